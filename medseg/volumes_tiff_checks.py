"""What is verified of a TIFF before its pixels are read: directories, strips and tiles, and the size of the whole."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import FormatError
from medseg.volumes_pictures import check_size

__all__ = ["SMALL", "check_chain", "check_room", "check_segments"]

SMALL = 64 << 20  # bytes below which the ratio is not looked at
_RATIO = 5000  # unpacked bytes per stored byte that no TIFF compression of real use exceeds
_MAX_BYTES = 1 << 36
_MAX_TILE = 1 << 20  # pixels, where the image has no more


def check_chain(path: Path, size: int, case: str | None) -> None:
    """The directories must lie inside the file and each come once: tifffile follows a loop of them for minutes."""
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        big = head[2:4] in (b"+\0", b"\0+")
        count_form, entry, next_form = ("Q", 20, "Q") if big else ("H", 12, "I")
        place = struct.unpack_from(order + next_form, head, 8 if big else 4)[0]
        seen: set[int] = set()
        while place:
            if place in seen or place >= size:
                found = f"directory {len(seen) + 1} at byte {place} of {size}{', again' * (place in seen)}"
                raise FormatError("the TIFF's directories are broken", code="E305", case=case, file=path, found=found)
            seen.add(place)
            file.seek(place)
            count = struct.unpack(order + count_form, file.read(struct.calcsize(count_form)))[0]
            file.seek(place + struct.calcsize(count_form) + count * entry)
            place = struct.unpack(order + next_form, file.read(struct.calcsize(next_form)))[0]


def check_room(pages: list, shape: tuple, bands: int, size: int, path: Path, case: str | None) -> None:
    first = pages[0]
    check_size(path, first.imagelength, first.imagewidth, max(size, 1 << 40 if first.compression == 1 else 0), case)
    needed = int(np.prod(shape, dtype=np.int64)) * bands * max(np.dtype(first.dtype).itemsize, 1)
    if needed > _MAX_BYTES or (needed > SMALL and needed > size * _RATIO):
        message = "the TIFF is too large to be read whole"
        found = f"{needed} bytes from a file of {size}"
        raise FormatError(message, code="E306", case=case, file=path, found=found, fix="read it in windows")


def check_segments(page: Any, size: int, path: Path, case: str | None) -> None:
    """All strips or tiles must lie inside the file, and there must be as many as the size asks for."""
    offsets, counts = page.dataoffsets, page.databytecounts
    rows, columns = page.imagelength, page.imagewidth
    if rows < 1 or columns < 1:
        raise FormatError("the TIFF is corrupt", code="E305", case=case, file=path, found=f"size {columns} x {rows}")
    if page.is_tiled:
        if page.tilelength * page.tilewidth > max(_MAX_TILE, 4 * rows * columns):
            found = f"tiles of {page.tilewidth} x {page.tilelength} for {columns} x {rows} pixels"
            raise FormatError("the TIFF is corrupt", code="E305", case=case, file=path, found=found)
        wanted = -(-rows // max(1, page.tilelength)) * -(-columns // max(1, page.tilewidth))
    else:
        wanted = -(-rows // max(1, min(int(page.rowsperstrip or rows), rows)))
    if int(page.planarconfig) == 2:
        wanted *= int(page.samplesperpixel)
    end = max((o + c for o, c in zip(offsets, counts, strict=False) if c), default=0)
    if end > size:
        expected, found = f"{end} bytes", f"{size} bytes"
        raise FormatError("the TIFF is cut off", code="E303", case=case, file=path, expected=expected, found=found)
    if len(offsets) < wanted or len(counts) < wanted:
        found = f"{min(len(offsets), len(counts))} strips or tiles"
        raise FormatError("the TIFF is corrupt", code="E305", case=case, file=path, expected=wanted, found=found)
    if page.compression == 1 and sum(counts) * 8 < rows * columns * int(page.samplesperpixel) * int(page.bitspersample):
        found = f"{sum(counts)} bytes of pixels"
        raise FormatError("the TIFF is cut off", code="E303", case=case, file=path, found=found)
