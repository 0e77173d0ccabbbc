"""The files that the options of `data add` mean, as paths below the data root."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from medseg.errors import UsageError
from medseg.volumes import natural_key

__all__ = ["below", "expand", "without_labels"]

_SHOWN = 5


def expand(root: Path, pattern: str, option: str) -> list[str]:
    """Files of a pattern, as paths below the root; the pattern is below the root, or a path that leads into it."""
    plain = re.sub(r"\{\w+\}", "*", pattern)
    found = glob.glob(plain, root_dir=root, recursive=True) if not Path(plain).is_absolute() else []
    if not found:
        base = root.resolve()
        paths = [Path(text).resolve() for text in glob.glob(plain, recursive=True)]
        outside = [path for path in paths if not path.is_relative_to(base)]
        if outside:
            fix = "give the folder that holds images and labels with --data"
            raise UsageError(
                "files lie outside the data folder", code="E104", field=option, file=outside[0], expected=base, fix=fix
            )
        found = [path.relative_to(base).as_posix() for path in paths]
    if not found:
        fix = "quote the pattern so that the shell leaves it alone: 'images/*.png'"
        raise UsageError("no file matches", code="E103", field=option, file=root, found=pattern, fix=fix)
    return sorted((Path(text).as_posix() for text in found), key=natural_key)


def below(root: Path, path: str | Path) -> str:
    base = root.resolve()
    for candidate in (base / path, Path(path).resolve()):
        if candidate.exists() and candidate.resolve().is_relative_to(base):
            return candidate.resolve().relative_to(base).as_posix()
    raise UsageError(
        "not inside the data folder, or not there", code="E104", file=path, expected=f"a path below {base}"
    )


def without_labels(images: Sequence[str], labels: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """The images without the files that the pattern of labels finds too, and a note that says so.

    Raises:
        UsageError: E120, no image is left.
    """
    known = set(labels)
    left = [path for path in images if path not in known]
    both = len(images) - len(left)
    if not left:
        fix = f"let {option} find the labels alone: 'folder/*_mask.png'; or give a table with --csv"
        found = ", ".join(images[:_SHOWN]) + (" ..." if both > _SHOWN else "")
        message = f"every file of --images is one of {option} too"
        raise UsageError(message, code="E120", field=option, found=found, fix=fix)
    match = f"{both} files that match both are" if both > 1 else "1 file that matches both is"
    kind = "label" if option == "--labels" else "mask"
    return left, [f"{match} {kind}{'s' * (both > 1)}: taken out of the images"] if both else []
