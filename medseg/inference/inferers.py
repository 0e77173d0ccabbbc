"""Overlap-tile and Gaussian inference, as MONAI inferers and as streams of finished blocks.

`inferer(inputs, network)` gives logits of the whole image. `inferer.blocks(image, networks)` gives them piece by piece,
so that a volume never needs memory for classes times voxels: `medseg.inference.predict_case` reduces each piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.inferers.inferer import Inferer

from medseg.errors import UsageError
from medseg.inference.memory import available_memory, bytes_per_voxel, parse_bytes
from medseg.inference.passes import Passes, is_out_of_memory, memory_error
from medseg.inference.tiling import Border, Tile, TilePlan, plan_tiles
from medseg.inference.windows import constant_value, network_geometry, read_window

__all__ = ["Block", "OverlapTileInferer", "TileInferer"]

SHARE = 0.5  # of the free memory, when no limit is given


@dataclass(frozen=True)
class Block:
    """Finished logits (K, *box) of the box start..stop; all of the image below `complete` on the slab axis is done."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    values: torch.Tensor | None  # None: nothing to predict here (outside the mask)
    complete: int


class TileInferer(Inferer):
    """What both inferers share: options, batches of images, memory. Not used by itself."""

    def __init__(self, *, batch: int | str = "auto", mirror: bool | Sequence[int] = False, precision: str = "fp32",
                 max_ram: int | str | None = None, max_vram: int | str | None = None,
                 device: torch.device | str | None = None,
                 progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__()
        if batch != "auto" and (not isinstance(batch, int) or batch < 1):
            raise UsageError("batch must be a number or auto", field="batch", found=batch)
        self.batch, self.mirror, self.precision = batch, mirror, precision
        self.max_ram, self.max_vram = parse_bytes(max_ram), parse_bytes(max_vram)
        self.device = device
        self.progress = progress

    def blocks(self, image: torch.Tensor, networks: Sequence[Any], *, axis: int = -1, mask: torch.Tensor | None = None,
               device: torch.device | str | None = None) -> Iterator[Block]:
        """Logits of `image` (C, *spatial) as finished blocks, ordered along the slab axis.

        `mask` (*spatial): tiles without a voxel in it are skipped. The mean over `networks` is taken per tile.
        """
        raise NotImplementedError

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (B, K, *spatial), float32, of `inputs` (B, C, *spatial), on the inputs' device.

        With mirroring, the logarithm of the mean probability. Further arguments go to the network.
        """
        if inputs.ndim < 3:
            raise UsageError("inputs need the axes (B, C, *spatial)", field="inputs", found=tuple(inputs.shape))
        networks = [_Bound(network, args, kwargs) if args or kwargs else network]
        result: torch.Tensor | None = None
        for number, image in enumerate(_plain(inputs)):
            for block in self.blocks(image, networks, device=self.device or inputs.device):
                assert block.values is not None
                if result is None:
                    shape = (len(inputs), block.values.shape[0], *inputs.shape[2:])
                    if block.values.shape[1:] == inputs.shape[2:] and len(inputs) == 1:
                        return block.values[None].to(inputs.device)
                    result = torch.empty(shape, dtype=torch.float32, device=inputs.device)
                box = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
                result[number, :, *box] = block.values.to(inputs.device)
        assert result is not None
        return result

    def passes(self, networks: Sequence[Any], dims: int, device: torch.device | str) -> Passes:
        return Passes(networks, dims, mirror=self.mirror, precision=self.precision, device=device)

    def budget(self, device: torch.device | str, held: int = 0) -> int:
        """Bytes that one batch of windows may take: the limit, or half of what is free now, less what is `held`."""
        on_host = torch.device(device).type == "cpu"
        limit = self.max_ram if on_host else self.max_vram
        free = available_memory(device)
        return max(1, min(limit - held, free) if limit is not None else int(free * SHARE))


class OverlapTileInferer(TileInferer):
    """Tiles whose outputs meet without blending: the result of one pass over the whole image, in bounded memory.

    For networks that state `context` and `divisor` and are exact under tiling (no instance norm). A network that states
    no context gets the whole image in one pass.

    Args:
        tile: size of the input window, context included; "auto": the plan with the least computation that fits.
        batch: network passes at once; "auto": 1 on a CPU, what fits up to 16 on a GPU.
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

    def __init__(self, tile: int | Sequence[int] | str = "auto", batch: int | str = "auto",
                 mirror: bool | Sequence[int] = False, *, border: Border = "auto",
                 context: int | Sequence[int] | None = None, divisor: int | Sequence[int] | None = None,
                 precision: str = "fp32", max_ram: int | str | None = None, max_vram: int | str | None = None,
                 device: torch.device | str | None = None,
                 progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__(batch=batch, mirror=mirror, precision=precision, max_ram=max_ram, max_vram=max_vram,
                         device=device, progress=progress)
        self.tile, self.border, self.context, self.divisor = tile, border, context, divisor

    def plan(self, image_size: Sequence[int], network: Any, *, channels: int = 1, axis: int = -1,
             device: torch.device | str = "cpu", max_bytes: int | None = None) -> TilePlan:
        """The plan for an image of this size, without predicting."""
        geometry = network_geometry(network, len(image_size))
        context = self.context if self.context is not None else geometry.context
        tile: Any = self.tile
        if context is None:
            if tile != "auto":
                raise UsageError("the network does not state its context, so tiles cannot be exact", field="context",
                                 fix="give context= and divisor=, leave out tile=, or use GaussianTileInferer")
            tile, context = tuple(image_size), 0
        plan = lambda **bound: plan_tiles(  # noqa: E731
            image_size, context=context, divisor=self.divisor if self.divisor is not None else geometry.divisor,
            output_size=geometry.output_size, legal_size=geometry.legal_size, border=self.border, axis=axis, **bound)
        batch = self.batch if isinstance(self.batch, int) else 1
        if tile != "auto":
            return plan(tile=tile, batch=batch)
        budget = max_bytes or self.budget(device)
        whole = plan(batch=batch)
        probe = _probe_size(whole)
        per_voxel = bytes_per_voxel(network, channels, probe, half=self.precision != "fp32")
        if math.prod(whole.window) * per_voxel * batch <= budget:
            return whole
        return plan(max_bytes=budget, bytes_per_voxel=per_voxel, batch=batch)

    def blocks(self, image: torch.Tensor, networks: Sequence[Any], *, axis: int = -1, mask: torch.Tensor | None = None,
               device: torch.device | str | None = None) -> Iterator[Block]:
        """See `TileInferer.blocks`. After running out of memory the rest is planned with half of the window."""
        device = device or self.device or image.device
        size = tuple(image.shape[1:])
        passes = self.passes(networks, len(size), device)
        plan = self.plan(size, networks[0], channels=image.shape[0], axis=axis, device=device)
        done = 0  # finished along the slab axis
        while done < size[plan.axis]:
            try:
                for block in self._row_blocks(image, passes, plan, mask, done):
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
            plan = smaller

    def _smaller(self, plan: TilePlan, network: Any, channels: int, device: torch.device | str) -> TilePlan | None:
        from medseg.errors import ResourceError

        per_voxel = bytes_per_voxel(network, channels, _probe_size(plan), half=self.precision != "fp32")
        try:
            chosen = self.plan(plan.image_size, network, channels=channels, axis=plan.axis, device=device,
                               max_bytes=int(math.prod(plan.window) * per_voxel / 2))
        except ResourceError:
            return None
        return chosen if math.prod(chosen.window) < math.prod(plan.window) else None

    def _row_blocks(self, image: torch.Tensor, passes: Passes, plan: TilePlan, mask: torch.Tensor | None,
                    done: int) -> Iterator[Block]:
        # windows of one constant value (air, padding) give the same output wherever they are: computed once
        known: tuple[Any, torch.Tensor] | None = None
        rows = [(slab, tiles) for slab, tiles in plan.rows() if slab[1] > done]
        total, count = sum(len(tiles) for _, tiles in rows), 0
        limit = passes_at_once(self.batch, passes)
        for slab, tiles in rows:
            for group in _groups(tiles, max(1, limit // len(passes.flips))):
                inside = [t for t in group if mask is None or bool(mask[_box(t)].any())]
                windows = [read_window(image, t.window, t.size) for t in inside]
                keys = [constant_value(window) for window in windows]
                fresh = [i for i, key in enumerate(keys) if key is None or known is None or known[0] != key]
                outputs: list[torch.Tensor | None] = [None] * len(inside)
                if fresh:
                    logits = passes(torch.stack([windows[i] for i in fresh]), limit)
                    for i, values in zip(fresh, logits, strict=True):
                        outputs[i] = values
                        if keys[i] is not None:
                            known = (keys[i], values)
                del windows
                place = {id(tile): i for i, tile in enumerate(inside)}
                for tile in group:
                    count += 1
                    last = tile is tiles[-1]
                    values = None
                    if id(tile) in place:
                        output = outputs[place[id(tile)]]
                        values = output if output is not None else known[1]  # type: ignore[index]
                        values = values[(slice(None), *tile.crop)]
                    yield Block(tile.start, tile.stop, values, slab[1] if last else done)
                done = slab[1] if group[-1] is tiles[-1] else done
                if self.progress is not None:
                    self.progress(count, total)


class _Bound:
    """A network with further arguments; keeps the network's own attributes visible."""

    def __init__(self, network: Any, args: tuple, kwargs: dict) -> None:
        self._network, self._args, self._kwargs = network, args, kwargs

    def __call__(self, windows: torch.Tensor) -> Any:
        return self._network(windows, *self._args, **self._kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def passes_at_once(batch: int | str, passes: Passes) -> int:
    """Windows times mirrors in one call of a network: on a CPU more than one gains nothing and costs memory."""
    if isinstance(batch, int):
        return batch
    return 1 if passes.device.type == "cpu" else max(len(passes.flips), 8)


def _probe_size(plan: TilePlan) -> tuple[int, ...]:
    """A legal window of moderate size to measure memory with; the plan's own, as nothing is computed."""
    return plan.window


def _plain(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs  # MetaTensor costs time in every operation


def _box(tile: Tile) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(tile.start, tile.stop, strict=True))


def _groups(tiles: Sequence[Tile], size: int) -> Iterator[Sequence[Tile]]:
    for first in range(0, len(tiles), size):
        yield tiles[first:first + size]


