"""MetaImage and NRRD through SimpleITK, once the length of their data has been checked (it reads what is missing as 0).

ITK's world axes are LPS; they are turned to RAS here. Arrays are (i, j, k) as in NIfTI.
Formats: https://itk.org/Wiki/ITK/MetaIO/Documentation ; https://teem.sourceforge.net/nrrd/format.html
"""

from __future__ import annotations

import bz2
import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import DataError, FormatError, GeometryError
from medseg.files import require_file
from medseg.volumes_geometry import Geometry, check_affine
from medseg.volumes_gzip import RATIO, too_short
from medseg.volumes_image import Raw
from medseg.volumes_slicer import lay_together, numbered, read_segments, reference_grid, restore

__all__ = ["read_itk", "read_itk_header"]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_META_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4}
_META_BYTES |= {"LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
_HEAD = 1 << 20  # headers are text and short


def read_itk(path: Path, format: str, *, case: str | None = None) -> Raw:
    """Read a MetaImage or NRRD volume; vector pixels are bands, a segmentation of 3D Slicer is one of numbers.

    Raises:
        FormatError: E301, E303 data shorter than the header says, E305, E306, E307.
        GeometryError: E322, E323, E324. DataError: E310 not two or three dimensions.
    """
    import SimpleITK

    path = require_file(path, case=case)
    checksum = _check_length(path, format, case)
    reader = _reader(path, case)
    geometry, bands, dtype = _facts(reader, path, case)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _corrupt(path, case, error) from None
    array = SimpleITK.GetArrayFromImage(image)  # (k, j, i[, band])
    # ITK goes on with zeros when unpacking fails half-way: the bytes must be those that were verified
    if bands == 1 and checksum not in (zlib.crc32(array.data), zlib.crc32(array.byteswap().data)):
        raise _corrupt(path, case, "the voxels read are not those in the file")
    spatial = 3 if len(geometry.shape) == 3 else 2
    array = array.reshape(tuple(reversed(geometry.shape)) + ((bands,) if bands > 1 else ()))
    array = array.transpose(*reversed(range(spatial)), *range(spatial, array.ndim))
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    fields = _own_fields(reader)
    if segments := read_segments(fields, path, case):
        grid, start = reference_grid(fields, geometry)
        flat, notes = lay_together(array, segments, path, case)
        flat = restore(flat, start, grid.shape)
        return Raw(flat, grid, format, {}, bits=dtype.itemsize * 8, notes=notes, segments=numbered(segments, bands))
    kind = "grey" if bands == 1 else "colour" if bands in (3, 4) and array.dtype == np.uint8 else "axis"
    return Raw(array, geometry, format, {}, kind, bits=dtype.itemsize * 8)


def read_itk_header(path: Path, format: str) -> tuple[Geometry, int, np.dtype]:
    """Geometry, bands and type from the header alone."""
    path = require_file(path)
    _check_length(path, format, None)
    reader = _reader(path, None)
    geometry, bands, dtype = _facts(reader, path, None)
    fields = _own_fields(reader)
    if read_segments(fields, path):
        return reference_grid(fields, geometry)[0], 1, dtype
    return geometry, bands, dtype


def _own_fields(reader: Any) -> dict[str, str]:
    """The fields of a header that belong to a segmentation of 3D Slicer."""
    return {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys() if key.startswith("Segment")}


def _reader(path: Path, case: str | None) -> Any:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if path.suffix.lower() in (".mha", ".mhd") else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _corrupt(path, case, error) from None
    return reader


def _facts(reader: Any, path: Path, case: str | None) -> tuple[Geometry, int, np.dtype]:
    import SimpleITK

    size = [int(n) for n in reader.GetSize()]
    bands = int(reader.GetNumberOfComponents())
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    if len(size) not in (2, 3) or min(size) < 1:
        message = "the image has an unusable number of dimensions"
        raise DataError(message, code="E310", case=case, file=path, expected="2 or 3", found=f"size {size}")
    name = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    kinds = {"8-bit": 1, "16-bit": 2, "32-bit": 4, "64-bit": 8}
    width = next((n for key, n in kinds.items() if key in name), 0)
    if not width or "complex" in name or "label" in name:
        raise FormatError("the data type cannot be used", code="E307", case=case, file=path, found=name)
    letter = "f" if "float" in name else "u" if "unsigned" in name else "i"
    ndim = int(reader.GetDimension())
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(ndim, ndim)
    spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin())
    count = min(ndim, 3)
    affine = np.eye(4)
    affine[:count, :count] = direction[:count, :count] * spacing[:count]
    affine[:count, 3] = origin[:count]
    affine = _LPS_TO_RAS @ affine
    problem = check_affine(affine)
    if problem:
        code = "E323" if problem.startswith("is sheared") else "E324" if "spacing" in problem else "E322"
        expected = "finite, invertible, right angles, 0.001 to 100 mm"
        message = f"the image's grid {problem}"
        raise GeometryError(message, code=code, case=case, file=path, expected=expected)
    shape = (*size, 1)[:3]
    return Geometry.of(shape, affine), bands, np.dtype(f"{letter}{width}")


def _check_length(path: Path, format: str, case: str | None) -> int:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if format == "nrrd":
        if not head.startswith(b"NRRD000"):
            raise _not(path, case, "NRRD", head)
        return _check_nrrd(path, head, case)
    if not re.match(rb"\s*\w+ *=", head):
        raise _not(path, case, "MetaImage", head)
    return _check_meta(path, head, case)


def _check_meta(path: Path, head: bytes, case: str | None) -> int:
    fields: dict[str, str] = {}
    position = 0
    for line in head.splitlines(keepends=True):
        position += len(line)
        name, _, value = line.decode("latin-1").partition("=")
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            break
    try:
        sizes = [int(n) for n in fields["DimSize"].split()]
        kind = fields["ElementType"].upper().removeprefix("MET_").removesuffix("_ARRAY")
        bands = int(fields.get("ElementNumberOfChannels", 1))
        source = fields["ElementDataFile"]
        needed = math.prod(sizes) * bands * _META_BYTES[kind]
    except (KeyError, ValueError) as error:
        raise _corrupt(path, case, f"field {error}") from None
    if source.upper().startswith("LIST") or "%" in source:
        raise FormatError("a MetaImage in several files", code="E307", case=case, file=path, fix="save it as .mha")
    if fields.get("BinaryData", "True").lower() != "true":
        raise FormatError("a MetaImage with text data", code="E307", case=case, file=path, fix="save it as binary")
    packed = fields.get("CompressedData", "False").lower() == "true"
    data = _beside(path, source, case) if source.upper() != "LOCAL" else path
    skip = position if data == path else int(fields.get("HeaderSize", 0) or 0)
    if skip < 0:  # the data are the last bytes of their file
        skip = max(0, data.stat().st_size - needed)
    return _check_stream(path, data, skip, needed, "zlib" if packed else "raw", case)


def _check_nrrd(path: Path, head: bytes, case: str | None) -> int:
    end = re.search(rb"\r?\n\r?\n", head)
    text = head[: end.start()] if end else head
    fields = {}
    for line in text.decode("latin-1").splitlines()[1:]:
        name, sign, value = line.partition(":")
        if sign and not value.startswith("=") and not name.startswith("#"):
            fields[name.strip().lower()] = value.strip()
    try:
        sizes = [int(n) for n in fields["sizes"].split()]
        kind, encoding = fields["type"].lower(), fields["encoding"].lower()
    except (KeyError, ValueError) as error:
        raise _corrupt(path, case, f"field {error}") from None
    width = _nrrd_bytes(kind)
    if not width:
        raise FormatError("the data type cannot be used", code="E307", case=case, file=path, found=kind)
    if any(fields.get(key, "0") != "0" for key in ("line skip", "lineskip", "byte skip", "byteskip")):
        raise FormatError("an NRRD that skips bytes", code="E307", case=case, file=path, fix="save it as one .nrrd")
    source = fields.get("data file") or fields.get("datafile")
    if source and (source.upper().startswith("LIST") or "%" in source):
        raise FormatError("an NRRD in several files", code="E307", case=case, file=path, fix="save it as one .nrrd")
    if not source and end is None:
        raise _corrupt(path, case, "no empty line behind the header")
    data = _beside(path, source, case) if source else path
    skip = 0 if source or end is None else end.end()
    names = {"gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2", "raw": "raw"}
    if encoding not in names:
        fix = "save it with raw or gzip encoding"
        raise FormatError("the encoding cannot be verified", code="E307", case=case, file=path, found=encoding, fix=fix)
    return _check_stream(path, data, skip, math.prod(sizes) * width, names[encoding], case)


def _nrrd_bytes(kind: str) -> int:
    plain = kind.replace("unsigned ", "u").replace("signed ", "").replace("_t", "").replace(" int", "").strip()
    table = {"char": 1, "uchar": 1, "int8": 1, "uint8": 1, "short": 2, "ushort": 2, "int16": 2, "uint16": 2}
    table |= {"int": 4, "uint": 4, "int32": 4, "uint32": 4, "float": 4, "double": 8}
    table |= {"longlong": 8, "ulonglong": 8, "long long": 8, "ulong long": 8, "int64": 8, "uint64": 8}
    return table.get(plain, 0)


def _beside(path: Path, name: str, case: str | None) -> Path:
    """A data file named in a header: only one in the header's own folder is opened."""
    if not name or Path(name).name != name:
        message, fix = "the header names a data file in another folder", "put both files into one folder"
        raise FormatError(message, code="E308", case=case, file=path, found=name, fix=fix)
    return require_file(path.parent / name, case=case)


def _check_stream(path: Path, data: Path, skip: int, needed: int, encoding: str, case: str | None) -> int:
    """CRC-32 of the `needed` bytes of data, unpacked."""
    size = data.stat().st_size - skip
    if needed < 1:
        raise _corrupt(path, case, f"{needed} bytes of data")
    if encoding == "raw" and size < needed:
        raise too_short(path, case, needed, size)
    if encoding != "bzip2" and size * RATIO < needed:
        raise too_short(path, case, needed, f"at most {size * RATIO}")
    total = checksum = 0
    try:
        with data.open("rb") as file:
            file.seek(skip)
            for block in _blocks(file, encoding):
                checksum = zlib.crc32(block[: max(0, needed - total)], checksum)
                total += len(block)
                if total > needed:
                    break
    except (zlib.error, EOFError, OSError, ValueError) as error:
        fix = "copy or download the file again"
        message = "the packed data are damaged"
        raise FormatError(message, code="E304", case=case, file=path, found=error, fix=fix) from None
    if total < needed:
        raise too_short(path, case, needed, total)
    if total > needed and encoding != "raw":
        expected, found = f"{needed} bytes", f"{total} bytes or more"
        message = "the data are longer than the header says"
        raise FormatError(message, code="E306", case=case, file=path, expected=expected, found=found)
    return checksum


def _blocks(file: Any, encoding: str) -> Iterator[bytes]:
    """Unpacked blocks to the end of the stream, whose own checksum is verified there."""
    if encoding != "zlib":
        opened = {"raw": lambda: file, "gzip": lambda: gzip.GzipFile(fileobj=file), "bzip2": lambda: bz2.BZ2File(file)}
        source = opened[encoding]()
        while block := source.read(1 << 20):
            yield block
        return
    stream = zlib.decompressobj()
    while not stream.eof:
        packed = stream.unconsumed_tail or file.read(1 << 20)
        if not packed:
            raise EOFError("the stream ends early")
        yield stream.decompress(packed, 1 << 22)


def _not(path: Path, case: str | None, name: str, head: bytes) -> FormatError:
    shown = head[:12].decode("latin-1").strip()
    return FormatError(f"not a {name} (starts with `{shown}`)", code="E301", case=case, file=path)


def _corrupt(path: Path, case: str | None, error: object) -> FormatError:
    text = str(error).strip().splitlines()
    return FormatError("the file is corrupt", code="E305", case=case, file=path, found=text[-1][:200] if text else None)
