"""The map between the grid of a preprocessed image and the image's own, from the two affines alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg.errors import GeometryError

__all__ = ["GridMap", "grid_map"]

TOLERANCE = 1e-2  # voxels: what counts as a whole-voxel shift over the whole image


class GridMap:
    """Native voxel -> preprocessed voxel: `matrix` (D, D) and `offset` (D,), both grids' shapes.

    `exact`: a signed permutation with whole offsets. `axis`: the preprocessed axis that the last native axis follows
    most, so that slabs along it finish planes of the native image in order. `forward`: whether they run the same way.
    """

    def __init__(self, matrix: np.ndarray, offset: np.ndarray, shape_pre: Sequence[int], shape: Sequence[int]) -> None:
        self.shape_pre, self.shape = tuple(shape_pre), tuple(shape)
        rounded, whole = np.round(matrix), np.round(offset)
        reach = np.abs(matrix - rounded) @ np.array(self.shape, dtype=float) + np.abs(offset - whole)
        permutes = bool((np.abs(rounded).sum(0) == 1).all() and (np.abs(rounded).sum(1) == 1).all())
        self.exact = permutes and float(reach.max()) < TOLERANCE
        self.matrix, self.offset = (rounded, whole) if self.exact else (matrix, offset)
        self.axis = int(np.argmax(np.abs(matrix[:, -1])))
        self.forward = bool(matrix[self.axis, -1] > 0)

    @property
    def separable(self) -> bool:
        """Each preprocessed axis follows one native axis alone (no rotation beyond permutation)."""
        extent = np.array(self.shape, dtype=float)
        drift = np.abs(self.matrix) * extent
        return bool((np.sort(drift, axis=1)[:, :-1].sum(1) < TOLERANCE).all())

    def place(
        self, start: Sequence[int], stop: Sequence[int]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...], tuple[int, ...], tuple[int, ...]]:
        """For an exact map and a box of the preprocessed grid: where it lies in the native image.

        Returns (slices of the native image, slices of the box after `permute`, permute, flipped native axes).
        """
        permute = tuple(int(np.argmax(np.abs(self.matrix[:, b]))) for b in range(len(self.shape)))
        native, inner, flipped = [], [], []
        for b, a in enumerate(permute):
            sign, shift = self.matrix[a, b], self.offset[a]
            ends = sorted(int(v) for v in ((start[a] - shift) * sign, (stop[a] - 1 - shift) * sign))
            low, high = max(ends[0], 0), min(ends[1] + 1, self.shape[b])
            native.append(slice(low, max(low, high)))
            inner.append(slice(low - ends[0], max(low, high) - ends[0]))
            if sign < 0:
                flipped.append(b)
        return tuple(native), tuple(inner), permute, tuple(flipped)


def grid_map(affine_pre: np.ndarray, shape_pre: Sequence[int], affine: np.ndarray, shape: Sequence[int]) -> GridMap:
    """The map between two grids given by 4x4 affines (2-D grids use rows and columns 0, 1 and 3)."""
    dims = len(shape)
    keep = [*range(dims), 3]
    pre = np.asarray(affine_pre, dtype=np.float64)[np.ix_(keep, keep)]
    own = np.asarray(affine, dtype=np.float64)[np.ix_(keep, keep)]
    if len(shape_pre) != dims:
        raise GeometryError("the preprocessed image has another number of axes", expected=dims, found=len(shape_pre))
    try:
        full = np.linalg.solve(pre, own)
    except np.linalg.LinAlgError as error:
        raise GeometryError("the preprocessed image has a singular affine", found=pre.tolist()) from error
    return GridMap(full[:dims, :dims], full[:dims, dims], shape_pre, shape)
