"""Where voxels are: shape, affine, axis codes, and whether two images share one grid.

World axes are RAS+ (x to the patient's right, y to the front, z up), millimetres, as in NIfTI and nibabel. Voxel
(i, j, k) has its centre at affine @ (i, j, k, 1). Pictures (two dimensions) have array axes (row, column), unit "px"
and the affine diag(spacing[0], spacing[1], 1, 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import GeometryError, UsageError

__all__ = ["Geometry", "Volume", "axis_codes", "check_affine", "check_pair", "corner_shift", "reorient", "shear"]

SPACING_RANGE_MM = (0.001, 100.0)
SPACING_TOLERANCE = 1e-3  # relative
SHIFT_TOLERANCE = 0.5  # voxels
SHEAR_TOLERANCE = 1e-3  # cosine between two axes; 0.06 degrees, what float32 headers and rounding leave stays below

_CODES = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True)
class Geometry:
    """The grid of an image.

    Attributes:
        shape: voxels along each spatial axis.
        affine: 4x4 float64, voxel -> mm (RAS+), or pixel -> pixel for pictures.
        spacing: size of a voxel along each spatial axis, mm for volumes, 1.0 px for pictures.
        kind: "volume" or "picture".
        unit: "mm" or "px".

    >>> Geometry.of((4, 5, 6), np.diag([1.0, 1.0, 2.5, 1.0])).spacing
    (1.0, 1.0, 2.5)
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    spacing: tuple[float, ...]
    kind: str
    unit: str

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray | None = None, unit: str | None = None) -> Geometry:
        """The geometry of a grid of `shape` (2 or 3 axes) with `affine` (identity when None)."""
        shape = tuple(int(n) for n in shape)
        affine = np.eye(4) if affine is None else np.array(affine, dtype=np.float64)
        affine.setflags(write=False)
        spacing = tuple(float(v) for v in voxel_size(affine)[: len(shape)])
        kind = "picture" if len(shape) == 2 else "volume"
        return cls(shape, affine, spacing, kind, unit or ("px" if kind == "picture" else "mm"))

    @property
    def codes(self) -> tuple[str, ...]:
        """Axis codes, such as ("L", "P", "S"): the direction to which each array axis points."""
        return axis_codes(self.affine)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geometry):
            return NotImplemented
        return self.shape == other.shape and self.unit == other.unit and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.unit, self.affine.tobytes()))


@dataclass(frozen=True)
class Volume:
    """An image as read.

    Attributes:
        array: (C, *spatial); (i, j, k) for volumes, (row, column) for pictures; integers stay integers.
        geometry: the grid.
        path: file, or folder of a DICOM series.
        format: "nifti", "metaimage", "nrrd", "dicom", "tiff", "png", "jpeg", "gif".
        header: what a writer needs to give back the same grid: the NIfTI header, or a plain dictionary.
        channels: C.
        notes: what was done to the image and should be told ("E313: the image is constant").
        segments: what the numbers of a label are called where its file says so (3D Slicer), and not the caller.
    """

    array: np.ndarray
    geometry: Geometry
    path: Path
    format: str
    header: Any
    channels: int
    notes: tuple[str, ...] = field(default=())
    segments: Mapping[int, str] = field(default_factory=dict)


def voxel_size(affine: np.ndarray) -> np.ndarray:
    """Size of a voxel along each of the three array axes.

    >>> voxel_size(np.diag([-1.0, 1.0, 2.5, 1.0])).tolist()
    [1.0, 1.0, 2.5]
    """
    return np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0))


def axis_codes(affine: np.ndarray) -> tuple[str, str, str]:
    """The direction to which each of the three array axes points mostly; each world axis is used once.

    The assignment is nibabel's (`aff2axcodes`): the axis with the largest cosine first.

    >>> axis_codes(np.diag([-1.0, -1.0, 2.0, 1.0]))
    ('L', 'P', 'S')
    """
    import nibabel

    codes = nibabel.orientations.aff2axcodes(affine)  # type: ignore[attr-defined]
    return tuple(str(code) for code in codes)  # type: ignore[return-value]


def reorient(array: np.ndarray, affine: np.ndarray, codes: tuple[str, ...] | str) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip the last three axes so that they point to `codes`; the affine follows; no value changes.

    Args:
        array: (..., i, j, k).
        affine: 4x4 voxel -> mm.
        codes: such as "RAS" or ("L", "P", "S"); any of the 48.

    Returns:
        array (a view) and affine (new). `reorient(*reorient(a, m, codes), axis_codes(m))` gives `a` back exactly and
        `m` up to the last digit of its translation.

    Raises:
        UsageError: E101, codes that are none.

    >>> a, m = reorient(np.arange(6).reshape(1, 2, 3), np.eye(4), "SRA")
    >>> a.shape, axis_codes(m)
    ((3, 1, 2), ('S', 'R', 'A'))
    """
    wanted = _directions(codes)
    present = _directions(axis_codes(affine))
    lead = array.ndim - 3
    if lead < 0:
        raise UsageError("reorient needs three spatial axes", field="array", found=f"shape {array.shape}")
    order = [next(p for p, (axis, _) in enumerate(present) if axis == wanted_axis) for wanted_axis, _ in wanted]
    new = array.transpose(*range(lead), *(lead + p for p in order))
    # columns are moved and negated, never multiplied by a matrix, so that the way back gives their very bits
    matrix = np.array(affine, dtype=np.float64)
    matrix[:, :3] = np.asarray(affine, dtype=np.float64)[:, order]
    offset = matrix[:3, 3].copy()
    for position, (_, sign) in enumerate(wanted):
        if present[order[position]][1] != sign:
            new = np.flip(new, lead + position)
            column = matrix[:3, position].copy()
            offset = offset + column * (new.shape[lead + position] - 1)
            matrix[:3, position] = -column
    matrix[:3, 3] = offset
    return new, matrix


def shear(affine: np.ndarray) -> float:
    """The largest absolute cosine between two of the three voxel axes: 0 for a rectangular grid."""
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    norms = np.sqrt((axes**2).sum(axis=0))
    unit = axes / np.where(norms > 0, norms, 1.0)
    return float(np.abs((unit.T @ unit)[np.triu_indices(3, 1)]).max())


def check_affine(affine: np.ndarray) -> str | None:
    """What is wrong with a voxel -> mm affine ("is singular", ...), or None."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return "holds NaN or infinity"
    with np.errstate(over="ignore"):
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = SPACING_RANGE_MM
    if not ((spacing >= low * (1 - 1e-6)) & (spacing <= high * (1 + 1e-6))).all():
        zero = "is singular: " if not spacing.all() else ""
        shown = ", ".join(f"{v:g}" for v in spacing)
        return f"{zero}has a spacing outside {low:g} to {high:g} mm: {shown}"
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        return "is singular"
    if shear(affine) > SHEAR_TOLERANCE:
        return f"is sheared: two axes are {np.degrees(np.arccos(shear(affine))):.2f} degrees apart"
    return None


def corner_shift(shape: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> float:
    """The largest distance between the places of a corner of the grid under two affines, in voxels of the first."""
    corners = np.array(list(itertools.product(*[(0, n - 1) for n in (*shape, 1, 1)[:3]])), dtype=np.float64).T
    apart = np.asarray(second)[:3, :3] @ corners - np.asarray(first)[:3, :3] @ corners
    apart = apart + (np.asarray(second)[:3, 3] - np.asarray(first)[:3, 3])[:, None]
    return float(np.abs(np.linalg.solve(np.asarray(first)[:3, :3], apart)).max())


def check_pair(image: Volume | Geometry, label: Volume | Geometry, *, case: str | None = None) -> None:
    """Make sure that an image and a label (or a prediction and a reference) lie on one grid.

    Raises:
        GeometryError: E320 shape, E327 axis codes, E325 spacing (relative difference > 1e-3), E326 origin or direction
            (some corner of the grid more than half a voxel apart).

    >>> check_pair(Geometry.of((4, 4, 4)), Geometry.of((4, 4, 5)))
    Traceback (most recent call last):
    medseg.errors.GeometryError: E320: image and label have different shapes
      expected: (4, 4, 4)
      found: (4, 4, 5)
      fix: resample the label to the image's grid
    """
    one, two = (part.geometry if isinstance(part, Volume) else part for part in (image, label))
    file = label.path if isinstance(label, Volume) else None
    fix = "resample the label to the image's grid"

    def fail(code: str, what: str, expected: object, found: object) -> GeometryError:
        message = f"image and label have different {what}"
        return GeometryError(message, code=code, case=case, file=file, expected=expected, found=found, fix=fix)

    if one.shape != two.shape:
        raise fail("E320", "shapes", one.shape, two.shape)
    if one.unit != two.unit:
        return  # a volume's slices as pictures beside a mask without spacing: only the shape can be compared
    # near 45 degrees a last digit decides the codes: they count only where the axes really point elsewhere
    if one.kind == "volume" and one.codes != two.codes and _turned(one.affine, two.affine):
        raise fail("E327", "axis orders", "".join(one.codes), "".join(two.codes))
    if not np.allclose(one.spacing, two.spacing, rtol=SPACING_TOLERANCE, atol=0):
        raise fail("E325", "spacings", _numbers(one.spacing), _numbers(two.spacing))
    if one.kind == "volume" and (shift := corner_shift(one.shape, one.affine, two.affine)) > SHIFT_TOLERANCE:
        origin = f"origin {_numbers(one.affine[:3, 3])}"
        found = f"origin {_numbers(two.affine[:3, 3])}; corners up to {shift:.2f} voxels apart"
        raise fail("E326", "origins or directions", origin, found)


def _turned(first: np.ndarray, second: np.ndarray, degrees: float = 5.0) -> bool:
    axes = [m[:3, :3] / voxel_size(m) for m in (first, second)]
    return bool(((axes[0] * axes[1]).sum(axis=0) < np.cos(np.radians(degrees))).any())


def _numbers(values: Any) -> str:
    return ", ".join(f"{float(v):.6g}" for v in values)


def _directions(codes: tuple[str, ...] | str) -> list[tuple[int, int]]:
    found = []
    for code in codes:
        found += [(axis, pair.index(code)) for axis, pair in enumerate(_CODES) if code in pair]
    if len(found) != 3 or len(codes) != 3 or {axis for axis, _ in found} != {0, 1, 2}:
        expected = "one of L/R, one of P/A, one of I/S, in any order"
        raise UsageError("these are no axis codes", field="codes", expected=expected, found="".join(map(str, codes)))
    return found
