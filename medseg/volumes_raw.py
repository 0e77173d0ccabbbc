"""One shape for what the readers of the single formats return, and the choice of the reader."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg.errors import DataError, FormatError
from medseg.volumes_geometry import Geometry
from medseg.volumes_image import Raw
from medseg.volumes_inputs import find_format
from medseg.volumes_nifti import NiftiHeader, read_nifti, read_nifti_header, read_nifti_window
from medseg.volumes_pictures import check_size, picture_size, read_picture

__all__ = ["Raw", "read_raw", "read_raw_header", "read_raw_window"]


def read_raw(
    path: Path,
    *,
    dims: int | None = None,
    series: str | int | None = None,
    affine: str = "auto",
    case: str | None = None,
    exact: bool = False,
) -> Raw:
    """Read an image of any format. `exact` keeps scaled values as float64 (labels)."""
    format = find_format(path, case=case)
    if format == "nifti":
        return _read_nifti(path, dims, affine, case, exact)
    if format in ("metaimage", "nrrd"):
        from medseg.volumes_itk import read_itk

        return read_itk(path, format, case=case)
    if format == "tiff":
        from medseg.volumes_tiff import read_tiff

        raw = read_tiff(path, dims=dims, case=case)
        return replace(raw, notes=(*raw.notes, *_turned(raw.header["orientation"], exact)))
    if format == "dicom":
        from medseg.volumes_dicom import read_series

        return read_series(path, series=series, case=case)
    picture = read_picture(path, format, case=case)
    shape = picture.array.shape[:2]
    kind = "palette" if picture.palette is not None else "colour" if picture.array.ndim == 3 else "grey"
    header, notes = {"bits": picture.bits}, _turned(picture.orientation, exact)
    return Raw(picture.array, Geometry.of(shape), format, header, kind, picture.palette, picture.bits, notes)


def _turned(orientation: int, label: bool) -> tuple[str, ...]:
    """A note on an image that viewers show turned or mirrored; predictions are written on the grid that is stored."""
    if label or orientation not in range(2, 9):
        return ()
    return (
        f"E319: orientation tag {orientation} is not applied, and viewers show the image turned or mirrored: if its "
        "label was drawn so, save the image as it is shown (Pillow: ImageOps.exif_transpose)",
    )


def read_raw_header(
    path: Path, *, dims: int | None = None, series: str | int | None = None, affine: str = "auto"
) -> tuple[Geometry, int, np.dtype]:
    """Geometry, channels and stored type without the voxels."""
    format = find_format(path)
    if format == "nifti":
        info = read_nifti_header(path, affine=affine)
        shape = _volume_shape(info, path, None)
        channels = info.colour or math.prod(info.shape[3:])
        return Geometry.of(shape, info.affine), channels, info.dtype.newbyteorder("=")
    if format in ("metaimage", "nrrd"):
        from medseg.volumes_itk import read_itk_header

        return read_itk_header(path, format)
    if format == "tiff":
        from medseg.volumes_tiff import read_tiff_header

        return read_tiff_header(path, dims=dims)
    if format == "dicom":
        from medseg.volumes_dicom import read_series_header

        return read_series_header(path, series=series)
    rows, columns = picture_size(path, format)
    check_size(path, rows, columns, path.stat().st_size, None)
    if format == "png":
        with path.open("rb") as file:
            depth, colour_type = file.read(26)[24:]
        bands = {0: 1, 2: 3, 4: 2, 6: 4}.get(colour_type, 1)
        return Geometry.of((rows, columns)), bands, np.dtype(np.uint16 if depth == 16 else np.uint8)
    from PIL import Image

    with Image.open(path, formats=[format.upper()]) as image:
        return Geometry.of((rows, columns)), 1 if image.mode == "P" else len(image.getbands()), np.dtype(np.uint8)


def read_raw_window(path: Path, slices: tuple[slice, ...]) -> np.ndarray:
    """(C, *window) of a TIFF or a plain NIfTI."""
    format = find_format(path)
    if format == "tiff":
        from medseg.volumes_tiff import read_tiff_window

        return read_tiff_window(path, slices)
    if format == "nifti":
        info = read_nifti_header(path)
        if len(info.shape) != 3 or info.colour or len(slices) != 3:
            message = "only grey volumes are read in windows, by three slices"
            raise DataError(message, code="E310", file=path, found=f"shape {info.shape}, {len(slices)} slices")
        array, _ = _scaled(read_nifti_window(path, slices), info, path, None, exact=False)
        return array[None]
    fix = "save it as a tiled TIFF, or read the whole image"
    raise DataError("this format cannot be read in windows", code="E310", file=path, found=format, fix=fix)


def _read_nifti(path: Path, dims: int | None, affine: str, case: str | None, exact: bool) -> Raw:
    info = read_nifti_header(path, affine=affine, case=case)
    shape = _volume_shape(info, path, case)
    if dims == 2:
        expected, found = "a picture (two dimensions)", f"a volume, shape {shape}"
        message = "the image has another number of dimensions than needed"
        fix = "save its slices as pictures (PNG, TIFF), or use a model or data set of volumes"
        raise DataError(message, code="E310", case=case, file=path, expected=expected, found=found, fix=fix)
    array, info = read_nifti(path, affine=affine, case=case)
    kind, notes = "grey", info.notes
    if info.colour:
        kind = "colour"
        array = array.reshape((*shape, info.colour))
    else:
        array, more = _scaled(array, info, path, case, exact=exact)
        notes += more
        if len(info.shape) > 3:
            kind = "axis"
            array = array.reshape((*shape, -1), order="F")
        else:
            array = array.reshape(shape, order="F")
    return Raw(
        array, Geometry.of(shape, info.affine), "nifti", info.header, kind, bits=info.dtype.itemsize * 8, notes=notes
    )


def _volume_shape(info: NiftiHeader, path: Path, case: str | None) -> tuple[int, int, int]:
    axes = [n for n in info.shape[3:] if n > 1]
    if len(info.shape) < 2 or len(axes) > 1:
        found = f"shape {info.shape}"
        message = "the image has an unusable number of dimensions"
        raise DataError(message, code="E310", case=case, file=path, expected="2, 3 or 4", found=found)
    i, j, k = (*info.shape, 1)[:3]
    return i, j, k


def _scaled(
    array: np.ndarray, info: NiftiHeader, path: Path, case: str | None, *, exact: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Stored values times slope plus intercept (NIfTI: a slope of 0 or NaN means none); integers stay integers."""
    slope, inter = float(info.header["scl_slope"]), float(info.header["scl_inter"])
    if not math.isfinite(slope) or slope == 0:
        return array, ()
    if not math.isfinite(inter):
        raise FormatError(
            "the header is invalid: scl_inter", code="E305", case=case, file=path, field="scl_inter", found=inter
        )
    if slope == 1 and inter == 0:
        return array, ()
    if slope == 1 and inter == int(inter) and array.dtype.kind in "iu" and array.size:
        low, high = int(array.min()) + int(inter), int(array.max()) + int(inter)
        if low >= -(2**31) and high < 2**31:
            kind = np.int16 if low >= -(2**15) and high < 2**15 else np.int32
            return array.astype(kind) + kind(inter) if abs(inter) < 2**15 else array.astype(np.int32) + int(inter), ()
    out = np.empty(array.shape, np.float64 if exact or array.dtype.itemsize > 4 else np.float32, order="F")
    for k in range(array.shape[-1]):  # slab by slab, so that no float64 copy of the whole is made
        out[..., k] = array[..., k].astype(np.float64) * slope + inter
    return out, ()
