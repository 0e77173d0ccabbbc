"""Which label belongs to which image, and the patterns with `{id}` that say so, found out from the files' names.

Both lists are taken apart in the same way: folders that are alike for all files are fixed text, folders that differ are
part of the id, and of the file's name as much is fixed text as has to be for the ids of images and labels to be equal.

    images/a_1.png      labels/a_1_mask.png      ->  images/{id}.png        labels/{id}_mask.png
    p1/ct.nii.gz        p1/seg.nii.gz            ->  {id}/ct.nii.gz         {id}/seg.nii.gz
    day1/img/3.tif      day1/msk/3.tif           ->  {folder}/img/{name}.tif  {folder}/msk/{name}.tif
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import UsageError, counted
from medseg.files import written_suffix

__all__ = ["instance_pattern", "no_signs", "pair_patterns"]

_SHOWN = 5
_CANDIDATES = 12  # cuts tried at each end of a name; more would only make ids shorter


@dataclass(frozen=True)
class _Side:
    """One list of files, taken apart: fixed folders and None for those that differ, and the values of these."""

    what: str
    paths: list[str]
    folders: list[str | None]
    keys: list[tuple[str, ...]]  # the folders that differ, for each file
    names: list[str]  # the files' names without folder and suffix
    suffix: str

    def pattern(self, prefix: str, suffix: str, placeholders: Sequence[str]) -> str:
        """The pattern, given the fixed text around the id in the name, and what each varying part is called.

        Raises:
            UsageError: E120, the fixed text holds what means something in a pattern.
        """
        for fixed in (*self.folders, "" if prefix == "*" else prefix, suffix, self.suffix):
            no_signs(fixed or "", self.what, self.paths[0])
        left = list(placeholders)
        parts = [folder if folder is not None else f"{{{left.pop(0)}}}" for folder in self.folders]
        name = f"{prefix}{{{left.pop(0)}}}{suffix}" if left else prefix
        return "/".join([*parts, name + self.suffix])


def pair_patterns(images: Sequence[str], labels: Sequence[str]) -> tuple[str, str]:
    """The patterns of images and labels.

    Args:
        images, labels: paths below the data root, with `/`.

    Raises:
        UsageError: E120, no rule pairs them, several labels for an image, or several kinds of files in one list.

    >>> pair_patterns(["img/a_1.png", "img/a_2.png"], ["msk/a_1_mask.png", "msk/a_2_mask.png"])
    ('img/{id}.png', 'msk/{id}_mask.png')
    """
    sides = _take_apart("images", images), _take_apart("labels", labels)
    best: tuple[int, int] | None = None
    chosen = None
    left, right = sides
    cuts = {side.what: _cuts(side) for side in sides}
    for first in cuts["images"]:
        keys = _keys(left, *first)
        known = set(keys)
        if len(known) < len(keys):
            continue  # two images with one id
        for second in cuts["labels"]:
            others = _keys(right, *second)
            if len(set(others)) < len(others):
                continue
            common = known.intersection(others)
            if not common:
                continue
            # most pairs first; among these the longest ids, which say most in a report
            rank = len(common), sum(len("".join(key)) for key in common)
            if best is None or rank > best:
                best, chosen = rank, (first, second, next(iter(common)))
    if best is None or chosen is None or best[0] * 2 < min(len(images), len(labels)):
        raise _unpaired(left, right)
    first, second, key = chosen
    placeholders = _placeholders(key)
    return (
        left.pattern(*first, _spread(left, first, placeholders)),
        right.pattern(*second, _spread(right, second, placeholders)),
    )


def instance_pattern(images: Sequence[str], masks: Sequence[str]) -> tuple[str, str]:
    """The patterns of images and of masks that lie in a folder for each image, one file for each instance.

    Raises:
        UsageError: E120, the masks' folders are not named like the images.

    >>> instance_pattern(["a/images/a.png", "b/images/b.png"], ["a/masks/1.png", "a/masks/2.png", "b/masks/7.png"])
    ('{id}/images/{id}.png', '{id}/masks/*.png')
    """
    folders = sorted({os.path.dirname(mask) for mask in masks})
    suffix = _suffix("instances", masks)
    # pretend that each folder is one file: the same search then pairs folders with images
    image, label = pair_patterns(images, [f"{folder}/*" for folder in folders])
    return image, f"{label}{suffix}"


def no_signs(text: str, what: str, file: str | Path) -> None:
    """Refuse a name that would mean something else in a pattern.

    Raises:
        UsageError: E120, `{`, `}` or `*` in it.
    """
    if odd := sorted(set("{}*") & set(text)):
        fix = f"rename it without {' and '.join(odd)}, or give a table with --csv"
        message = "a name that cannot be written in a pattern"
        raise UsageError(message, code="E120", field=what, file=file, found=text, fix=fix)


def _take_apart(what: str, paths: Sequence[str]) -> _Side:
    suffix = _suffix(what, paths)
    parts = [path.split("/") for path in paths]
    depths = Counter(len(part) for part in parts)
    if len(depths) > 1:
        found = ", ".join(f"{count} of {depth - 1} folders" for depth, count in depths.most_common())
        fix = "give a pattern for each layout, or a table with --csv"
        raise UsageError(f"{what} lie at different depths", code="E120", field=what, found=found, fix=fix)
    columns = list(zip(*(part[:-1] for part in parts), strict=True))
    folders = [column[0] if len(set(column)) == 1 else None for column in columns]
    keys = [tuple(p for p, fixed in zip(part, folders, strict=False) if fixed is None) for part in parts]
    names = [part[-1][: len(part[-1]) - len(suffix)] for part in parts]
    return _Side(what, list(paths), folders, keys, names, suffix)


def _cuts(side: _Side) -> list[tuple[str, str]]:
    """(fixed text before, fixed text after) the id that are worth a try; a name that never changes is all fixed."""
    names = side.names
    if len(set(names)) == 1 and (len(names) > 1 or names[0] == "*"):
        return [(names[0], "")]
    before = _common_start(names)
    after = _common_start([name[::-1] for name in names])[::-1]
    heads = [0, *(i + 1 for i, c in enumerate(before) if not c.isalnum())][:_CANDIDATES]
    word = len(before.rstrip("0123456789"))  # img1, img2
    if word and before[word - 1].isalpha() and all(name[word:].isdigit() for name in names) and len(names) > 1:
        heads.append(word)
    tails = [0, *(len(after) - i for i, c in enumerate(after) if not c.isalnum())]
    shortest = min(map(len, names))
    pairs = [(head, tail) for head in heads for tail in sorted(tails)[:_CANDIDATES] if head + tail < shortest]
    result = [(before[:head], after[len(after) - tail :]) for head, tail in pairs]
    if len(names) == 1 and not names[0][:1].isalnum():
        result.append(("", ""))
    return result or [("", "")]


def _common_start(names: Sequence[str]) -> str:
    first, last = min(names), max(names)  # what the first and the last in order share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _keys(side: _Side, prefix: str, suffix: str) -> list[tuple[str, ...]]:
    keys = []
    for folders, name in zip(side.keys, side.names, strict=True):
        inner = name[len(prefix) : len(name) - len(suffix)]
        # a folder with the file's own id, {id}/images/{id}.png, is no further part of the id
        keys.append(tuple(dict.fromkeys((*folders, inner) if inner else folders)))
    return keys


def _placeholders(key: tuple[str, ...]) -> dict[str, str]:
    """Value of each part of a key -> what it is called."""
    if len(key) == 1:
        return {key[0]: "id"}
    names = ["folder", *(f"folder{i}" for i in range(2, len(key))), "name"]
    return dict(zip(key, names, strict=True))


def _spread(side: _Side, cut: tuple[str, str], placeholders: dict[str, str]) -> list[str]:
    for folders, name in zip(side.keys, side.names, strict=True):
        inner = name[len(cut[0]) : len(name) - len(cut[1])]
        parts = (*folders, inner) if inner else folders
        if all(part in placeholders for part in parts):
            return [placeholders[part] for part in parts]
    raise AssertionError("the key came from this side")


def _unpaired(images: _Side, labels: _Side) -> UsageError:
    stems = Counter[str]()
    for stem in images.names:
        stems[stem] += sum(stem in label for label in labels.paths)
    several = (
        len(labels.paths) > len(images.paths) and sum(count > 1 for count in stems.values()) > len(images.paths) / 2
    )
    if several:
        message = "several labels for an image"
        fix = f"observers: one of them in the pattern, such as {_one_of_several(images, labels)}; objects: masks in a "
        fix += "folder for each image, and --instances; classes: merge them into one label"
    elif len(images.paths) > len(labels.paths) > 1 and len(images.paths) % len(labels.paths) == 0:
        message = "several images for a label"
        fix = "name one kind in the pattern, such as '*_0000.nii.gz' or '*_flair.nii.gz'; if they are channels of one "
        fix += "case: --folder (nnU-Net), or a table with the columns image_1, image_2 ..."
    else:
        message = "images and labels cannot be paired by their names"
        fix = "name each label like its image (a_1.png and a_1_mask.png), or give a table with --csv"
    shown = [", ".join(side.paths[:_SHOWN]) + (" ..." if len(side.paths) > _SHOWN else "") for side in (images, labels)]
    found = f"{counted(len(images.paths), 'image')}: {shown[0]}; {counted(len(labels.paths), 'label')}: {shown[1]}"
    return UsageError(message, code="E120", found=found, fix=fix)


def _one_of_several(images: _Side, labels: _Side) -> str:
    """A pattern that finds one label for each image, if there is one: that of the commonest end of a label's name."""
    ends = Counter(
        (os.path.dirname(path), name[name.index(stem) + len(stem) :])
        for stem in images.names
        for path, name in zip(labels.paths, labels.names, strict=True)
        if stem in name and not name[name.index(stem) + len(stem) :][:1].isalnum()
    )
    folder, end = next((key for key, _ in ends.most_common() if key[1]), ("", "_1"))
    return f"'{f'{folder}/' if folder else ''}*{end}{labels.suffix}'"


def _suffix(what: str, paths: Sequence[str]) -> str:
    """The one suffix of all files, as it is written: a pattern finds `.PNG` where `.PNG` stands and nothing else."""
    suffixes = Counter(map(written_suffix, paths))
    if len(suffixes) == 1:
        return next(iter(suffixes))
    found = ", ".join(f"{count} of {suffix or 'no suffix'}" for suffix, count in suffixes.most_common())
    if len({suffix.lower() for suffix in suffixes}) == 1:
        message, fix = (
            f"{what} with suffixes in capitals and small letters",
            "rename them to one spelling, or give a table with --csv",
        )
    else:
        message, fix = f"{what} of several kinds", "name one kind in the pattern, such as '*.png', or convert"
    raise UsageError(message, code="E120", field=what, expected="one suffix", found=found, fix=fix)
