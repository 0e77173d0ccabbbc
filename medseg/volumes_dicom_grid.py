"""Whether the slices of a DICOM series make one regular grid, and which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.errors import DataError, GeometryError, MedsegError, collect
from medseg.volumes_geometry import Geometry, check_affine

__all__ = ["Slice", "find_grid"]

_ANGLE = 1e-3  # difference of direction cosines that rounding in headers explains
_TILT_DEGREES = 0.5
_NEAR = 0.9  # cosine (26 degrees) up to which a plane is still called by the name of the nearest
_GAP = 0.1  # relative difference of a gap from the median gap that rounding of positions explains
_SAME_PLACE_MM = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SHOWN = 6
SEG_FIX = "write masks as NIfTI: medseg predict --format nifti"


@dataclass(frozen=True)
class Slice:
    """Header facts of one DICOM image; lengths in mm, positions and directions in DICOM's LPS axes."""

    path: Path
    place: int
    series_uid: str
    series_number: str
    instance: str
    kind: str
    rows: int
    columns: int
    pixel_spacing: tuple[float, ...] | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    thickness: float
    samples: int
    frames: int
    bits: int
    signed: bool
    slope: float
    intercept: float
    inverted: bool

    @property
    def plane(self) -> str:
        """axial, sagittal, coronal or oblique; empty where the header does not say."""
        if self.orientation is None:
            return ""
        normal = np.abs(np.cross(self.orientation[:3], self.orientation[3:]))
        nearest = int(normal.argmax())
        return ("sagittal", "coronal", "axial")[nearest] if normal[nearest] > _NEAR else "oblique"

    def __str__(self) -> str:  # file names often are UIDs or names of patients
        return f"instance {self.instance} (file {self.place + 1} in order of name)"


def find_grid(
    slices: Sequence[Slice], path: Path, case: str | None = None
) -> tuple[list[Slice], Geometry, tuple[str, ...]]:
    """Slices sorted along the normal, their common grid (RAS+), and notes.

    Raises:
        MedsegError: DataError or GeometryError, every problem that was found; codes E314, E342 - E347, E349, E32x.
    """
    problems: list[MedsegError] = []

    def refuse(kind: type[MedsegError], code: str, message: str, found: object, fix: str) -> None:
        problems.append(kind(message, code=code, case=case, file=path, found=found, fix=fix))

    if any(s.kind == "SEG" for s in slices):
        message, fix = "a DICOM segmentation (SEG), which is written but not read", f"{SEG_FIX}; convert one of others"
        raise DataError(message, code="E349", case=case, file=path, fix=fix)
    scouts = [s for s in slices if s.kind.endswith("LOCALIZER")]
    if scouts:
        refuse(DataError, "E349", "a localizer in the series", _names(scouts), "remove the localizer images")
    many = [s for s in slices if s.frames > 1]
    if many:
        refuse(DataError, "E349", "multi-frame DICOM is not supported", _names(many), "convert it to NIfTI")
    coloured = [s for s in slices if s.samples != 1]
    if coloured:
        refuse(DataError, "E314", "colour DICOM where grey is expected", _names(coloured), "choose another series")
    lost = [s for s in slices if s.position is None or s.orientation is None or s.pixel_spacing is None]
    if lost:
        fix = "export the series with position, orientation and pixel spacing"
        refuse(GeometryError, "E347", "slices without a position in space", _names(lost), fix)
    sizes = Counter(f"{s.columns} x {s.rows}, pixels {_show(s.pixel_spacing)} mm" for s in slices if s not in lost)
    if len(sizes) > 1:
        found = "; ".join(f"{n} slices {size}" for size, n in sizes.most_common())
        refuse(GeometryError, "E346", "slices of different size or pixel spacing", found, "choose slices of one size")
    kept = [s for s in slices if s not in lost]
    directions = _directions(kept)
    if len(directions) > 1:
        found = "; ".join(f"{n} slices at {_show(d)}" for d, n in directions)
        refuse(GeometryError, "E344", "slices of different orientation", found, "give each orientation its own folder")
    if problems:
        raise collect(problems)

    axes = np.array(kept[0].orientation, dtype=np.float64).reshape(2, 3)
    if not np.allclose(np.linalg.norm(axes, axis=1), 1, atol=1e-2) or abs(axes[0] @ axes[1]) > 1e-2:
        message = "the orientation is no pair of perpendicular directions"
        raise GeometryError(message, code="E344", case=case, file=path, found=_show(kept[0].orientation))
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    normal = np.cross(axes[0], axes[1])
    kept.sort(key=lambda s: (float(np.array(s.position) @ normal), s.place))
    places = np.array([s.position for s in kept], dtype=np.float64)
    step, notes = _step(kept, places, normal, path, case)
    spacing = kept[0].pixel_spacing or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[1]  # PixelSpacing is (between rows, between columns)
    affine[:3, 1] = axes[1] * spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = places[0]
    affine = _LPS_TO_RAS @ affine + 0.0  # no negative zeros
    problem = check_affine(affine)
    if problem:
        code = "E324" if "spacing" in problem else "E345" if "sheared" in problem else "E322"
        raise GeometryError(f"the series' grid {problem}", code=code, case=case, file=path)
    return kept, Geometry.of((kept[0].columns, kept[0].rows, len(kept)), affine), notes


def _step(
    slices: list[Slice], places: np.ndarray, normal: np.ndarray, path: Path, case: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Vector from a slice to the next, if they are evenly spaced along the normal."""
    if len(slices) == 1:
        thickness = slices[0].thickness
        note = f"E347: a single slice; its thickness is taken as {thickness or 1.0:g} mm"
        return normal * (thickness or 1.0), (note,)
    along = places @ normal
    gaps = np.diff(along)
    same = np.flatnonzero(gaps < _SAME_PLACE_MM)
    if same.size:
        pairs = [f"{slices[n]} and {slices[n + 1]} at {along[n]:.2f} mm" for n in same[:_SHOWN]]
        found = f"{same.size} pairs: " + "; ".join(pairs)
        fix = "keep one of each: doubled exports, or phases or echoes that need a folder each"
        message = "several slices at one place"
        raise GeometryError(message, code="E343", case=case, file=path, found=found, fix=fix)
    median = float(np.median(gaps))
    odd = np.flatnonzero(np.abs(gaps - median) > _GAP * median)
    if odd.size:
        shown = "; ".join(f"{gaps[n]:.3f} mm between {along[n]:.2f} and {along[n + 1]:.2f} mm" for n in odd[:_SHOWN])
        ratio = gaps[odd] / median
        missing = bool((np.abs(ratio - np.rint(ratio)) < _GAP * np.rint(ratio)).all() and (ratio > 1.5).all())
        message = "slices are missing" if missing else "the spacing of the slices changes"
        fix = "export the whole series again" if missing else "resample the series to even slices, or choose another"
        expected = f"{median:.3f} mm between slices"
        found = f"{len(slices)} slices; {shown}"
        raise GeometryError(message, code="E342", case=case, file=path, expected=expected, found=found, fix=fix)
    step = (places[-1] - places[0]) / (len(slices) - 1)
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > _TILT_DEGREES:
        fix = "correct the gantry tilt (dcm2niix does so), or choose another series"
        found = f"slices shift by {np.linalg.norm(step - (step @ normal) * normal):.3f} mm, {tilt:.2f} degrees"
        message = "the slices are tilted against their stacking direction (gantry tilt)"
        raise GeometryError(message, code="E345", case=case, file=path, found=found, fix=fix)
    return float(step @ normal) * normal, ()


def _directions(slices: Sequence[Slice]) -> list[tuple[tuple[float, ...], int]]:
    found: list[tuple[tuple[float, ...], int]] = []
    for part in slices:
        assert part.orientation is not None
        for n, (known, count) in enumerate(found):
            if np.abs(np.subtract(known, part.orientation)).max() <= _ANGLE:
                found[n] = (known, count + 1)
                break
        else:
            found.append((part.orientation, 1))
    return found


def _names(slices: Sequence[Slice]) -> str:
    more = f" and {len(slices) - _SHOWN} more" if len(slices) > _SHOWN else ""
    return f"{len(slices)} of them: " + ", ".join(map(str, slices[:_SHOWN])) + more


def _show(values: tuple[float, ...] | None) -> str:
    return "?" if values is None else "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
