"""Blended windows, for networks whose outputs depend on the whole window (instance norm, very wide context).

Overlapping windows are averaged with an importance that falls off from their centre, as in nnU-Net (Isensee et al.
2021, doi:10.1038/s41592-020-01008-z) and MONAI's SlidingWindowInferer. One row of windows is accumulated at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from medseg.errors import UsageError
from medseg.inference.blending import WindowPlan, plan_windows, shares
from medseg.inference.keeping import kept_windows
from medseg.inference.passes import is_out_of_memory, memory_error
from medseg.inference.streams import Block, TileInferer
from medseg.inference.tiling import spread
from medseg.inference.windows import constant_value, network_geometry, read_window

__all__ = ["GaussianTileInferer"]

_AT_ONCE = 2**25  # values of a finished piece (128 MiB)
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class GaussianTileInferer(TileInferer):
    """Overlapping windows, averaged in logits with Gaussian importance; accumulators for one row of windows only.

    Args:
        roi_size: size of the window, one number or one per axis.
        overlap: least share of a window that its neighbour covers.
        batch: network passes at once; "auto": 1 on a CPU, what fits up to 8 on a GPU.
        mirror, precision, max_ram, max_vram, device, progress: as in `OverlapTileInferer`.
        sigma: standard deviation of the importance, as a share of the window.
        accumulate: "float32", or "float16": half of the memory, logits rounded to 3 digits. "auto": float16 only where
            float32 would take more than half of `max_ram`.

    >>> image = torch.rand(1, 1, 40, 30)
    >>> result = GaussianTileInferer(16)(image, lambda window: window)
    >>> bool(torch.allclose(result, image, atol=1e-6))
    True
    """

    def __init__(
        self,
        roi_size: int | Sequence[int] = 96,
        overlap: float | Sequence[float] = 0.5,
        batch: int | str = "auto",
        mirror: bool | Sequence[int] = False,
        *,
        sigma: float = 0.125,
        accumulate: str = "auto",
        precision: str = "fp32",
        max_ram: int | str | None = None,
        max_vram: int | str | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            batch=batch, mirror=mirror, precision=precision, max_ram=max_ram, max_vram=max_vram, device=device,
            progress=progress,
        )  # fmt: skip
        if not sigma > 0:
            raise UsageError("sigma must be positive", field="sigma", found=sigma)
        if accumulate != "auto" and accumulate not in _DTYPES:
            raise UsageError(
                "unknown accumulator type", field="accumulate", expected="auto, float32 or float16", found=accumulate
            )
        self.roi_size, self.overlap, self.sigma, self.accumulate = roi_size, overlap, sigma, accumulate

    def plan(self, image_size: Sequence[int], network: Any, *, axis: int = -1, batch: int = 1) -> WindowPlan:
        """The windows of an image of this size, without predicting."""
        dims = len(image_size)
        geometry = network_geometry(network, dims)
        roi = spread(self.roi_size, dims, "roi_size")
        output = None
        if geometry.legal_size is not None:
            legal = tuple(int(n) for n in geometry.legal_size(roi))
            output = geometry.output(legal)
            roi, output = (legal, output) if output != legal else (roi, None)
        return plan_windows(
            image_size, roi, self.overlap, output=output, divisor=geometry.divisor, axis=axis, batch=batch
        )

    def blocks(
        self,
        image: torch.Tensor,
        networks: Sequence[Any],
        *,
        axis: int = -1,
        mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Block]:
        """See `TileInferer.blocks`; each block is a slab of the whole cross-section."""
        yield from self._kept(image, networks, axis, mask, device, slabs=True)

    def _whole(self, image: torch.Tensor, networks: Sequence[Any], device: torch.device | str) -> Iterator[Block]:
        # the caller wants all logits in one tensor: they are accumulated there, and nothing is moved
        yield from self._kept(image, networks, 0, None, device, slabs=False)

    def _kept(
        self, image: torch.Tensor, networks: Sequence[Any], axis: int, *others: Any, slabs: bool
    ) -> Iterator[Block]:
        plan, device = self.plan(image.shape[1:], networks[0], axis=axis), others[-1] or self.device or image.device
        with kept_windows(self, plan, networks, image.shape[0], device=device):
            yield from self._run(image, networks, axis, *others, slabs=slabs)

    def _run(
        self,
        image: torch.Tensor,
        networks: Sequence[Any],
        axis: int,
        mask: torch.Tensor | None,
        device: torch.device | str | None,
        *,
        slabs: bool,
    ) -> Iterator[Block]:
        device = device or self.device or image.device
        size = tuple(image.shape[1:])
        passes = self.passes(networks, len(size), device)
        plan = self.plan(size, networks[0], axis=axis)
        limit = self.at_once(passes, networks[0], image.shape[0], plan.window)
        plan = replace(plan, batch=max(1, limit // len(passes.flips)))
        axis = plan.axis
        weights = [
            dict(zip(starts, shares(starts, extent, length, self.sigma), strict=True))
            for starts, extent, length in zip(plan.starts, plan.output, size, strict=True)
        ]
        others = [starts for a, starts in enumerate(plan.starts) if a != axis]
        sums = norm = None  # norm: shares that were added, needed only where masked windows leave some out
        held = 0  # first voxel of the accumulators along the slab axis
        deep = plan.output[axis] if slabs else size[axis]
        done = 0
        constant: tuple[Any, torch.Tensor] | None = None
        for row, (begin, end) in enumerate(plan.slabs):
            first = plan.starts[axis][row]
            places = [(*rest[:axis], first, *rest[axis:]) for rest in itertools.product(*others)]
            if mask is not None:
                norm = _shifted(norm, axis, begin - held, deep, size, (), torch.float32)
            if sums is not None and slabs:
                sums = _shifted(sums, axis, begin - held, deep, size, sums.shape[:1], sums.dtype)
            held = begin if slabs else 0
            for group in (places[i : i + plan.batch] for i in range(0, len(places), plan.batch)):
                chosen = [p for p in group if mask is None or bool(mask[_box(p, plan, size)].any())]
                windows = [
                    read_window(image, [a - m for a, m in zip(p, plan.margin, strict=True)], plan.window)
                    for p in chosen
                ]
                keys = [constant_value(window) for window in windows]
                known = [constant[1] if constant is not None and constant[0] == key else None for key in keys]
                fresh = [window for window, seen in zip(windows, known, strict=True) if seen is None]
                logits = iter(self._logits(passes, fresh, limit, plan))
                for place, key, seen in zip(chosen, keys, known, strict=True):
                    values = next(logits) if seen is None else seen
                    if key is not None:
                        constant = (key, values)
                    if sums is None:
                        sums = _accumulators(values, axis, deep, size, self._dtype(values.shape[0], plan))
                    _add(sums, norm, values, weights, place, plan, held)
                    del values, seen
                del windows, fresh, logits, known  # not held while the next windows are computed
                done += len(group)
                if self.progress is not None:
                    self.progress(done, plan.count)
            if slabs:
                yield from _finished(sums, norm, axis, begin, end, size)
        if not slabs:
            yield from _finished(sums, norm, axis, 0, size[axis], size, pieces=False)

    def _dtype(self, classes: int, plan: WindowPlan) -> torch.dtype:
        if self.accumulate != "auto":
            return _DTYPES[self.accumulate]
        extent = [*plan.image_size]
        extent[plan.axis] = plan.output[plan.axis]
        tight = self.max_ram is not None and classes * math.prod(extent) * 4 > self.max_ram / 2
        return torch.float16 if tight else torch.float32

    def _logits(self, passes: Any, windows: list[torch.Tensor], limit: int, plan: WindowPlan) -> torch.Tensor | tuple:
        if not windows:
            return ()
        try:
            return passes(torch.stack(windows), limit).cpu()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise memory_error(error, plan.window, "give a smaller roi_size or fewer mirrors") from error
            raise


def _finished(
    sums: torch.Tensor | None,
    norm: torch.Tensor | None,
    axis: int,
    begin: int,
    end: int,
    size: Sequence[int],
    *,
    pieces: bool = True,
) -> Iterator[Block]:
    """What a row of windows has finished, a few planes at a time: what is made of them stays small."""
    start, stop = [0 for _ in size], list(size)
    if sums is None:
        start[axis], stop[axis] = begin, end
        yield Block(tuple(start), tuple(stop), None, end)
        return
    step = max(1, _AT_ONCE // (sums.numel() // sums.shape[axis + 1])) if pieces else end - begin
    for first in range(begin, end, step):
        last = min(first + step, end)
        values = sums.narrow(axis + 1, first - begin, last - first).to(torch.float32)  # a view of float32
        if norm is not None:
            values = values / norm.narrow(axis, first - begin, last - first).clamp_min(1e-6)
        start[axis], stop[axis] = first, last
        yield Block(tuple(start), tuple(stop), values, last)


def _box(place: Sequence[int], plan: WindowPlan, size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + e, n)) for a, e, n in zip(place, plan.output, size, strict=True))


def _shifted(
    buffer: torch.Tensor | None,
    axis: int,
    by: int,
    extent: int,
    size: Sequence[int],
    lead: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The accumulators for the next row: what is finished drops out, what is not moves to the front, the rest is 0."""
    at = axis + len(lead)
    if buffer is None:
        shape = [*lead, *size]
        shape[at] = min(extent, size[axis])
        return torch.zeros(shape, dtype=dtype)
    keep = max(0, buffer.shape[at] - by)
    if by:
        # pieces of `by` planes towards the front: source and target do not overlap, and nothing is copied twice
        for first in range(0, keep, by):
            count = min(by, keep - first)
            buffer.narrow(at, first, count).copy_(buffer.narrow(at, first + by, count))
        buffer.narrow(at, keep, buffer.shape[at] - keep).zero_()
    return buffer


def _accumulators(
    values: torch.Tensor, axis: int, extent: int, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Zeros (K, *slab), laid out as the network's outputs are: adding across layouts is several times slower."""
    shape = [*size]
    shape[axis] = min(extent, size[axis])
    if _classes_last(values) and dtype == torch.float32:
        return torch.zeros((*shape, len(values)), dtype=dtype).movedim(-1, 0)
    return torch.zeros((len(values), *shape), dtype=dtype)


def _classes_last(values: torch.Tensor) -> bool:
    return len(values) > 1 and values.stride(0) == 1


def _add(
    sums: torch.Tensor,
    norm: torch.Tensor | None,
    values: torch.Tensor,
    weights: Sequence[dict[int, torch.Tensor]],
    place: Sequence[int],
    plan: WindowPlan,
    held: int,
) -> None:
    target, source, factors = [], [], []
    for a, first in enumerate(place):
        factor = weights[a][first]
        begin = first - held if a == plan.axis else first
        target.append(slice(begin, begin + len(factor)))
        source.append(slice(0, len(factor)))
        factors.append(factor)
    chosen = values[(slice(None), *source)]
    if sums.dtype != torch.float32:
        weight = _outer(factors)
        for total, channel in zip(sums, chosen, strict=True):  # one channel at a time: no float32 copy of all classes
            total[tuple(target)] += (channel * weight).to(sums.dtype)
    elif _classes_last(sums) and _classes_last(chosen):
        # the weight of one plane is repeated for the classes, so that the inner loop runs over memory in order
        plane = _outer(factors[1:])[..., None].expand(*(len(f) for f in factors[1:]), len(sums)).contiguous()
        totals, parts = sums.movedim(0, -1)[tuple(target)], chosen.movedim(0, -1)
        for total, part, factor in zip(totals, parts, factors[0].tolist(), strict=True):
            total.addcmul_(part, plane, value=factor)
    else:
        sums[(slice(None), *target)].addcmul_(chosen, _outer(factors))
    if norm is not None:
        norm[tuple(target)].add_(_outer(factors))


def _outer(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(lambda product, factor: product[..., None] * factor, factors, torch.ones(()))
