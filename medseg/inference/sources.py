"""From which files a mask was made: what predict's record beside it tells, to whoever scores it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from medseg import files

__all__ = ["RECORDS", "contents_of", "made_from_others"]

RECORDS = ".medseg"  # hidden, so that no tool takes the records for images
_ENDS = 1 << 16  # bytes at either end of a file


def contents_of(paths: Sequence[Path]) -> list[str] | None:
    """A hash of the length and both ends of each file, the same wherever it lies; None where one is no file (DICOM)."""
    found = []
    try:
        for path in paths:
            with path.open("rb") as file:
                size = path.stat().st_size
                start = file.read(_ENDS)
                file.seek(max(0, size - _ENDS))
                found.append(hashlib.sha256(b"%d:" % size + start + file.read(_ENDS)).hexdigest())
    except OSError:
        return None
    return found


def made_from_others(mask: Path, images: Sequence[Path]) -> bool:
    """Whether predict's record says that this mask was made from other files than `images`; False where none tells."""
    stem = mask.name[: len(mask.name) - len(files.full_suffix(mask))]
    try:
        value = json.loads((mask.parent / RECORDS / f"{stem}.json").read_text(encoding="utf-8"))
        own, sources = value["outputs"][mask.name] == mask.stat().st_size, set(value["contents"])
    except (OSError, ValueError, KeyError, TypeError):  # no record, or one from before this was kept
        return False
    if not own or not sources:
        return False
    now = contents_of(images)
    return bool(now) and not sources & set(now)
