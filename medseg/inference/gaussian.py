"""Blended windows, for networks whose outputs depend on the whole window (instance norm, very wide context).

Overlapping windows are averaged with an importance that falls off from their centre, as in nnU-Net (Isensee et al.
2021, doi:10.1038/s41592-020-01008-z) and MONAI's SlidingWindowInferer. One row of windows is accumulated at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medseg.errors import UsageError
from medseg.inference.inferers import Block, TileInferer, passes_at_once
from medseg.inference.passes import is_out_of_memory, memory_error
from medseg.inference.tiling import spread
from medseg.inference.windows import constant_value, network_geometry, read_window

__all__ = ["GaussianTileInferer", "WindowPlan", "importance_1d", "plan_windows"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one size; `starts` holds, per axis, the first voxel of each window's *output* in the image."""

    image_size: tuple[int, ...]
    window: tuple[int, ...]
    output: tuple[int, ...]
    margin: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    axis: int
    batch: int

    @property
    def count(self) -> int:
        return math.prod(len(starts) for starts in self.starts)

    @property
    def redundancy(self) -> float:
        """Computed voxels / voxels of the image."""
        return self.count * math.prod(self.window) / math.prod(self.image_size)

    @property
    def slabs(self) -> tuple[tuple[int, int], ...]:
        """Ranges along the slab axis, each finished by one row of windows."""
        starts, length = self.starts[self.axis], self.image_size[self.axis]
        return tuple(itertools.pairwise((*starts, length)))


def plan_windows(image_size: Sequence[int], roi_size: Sequence[int], overlap: float | Sequence[float] = 0.5, *,
                 output: Sequence[int] | None = None, divisor: int | Sequence[int] = 1, batch: int = 1,
                 axis: int = -1) -> WindowPlan:
    """Windows evenly re-spaced: as few as the overlap allows, at equal distances, from edge to edge.

    Args:
        image_size: voxels along each axis.
        roi_size: size of the window; shortened (to a multiple of `divisor`) where the image is smaller.
        overlap: least share of a window that the next one covers, 0 <= overlap < 1.
        output: the network's output for a window of `roi_size`, when it is smaller.
        divisor, batch, axis: as in `plan_tiles`.

    >>> plan_windows((100,), (40,), 0.5).starts
    ((0, 20, 40, 60),)
    >>> plan_windows((90,), (40,), 0.5).starts  # not 0, 20, 40, 50
    ((0, 17, 33, 50),)
    """
    size = tuple(int(n) for n in image_size)
    dims = len(size)
    divisors = spread(divisor, dims, "divisor")
    shares = (float(overlap),) * dims if isinstance(overlap, int | float) else tuple(float(o) for o in overlap)
    if len(shares) != dims or any(not 0 <= share < 1 for share in shares):
        raise UsageError("overlap must be 0 <= overlap < 1", field="overlap", found=overlap)
    roi = spread(tuple(roi_size), dims, "roi_size")
    if any(n < 1 or n % d for n, d in zip(roi, divisors, strict=True)) and output is None:
        legal = tuple(max(1, -(-n // d)) * d for n, d in zip(roi, divisors, strict=True))
        raise UsageError("roi_size does not fit the strides of the network", field="roi_size",
                         expected=f"multiples of {divisors}, such as {legal}", found=roi)
    if output is None:
        window = tuple(min(r, -(-n // d) * d) for r, n, d in zip(roi, size, divisors, strict=True))
        kept, margin = window, (0,) * dims
    else:
        window, kept = roi, tuple(int(n) for n in output)
        margin = tuple((a - b) // 2 for a, b in zip(window, kept, strict=True))
    starts = []
    for n, extent, share in zip(size, kept, shares, strict=True):
        if extent >= n:
            starts.append((0,))
            continue
        count = math.ceil((n - extent) / max(1.0, extent * (1 - share))) + 1
        starts.append(tuple(round(i * (n - extent) / (count - 1)) for i in range(count)))
    return WindowPlan(size, window, kept, margin, tuple(starts), axis % dims, batch)


def importance_1d(size: int, sigma_share: float = 0.125) -> torch.Tensor:
    """exp(-(x - centre)^2 / (2 sigma^2)) along one axis, sigma = size * `sigma_share`, at least 1e-3.

    >>> importance_1d(4).tolist() == importance_1d(4).flip(0).tolist()
    True
    """
    position = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    sigma = size * sigma_share
    # the floor keeps a voxel that only a window's corner covers from being divided by nearly nothing
    return torch.exp(-(position**2) / (2 * sigma**2)).clamp_min_(1e-3)


class GaussianTileInferer(TileInferer):
    """Overlapping windows, averaged in logits with Gaussian importance; accumulators for one row of windows only.

    Args:
        roi_size: size of the window, one number or one per axis.
        overlap: least share of a window that its neighbour covers.
        batch: network passes at once; "auto": 1 on a CPU, 8 on a GPU.
        mirror, precision, max_ram, max_vram, device, progress: as in `OverlapTileInferer`.
        sigma: standard deviation of the importance, as a share of the window.
        accumulate: "float32", or "float16": half of the memory, logits rounded to 3 digits. "auto": float16 only where
            float32 would take more than half of `max_ram`.

    >>> image = torch.rand(1, 1, 40, 30)
    >>> result = GaussianTileInferer(16)(image, lambda window: window)
    >>> bool(torch.allclose(result, image, atol=1e-6))
    True
    """

    def __init__(self, roi_size: int | Sequence[int] = 96, overlap: float | Sequence[float] = 0.5,
                 batch: int | str = "auto", mirror: bool | Sequence[int] = False, *, sigma: float = 0.125,
                 accumulate: str = "auto", precision: str = "fp32", max_ram: int | str | None = None,
                 max_vram: int | str | None = None, device: torch.device | str | None = None,
                 progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__(batch=batch, mirror=mirror, precision=precision, max_ram=max_ram, max_vram=max_vram,
                         device=device, progress=progress)
        if not sigma > 0:
            raise UsageError("sigma must be positive", field="sigma", found=sigma)
        if accumulate != "auto" and accumulate not in _DTYPES:
            raise UsageError("unknown accumulator type", field="accumulate", expected="auto, float32 or float16",
                             found=accumulate)
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
        return plan_windows(image_size, roi, self.overlap, output=output, divisor=geometry.divisor, axis=axis,
                            batch=batch)

    def blocks(self, image: torch.Tensor, networks: Sequence[Any], *, axis: int = -1, mask: torch.Tensor | None = None,
               device: torch.device | str | None = None) -> Iterator[Block]:
        """See `TileInferer.blocks`; each block is a slab of the whole cross-section."""
        device = device or self.device or image.device
        size = tuple(image.shape[1:])
        passes = self.passes(networks, len(size), device)
        limit = passes_at_once(self.batch, passes)
        plan = self.plan(size, networks[0], axis=axis, batch=max(1, limit // len(passes.flips)))
        axis = plan.axis
        weight = _product([importance_1d(n, self.sigma) for n in plan.output])
        others = [starts for a, starts in enumerate(plan.starts) if a != axis]
        sums = norm = None
        held = 0  # first voxel of the accumulators along the slab axis
        done = 0
        constant: tuple[Any, torch.Tensor] | None = None
        for row, (begin, end) in enumerate(plan.slabs):
            first = plan.starts[axis][row]
            places = [(*rest[:axis], first, *rest[axis:]) for rest in itertools.product(*others)]
            norm = _shifted(norm, axis, begin - held, plan.output[axis], size, (), torch.float32)
            if sums is not None:
                sums = _shifted(sums, axis, begin - held, plan.output[axis], size, sums.shape[:1], sums.dtype)
            held = begin
            for group in (places[i:i + plan.batch] for i in range(0, len(places), plan.batch)):
                chosen = [p for p in group if mask is None or bool(mask[_box(p, plan, size)].any())]
                windows = [read_window(image, [a - m for a, m in zip(p, plan.margin, strict=True)], plan.window)
                           for p in chosen]
                keys = [constant_value(window) for window in windows]
                known = [constant is not None and key is not None and constant[0] == key for key in keys]
                fresh = [window for window, seen in zip(windows, known, strict=True) if not seen]
                logits = iter(self._logits(passes, fresh, limit, plan))
                for place, key, seen in zip(chosen, keys, known, strict=True):
                    values = constant[1] if seen and constant is not None else next(logits)
                    if key is not None and not seen:
                        constant = (key, values)
                    if sums is None:
                        dtype = self._dtype(values.shape[0], plan)
                        sums = _shifted(None, axis, 0, plan.output[axis], size, values.shape[:1], dtype)
                    _add(sums, norm, values, weight, place, plan, held)
                done += len(group)
                if self.progress is not None:
                    self.progress(done, plan.count)
            start, stop = list((0,) * len(size)), list(size)
            start[axis], stop[axis] = begin, end
            values = None
            if sums is not None:
                finished = sums.narrow(axis + 1, 0, end - begin).float()
                values = finished / norm.narrow(axis, 0, end - begin).clamp_min(1e-12)
            yield Block(tuple(start), tuple(stop), values, end)

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


def _product(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    weight = factors[0]
    for factor in factors[1:]:
        weight = weight[..., None] * factor
    return weight


def _box(place: Sequence[int], plan: WindowPlan, size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + e, n)) for a, e, n in zip(place, plan.output, size, strict=True))


def _shifted(buffer: torch.Tensor | None, axis: int, by: int, extent: int, size: Sequence[int],
             lead: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The accumulators for the next row: what is finished drops out, what is not moves to the front, the rest is 0."""
    at = axis + len(lead)
    if buffer is None:
        shape = [*lead, *size]
        shape[at] = min(extent, size[axis])
        return torch.zeros(shape, dtype=dtype)
    keep = max(0, buffer.shape[at] - by)
    if by:
        # plane by plane towards the front: source and target overlap, and a copy would double the memory
        for plane in range(keep):
            buffer.select(at, plane).copy_(buffer.select(at, plane + by))
        buffer.narrow(at, keep, buffer.shape[at] - keep).zero_()
    return buffer


def _add(sums: torch.Tensor, norm: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, place: Sequence[int],
         plan: WindowPlan, held: int) -> None:
    target, source = [], []
    for a, (first, extent, length) in enumerate(zip(place, plan.output, plan.image_size, strict=True)):
        begin = first - held if a == plan.axis else first
        count = min(extent, length - first)
        target.append(slice(begin, begin + count))
        source.append(slice(0, count))
    part = weight[tuple(source)]
    chosen = values[(slice(None), *source)]
    if sums.dtype == torch.float32:
        sums[(slice(None), *target)].addcmul_(chosen, part)
    else:
        for total, channel in zip(sums, chosen, strict=True):  # one channel at a time: no float32 copy of all classes
            total[tuple(target)] += (channel * part).to(sums.dtype)
    norm[tuple(target)].add_(part)
