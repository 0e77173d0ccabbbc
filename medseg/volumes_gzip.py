"""Unpacking a gzip stream whose unpacked size is known, verifying every byte in the same pass.

Format: RFC 1952. libdeflate (in imagecodecs) does it at twice zlib's speed where the stream is one whole member; zlib
reads the others (several members, padding) and finds out what is wrong with a damaged one.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import FormatError

__all__ = ["RATIO", "damaged", "is_gzip", "too_short", "unpack", "unpack_start"]

RATIO = 1032  # no deflate stream unpacks to more than this times its size (258 bytes from 2 bits)

_GZIP = b"\x1f\x8b"
_SLACK = 64 << 20  # bytes behind the expected ones that are still verified, not kept
_BLOCK = 1 << 20


def is_gzip(file: Any) -> bool:
    """Whether an open binary file begins like a gzip stream."""
    file.seek(0)
    return file.read(2) == _GZIP


def unpack(packed: bytes, end: int, path: Path, case: str | None = None) -> np.ndarray:
    """The first `end` bytes of the unpacked stream, uint8; length and CRC-32 are verified to the stream's last byte.

    Raises:
        FormatError: E303 fewer than `end` bytes, E304 damaged or without its checksum, E306 far more than `end` bytes.
    """
    from imagecodecs import DeflateError, gzip_decode

    out = np.empty(end, np.uint8)
    # libdeflate wants the exact size, which the last four bytes of a single member state
    if int.from_bytes(packed[-4:], "little") == end & 0xFFFFFFFF:
        try:
            if len(gzip_decode(packed, out=out)) == end:  # type: ignore[arg-type]
                return out
        except (DeflateError, ValueError):
            pass  # several members, or damage: zlib tells which
    _unpack_members(memoryview(packed), out, path, case)
    return out


def unpack_start(packed: bytes, count: int, path: Path, case: str | None = None) -> bytes:
    """The first `count` unpacked bytes, or fewer, out of the first bytes of a stream; members are joined."""
    found = b""
    while packed and len(found) < count:
        stream = zlib.decompressobj(wbits=31)
        try:
            found += stream.decompress(packed, count - len(found))
        except zlib.error as error:
            raise damaged(path, case, error) from None
        packed = stream.unused_data
    return found


def too_short(path: Path, case: str | None, expected: object, found: object) -> FormatError:
    """The error for a file that ends early."""
    return FormatError(
        "the file is shorter than its header says",
        code="E303",
        case=case,
        file=path,
        expected=f"{expected} bytes",
        found=f"{found} bytes",
        fix="copy or download the file again",
    )


def _unpack_members(packed: memoryview, out: np.ndarray, path: Path, case: str | None) -> None:
    end, total, position = out.size, 0, 0
    stream = None
    block: Any = b""
    while True:
        if not block:
            block = packed[position : position + _BLOCK]
            position += len(block)
        if stream is None:  # between members
            if total and not any(packed[position - len(block) :].tobytes()[:_BLOCK]):
                break  # end, or zero padding behind the last member, which gzip allows too
            if bytes(block[:2]) != _GZIP[: len(block)]:
                raise damaged(path, case, "something else behind the gzip stream")
            stream = zlib.decompressobj(wbits=31)
        elif not len(block):
            raise too_short(path, case, end, total) if total < end else damaged(path, case, "cut off")
        try:
            piece = stream.decompress(block, 4 * _BLOCK)
        except zlib.error as error:
            raise damaged(path, case, error) from None
        if total < end:
            take = min(len(piece), end - total)
            out[total : total + take] = np.frombuffer(piece, np.uint8, take)
        total += len(piece)
        if total > end + _SLACK:
            message, found = "the file is much longer than its header says", f"more than {total} bytes"
            raise FormatError(message, code="E306", case=case, file=path, expected=f"{end} bytes", found=found)
        block = stream.unused_data if stream.eof else stream.unconsumed_tail
        if stream.eof:
            stream = None
    if total < end:
        raise too_short(path, case, end, total)


def damaged(path: Path, case: str | None, reason: object) -> FormatError:
    """The error for a stream whose content or checksum is wrong."""
    message = "the gzip stream is damaged: its checksum or its codes are wrong"
    fix = "copy or download the file again"
    return FormatError(message, code="E304", case=case, file=path, found=reason, fix=fix)
