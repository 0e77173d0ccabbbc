"""DICOM series: one folder, one volume, or a refusal that lists what is in it.

Slices are sorted by position, never by name or number; each gets its own rescale slope and intercept. The grid must be
regular: a missing, doubled, tilted or differently sized slice would silently deform the patient. DICOM's LPS axes
become RAS+. Arrays are (i, j, k): i along a row of pixels, j down the rows, k along the normal of the slices.

Nothing that identifies a patient leaves this module: messages name slices by instance number and place in the folder,
not by file name or UID, and case ids are keyed hashes.
Source: DICOM PS3.3 C.7.6.2 (Image Plane), C.11.1 (Modality LUT).
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DataError, FormatError, MedsegError, collect
from medseg.files import require_file, sha256_file
from medseg.volumes_dicom_grid import Slice, find_grid
from medseg.volumes_geometry import Geometry
from medseg.volumes_image import Raw

__all__ = ["read_series", "read_series_header", "scan_series", "series_id"]

_KEY = b"medseg case id"  # a keyed hash hides the UID from readers of results; it is a pseudonym, not a secret
_MAX_PIXELS = 1 << 26  # per slice; the largest detectors have a quarter of it
_BOMB_RATIO = 1000  # pixels per byte of a compressed file
_TAGS = [
    "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "Modality", "ImageType", "Rows", "Columns", "PixelSpacing",
    "ImagePositionPatient", "ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation",
    "NumberOfFrames", "BitsAllocated", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "SliceThickness",
    "SpacingBetweenSlices",
]  # fmt: skip


@dataclass(frozen=True)
class _Series:
    id: str
    uid: str
    number: str
    slices: tuple[Slice, ...]

    def __str__(self) -> str:
        sizes = sorted({f"{s.columns}x{s.rows}" for s in self.slices})
        kinds = sorted({s.kind for s in self.slices})
        number = f"number {self.number}, " if self.number else ""
        planes = sorted({s.plane for s in self.slices} - {""})
        facts = ["/".join(kinds), f"{len(self.slices)} images", "/".join(sizes), *planes]
        return f"{self.id} ({number}{', '.join(facts)})"


def read_series(path: Path, *, series: str | int | None = None, case: str | None = None) -> Raw:
    """Read the volume of a folder of DICOM files, or a single file as a volume of one slice.

    Args:
        path: folder (files in it, not below it) or file.
        series: series number, id as listed, or UID, where the folder holds several.
        case: id for messages.

    Raises:
        DataError: E340 no images, E341 several series, E349 localizer or multi-frame, E314 colour.
        GeometryError: E342 missing slice or uneven spacing, E343 two slices at one place, E344 mixed orientations,
            E345 gantry tilt, E346 changing size or pixel spacing, E347 no position, E322 ff. affine.
        FormatError: E348 pixels cut off or not decodable.
    """
    chosen = _choose(scan_series(path, case=case), series, path, case)
    slices, geometry, notes = find_grid(chosen.slices, path, case)
    parts, problems = [], []
    for part in slices:
        try:
            parts.append(_pixels(part, path, case))
        except MedsegError as error:
            problems.append(error)
    if problems:
        raise collect(problems)
    array, more = _rescale(parts, slices)
    header = {"files": tuple(part.path.name for part in slices)}
    return Raw(array, geometry, "dicom", header, "grey", bits=array.dtype.itemsize * 8, notes=(*notes, *more))


def read_series_header(path: Path, *, series: str | int | None = None) -> tuple[Geometry, int, np.dtype]:
    """Geometry, channels (1) and stored type, without the pixels."""
    chosen = _choose(scan_series(path), series, path, None)
    slices, geometry, _ = find_grid(chosen.slices, path, None)
    return geometry, 1, np.dtype(f"{'i' if slices[0].signed else 'u'}{max(slices[0].bits // 8, 1)}")


def series_files(path: Path, *, series: str | int | None = None) -> list[Path]:
    """The files of the chosen series, in the order of their names."""
    return [part.path for part in _choose(scan_series(path), series, path, None).slices]


def series_id(path: Path) -> str:
    """`dicom-` and twelve digits of a keyed hash of the series' UID: of the first image by name when there are several.

    A series whose UIDs were removed is known by the content of its first file.
    """
    for file in _files(path):
        found = _read_slice(file, 0)
        if found is not None:
            return _hashed(found)
    raise DataError("no DICOM images", code="E340", file=path)


def scan_series(path: Path, *, case: str | None = None) -> list[_Series]:
    """The series in a folder, from the headers of its files.

    Raises:
        DataError: E340 no DICOM image; a file named .dcm that is none.
    """
    groups: dict[str, list[Slice]] = {}
    broken = []
    for place, file in enumerate(_files(path)):
        try:
            found = _read_slice(file, place)
        except MedsegError as error:
            error.case, error.file = case, str(path)
            broken.append(error)
            continue
        if found is not None:
            groups.setdefault(found.series_uid, []).append(found)
    if broken:
        raise collect(broken)
    if not groups:
        raise DataError("no DICOM images", code="E340", case=case, file=path, found=f"{len(_files(path))} files")
    return [
        _Series(_hashed(slices[0]), uid, slices[0].series_number, tuple(slices))
        for uid, slices in sorted(groups.items())
    ]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [require_file(path)]
    try:
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise FormatError("the folder cannot be read", code="E308", file=path, found=error.strerror) from None


def _hashed(part: Slice) -> str:
    text = part.series_uid or f"content {sha256_file(part.path)}"
    return "dicom-" + hashlib.blake2b(text.encode(), key=_KEY, digest_size=6).hexdigest()


def _choose(found: list[_Series], series: str | int | None, path: Path, case: str | None) -> _Series:
    listed = "; ".join(str(part) for part in found)
    if series is None:
        if len(found) == 1:
            return found[0]
        message = f"{len(found)} DICOM series in one folder"
        fix = f'choose one: --series {found[0].id} (Python: series="..."), or give each its own folder'
        raise DataError(message, code="E341", case=case, file=path, expected="1 series", found=listed, fix=fix)
    wanted = str(series)
    matches = [part for part in found if wanted in (part.id, part.number, part.uid)]
    if len(matches) != 1:
        message = "the series asked for is not there" if not matches else "several series have this number"
        raise DataError(
            message, code="E341", case=case, file=path, field="series", found=listed, fix="name one by its id"
        )
    return matches[0]


def _read_slice(file: Path, place: int) -> Slice | None:
    """Header facts of a DICOM image; None for a file that is none."""
    import pydicom

    with file.open("rb") as opened:
        is_dicom = opened.read(132)[128:] == b"DICM"
    if not is_dicom:
        if file.suffix.lower() == ".dcm":
            found = f"file {place + 1} in order of name"
            raise FormatError("a file named .dcm is not DICOM", code="E340", found=found)
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            if "Rows" not in data or "Columns" not in data:
                kind = pydicom.uid.UID(data.file_meta.MediaStorageSOPClassUID).name
                if "Storage" in kind and "Image" not in kind:
                    return None  # DICOMDIR, reports, structure sets
                raise ValueError("no image size")  # an image that ends before it
            return _facts(data, file, place)
    except Exception as error:  # pydicom raises what it likes on bad headers
        found = f"file {place + 1} in order of name: {type(error).__name__}"
        raise FormatError("a DICOM header cannot be read", code="E340", found=found) from None


def _facts(data: Any, file: Path, place: int) -> Slice:
    def numbers(name: str, count: int) -> tuple[float, ...] | None:
        values = data.get(name)
        if values is None or values == "":
            return None
        values = [
            float(v) for v in (values if hasattr(values, "__len__") and not isinstance(values, str) else [values])
        ]
        return tuple(values) if len(values) == count and np.isfinite(values).all() else None

    def one(name: str, default: float) -> float:
        values = numbers(name, 1)
        return values[0] if values else default

    kind = str(data.get("Modality") or "image")
    types = data.get("ImageType") or []
    types = [types] if isinstance(types, str) else [str(t).upper() for t in types]
    return Slice(
        path=file,
        place=place,
        series_uid=str(data.get("SeriesInstanceUID") or ""),
        series_number=str(data.get("SeriesNumber") if data.get("SeriesNumber") is not None else ""),
        instance=str(data.get("InstanceNumber") if data.get("InstanceNumber") is not None else "?"),
        kind=f"{kind if kind.isalnum() and len(kind) <= 16 else 'image'}{' LOCALIZER' if 'LOCALIZER' in types else ''}",
        rows=int(data.Rows),
        columns=int(data.Columns),
        pixel_spacing=numbers("PixelSpacing", 2),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        thickness=one("SpacingBetweenSlices", one("SliceThickness", 0.0)),
        samples=int(one("SamplesPerPixel", 1)),
        frames=int(one("NumberOfFrames", 1)),
        bits=int(one("BitsAllocated", 16)),
        signed=bool(one("PixelRepresentation", 0)),
        slope=one("RescaleSlope", 1.0),
        intercept=one("RescaleIntercept", 0.0),
        inverted=str(data.get("PhotometricInterpretation") or "") == "MONOCHROME1",
    )


def _pixels(part: Slice, path: Path, case: str | None) -> np.ndarray:
    """Stored values (rows, columns) of one slice."""
    import pydicom

    def refuse(found: object) -> FormatError:
        message = f"the pixels of {part} are cut off or cannot be decoded"
        return FormatError(message, code="E348", case=case, file=path, found=found, fix="export the series again")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(part.path)
            size = len(data.PixelData)
            pixels = part.rows * part.columns
            packed = data.file_meta.TransferSyntaxUID.is_compressed
            if pixels > _MAX_PIXELS or (packed and pixels > size * _BOMB_RATIO):
                raise refuse(f"{part.columns} x {part.rows} pixels from {size} bytes")
            if not packed and size < pixels * part.bits // 8:
                raise refuse(f"{size} of {pixels * part.bits // 8} bytes")
            array = np.asarray(data.pixel_array)
    except MedsegError:
        raise
    except Exception as error:  # decoders raise what they like
        raise refuse(type(error).__name__) from None
    if array.shape != (part.rows, part.columns) or array.dtype.kind not in "iu":
        raise refuse(f"{array.dtype} of shape {array.shape}")
    return array


def _rescale(parts: list[np.ndarray], slices: list[Slice]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(i, j, k): stored value times slope plus intercept, slice by slice; whole numbers stay integers."""
    columns, rows = parts[0].shape[1], parts[0].shape[0]
    whole = all(s.slope == int(s.slope) and s.intercept == int(s.intercept) for s in slices)
    low = min(
        min(int(p.min()) * s.slope, int(p.max()) * s.slope) + s.intercept for p, s in zip(parts, slices, strict=True)
    )
    high = max(
        max(int(p.min()) * s.slope, int(p.max()) * s.slope) + s.intercept for p, s in zip(parts, slices, strict=True)
    )
    kind: Any = np.float32
    if whole and -(2**31) <= low <= high < 2**31:
        kind = np.int16 if -(2**15) <= low <= high < 2**15 else np.int32
    out = np.empty((columns, rows, len(parts)), kind, order="F")
    for k, (part, facts) in enumerate(zip(parts, slices, strict=True)):
        out[..., k] = (part.astype(np.float64) * facts.slope + facts.intercept).T
    inverted = any(s.inverted for s in slices)
    return out, (("E314: MONOCHROME1: low values are bright; they are left as stored",) if inverted else ())
