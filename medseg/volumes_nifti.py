"""The one verified reader of NIfTI-1 and NIfTI-2, plain or gzipped.

nibabel never looks at the gzip checksum and SimpleITK reads what is missing as zeros (both measured). Here the header
is checked before anything of the image's size is allocated, the length and the CRC-32 of the whole stream are verified
in the same pass that unpacks it, and nibabel then interprets the header.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from medseg.errors import DataError, FormatError
from medseg.files import require_file
from medseg.volumes_gzip import is_gzip, too_short, unpack
from medseg.volumes_nifti_header import NiftiHeader, parse_header

__all__ = ["NiftiHeader", "read_nifti", "read_nifti_header", "read_nifti_window"]


def read_nifti_header(path: str | Path, *, affine: str = "auto", case: str | None = None) -> NiftiHeader:
    """Read and check the header and, for plain files, the length; see `read_nifti` for the errors."""
    path = require_file(path, case=case)
    with path.open("rb") as file:
        return parse_header(file, path, affine, case)


def read_nifti(path: str | Path, *, affine: str = "auto", case: str | None = None) -> tuple[np.ndarray, NiftiHeader]:
    """Read and verify a NIfTI file.

    Args:
        path: `.nii` or `.nii.gz`.
        affine: "sform" or "qform" decides where the two disagree or one is broken; "auto" refuses then.
        case: id for messages.

    Returns:
        The voxels as stored, (i, j, k, ...) in Fortran order and native byte order, *not* scaled; colour as a last
        axis.        The header.

    Raises:
        FormatError: E301 no NIfTI, E303 shorter than the header says, E304 checksum, E305 header, E306 too large,
            E307 data type, E308 missing, E309 changed while read.
        GeometryError: E321 sform and qform disagree, E322 affine.
    """
    path = require_file(path, case=case)
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        info = parse_header(file, path, affine, case)
        end = info.offset + info.image_bytes
        if is_gzip(file):
            file.seek(0)
            raw = unpack(file.read(), end, path, case)
            data = raw[info.offset : end]
        else:
            file.seek(info.offset)
            data = np.fromfile(file, np.uint8, info.image_bytes)
            if data.size != info.image_bytes:
                raise too_short(path, case, end, info.offset + data.size)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise FormatError("the file changed while it was read", code="E309", case=case, file=path)
    return _as_array(data, info, info.shape), info


def read_nifti_window(path: str | Path, slices: tuple[slice, ...]) -> np.ndarray:
    """Voxels [slices] of a plain `.nii`, unscaled: only the slabs along the last axis that are needed are read.

    Raises:
        FormatError: as `read_nifti`; E310 for a gzipped file, which has no random access.
    """
    path = require_file(path)
    with path.open("rb") as file:
        info = parse_header(file, path, "auto", None)
        if is_gzip(file):
            fix = "unpack it with gunzip, or read the whole image"
            raise DataError("a gzipped file cannot be read in windows", code="E310", file=path, fix=fix)
        start, stop, step = slices[-1].indices(info.shape[-1])
        slab = info.image_bytes // info.shape[-1]
        file.seek(info.offset + start * slab)
        count = max(stop - start, 0)
        data = np.fromfile(file, np.uint8, count * slab)
        if data.size != count * slab:
            raise too_short(path, None, info.offset + info.image_bytes, info.offset + start * slab + data.size)
    return _as_array(data, info, (*info.shape[:-1], count))[(*slices[:-1], slice(None, None, step))]


def _as_array(data: np.ndarray, info: NiftiHeader, shape: tuple[int, ...]) -> np.ndarray:
    if info.colour:
        return np.moveaxis(data.reshape((info.colour, *shape), order="F"), 0, -1)
    array = data.view(info.dtype) if data.flags.aligned and not info.offset % info.dtype.itemsize else None
    if array is None:
        array = np.frombuffer(data.tobytes(), info.dtype)
    if not array.dtype.isnative:
        array = array.astype(info.dtype.newbyteorder("="))
    return array.reshape(shape, order="F")
