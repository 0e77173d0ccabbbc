"""Overlap-tile inference: exact, and as cheap as the memory allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from medseg.errors import UsageError
from medseg.inference.keeping import kept_windows
from medseg.inference.large import LARGE
from medseg.inference.memory import bytes_per_voxel
from medseg.inference.passes import Passes, is_out_of_memory, memory_error
from medseg.inference.streams import Block, TileInferer
from medseg.inference.tiling import Border, Tile, TilePlan, plan_tiles
from medseg.inference.windows import constant_value, network_geometry, read_window

__all__ = ["OverlapTileInferer"]


class OverlapTileInferer(TileInferer):
    """Tiles whose outputs meet without blending: the result of one pass over the whole image, in bounded memory.

    For networks that state `context` and `divisor` and are exact under tiling (no instance norm). A network that states
    no context gets the whole image in one pass.

    Args:
        tile: size of the input window, context included; "auto": the plan with the least computation that fits.
        batch: network passes at once; "auto": 1 on a CPU, what fits up to 8 on a GPU.
        mirror: average over mirrored inputs, True or the spatial axes.
        border: what is beyond the image, see `plan_tiles`.
        context, divisor: for networks that do not state them.
        precision: "fp32", "bf16", "fp16" (autocast).
        max_ram, max_vram: bytes or "3GB" that the windows may take on a CPU / a GPU; None: half of what is free.
        device: where the network is; None: where the inputs are.
        progress: called with (tiles done, tiles).

    >>> image = torch.rand(1, 1, 40, 30)
    >>> inferer = OverlapTileInferer(tile=24, context=3, divisor=2)
    >>> bool(torch.equal(inferer(image, lambda window: window), image))
    True
    """

    def __init__(
        self,
        tile: int | Sequence[int] | str = "auto",
        batch: int | str = "auto",
        mirror: bool | Sequence[int] = False,
        *,
        border: Border = "auto",
        context: int | Sequence[int] | None = None,
        divisor: int | Sequence[int] | None = None,
        precision: str = "fp32",
        max_ram: int | str | None = None,
        max_vram: int | str | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            batch=batch,
            mirror=mirror,
            precision=precision,
            max_ram=max_ram,
            max_vram=max_vram,
            device=device,
            progress=progress,
        )
        self.tile, self.context, self.divisor = tile, context, divisor
        self.border: Border = border

    def plan(
        self,
        image_size: Sequence[int],
        network: Any,
        *,
        channels: int = 1,
        axis: int = -1,
        device: torch.device | str = "cpu",
        max_bytes: int | None = None,
    ) -> TilePlan:
        """The plan for an image of this size, without predicting."""
        geometry = network_geometry(network, len(image_size))
        context = self.context if self.context is not None else geometry.context
        tile: Any = self.tile
        if context is None:
            if tile != "auto":
                raise UsageError(
                    "the network does not state its context, so tiles cannot be exact",
                    field="context",
                    fix="give context= and divisor=, leave out tile=, or use GaussianTileInferer",
                )
            tile, context = tuple(image_size), 0
        plan = partial(
            plan_tiles,
            image_size,
            context=context,
            divisor=self.divisor if self.divisor is not None else geometry.divisor,
            output_size=geometry.output_size,
            legal_size=geometry.legal_size,
            border=self.border,
            axis=axis,
        )
        batch = self.batch if isinstance(self.batch, int) else 1
        if tile != "auto":
            return plan(tile=tile, batch=batch)
        budget = max_bytes or self.budget(device)
        whole = plan(batch=batch)
        probe = _probe_size(whole)
        per_voxel = bytes_per_voxel(network, channels, probe, half=self.precision != "fp32")
        if len(image_size) == 2 and math.prod(image_size) > LARGE:
            # a slide, mostly empty: windows of one value cost nothing, so small ones are good
            return plan(max_bytes=budget, bytes_per_voxel=per_voxel, batch=batch, slack=1.05)
        if math.prod(whole.window) * per_voxel * batch <= budget:
            return whole
        return plan(max_bytes=budget, bytes_per_voxel=per_voxel, batch=batch)

    def blocks(
        self,
        image: torch.Tensor,
        networks: Sequence[Any],
        *,
        axis: int = -1,
        mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Block]:
        """See `TileInferer.blocks`. After running out of memory the rest is planned with half of the window."""
        device = device or self.device or image.device
        size = tuple(image.shape[1:])
        passes = self.passes(networks, len(size), device)
        plan = self.plan(size, networks[0], channels=image.shape[0], axis=axis, device=device)
        done = 0  # finished along the slab axis
        limit = None
        while done < size[plan.axis]:
            try:
                with kept_windows(self, plan, networks, image.shape[0], device=device):
                    limit = limit or self.at_once(passes, networks[0], image.shape[0], plan.window)
                    for block in self._row_blocks(image, passes, plan, mask, done, limit):
                        yield block
                        done = max(done, block.complete)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.tile != "auto" and self.batch != "auto":
                    raise memory_error(error, plan.window, "give a smaller tile, or tile: auto") from error
                failed = error.with_traceback(None)  # the traceback holds the tensors
            smaller = self._smaller(plan, networks[0], image.shape[0], device)
            if smaller is None:
                raise memory_error(failed, plan.window, "use GaussianTileInferer, or a network with less context")
            plan, limit = smaller, None if isinstance(self.batch, int) else 1

    def _smaller(self, plan: TilePlan, network: Any, channels: int, device: torch.device | str) -> TilePlan | None:
        from medseg.errors import ResourceError

        per_voxel = bytes_per_voxel(network, channels, _probe_size(plan), half=self.precision != "fp32")
        try:
            chosen = self.plan(
                plan.image_size,
                network,
                channels=channels,
                axis=plan.axis,
                device=device,
                max_bytes=int(math.prod(plan.window) * per_voxel / 2),
            )
        except ResourceError:
            return None
        return chosen if math.prod(chosen.window) < math.prod(plan.window) else None

    def _row_blocks(
        self, image: torch.Tensor, passes: Passes, plan: TilePlan, mask: torch.Tensor | None, done: int, limit: int
    ) -> Iterator[Block]:
        # windows of one constant value (air, padding) give the same output wherever they are: computed once
        known: tuple[Any, torch.Tensor] | None = None
        finished = done
        rows = [(slab, tiles) for slab, tiles in plan.rows() if slab[1] > done]
        total, count = sum(len(tiles) for _, tiles in rows), 0
        for slab, tiles in rows:
            for group in _groups(tiles, max(1, limit // len(passes.flips))):
                inside = [t for t in group if mask is None or bool(mask[_box(t)].any())]
                windows = [read_window(image, t.window, t.size) for t in inside]
                keys = [constant_value(window) for window in windows]
                fresh = [i for i, key in enumerate(keys) if key is None or known is None or known[0] != key]
                outputs = [None if i in fresh or known is None else known[1] for i in range(len(inside))]
                if fresh:
                    logits = passes(torch.stack([windows[i] for i in fresh]), limit)
                    for number, i in enumerate(fresh):
                        outputs[i] = logits[number]
                        if keys[i] is not None:
                            known = (keys[i], logits[number])
                    del logits
                del windows
                place = {id(tile): i for i, tile in enumerate(inside)}
                for tile in group:
                    count += 1
                    last = tile is tiles[-1]
                    block = _block(
                        tile, outputs[place[id(tile)]] if id(tile) in place else None, slab[1] if last else done
                    )
                    yield _cut(block, plan.axis, finished)
                    del block
                del outputs  # not held while the next tile is computed
                done = slab[1] if group[-1] is tiles[-1] else done
                if self.progress is not None:
                    self.progress(count, total)


def _probe_size(plan: TilePlan) -> tuple[int, ...]:
    """A legal window of moderate size to measure memory with; the plan's own, as nothing is computed."""
    return plan.window


def _block(tile: Tile, output: torch.Tensor | None, complete: int) -> Block:
    return Block(tile.start, tile.stop, None if output is None else output[(slice(None), *tile.crop)], complete)


def _cut(block: Block, axis: int, low: int) -> Block:
    """The part of a block from `low` on: after a new plan its first row may begin in what was finished before."""
    if block.start[axis] >= low:
        return block
    values = block.values
    if values is not None:
        values = values.narrow(axis + 1, low - block.start[axis], block.stop[axis] - low)
    start = (*block.start[:axis], low, *block.start[axis + 1 :])
    return Block(start, block.stop, values, block.complete)


def _box(tile: Tile) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(tile.start, tile.stop, strict=True))


def _groups(tiles: Sequence[Tile], size: int) -> Iterator[Sequence[Tile]]:
    for first in range(0, len(tiles), size):
        yield tiles[first : first + size]
