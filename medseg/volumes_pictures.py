"""Reading PNG, JPEG and GIF with Pillow, after the file's own structure has been checked.

Pillow allocates what a header asks for and takes a stream that ends early for a picture in some formats; so the sizes
are read first, and the chunks of a PNG and the ends of JPEG and GIF are verified, before it sees the file.
Formats: PNG (ISO/IEC 15948), JPEG (ITU-T T.81), GIF89a.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medseg.errors import FormatError, MedsegError
from medseg.files import require_file

__all__ = ["MAX_PIXELS", "Picture", "check_size", "picture_size", "read_picture", "sniff_picture"]

MAX_PIXELS = 1 << 29  # read whole; larger ones are read in windows, from TIFF
_BOMB_PIXELS = 179_000_000  # Pillow's own limit: beyond, a file must hold a plausible number of bytes
_BOMB_RATIO = 500  # pixels per byte of file

_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {"png": (_PNG,), "jpeg": (b"\xff\xd8\xff",), "gif": (b"GIF87a", b"GIF89a")}


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        array: (row, column) or (row, column, band), samples as stored: palette indices, 0 and 1 for one bit, 0 to 15
            for four, uint16.
        palette: (n, 3) uint8 colours of the indices, or None.
        format: "png", "jpeg" or "gif".
        bits: per value, as stored.
        orientation: of the EXIF tag, 1 where there is none; the array is as stored, not turned.
    """

    array: np.ndarray
    palette: np.ndarray | None
    format: str
    bits: int
    orientation: int = 1


def sniff_picture(start: bytes) -> str | None:
    """Format of the first bytes of a file: "png", "jpeg", "gif", "tiff" or None."""
    for name, signatures in _SIGNATURES.items():
        if start.startswith(signatures):
            return name
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    return None


def picture_size(path: Path, format: str, case: str | None = None) -> tuple[int, int]:
    """(rows, columns) out of the header alone."""
    with path.open("rb") as file:
        data = file.read(-1 if format == "jpeg" else 1 << 16)  # a JPEG may carry large metadata in front
    rows, columns = _size(data, format, path, case)
    return rows, columns


def check_size(path: Path, rows: int, columns: int, file_bytes: int, case: str | None) -> None:
    """Refuse (E306) a picture that is too large to be read whole, or larger than its file can honestly hold."""
    pixels = rows * columns
    if rows < 1 or columns < 1:
        raise _broken(path, case, f"a size of {columns} x {rows}", "at least 1 x 1")
    if pixels > MAX_PIXELS or (pixels > _BOMB_PIXELS and pixels > file_bytes * _BOMB_RATIO):
        raise FormatError(
            "the picture is too large to be read",
            code="E306",
            case=case,
            file=path,
            expected=f"at most {MAX_PIXELS} pixels, or {_BOMB_RATIO} per byte of the file",
            found=f"{columns} x {rows} = {pixels} pixels in {file_bytes} bytes",
            fix="save it as a tiled TIFF, which is read in windows",
        )


def read_picture(path: str | Path, format: str, *, case: str | None = None) -> Picture:
    """Read a whole picture.

    Raises:
        FormatError: E301 not of `format`, E303 cut off, E304 a wrong checksum, E305 corrupt, E306 too large,
            E310 an animation, E302 and E308 as `require_file`.
    """
    path = require_file(path, case=case)
    data = path.read_bytes()
    rows, columns = _size(data, format, path, case)
    check_size(path, rows, columns, len(data), case)
    if format == "png":
        _check_chunks(data, path, case)
    try:
        return _decode(data, format, path, case)
    except MedsegError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises SyntaxError, struct.error, ValueError, OSError, ... on bad data
        raise _broken(path, case, _plain(error)) from None


def _decode(data: bytes, format: str, path: Path, case: str | None) -> Picture:
    from PIL import Image

    if format == "png" and data[24] == 16 and data[25] != 0:  # Pillow keeps eight of sixteen bits of colour
        from imagecodecs import png_decode

        return Picture(np.asarray(png_decode(data)), None, format, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes have been checked; what remains are remarks about metadata
        image = Image.open(io.BytesIO(data), formats=[format.upper()])
        if getattr(image, "n_frames", 1) > 1:
            found = f"{image.n_frames} frames"
            fix = "save the frames as single files or as a TIFF stack"
            raise FormatError(
                "an animation", code="E310", case=case, file=path, expected="1 frame", found=found, fix=fix
            )
        image.load()
        turned = _orientation(image)
    palette = None
    if image.mode in ("P", "PA"):
        if image.mode == "PA":
            image = image.convert("RGBA")
        else:
            palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    elif image.mode == "I":
        image = image.convert("I;16") if image.getextrema()[1] <= 65535 else image  # type: ignore[operator]
    array = np.asarray(image)
    bits = 1 if image.mode == "1" else array.dtype.itemsize * 8
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if format == "png" and image.mode == "L" and data[24] in (2, 4):  # Pillow stretches them to 0 .. 255
        bits = data[24]
        array = array // np.uint8(255 // ((1 << bits) - 1))
    return Picture(array, palette, format, bits, turned)


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(274, 1))
    except Exception:  # the metadata may be damaged where the picture is sound
        return 1


def _size(data: bytes, format: str, path: Path, case: str | None) -> tuple[int, int]:
    if sniff_picture(data) != format:
        shown = data[:8].decode("latin-1")
        message = f"not a {format.upper()} (starts with `{shown}`)"
        raise FormatError(message, code="E301", case=case, file=path, found=sniff_picture(data), fix="rename the file")
    try:
        if format == "png":
            if data[12:16] != b"IHDR":
                raise _broken(path, case, "no IHDR chunk")
            columns, rows = struct.unpack(">II", data[16:24])
        elif format == "gif":
            columns, rows = struct.unpack("<HH", data[6:10])
        else:
            rows, columns = _jpeg_size(data)
    except (struct.error, IndexError):
        raise FormatError("the picture is cut off in its header", code="E303", case=case, file=path) from None
    return rows, columns


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position = 2
    while True:
        while data[position] != 0xFF:
            position += 1
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        if marker in (0x01, *range(0xD0, 0xDA)):  # without a length
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack(">HH", data[position + 4 : position + 8])  # type: ignore[return-value]
        position += 1 + max(struct.unpack(">H", data[position + 1 : position + 3])[0], 2)


def _check_chunks(data: bytes, path: Path, case: str | None) -> None:
    """Length and CRC of every chunk, and the size of the pixel stream, without decoding a pixel."""
    position = 8
    while True:
        head = data[position : position + 8]
        if len(head) < 8:
            raise FormatError("the PNG is cut off", code="E303", case=case, file=path, found=f"{len(data)} bytes")
        length, kind = struct.unpack(">I4s", head)
        end = position + 12 + length
        if end > len(data):
            expected, found = f"{end} bytes", f"{len(data)} bytes"
            raise FormatError("the PNG is cut off", code="E303", case=case, file=path, expected=expected, found=found)
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != struct.unpack(">I", data[end - 4 : end])[0]:
            message = "a checksum in the PNG is wrong"
            raise FormatError(message, code="E304", case=case, file=path, found=f"chunk {kind.decode('latin-1')}")
        if kind == b"IEND":
            return
        position = end


def _plain(error: Any) -> str:
    return str(error).split("<_io")[0] or type(error).__name__


def _broken(path: Path, case: str | None, found: object, expected: object = None) -> FormatError:
    return FormatError("the picture is corrupt", code="E305", case=case, file=path, expected=expected, found=found)
