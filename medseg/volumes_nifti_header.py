"""The header of a NIfTI file, checked before anything of the image's size is allocated, and its affine.

Which affine counts: the sform when it is coded, else the qform when it is coded, else pixdim alone (as nibabel). Where
both are coded and lie more than half a voxel apart, or the one that counts is broken, the file is refused, naming both;
`affine="sform"` or `"qform"` decides. A valid sform beats an invalid pixdim.

Format: https://nifti.nimh.nih.gov/nifti-1 and /nifti-2.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medseg.errors import FormatError, GeometryError, UsageError
from medseg.volumes_geometry import SHIFT_TOLERANCE, check_affine, corner_shift
from medseg.volumes_gzip import RATIO, is_gzip, too_short, unpack_start

__all__ = ["NiftiHeader", "affines_of", "parse_header"]

_MAGIC = {348: (b"n+1\0", b"ni1\0"), 540: (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}
_HEAD = 1024  # more than any header
_REFUSED_TYPES = {1: "binary (1 bit)", 32: "complex64", 1536: "float128", 1792: "complex128", 2048: "complex256"}
_COLOUR_TYPES = {128: 3, 2304: 4}  # RGB24, RGBA32
_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}


class NiftiHeader(NamedTuple):
    """What is known before the voxels are read.

    Attributes:
        header: nibabel header, in the file's byte order.
        shape: all axes, as stored, without trailing ones after the third.
        affine: 4x4, mm.
        dtype: of one stored element, in the file's byte order.
        colour: 0, or 3 or 4 values per voxel.
        offset: byte at which the voxels begin.
        notes: what was done and should be told.
    """

    header: Any
    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype
    colour: int
    offset: int
    notes: tuple[str, ...]

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize * max(self.colour, 1)


def parse_header(file: Any, path: Path, affine: str, case: str | None) -> NiftiHeader:
    """Read and check the header of an open file, and the length of a plain one.

    Raises:
        FormatError: E301, E303, E304, E305, E307.
        GeometryError: E321, E322, E323, E324.
    """
    import nibabel

    size = os.fstat(file.fileno()).st_size
    packed = is_gzip(file)
    named_packed = path.name.lower().endswith(".gz")
    file.seek(0)
    start = file.read(1 << 16)
    if packed:
        start = unpack_start(start, _HEAD, path, case)
    elif named_packed and int.from_bytes(start[:4], "little") not in _MAGIC:
        raise _not_nifti(path, case, start)
    hdr_size, order = _byte_order(start)
    if not hdr_size:
        raise _not_nifti(path, case, start)
    if len(start) < hdr_size + 4:
        raise too_short(path, case, hdr_size + 4, len(start))
    magic = start[344:348] if hdr_size == 348 else start[4:12]
    single, pair = _MAGIC[hdr_size]
    if magic != single:
        what = "this is one half of a two-file NIfTI" if magic == pair else "the NIfTI magic is wrong"
        fix = "convert it to one .nii.gz file"
        raise FormatError(what, code="E305", case=case, file=path, field="magic", expected=single, found=magic, fix=fix)
    if named_packed and not packed:
        fix = "compress it with gzip, or rename it to .nii"
        raise FormatError("named .gz but not compressed", code="E301", case=case, file=path, fix=fix)
    kind: Any = nibabel.Nifti1Header if hdr_size == 348 else nibabel.Nifti2Header
    header: Any = kind(start[:hdr_size], endianness=order, check=False)

    shape = _shape(header, path, case)
    dtype, colour = _dtype(header, path, case)
    offset = header["vox_offset"].item()
    least = hdr_size + 4
    if not math.isfinite(offset) or offset != int(offset) or offset < least:
        raise _bad(path, case, "vox_offset", f"a whole number >= {least}", f"{offset:g}")
    offset = int(offset)
    needed = offset + math.prod(shape) * dtype.itemsize * max(colour, 1)
    if not packed and size < needed:
        raise too_short(path, case, f"{needed} ({_sizes(shape, dtype, colour)})", size)
    if packed and size * RATIO < needed:
        raise too_short(
            path, case, f"{needed} ({_sizes(shape, dtype, colour)})", f"at most {size * RATIO}, from {size} compressed"
        )
    chosen, notes = _affine(header, shape, affine, path, case)
    if not packed and size > needed:
        notes += (f"E303: {size - needed} bytes behind the image are ignored",)
    return NiftiHeader(header, shape, chosen, dtype, colour, offset, notes)


def _sizes(shape: tuple[int, ...], dtype: np.dtype, colour: int) -> str:
    return " x ".join(map(str, shape)) + f" of {'colour' if colour else dtype.name}"


def _byte_order(start: bytes) -> tuple[int, str]:
    for order, sign in (("little", "<"), ("big", ">")):
        value = int.from_bytes(start[:4], order)  # type: ignore[arg-type]
        if value in _MAGIC:
            return value, sign
    return 0, "<"


def _shape(header: Any, path: Path, case: str | None) -> tuple[int, ...]:
    dim = [int(v) for v in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise _bad(path, case, "dim", "1 to 7 dimensions", f"dim[0] = {dim[0]}")
    shape = dim[1 : dim[0] + 1]
    if min(shape) < 1:
        raise _bad(path, case, "dim", "sizes of at least 1", f"dim = {' x '.join(map(str, shape))}")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _dtype(header: Any, path: Path, case: str | None) -> tuple[np.dtype, int]:
    code = int(header["datatype"])
    if code in _COLOUR_TYPES:
        return np.dtype(np.uint8), _COLOUR_TYPES[code]
    expected = "an integer or real type of up to 64 bits"
    if code in _REFUSED_TYPES:
        raise FormatError(
            f"voxels of type {_REFUSED_TYPES[code]} cannot be used",
            code="E307",
            case=case,
            file=path,
            field="datatype",
            expected=expected,
            found=f"{_REFUSED_TYPES[code]} (code {code})",
        )
    try:
        dtype = header.get_data_dtype()
    except Exception:  # nibabel raises what it likes for a code it does not know
        dtype = None
    if dtype is None or dtype.kind not in "iuf":
        raise FormatError(
            "the data type is unknown",
            code="E307",
            case=case,
            file=path,
            field="datatype",
            expected=expected,
            found=f"code {code}",
        )
    bits = int(header["bitpix"])
    if bits != dtype.itemsize * 8:
        raise _bad(path, case, "bitpix", f"{dtype.itemsize * 8} for {dtype.name}", bits)
    return dtype, 0


def _affine(
    header: Any, shape: tuple[int, ...], choice: str, path: Path, case: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine in mm. Order: sform when coded, else qform when coded, else pixdim alone (as nibabel)."""
    unit = _UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    candidates = affines_of(header, shape, choice)
    wrong = {name: "cannot be computed" if m is None else check_affine(m) for name, m in candidates.items()}
    notes: tuple[str, ...] = () if unit == 1.0 else (f"E324: lengths are stored in units of {unit:g} mm; converted",)
    if choice not in ("auto", "sform", "qform"):
        raise UsageError("unknown affine choice", field="affine", expected='"auto", "sform" or "qform"', found=choice)
    if choice != "auto":
        if wrong[choice]:
            raise _bad_affine(path, case, choice, wrong, candidates)
        return _sure(candidates[choice]), notes
    # a sform that stands by itself beats a broken pixdim; a broken sform is a question for the user
    if "sform" in wrong and not wrong["sform"]:
        if wrong.get("qform"):
            if _pixdim_broken(header):
                return _sure(candidates["sform"]), (*notes, "E322: pixdim is invalid; the sform is used")
            raise _bad_affine(path, case, "qform", wrong, candidates)
    elif any(wrong.values()):
        raise _bad_affine(path, case, next(name for name, text in wrong.items() if text), wrong, candidates)
    if len(candidates) == 2:
        sform, qform = _sure(candidates["sform"]), _sure(candidates["qform"])
        shift = corner_shift(shape, sform, qform)
        if shift > SHIFT_TOLERANCE:
            raise GeometryError(
                f"sform and qform disagree by up to {shift:.2f} voxels",
                code="E321",
                case=case,
                file=path,
                field="sform, qform",
                expected=f"at most {SHIFT_TOLERANCE} voxels apart",
                found=f"sform {_show(sform)}; qform {_show(qform)}",
                fix='decide: affine "sform" or "qform" (datasets.yaml; data add: --affine), or mend the header',
            )
    return _sure(next(iter(candidates.values()))), notes


def affines_of(header: Any, shape: tuple[int, ...], choice: str = "auto") -> dict[str, np.ndarray | None]:
    """The affines that a header states, in mm: "sform" and "qform" where coded (or chosen), else "pixdim"."""
    unit = _UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    scale = np.diag([unit, unit, unit, 1.0])
    found: dict[str, np.ndarray | None] = {}
    if int(header["sform_code"]) > 0 or choice == "sform":
        found["sform"] = scale @ np.asarray(header.get_sform(), dtype=np.float64)
    if int(header["qform_code"]) > 0 or choice == "qform":
        found["qform"] = _qform(header, scale)
    return found or {"pixdim": _pixdim(header, shape, scale)}


def _qform(header: Any, scale: np.ndarray) -> np.ndarray | None:
    try:
        with np.errstate(all="ignore"):
            return scale @ np.asarray(header.get_qform(), dtype=np.float64)
    except Exception:  # nibabel: negative pixdim, quaternion longer than 1
        return None


def _pixdim(header: Any, shape: tuple[int, ...], scale: np.ndarray) -> np.ndarray:
    # nibabel's base affine: x to the left, centre of the grid at the origin
    sizes = np.ones(3)
    sizes[: min(len(shape), 3)] = np.asarray(header["pixdim"], dtype=np.float64)[1 : min(len(shape), 3) + 1]
    if (sizes < 0).any():
        sizes = np.full(3, np.nan)
    matrix = np.diag([-sizes[0], sizes[1], sizes[2], 1.0])
    matrix[:3, 3] = -matrix[:3, :3] @ ((np.array((*shape, 1, 1)[:3]) - 1) / 2)
    return scale @ matrix


def _pixdim_broken(header: Any) -> bool:
    sizes = np.asarray(header["pixdim"], dtype=np.float64)[1:4]
    return not (np.isfinite(sizes) & (sizes > 0)).all()


def _sure(affine: np.ndarray | None) -> np.ndarray:
    assert affine is not None
    return affine


def _show(matrix: np.ndarray | None) -> str:
    if matrix is None:
        return "none"
    return "[" + "; ".join(" ".join(f"{v:.5g}" for v in row) for row in np.asarray(matrix)[:3]) + "]"


def _bad_affine(path: Path, case: str | None, name: str, wrong: dict, candidates: dict) -> GeometryError:
    text = wrong[name]
    singular = text.startswith("is singular")
    code = "E323" if text.startswith("is sheared") else "E324" if "spacing" in text and not singular else "E322"
    other = next((key for key in candidates if key != name and not wrong[key]), None)
    fix = (
        f'the {other} is valid: affine "{other}" (datasets.yaml; data add: --affine) uses it'
        if other
        else "mend the header"
    )
    found = "; ".join(f"{key} {wrong[key] or 'is valid'} {_show(matrix)}" for key, matrix in candidates.items())
    expected = "finite, invertible, right angles, 0.001 to 100 mm"
    message = f"the {name} {text}"
    return GeometryError(message, code=code, case=case, file=path, field=name, expected=expected, found=found, fix=fix)


def _not_nifti(path: Path, case: str | None, start: bytes) -> FormatError:
    shown = start[:12].decode("latin-1").strip()
    message = f"not a NIfTI (starts with `{shown}`)"
    return FormatError(message, code="E301", case=case, file=path, fix="look at the file; download it again")


def _bad(path: Path, case: str | None, field: str, expected: object, found: object) -> FormatError:
    message = f"the header is invalid: {field}"
    return FormatError(message, code="E305", case=case, file=path, field=field, expected=expected, found=found)
