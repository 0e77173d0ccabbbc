"""Folders that are called as the parts of a data set (train, val, test): its own split, which `data add` keeps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from medseg.data_case import PART_NAMES, PARTS, Case
from medseg.data_pattern import PLACEHOLDER, compile_pattern, fill
from medseg.errors import counted, listed

__all__ = ["parts_of", "tell_grouped", "tell_groups", "tell_parts"]


def parts_of(files: Mapping[str, str], images: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Patterns for each part instead of one for all, where a placeholder stands for nothing but names of parts.

    Args:
        files: patterns of image and label (or instances), with the same placeholders.
        images: all images, as paths below the data root.

    Returns:
        Part -> patterns; {} where there are no such folders. And notes for the user.

    >>> files = {"image": "img/{folder}/{name}.png", "label": "msk/{folder}/{name}.png"}
    >>> parts_of(files, ["img/train/a.png", "img/val/b.png"])[0]["validation"]
    {'image': 'img/val/{id}.png', 'label': 'msk/val/{id}.png'}
    """
    matches = [match.groupdict() for path in images if (match := compile_pattern(files["image"]).fullmatch(path))]
    names = list(dict.fromkeys(PLACEHOLDER.findall(files["image"])))
    for name in names[:-1]:  # the last one is the file's own name
        folders = sorted({values[name] for values in matches})
        parts = {PART_NAMES.get(folder.lower(), ""): folder for folder in folders}
        if "training" not in parts or "" in parts or len(parts) < max(2, len(folders)):
            continue
        others = [other for other in names if other != name]
        twice = Counter(tuple(values[other] for other in others) for values in matches)
        left = {other: f"{{{other}}}" for other in others} if len(others) > 1 else {names[-1]: "{id}"}
        found = {
            part: {key: fill(pattern, {**left, name: parts[part]}) for key, pattern in files.items()}
            for part in PARTS
            if part in parts
        }
        notes = [f"folders {', '.join(folders)} are taken as the parts of the set"]
        if (same := twice.most_common(1)[0])[1] > 1:
            # at the end, where an expression for --group that begins at the id's begin does not take it for a patient
            for part, patterns in found.items():
                patterns["id"] = f"{'_'.join(left.values())}_{parts[part]}"
            text, place = "_".join(same[0]), parts["training"]
            notes.append(f"{text} is in several of them: ids end with the folder's name, as in {text}_{place}")
        return found, notes
    cases = sorted({values[names[-1]] for values in matches})
    called = {PART_NAMES.get(case.lower()) for case in cases}
    if len(names) == 1 and len(cases) > 1 and "training" in called and None not in called:  # train/a.tif, test/a.tif
        how = "if they are, give a table with the column split"
        return {}, [f"{', '.join(cases)} are taken as the ids of cases, NOT as parts of the set: {how}"]
    return {}, []


def tell_parts(cases: Iterable[Case]) -> list[str]:
    """A note on how many cases each part has, where there is more than training."""
    counts = Counter(case.split for case in cases)
    told = ", ".join(f"{counts[part]} {part}" for part in PARTS if counts[part])
    return [f"parts: {told}"] if counts.keys() - {"training"} else []


def tell_grouped(cases: Sequence[Case]) -> str:
    """A note on the patients that were named, and whether one of them stands in several parts of the set.

    >>> from pathlib import Path
    >>> tell_grouped([Case("a", (), group="p1", label=Path("a")), Case("b", (), group="p1", split="test")])
    'p1 in several parts of the set, which `data check` refuses: put all cases of a patient into one of them'
    """
    parts: dict[str, set[str]] = {}
    for case in cases:
        parts.setdefault(case.group, set()).add(case.split)
    if both := [group for group, found in parts.items() if len(found) > 1]:
        fix = "put all cases of a patient into one of them"
        return f"{listed(both)} in several parts of the set, which `data check` refuses: {fix}"
    labelled = [case for case in cases if case.labelled]
    groups = counted(len({case.group for case in labelled}), "group")
    return f"{counted(len(labelled), 'case')} in {groups}: a group stays together in every split"


def tell_groups(cases: Sequence[Case]) -> list[str]:
    """A note that each image counts as a patient, with the expression that may find patients where ids look like it.

    >>> names = ["p1_01", "p1_02", "p2_01", "p2_02"]
    >>> tell_groups([Case(name, ()) for name in names])[0].partition(" (")[2]
    "ids may be those of 2 patients, p1, p2: --group '^(.+)[_-][^_-]+$')"
    """
    note = "each image is a case of its own; if several come from one patient, say so with --group"
    expression = "^(.+)[_-][^_-]+$"
    found = [re.search(expression, case.id) for case in cases]
    heads = {match[1] for match in found if match}
    tails = {match[0][len(match[1]) + 1 :] for match in found if match}
    if None in found or not 2 <= len(heads) <= len(cases) / 2 or tails <= PART_NAMES.keys():
        return [note]
    some = ", ".join(sorted(heads)[:3])
    return [f"{note} (ids may be those of {len(heads)} patients, {some}: --group '{expression}')"]
