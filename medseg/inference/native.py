"""From blocks of logits on the preprocessed grid to labels on the image's own grid, piece by piece.

The way back comes from the two affines alone: native voxel -> inv(A_pre) @ A_native -> preprocessed voxel. Where that
is a permutation, flips and whole-voxel shifts (reorientation, cropping, padding) every block is reduced to labels at
once and put in place: exact, and no probabilities are kept. Otherwise probabilities are interpolated linearly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from medseg.files import put_aside
from medseg.inference.grid_map import GridMap
from medseg.inference.passes import to_probabilities
from medseg.inference.resampling import SlabBuffer, resample_planes
from medseg.inference.streams import Block

__all__ = ["NativeLabels", "Sink"]

_AT_ONCE = 2**25  # interpolated values at once (128 MiB)

Sink = Callable[[int, np.ndarray], None]


class NativeLabels:
    """Takes blocks in order and builds the label image on the native grid.

    Args:
        grid: the map between the grids.
        threshold: for one class, and for two: foreground where its probability is at least this; None: 0.5 / argmax.
        sink: called with (first plane, planes (..., n)) of the last native axis, in order, as they are finished.
        probabilities: called with (native slices, probabilities (K, *box)) for each finished piece.
        out: uint8 zeros to put the labels in; of a mapped file, only what is worked on stays in memory.

    `.labels` (*shape), uint8 (int16 for more than 256 classes), is complete after `finish()`. Native voxels outside the
    preprocessed image are background.
    """

    def __init__(
        self,
        grid: GridMap,
        *,
        threshold: float | None = None,
        sink: Sink | None = None,
        probabilities: Callable[[tuple[slice, ...], np.ndarray], None] | None = None,
        out: np.ndarray | None = None,
    ) -> None:
        self.grid, self.threshold, self.sink, self.probabilities = grid, threshold, sink, probabilities
        self.labels = np.zeros(grid.shape, dtype=np.uint8) if out is None else out
        self._told = 0  # planes given to the sink
        self._buffer = None if grid.exact else SlabBuffer(grid.shape_pre, grid.axis)
        self._next = 0  # next native plane to interpolate, counted in the slabs' direction

    def add(self, block: Block) -> None:
        """Take one block of logits (K, *box)."""
        if block.values is not None and block.values.shape[0] > 256 and self.labels.dtype == np.uint8:
            self.labels = self.labels.astype(np.int16)
        if self._buffer is None:
            if block.values is not None:
                self._put(block)
            if self.grid.forward:
                self._tell(self._native_end(block.complete))
            return
        if block.values is not None:
            self._buffer.put(block.start, block.stop, to_probabilities(block.values, 0).cpu())
        self._interpolate(block.complete)

    def finish(self) -> np.ndarray:
        """The labels, all planes told."""
        if self._buffer is not None:
            self._interpolate(self.grid.shape_pre[self.grid.axis])
        self._tell(self.grid.shape[-1])
        return self.labels

    def _put(self, block: Block) -> None:
        assert block.values is not None
        native, inner, permute, flipped = self.grid.place(block.start, block.stop)
        labels = self._reduce(block.values).cpu().numpy()
        self.labels[native] = np.flip(labels.transpose(permute), flipped)[inner]
        put_aside(self.labels)
        if self.probabilities is not None:
            values = to_probabilities(block.values, 0).cpu().numpy()
            values = values.transpose(0, *(a + 1 for a in permute))
            self.probabilities(native, np.flip(values, tuple(a + 1 for a in flipped))[(slice(None), *inner)])

    def _reduce(self, values: torch.Tensor, *, probabilities: bool = False) -> torch.Tensor:
        if values.shape[0] <= 2 and (self.threshold is not None or values.shape[0] == 1):
            foreground = (values if probabilities else to_probabilities(values, 0))[-1]
            return (foreground >= (0.5 if self.threshold is None else self.threshold)).to(torch.uint8)
        return values.argmax(0).to(torch.uint8 if values.shape[0] <= 256 else torch.int16)

    def _native_end(self, complete: int) -> int:
        """Native planes that are finished once all below `complete` on the slab axis is (forward, exact maps)."""
        if complete >= self.grid.shape_pre[self.grid.axis]:
            return self.grid.shape[-1]
        return int(np.clip(complete - self.grid.offset[self.grid.axis], 0, self.grid.shape[-1]))

    def _tell(self, end: int) -> None:
        if self.sink is not None and end > self._told:
            self.sink(self._told, self.labels[..., self._told : end])
            self._told = end

    def _interpolate(self, complete: int) -> None:
        assert self._buffer is not None
        grid, buffer = self.grid, self._buffer
        length, planes = grid.shape_pre[grid.axis], grid.shape[-1]
        # range of the slab axis that a native plane touches: its centre line, and what the other axes add
        row = grid.matrix[grid.axis]
        others = [float(v) * (n - 1) for v, n in zip(row[:-1], grid.shape[:-1], strict=True)]
        low, high = sum(min(v, 0) for v in others), sum(max(v, 0) for v in others)
        classes = buffer.classes
        plane_values = int(np.prod(grid.shape[:-1]))
        at_once = max(1, _AT_ONCE // (plane_values * max(1, classes if self.probabilities else 2)))
        while self._next < planes:
            stop = self._next
            while stop < planes and stop - self._next < at_once:
                plane = stop if grid.forward else planes - 1 - stop
                reach = grid.offset[grid.axis] + row[-1] * plane + high
                if complete < length and reach + 1 >= complete:
                    break
                stop += 1
            if stop == self._next:
                break
            first, last = (self._next, stop) if grid.forward else (planes - stop, planes - self._next)
            if classes:
                top = grid.offset[grid.axis] + row[-1] * (last - 1 if row[-1] > 0 else first) + high
                buffer.extend(min(length, int(np.floor(top)) + 2), classes)
                for box, values in resample_planes(buffer, grid, first, last, self._pieces()):
                    self.labels[box] = (
                        self._reduce(values, probabilities=True).numpy() if values.ndim > len(box) else values.numpy()
                    )
                    put_aside(self.labels)
                    if self.probabilities is not None:
                        self.probabilities(box, values.numpy())
            self._next = stop
            if grid.forward:
                self._tell(self._next)
        if self._next < planes:
            plane = self._next if grid.forward else planes - 1 - self._next
            needed = int(np.floor(grid.offset[grid.axis] + row[-1] * plane + low)) - 1
            buffer.drop_below(min(needed, complete))  # the row in work may still write above `complete`

    def _pieces(self) -> bool:
        """Whether all classes are needed at once (to keep probabilities or to compare with a threshold)."""
        classes = self._buffer.classes if self._buffer else 0
        return self.probabilities is not None or classes <= 2
