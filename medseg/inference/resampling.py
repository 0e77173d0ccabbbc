"""Linear interpolation of probabilities from a moving slab, without a copy per class on the native grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from medseg.inference.grid_map import GridMap

__all__ = ["SlabBuffer", "resample_planes"]


class SlabBuffer:
    """Probabilities (K, *slab) of a moving range low..high of the slab axis; what no block filled is background."""

    def __init__(self, shape: Sequence[int], axis: int) -> None:
        self.shape, self.axis = tuple(shape), axis
        self.low = 0
        self.values: torch.Tensor | None = None

    @property
    def classes(self) -> int:
        return 0 if self.values is None else self.values.shape[0]

    def put(self, start: Sequence[int], stop: Sequence[int], values: torch.Tensor) -> None:
        """Take probabilities (K, *box) of the box start..stop."""
        self.extend(stop[self.axis], values.shape[0])
        assert self.values is not None
        box = [slice(a, b) for a, b in zip(start, stop, strict=True)]
        box[self.axis] = slice(start[self.axis] - self.low, stop[self.axis] - self.low)
        self.values[(slice(None), *box)] = values

    def extend(self, stop: int, classes: int) -> None:
        """Hold everything up to `stop` on the slab axis, background where nothing was put (tiles outside a mask)."""
        at = self.axis + 1
        missing = stop - self.low - (0 if self.values is None else self.values.shape[at])
        if missing > 0:
            shape = [classes, *self.shape]
            shape[at] = missing
            fresh = torch.zeros(shape)
            if classes > 1:
                fresh[0] = 1.0
            self.values = fresh if self.values is None else torch.cat([self.values, fresh], at)

    def drop_below(self, low: int) -> None:
        """Forget everything below `low` on the slab axis."""
        if low <= self.low:
            return
        if self.values is not None:
            at = self.axis + 1
            gone = min(low - self.low, self.values.shape[at])
            self.values = self.values.narrow(at, gone, self.values.shape[at] - gone).clone()
        self.low = low


def resample_planes(
    buffer: SlabBuffer, grid: GridMap, first: int, last: int, all_classes: bool
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Interpolate native planes first..last (of the last axis).

    Yields one (native slices, values): probabilities (K, *box) when `all_classes`, else labels (*box) from a running
    maximum over the classes, so that only two values per voxel are held. Voxels whose centre lies more than half a
    voxel outside the preprocessed image are background.
    """
    assert buffer.values is not None
    box = (*(slice(0, n) for n in grid.shape[:-1]), slice(first, last))
    shape = tuple(s.stop - s.start for s in box)
    sample = _Separable(buffer, grid, box) if grid.separable else _General(buffer, grid, box)
    outside = sample.outside.expand(shape)
    if all_classes:
        values = torch.stack([sample(channel) for channel in buffer.values])
        values.masked_fill_(outside, 0.0)
        if len(values) > 1:
            values[0].masked_fill_(outside, 1.0)
        yield box, values
        return
    best = sample(buffer.values[0])
    labels = torch.zeros(shape, dtype=torch.uint8 if buffer.classes <= 256 else torch.int16)
    for number in range(1, buffer.classes):
        value = sample(buffer.values[number])
        higher = value > best
        best = torch.where(higher, value, best)
        labels.masked_fill_(higher, number)
    yield box, labels.masked_fill_(outside, 0)


class _Separable:
    """Interpolation axis by axis, for maps without rotation."""

    def __init__(self, buffer: SlabBuffer, grid: GridMap, box: tuple[slice, ...]) -> None:
        self.steps = []
        dims = len(box)
        self.permute = tuple(int(np.argmax(np.abs(grid.matrix[:, b]))) for b in range(dims))
        outside = torch.zeros((1,) * dims, dtype=torch.bool)
        for b, a in enumerate(self.permute):
            position = grid.offset[a] + grid.matrix[a, b] * torch.arange(box[b].start, box[b].stop, dtype=torch.float64)
            length = grid.shape_pre[a]
            beyond = (position < -0.5 - 1e-6) | (position > length - 0.5 + 1e-6)
            view = [1] * dims
            view[b] = -1
            outside = outside | beyond.view(view)
            position = position.clamp(0, length - 1) - (buffer.low if a == buffer.axis else 0)
            low = position.floor().long()
            assert buffer.values is not None
            high = (low + 1).clamp_max(buffer.values.shape[a + 1] - 1)
            self.steps.append((a, low, high, (position - low).float()))
        # the axis that shrinks most goes first
        self.steps.sort(key=lambda step: len(step[1]) / grid.shape_pre[step[0]])
        self.outside = outside

    def __call__(self, channel: torch.Tensor) -> torch.Tensor:
        for axis, low, high, weight in self.steps:
            view = [1] * channel.ndim
            view[axis] = -1
            below, above = channel.index_select(axis, low), channel.index_select(axis, high)
            channel = torch.lerp(below, above, weight.view(view))
        return channel.permute(self.permute)


class _General:
    """Interpolation at arbitrary positions, for rotated grids."""

    def __init__(self, buffer: SlabBuffer, grid: GridMap, box: tuple[slice, ...]) -> None:
        dims = len(box)
        assert buffer.values is not None
        ranges = [torch.arange(s.start, s.stop, dtype=torch.float64) for s in box]
        outside = torch.zeros((1,) * dims, dtype=torch.bool)
        columns = []
        for a in range(dims):
            position = torch.full((1,) * dims, float(grid.offset[a]), dtype=torch.float64)
            for b, values in enumerate(ranges):
                view = [1] * dims
                view[b] = -1
                position = position + float(grid.matrix[a, b]) * values.view(view)
            length = grid.shape_pre[a]
            outside = outside | (position < -0.5 - 1e-6) | (position > length - 0.5 + 1e-6)
            position = position.clamp(0, length - 1) - (buffer.low if a == buffer.axis else 0)
            extent = buffer.values.shape[a + 1]
            columns.append((position * (2.0 / max(extent - 1, 1)) - 1.0).float())
        shape = tuple(len(values) for values in ranges)
        # grid_sample wants the last axis first
        self.grid = torch.stack([column.expand(shape) for column in reversed(columns)], -1)[None]
        self.outside = outside

    def __call__(self, channel: torch.Tensor) -> torch.Tensor:
        sampled = torch.nn.functional.grid_sample(
            channel[None, None], self.grid, mode="bilinear", padding_mode="border", align_corners=True
        )
        return sampled[0, 0]
