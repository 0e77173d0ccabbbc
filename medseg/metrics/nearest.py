"""Exact distance from each of many grid points to the nearest of many others: neighbours first, a k-d tree for others.

Two surfaces of the same organ mostly lie within a few voxels of each other. So each point first looks at the offsets
around it in the order of their length (most find the other surface among the first dozens: a table look-up each), and
only the points that found nothing ask a k-d tree. Both steps are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Longest list of offsets tried. A ball of 250 voxels (radius 3.9) costs about as much as one query of the tree.
_OFFSETS = 250
_FEW = 64  # points in the tree below which nothing else is worth its trouble


@dataclass(frozen=True)
class Shells:
    """Offsets in the order of their length, those of equal length together.

    Attributes:
        groups: (length in the unit of spacing, integer offsets (n, D)) with lengths ascending; every offset shorter
            than the last length is in the list, so that the first hit is the nearest point.
        margin: largest offset on each axis, which is how far a grid must be padded.
    """

    groups: tuple[tuple[float, np.ndarray], ...]
    margin: tuple[int, ...]


@lru_cache(maxsize=64)
def offset_shells(spacing: tuple[float, ...], count: int = _OFFSETS) -> Shells:
    """About the `count` shortest offsets on a grid of that spacing, grouped by length.

    Args:
        spacing: distance of neighbours on each axis, D values.
        count: how many offsets at most (whole shells only; at least the nearest neighbours).

    >>> shells = offset_shells((1.0, 1.0), 9)
    >>> [(length, len(offsets)) for length, offsets in shells.groups], shells.margin
    ([(0.0, 1), (1.0, 4), (1.4142135623730951, 4)], (1, 1))
    """
    step = np.asarray(spacing, dtype=np.float64)
    # the ball that holds `count` cells of this grid has this radius; a little more because of its ragged edge
    ball = {2: np.pi, 3: 4 * np.pi / 3}[len(spacing)]
    radius = (count * step.prod() / ball) ** (1 / len(spacing)) + step.min()
    reach = np.maximum(np.floor(radius / step).astype(int), 0)
    axes = [np.arange(-r, r + 1) for r in reach]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(spacing))
    squared = ((offsets * step) ** 2).sum(axis=1)
    inside = squared <= radius**2  # beyond the radius the box has holes: not all offsets of that length are in it
    offsets, squared = offsets[inside], squared[inside]
    order = np.argsort(squared, kind="stable")
    offsets, squared = offsets[order], squared[order]
    starts = np.flatnonzero(np.r_[True, np.diff(squared) > 1e-9 * step.min() ** 2])
    ends = np.r_[starts[1:], len(squared)]
    whole = max(int(np.searchsorted(ends, count, side="right")), 2 if len(ends) > 1 else 1)
    groups = tuple(
        (float(np.sqrt(squared[s])), offsets[s:e]) for s, e in zip(starts[:whole], ends[:whole], strict=True)
    )
    used = np.concatenate([group for _, group in groups])
    return Shells(groups, tuple(int(m) for m in np.abs(used).max(axis=0)))


def nearest_distances(
    points: np.ndarray, targets: np.ndarray, grid: np.ndarray, spacing: tuple[float, ...], shells: Shells
) -> np.ndarray:
    """Distance from every point to the nearest target.

    Args:
        points: flat indices into `grid` (int64), in no order, at least `shells.margin` away from its edges.
        targets: flat indices of the true elements of `grid`, at least one, as far from the edges.
        grid: boolean, C-contiguous, 2-D or 3-D.
        spacing: distance of neighbours on each axis.
        shells: from `offset_shells(spacing)`.

    Returns:
        float64, one distance per point, in the order of the points.
    """
    result = np.empty(len(points), dtype=np.float64)
    if len(points) == 0:
        return result
    strides = np.array([np.prod(grid.shape[axis + 1 :], dtype=np.int64) for axis in range(grid.ndim)])
    flat = grid.ravel()
    reach = int(np.dot(strides, shells.margin))
    left = np.arange(len(points))
    base = points - reach  # an offset is then a view of the flat grid that starts elsewhere: no addition per point
    if len(targets) > _FEW:
        for length, offsets in shells.groups:
            hit = np.zeros(len(base), dtype=bool)
            for shift in (offsets @ strides).tolist():
                hit |= flat[reach + shift :].take(base, mode="clip")
            result[left[hit]] = length
            np.logical_not(hit, out=hit)
            left, base = left[hit], base[hit]
            if len(base) == 0:
                return result
    # scipy.spatial takes 0.1 s to import, which pictures with near surfaces never need
    from scipy.spatial import KDTree

    step = np.asarray(spacing, dtype=np.float64)
    tree = KDTree(_coordinates(targets, grid.shape) * step, leafsize=32, compact_nodes=False, balanced_tree=False)
    result[left] = tree.query(_coordinates(points[left], grid.shape) * step, k=1)[0]
    return result


def _coordinates(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.unravel_index(flat, shape), axis=1)
