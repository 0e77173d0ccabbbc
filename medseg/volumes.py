"""Reading and writing images: NIfTI (verified), DICOM series, MetaImage, NRRD, TIFF, PNG, JPEG, GIF.

Arrays are channel first: (C, i, j, k) for volumes, with k along the slices, (C, row, column) for pictures. What is read
is what is stored, after slope and intercept; whatever was mended is in `Volume.notes`. A file that is cut off, damaged,
ambiguous or of another kind than asked for is refused with a `DataError`; docs/errors.md lists the codes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DataError, FormatError, LabelError, MedsegError
from medseg.volumes_colour import apply_palette, to_channels
from medseg.volumes_geometry import Geometry, Volume, axis_codes, check_pair, reorient
from medseg.volumes_image import Raw
from medseg.volumes_inputs import case_id, find_format, hidden_id, list_inputs, natural_key, same_file
from medseg.volumes_labels import check_values, interpret
from medseg.volumes_raw import read_raw, read_raw_header, read_raw_window
from medseg.volumes_seg import check_segmentable, write_segmentation
from medseg.volumes_slicer import by_name
from medseg.volumes_write import check_suffix, open_label_writer, write_label, write_overlay

__all__ = [
    "Geometry",
    "Volume",
    "axis_codes",
    "case_id",
    "check_pair",
    "check_segmentable",
    "check_suffix",
    "find_format",
    "hidden_id",
    "list_inputs",
    "natural_key",
    "open_label_writer",
    "read_geometry",
    "read_image",
    "read_label",
    "read_window",
    "reorient",
    "same_file",
    "write_label",
    "write_overlay",
    "write_segmentation",
]

_DAMAGED = ("E302", "E303", "E304", "E305")  # empty, cut off, wrong checksum, corrupt
_ANEW = "copy, download or export the file again, or leave its case out"
_STEPS = 256  # numbers between the least and the largest value of an image, as few as of 8 bits


def read_image(
    path: str | Path,
    *,
    dims: int | None = None,
    channels: int | Sequence[str] | None = None,
    colour: str | None = None,
    nan: str | float = "refuse",
    series: str | int | None = None,
    affine: str = "auto",
    case: str | None = None,
) -> Volume:
    """Read an image.

    Args:
        path: file, or folder of a DICOM series.
        dims: 2 or 3 refuses images of the other kind; None takes both. With 2 pages of a TIFF are channels where the
            file calls them so.
        channels: number of channels, or their names. A fourth axis of a volume is only read when it is declared here.
        colour: for pictures and RGB volumes: None as stored, "grey", "luma" or "rgb"; see volumes_colour.
        nan: "refuse", or the number that replaces NaN and infinite values.
        series: which series of a DICOM folder: its number, its id as listed in the refusal, or its UID.
        affine: "sform" or "qform" decides for a NIfTI whose two affines disagree.
        case: id for messages.

    Returns:
        Volume; `array` (C, *spatial) of the stored type, float32 where a scale factor made fractions of integers.

    Raises:
        FormatError: E301 - E309, not readable as what it is named, cut off, damaged, too large.
        DataError: E310 dimensions or channels, E311 NaN, infinite, or beyond single precision, E312 all NaN, E314
            colour, E34x DICOM.
        GeometryError: E32x, an affine that is broken, sheared or ambiguous.

    >>> import nibabel, tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.nii.gz")
    >>> nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([2.0, 2, 3, 1])).to_filename(file)
    >>> image = read_image(file)
    >>> image.array.shape, image.geometry.spacing, image.notes
    ((1, 4, 5, 6), (2.0, 2.0, 3.0), ('E313: the image is constant: 0',))
    """
    path = Path(path)
    raw = _guarded(path, case, lambda: read_raw(path, dims=dims, series=series, affine=affine, case=case))
    wanted = channels if channels is None or isinstance(channels, int) else len(channels)
    array, notes = _to_channel_first(raw, wanted, colour, path, case)
    _check_kind(raw.geometry, dims, path, case)
    if wanted is not None and array.shape[0] != wanted:
        message = "the number of channels differs from what is declared"
        several = wanted > 1 == array.shape[0]
        fix = "give the files of all channels (x_0000, x_0001 ...), or one with all" if several else "convert the image"
        fix += ", or use a model for such images"
        raise DataError(message, code="E310", case=case, file=path, expected=wanted, found=array.shape[0], fix=fix)
    array, more = _check_numbers(array, nan, path, case)
    return Volume(array, raw.geometry, path, raw.format, raw.header, array.shape[0], (*raw.notes, *notes, *more))


def read_label(
    path: str | Path,
    *,
    dims: int | None = None,
    allowed: Collection[int] | None = None,
    ignore: int | None = None,
    mapping: Mapping | str | None = None,
    palette: str = "auto",
    affine: str = "auto",
    names: Mapping[int, str] | None = None,
    case: str | None = None,
) -> Volume:
    """Read a label image: whole numbers, exactly, whatever type they are stored in.

    Args:
        path: file.
        dims: 2 or 3 refuses the other kind.
        allowed: label indices that may occur (after `mapping`).
        ignore: raw value of void voxels.
        mapping: {raw value: index}, {(r, g, b): index} for colour-coded pictures, or "nonzero".
        palette: what a palette picture's values are: "index", "grey" (the palette's grey values) or "auto": grey values
            where the palette holds greys alone, indices where any of its colours, used or not, is none; what does not
            fit `mapping` and `allowed` is read the other way. One-bit pictures are 0 and 1, or 0 and 255 where only
            these are expected.
        names: {index: name} of the labels. The segments of a segmentation of 3D Slicer that bear these names are those
            labels, whatever numbers they have (`mapping` then does not count).
        affine, case: as `read_image`.

    Returns:
        Volume with array (1, *spatial), uint8, int16 or int32.

    Raises:
        LabelError: E330 fractions, E331 negative, E332 not allowed, with values and voxel counts; E334 colour without a
            table. FormatError, GeometryError: as `read_image`.
    """
    path = Path(path)
    raw = _guarded(path, case, lambda: read_raw(path, dims=dims, series=None, affine=affine, case=case, exact=True))
    _check_kind(raw.geometry, dims, path, case)
    spatial = len(raw.geometry.shape)
    notes, segments = raw.notes, raw.segments
    if segments and names:
        table, more = by_name(segments, raw.array, names, path=path, case=case)
        notes = (*notes, *more)
        if table is not None:
            mapping, segments = table, {}
    last: LabelError | None = None
    for array, table in interpret(raw, spatial, mapping, palette, path=path, case=case):
        try:
            label = check_values(array, allowed=allowed, ignore=ignore, mapping=table, path=path, case=case)
        except LabelError as error:
            last = last or error
            continue
        notes = notes if label.any() else (*notes, "E333: the label is empty")
        return Volume(label[None], raw.geometry, path, raw.format, raw.header, 1, notes, segments)
    assert last is not None
    raise last


def read_geometry(
    path: str | Path, *, dims: int | None = None, series: str | int | None = None, affine: str = "auto"
) -> tuple[Geometry, int, np.dtype]:
    """Grid, number of channels (bands of a pixel) and stored type, from the header alone; nothing else is verified.

    `dims` (of a TIFF whose pages are channels) and `affine` (which one of a NIfTI counts): see `read_image`.
    """
    path = Path(path)
    return _guarded(path, None, lambda: read_raw_header(path, dims=dims, series=series, affine=affine))


def read_window(path: str | Path, slices: tuple[slice, ...]) -> np.ndarray:
    """A window of a large TIFF or of a plain `.nii`, without reading the rest of the file.

    Args:
        path: file.
        slices: one per spatial axis: (row, column) for pictures, (i, j, k) for volumes.

    Returns:
        (C, *window), the stored type, no colour conversion; NIfTI values unscaled where slope is 1, else as read_image.

    Raises:
        DataError: E310, the format has no windows (gzip, PNG, JPEG).
    """
    path = Path(path)
    return _guarded(path, None, lambda: read_raw_window(path, slices))


def _guarded(path: Path, case: str | None, action):
    """Whatever a library raises on a damaged file is a refusal of that file."""
    try:
        return action()
    except MedsegError as error:
        if error.fix is None and error.code in _DAMAGED:
            error.fix = _ANEW
        raise
    except MemoryError:
        fix = "read it on a machine with more memory, or in windows"
        raise FormatError("the image does not fit into memory", code="E306", case=case, file=path, fix=fix) from None
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise FormatError(
            "the file is corrupt", code="E305", case=case, file=path, found=found[:300], fix=_ANEW
        ) from error


def _check_kind(geometry: Geometry, dims: int | None, path: Path, case: str | None) -> None:
    if dims is not None and len(geometry.shape) != dims:
        names = {2: "a picture (two dimensions)", 3: "a volume (three dimensions)"}
        found = f"{names[len(geometry.shape)]}, shape {geometry.shape}"
        message = "the image has another number of dimensions than needed"
        fix = f"give {names.get(dims, 'other images')}, or use a model or data set of the other kind"
        raise DataError(
            message, code="E310", case=case, file=path, expected=names.get(dims, dims), found=found, fix=fix
        )


def _to_channel_first(
    raw: Raw, channels: int | None, colour: str | None, path: Path, case: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    array, spatial = raw.array, len(raw.geometry.shape)
    if raw.kind == "palette":
        assert raw.palette is not None
        array = apply_palette(array, raw.palette)
    if raw.kind == "axis":  # a fourth axis of a volume, bands that are no colours: only the user knows what they are
        if spatial == 2 and (colour is not None or channels is None or channels == 1):
            message, fix = "several channels where one is expected", "save one of them as a file"
            found = f"{array.shape[-1]} channels that are no colours"
            more = f"{fix}; to train on all, list them as `channels`, without `colour`, in datasets.yaml"
            raise DataError(message, code="E310", case=case, file=path, expected="1 channel", found=found, fix=more)
        if channels is None or channels == 1:
            raise DataError(
                "a fourth dimension where a volume is expected",
                code="E310",
                case=case,
                file=path,
                expected=f"shape {raw.geometry.shape}",
                found=f"shape {array.shape}",
                fix="save one of its volumes as a file; a model for several channels lists them in its datasets.yaml",
            )
        return np.moveaxis(array, -1, 0), ()
    if raw.kind == "colour" and spatial == 3 and colour is None and channels not in (3, array.shape[-1]):
        message = "a colour volume where grey is expected"
        fix = "save it as a grey volume; to train on colour, `colour: rgb` in datasets.yaml"
        raise DataError(message, code="E314", case=case, file=path, found=f"{array.shape[-1]} values a voxel", fix=fix)
    if spatial == 3 and raw.kind == "grey":
        if colour == "rgb":
            return np.repeat(array[None], 3, axis=0), ()
        return array[None], ()  # no copy: volumes are large
    return to_channels(array, spatial, colour, channels=channels, path=path, case=case)


def _check_numbers(
    array: np.ndarray, nan: str | float, path: Path, case: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    low, high = array.min(), array.max()  # NaN and infinity show here, without a mask of the image's size
    with np.errstate(over="ignore"):  # what single precision cannot hold is infinite in all that follows
        infinite = array.dtype.kind == "f" and not np.isfinite(np.array([low, high], np.float32)).all()
        bad = ~np.isfinite(array.astype(np.float32, copy=False)) if infinite else None
    if bad is not None:
        count = int(np.count_nonzero(bad))
        if count == array.size:
            raise DataError(
                "all voxels are NaN or infinite",
                code="E312",
                case=case,
                file=path,
                found=f"{count} voxels",
                fix="export the image again, or leave its case out",
            )
        first = tuple(int(v[0]) for v in np.nonzero(bad.any(axis=0)))
        what = f"{count} of {array.size} voxels, the first at {first}"
        if isinstance(nan, str):
            fix = "set `nan` in datasets.yaml (data add: --nan) to a number that replaces them; for predict, whose run "
            fix += "keeps what its set said, replace them in the file"
            message = "the image has NaN or infinite voxels"
            raise DataError(message, code="E311", case=case, file=path, expected="finite", found=what, fix=fix)
        array = np.where(bad, array.dtype.type(nan), array)
        return array, (f"E311: NaN or infinite voxels replaced by {nan:g}: {what}",)
    return array, ((f"E313: the image is constant: {low:g}",) if low == high else _coarse(array.dtype, low, high))


def _coarse(kind: np.dtype, low: Any, high: Any) -> tuple[str, ...]:
    """A note where single precision, in which images are computed, has few numbers from the least to the largest."""
    if kind.itemsize < 4 or (kind.kind == "f" and kind.itemsize == 4):
        return ()
    low, high = low.item(), high.item()
    steps = (high - low) / float(np.spacing(np.float32(max(abs(low), abs(high)))))
    if steps >= _STEPS:
        return ()
    text = f"E328: of the values from {low:.15g} to {high:.15g} single precision tells at most {int(steps) + 1} apart"
    return (f"{text}; subtract an offset and save the image anew",)
