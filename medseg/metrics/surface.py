"""Distances between the surfaces of two masks, measured once: Hausdorff, mean, root mean square, surface Dice.

The surface of a mask is the set of its voxels that have a face neighbour outside it (6 neighbours in 3-D, 4 in 2-D);
beyond the image counts as outside. Distances are Euclidean, between centres of voxels, in the unit of `spacing`.
Definitions follow "Metrics reloaded", Maier-Hein, Reinke et al. 2024, doi:10.1038/s41592-023-02151-z.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from medseg.errors import GeometryError, UsageError
from medseg.metrics.nearest import nearest_distances, offset_shells
from medseg.metrics.surfels import neighbour_codes, surfel_areas

__all__ = ["SurfaceDistances", "surface_distances"]


class SurfaceDistances:
    """Every distance score of one pair of masks. Made by `surface_distances`; nothing is measured twice.

    If both masks are empty, distances are 0 and surface Dice is 1; if exactly one is, distances are the image's
    diagonal and surface Dice is 0. No score is ever NaN or infinite.

    Attributes:
        status: "scored", "missed" (prediction empty), "false_alarm" (reference empty) or "both_empty".
        spacing: size of a voxel on each axis.
        diagonal: length of the image's diagonal, sqrt(sum((voxels x spacing)^2)), in the unit of spacing.
    """

    def __init__(
        self, masks: tuple[np.ndarray, np.ndarray] | None, status: str, spacing: tuple[float, ...], diagonal: float
    ) -> None:
        self._masks = masks  # cut to the union's box, with an empty margin; None when one of them is empty
        self.status = status
        self.spacing = spacing
        self.diagonal = diagonal

    def __repr__(self) -> str:
        return f"SurfaceDistances(status={self.status!r}, spacing={self.spacing}, diagonal={self.diagonal:g})"

    @cached_property
    def directed(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances from each surface voxel of the prediction to the reference's surface, and back; float64.

        With an empty mask: both empty arrays (nothing was measured).
        """
        if self._masks is None:
            return np.empty(0), np.empty(0)
        surfaces = [_surface(mask) for mask in self._masks]
        return self._distances(surfaces)

    def hausdorff(self, percentile: float = 100, definition: str = "max") -> float:
        """Hausdorff distance (percentile 100) or its robust form, HD95 (percentile 95).

        Args:
            percentile: 0 to 100, of the distances from one surface to the other (linear between neighbours).
            definition: "max" takes the percentile in each direction and then the larger one (MONAI, DeepMind, Metrics
                reloaded); "pooled" takes it once over the distances of both directions together (MedPy). The two are
                equal at percentile 100.

        Returns:
            A distance in the unit of spacing.

        Raises:
            UsageError: percentile out of range or unknown definition.

        Source: Huttenlocher et al., IEEE PAMI 15, 1993, doi:10.1109/34.232073.
        """
        if not 0 <= percentile <= 100:
            raise UsageError("percentile out of range", field="percentile", expected="0 to 100", found=percentile)
        if definition not in ("max", "pooled"):
            raise UsageError("unknown definition", field="definition", expected="max or pooled", found=definition)
        if self._masks is None:
            return self._without_surface()
        if definition == "pooled":
            return float(np.percentile(np.concatenate(self.directed), percentile))
        return max(float(np.percentile(distances, percentile)) for distances in self.directed)

    def assd(self) -> float:
        """Average symmetric surface distance: mean over the surface voxels of both masks together.

        Source: Heimann et al., IEEE TMI 28, 2009, doi:10.1109/TMI.2009.2013851.
        """
        if self._masks is None:
            return self._without_surface()
        there, back = self.directed
        return float((there.sum() + back.sum()) / (len(there) + len(back)))

    def masd(self) -> float:
        """Mean average surface distance: mean of the two directed means, so that both surfaces weigh the same.

        Source: Metrics reloaded, doi:10.1038/s41592-023-02151-z.
        """
        if self._masks is None:
            return self._without_surface()
        there, back = self.directed
        return float((there.mean() + back.mean()) / 2)

    def rmsd(self) -> float:
        """Root mean square symmetric surface distance, over the surface voxels of both masks together.

        Source: Heimann et al., IEEE TMI 28, 2009, doi:10.1109/TMI.2009.2013851.
        """
        if self._masks is None:
            return self._without_surface()
        there, back = self.directed
        return float(np.sqrt((np.dot(there, there) + np.dot(back, back)) / (len(there) + len(back))))

    def surface_dice(self, tolerance: float) -> float:
        """Share of both surfaces, by area, that lies within `tolerance` of the other one (normalised surface distance).

        Surfaces run between voxels here: pieces of surface with their area from 2 x 2 x 2 neighbourhoods. Equals
        DeepMind's `compute_surface_dice_at_tolerance` and MONAI's `compute_surface_dice(use_subvoxels=True)`. Distances
        are compared in single precision, so that three steps of 0.1 mm are within 0.3 mm.

        Args:
            tolerance: in the unit of spacing, 0 or more.

        Returns:
            0 to 1; 1 if both masks are empty, 0 if exactly one is.

        Raises:
            UsageError: tolerance negative or not finite.

        Source: Nikolov et al., J Med Internet Res 23, 2021, doi:10.2196/26151.
        """
        if not (np.isfinite(tolerance) and tolerance >= 0):
            raise UsageError("tolerance out of range", field="tolerance", expected="0 or more", found=tolerance)
        if self._masks is None:
            return 1.0 if self.status == "both_empty" else 0.0
        (distances, areas) = self._surfels
        within = sum(
            float(area[distance.astype(np.float32) <= np.float32(tolerance)].sum())
            for distance, area in zip(distances, areas, strict=True)
        )
        return within / float(sum(area.sum() for area in areas))

    @cached_property
    def _surfels(self) -> tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
        assert self._masks is not None
        table = surfel_areas(self.spacing)
        full = len(table) - 1
        edges, areas = [], []
        for mask in self._masks:
            codes = neighbour_codes(mask)
            edge = codes != 0
            edge &= codes != full
            edges.append(edge)
            areas.append(table[codes[edge]])
        return self._distances(edges), areas

    def _distances(self, surfaces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        prediction, reference = surfaces
        shells = offset_shells(self.spacing)
        a, b = np.flatnonzero(prediction), np.flatnonzero(reference)
        return (
            nearest_distances(a, b, reference, self.spacing, shells),
            nearest_distances(b, a, prediction, self.spacing, shells),
        )

    def _without_surface(self) -> float:
        return 0.0 if self.status == "both_empty" else self.diagonal


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: float | Sequence[float] | None = None
) -> SurfaceDistances:
    """Measure the surfaces of two masks against each other; every distance score derives from the result.

    Args:
        prediction: (*spatial) boolean, or numbers of which non-zero ones are inside; 2-D or 3-D.
        reference: the same shape.
        spacing: size of a voxel on each axis (mm), or one for all; 1 when None. May be anisotropic.

    Returns:
        SurfaceDistances: `.hausdorff()`, `.assd()`, `.masd()`, `.rmsd()`, `.surface_dice()`, in the unit of spacing.

    Raises:
        GeometryError: the shapes differ.
        UsageError: neither 2-D nor 3-D; spacing of another length, not positive or not finite.

    >>> import numpy as np
    >>> reference = np.zeros((20, 20), bool); reference[5:10, 5:10] = True
    >>> prediction = np.roll(reference, 2, axis=0)
    >>> distances = surface_distances(prediction, reference, spacing=(1.5, 1.0))
    >>> distances.hausdorff(), distances.hausdorff(percentile=95)
    (3.0, 3.0)
    >>> round(surface_distances(prediction & False, reference, spacing=(1.5, 1.0)).hausdorff(), 3)  # 30 x 20 mm
    36.056
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise GeometryError(
            "prediction and reference differ in shape", expected=reference.shape, found=prediction.shape
        )
    if prediction.ndim not in (2, 3):
        raise UsageError("surfaces need two or three dimensions", field="prediction", found=f"shape {prediction.shape}")
    step = check_spacing(spacing, prediction.ndim)
    diagonal = float(np.sqrt(sum((n * s) ** 2 for n, s in zip(prediction.shape, step, strict=True))))
    prediction, reference = _as_bool(prediction), _as_bool(reference)
    boxes = [_box(prediction), _box(reference)]
    if boxes[0] is None or boxes[1] is None:
        status = "both_empty" if boxes[0] is boxes[1] else ("missed" if boxes[0] is None else "false_alarm")
        return SurfaceDistances(None, status, step, diagonal)
    union = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(boxes[0], boxes[1], strict=True))
    # room for every offset, and one layer more for the neighbourhoods that begin before the first voxel
    margin = [m + 1 for m in offset_shells(step).margin]
    masks = (_cut(prediction, union, margin), _cut(reference, union, margin))
    return SurfaceDistances(masks, "scored", step, diagonal)


def check_spacing(spacing: float | Sequence[float] | np.ndarray | None, dims: int) -> tuple[float, ...]:
    """Spacing as `dims` positive floats.

    Raises:
        UsageError: another number of values, or one that is not positive and finite.
    """
    if spacing is None:
        return (1.0,) * dims
    values = np.atleast_1d(np.asarray(spacing, dtype=np.float64))
    step = tuple(float(v) for v in (np.repeat(values, dims) if values.size == 1 else values))
    if len(step) != dims or not all(np.isfinite(s) and s > 0 for s in step):
        raise UsageError("spacing does not fit", field="spacing", expected=f"{dims} positive numbers", found=spacing)
    return step


def _as_bool(mask: np.ndarray) -> np.ndarray:
    return mask if mask.dtype == bool else mask != 0


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Smallest box around the true voxels, read in the order in which they lie in memory."""
    order = sorted(range(mask.ndim), key=lambda axis: -abs(mask.strides[axis]))
    ordered = mask.transpose(order)
    first = _range(np.asarray(ordered.any(axis=tuple(range(1, mask.ndim)))))
    if first is None:
        return None
    plane = np.asarray(np.logical_or.reduce(ordered[first], axis=0))
    lines = [np.asarray(plane.any(axis=tuple(a for a in range(plane.ndim) if a != axis))) for axis in range(plane.ndim)]
    slices = [first, *(_range(line) or slice(0, 0) for line in lines)]
    return tuple(slices[order.index(axis)] for axis in range(mask.ndim))


def _range(line: np.ndarray) -> slice | None:
    found = np.flatnonzero(line)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else None


def _cut(mask: np.ndarray, box: tuple[slice, ...], margin: Sequence[int]) -> np.ndarray:
    cut = mask[box]
    padded = np.zeros([n + 2 * m for n, m in zip(cut.shape, margin, strict=True)], dtype=bool)
    padded[tuple(slice(m, m + n) for n, m in zip(cut.shape, margin, strict=True))] = cut
    return padded


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face neighbour outside. The mask's margin is empty, so flat shifts never reach the wrong row."""
    flat = mask.ravel()
    inner = flat.copy()
    for axis in range(mask.ndim):
        shift = int(np.prod(mask.shape[axis + 1 :], dtype=np.int64))
        inner[:-shift] &= flat[shift:]
        inner[shift:] &= flat[:-shift]
    np.logical_xor(inner, flat, out=inner)
    return inner.reshape(mask.shape)
