"""The files that the options of `data add` mean, as paths below the data root."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medseg.errors import FormatError, UsageError, counted
from medseg.files import full_suffix, written_suffix
from medseg.volumes import natural_key
from medseg.volumes_inputs import SUFFIXES, closed_folders

__all__ = ["below", "expand", "no_outlines", "other_channels", "without_labels"]

_SHOWN = 5
_OUTLINES = {".json": "JSON (COCO, LabelMe)", ".geojson": "GeoJSON (QuPath)", ".xml": "XML (CVAT, Aperio)",
             ".txt": "text (YOLO)", ".roi": "ImageJ's ROIs", ".zip": "an archive (ImageJ's ROIs)"}  # fmt: skip
OUTLINES_FIX = (
    "draw them into one label image for each image with the program that made them (CVAT: export `Segmentation mask`; "
    "LabelMe: labelme2voc.py; COCO: pycocotools, annToMask), then --images and --labels"
)


def expand(root: Path, pattern: str, option: str) -> tuple[list[str], list[str]]:
    """Files of a pattern as paths below the root, and notes; the pattern is below the root, or a path into it.

    Raises:
        UsageError: E103, nothing matches; E104, files lie outside the root. FormatError: E301, outlines, no images.
    """
    text = _glob_text(pattern, root)
    place = root
    found = glob.glob(text, root_dir=root, recursive=True) if not Path(text).is_absolute() else []
    if not found:
        text, place = _glob_text(pattern, Path()), Path()
        for path in glob.glob(text, recursive=True):
            if (inner := _inner(path, root)) is None:
                fix = "give the folder that holds images and labels with --data"
                message = "files lie outside the data folder"
                raise UsageError(message, code="E104", field=option, file=path, expected=root.resolve(), fix=fix)
            found.append(inner)
    if closed := [*closed_folders(_glob_text(pattern, root), root), *closed_folders(text, place)]:
        message, fix = "a folder cannot be read", "let your user read it, or move it away"
        raise UsageError(message, code="E308", field=option, file=closed[0], found="Permission denied", fix=fix)
    if not found:
        raise _nothing(root, pattern, option)
    found = sorted((Path(path).as_posix() for path in found), key=natural_key)
    if all((root / path).is_dir() for path in found):
        _no_folder(root, found[0], option)
    no_outlines(found, option)
    return found, _left_out(text, place, option)


def no_outlines(paths: Sequence[str], option: str) -> None:
    """Refuse files of outlines, where there is nothing else.

    Raises:
        FormatError: E301, with how to make label images of them.
    """
    kinds = Counter(suffix for path in paths if (suffix := Path(path).suffix.lower()) in _OUTLINES)
    if kinds.total() < len(paths):
        return
    suffix, count = kinds.most_common(1)[0]
    first = next(path for path in paths if path.lower().endswith(suffix))
    message, found = f"annotations in {_OUTLINES[suffix]} are not read", f"{count} of {suffix}"
    raise FormatError(
        message, code="E301", field=option, file=first, expected="label images", found=found, fix=OUTLINES_FIX
    )


def _no_folder(root: Path, folder: str, option: str) -> None:
    """Refuse a folder of image files; one of DICOM slices is an image."""
    files = sorted(path for path in (root / folder).iterdir() if path.is_file())
    suffixes = Counter(map(written_suffix, files))
    known = Counter({text: n for text, n in suffixes.items() if SUFFIXES.get(text.lower(), "dicom") != "dicom"})
    if files and known.total() * 2 <= len(files):
        return
    pattern = f"{folder}/*{known.most_common(1)[0][0]}" if known else f"{folder}/**/*.png"
    held = ", ".join(f"{n} {text or 'without suffix'}" for text, n in suffixes.most_common(_SHOWN))
    message = "a folder stands where a pattern of files is expected"
    raise UsageError(
        message, code="E103", field=option, file=folder, expected="files", found=f"a folder with {held or 'no files'}",
        fix=f"name the files in it: {option} '{pattern}'",
    )  # fmt: skip


def _glob_text(pattern: str, place: Path) -> str:
    """What `glob` has to look for: as long as a part of the path is there, it is a name, even with `[` or `{` in it."""
    parts = Path(pattern).parts
    names = 0
    while names < len(parts) and os.path.exists(place / Path(*parts[: names + 1])):
        names += 1
    return str(Path(*map(glob.escape, parts[:names]), *(re.sub(r"\{\w+\}", "*", part) for part in parts[names:])))


def _any_case(text: str) -> str:
    """The pattern that finds the same files whether their suffix is in capitals or in small letters."""
    suffix = full_suffix(text)
    letters = (f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in suffix)
    return text if glob.has_magic(suffix) else text[: len(text) - len(suffix)] + "".join(letters)


def _left_out(text: str, place: Path, option: str) -> list[str]:
    found = {other: glob.glob(other, root_dir=place, recursive=True) for other in (text, _any_case(text))}
    more = sorted(set(found[_any_case(text)]) - set(found[text]), key=natural_key)
    if not more:
        return []
    shown = ", ".join(more[:_SHOWN]) + (" ..." if len(more) > _SHOWN else "")
    return [f"left out by {option}, because their suffix differs in capitals: {len(more)} ({shown}); rename them"]


def _nothing(root: Path, pattern: str, option: str) -> UsageError:
    other = glob.glob(_any_case(_glob_text(pattern, root)), root_dir=root, recursive=True)
    if other:
        fix = f"write the suffix as the files have it: {min(other, key=natural_key)}"
    elif re.search(r"\{[^}]*,[^}]*\}", pattern):
        fix = "braces are not read: name one kind of file; channels in files of their own go into a table (--csv)"
    elif "[" in pattern:
        fix = "[ab] stands for one character, a or b; for a name with [ write [[]"
    else:
        fix = "quote the pattern so that the shell leaves it alone: 'images/*.png'"
    return UsageError("no file matches", code="E103", field=option, file=root, found=pattern, fix=fix)


def _inner(path: str | Path, root: Path) -> str | None:
    """A path below the root: by its own name, which a link inside the root keeps, or with all links resolved."""
    for change in (os.path.abspath, os.path.realpath):
        target, base = Path(change(path)), Path(change(root))
        if target.is_relative_to(base):
            return target.relative_to(base).as_posix()
    return None


def below(root: Path, path: str | Path, *, links: bool = False) -> str:
    """The path below the root of a folder or file that is named from the root or from the working folder.

    Raises:
        UsageError: E104, not there, or outside of the root, where `links` may lead.
    """
    base = root.resolve()
    linked = False
    for candidate in (root / path, Path(path)):
        inner = _inner(candidate, root)
        if inner is None or not candidate.exists():
            continue
        if links or candidate.resolve().is_relative_to(base):
            return inner
        linked = True
    message = "a link that leads out of the data folder" if linked else "not inside the data folder, or not there"
    fix = "move what it leads to into the data folder, or add --links" if linked else None
    raise UsageError(message, code="E104", file=path, expected=f"a path below {base}", fix=fix)


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


def other_channels(root: Path, images: Sequence[str]) -> list[str]:
    """A note where images are called `..._0000` and files `..._0001` lie beside them, as nnU-Net calls channels."""
    suffix = written_suffix(images[0])
    if not all(path.endswith(f"_0000{suffix}") for path in images):
        return []
    beside = [path[: -len(suffix) - 1] + "1" + suffix for path in images]
    if not (found := [path for path in beside if (root / path).is_file()]):
        return []
    how = "if these are further channels, use --folder, or a table with the columns image_1, image_2"
    return [f"left out by --images: {found[0]} and its like, {counted(len(found), 'file')}; {how}"]
