"""Cells out of the probability of being inside one, where membranes part them: basins, joined across weak borders.

A threshold joins two cells wherever the membrane between them has a gap of one pixel, and one value suits no two
images. Here the whole border between two regions is looked at, not its weakest pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from medseg.errors import UsageError
from medseg.transforms.arrays import components, needed_probabilities
from medseg.transforms.labels import part_instances

__all__ = ["CellsFromMembranes", "joined_basins"]


class CellsFromMembranes:
    """The cells that membranes part, found so that a gap in a membrane does not mislead.

    The basins of the probability (watershed) are joined, weakest border first, until along every border the mean
    probability of membrane is at least `merge`. A threshold alone joins two cells at the first gap of a pixel. For sets
    with one label, the cells, 0 being membrane.

    Args:
        threshold: within a cell, membrane where the probability of cell is at most this. It says how wide membranes
            are, not which cells are one.
        merge: mean probability of membrane along a border, below which the border is none.
        smooth: sd in voxels of the Gaussian before the watershed.
        depth: by how much a maximum of the smoothed probability stands out to be a basin.

    Returns:
        (*spatial) of the label's type, 1 in cells: no two cells touch, not even by corners, at least one voxel of 0
        parts them.

    >>> row = np.array([0.9] * 12 + [0.1] * 4 + [0.9] * 12)
    >>> shares = np.stack([1 - np.tile(row, (20, 1)), np.tile(row, (20, 1))])
    >>> shares[:, 10, 12:16] = [[0.4], [0.6]]  # a gap
    >>> cells = CellsFromMembranes()(shares[1] > 0.5, probabilities=shares, spacing=(1, 1))
    >>> components(shares[1] > 0.5)[1], components(cells != 0)[1]
    (1, 2)
    """

    needs_probabilities = True
    classes = (2,)
    local = False

    def __init__(self, threshold: float = 0.5, merge: float = 0.6, smooth: float = 2.0, depth: float = 0.02) -> None:
        for name, value in (("threshold", threshold), ("merge", merge)):
            if not 0 < value < 1:
                raise UsageError("this is a probability", field=name, expected="0 < value < 1", found=value)
        if smooth < 0 or not 0 < depth < 1:
            raise UsageError(
                "smooth is not negative, depth is a difference of probabilities", field="smooth, depth",
                expected="smooth >= 0, 0 < depth < 1", found=f"{smooth}, {depth}",
            )  # fmt: skip
        self.threshold, self.merge, self.smooth, self.depth = threshold, merge, smooth, depth

    def __call__(
        self, label: np.ndarray, *, probabilities: np.ndarray | None = None, spacing: Sequence[float] = ()
    ) -> np.ndarray:
        """The cells."""
        cell = needed_probabilities(probabilities, self)[1]
        regions = joined_basins(cell, smooth=self.smooth, depth=self.depth, merge=self.merge)
        _, gap = part_instances(regions + 1)
        return ((cell > self.threshold) & ~gap).astype(label.dtype)


def joined_basins(cell: np.ndarray, *, smooth: float, depth: float, merge: float) -> np.ndarray:
    """Number the cells: basins of the smoothed probability, joined from the weakest border on.

    The border of two regions is as strong as the mean probability of membrane (1 - cell) along it. The two regions with
    the weakest border become one, and so on, until every border has at least `merge`.

    Args:
        cell: (*spatial) probability of being inside a cell.
        smooth: sd in voxels of the Gaussian before the watershed.
        depth: by how much a maximum has to stand out to be a basin.
        merge: strength below which a border is none.

    Returns:
        int (*spatial), every voxel numbered, without gaps.

    >>> cell = np.full((40, 60), 0.95)
    >>> cell[:, 29:32] = 0.05  # a membrane ...
    >>> cell[20, 29:32] = 0.9  # ... with a gap, through which a threshold would join the cells
    >>> cell[5:12, 8:15] = 0.9  # an organelle
    >>> cells = joined_basins(cell, smooth=2.0, depth=0.02, merge=0.6)
    >>> int(cells.max()), bool((cells[:, :28] == cells[0, 0]).all()), bool((cells[:, 33:] == cells[0, 59]).all())
    (1, True, True)

    Source: Nunez-Iglesias et al. 2013, doi:10.1371/journal.pone.0071715 (mean agglomeration).
    """
    from skimage.graph import merge_hierarchical, rag_boundary
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed

    cell = np.asarray(cell, np.float32)
    height = ndimage.gaussian_filter(cell, smooth) if smooth else cell
    seeds, count = components(h_maxima(height, depth) > 0, corners=True)
    if count < 2:
        return np.zeros(cell.shape, np.int64)
    basins = watershed(-height, seeds)
    graph = rag_boundary(basins, 1.0 - cell.astype(np.float64), connectivity=1)
    return merge_hierarchical(
        basins, graph, thresh=merge, rag_copy=False, in_place_merge=True, merge_func=_nothing, weight_func=_mean
    )


def _nothing(graph: Any, first: int, second: int) -> None:
    """The regions' means live on the edges alone."""


def _mean(graph: Any, first: int, second: int, other: int) -> Mapping[str, float]:
    """Edge of two joined regions to a third: the mean over both borders."""
    edges = [graph[node][other] for node in (first, second) if graph.has_edge(node, other)]
    count = sum(edge["count"] for edge in edges)
    return {"count": count, "weight": sum(edge["weight"] * edge["count"] for edge in edges) / count}
