"""Whose file a file is, by its name: of a case, of its image, or of either with more text around it (`a1_mask`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medseg.errors import DataError, listed
from medseg.files import safe_stem
from medseg.volumes import case_id

__all__ = ["match_names", "shorter_names"]


def match_names(images: Mapping[str, Sequence[Path]], present: Mapping[str, Path]) -> dict[str, str | None]:
    """For each case the name of its file among those that are present: its id, or that of one of its images.

    Args:
        images: case -> files of its image.
        present: name -> file.

    Raises:
        DataError: E352, a file is named as the images of several cases.
    """
    owners: dict[str, list[str]] = {}
    for case, paths in images.items():
        for name in dict.fromkeys(map(case_id, paths)):
            owners.setdefault(name, []).append(case)
    found: dict[str, str | None] = {}
    for case, paths in images.items():
        own = (case, safe_stem(case))
        found[case] = next((name for name in (*own, *map(case_id, paths)) if name in present), None)
        name = found[case]
        if name is not None and name not in own and len(owners[name]) > 1:
            raise DataError(
                "images of several cases have the name of this file", code="E352", file=present[name],
                expected=f"the id of one of them: {listed(owners[name])}", found=name, fix="name each file as its case",
            )  # fmt: skip
    return found


def shorter_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Each name without the text that all have around the others' names; {} where there is no such text.

    The text is parted from the name by a sign (`a1_mask`, `seg-a1`), so that `a1` is not taken for `a10`.

    >>> shorter_names(["a1_mask", "a2_mask", "a3_mask"], ["a1", "a3"])
    {'a1_mask': 'a1', 'a2_mask': 'a2', 'a3_mask': 'a3'}
    """
    names, known = list(names), set(others)
    best: tuple[int, dict[str, str]] = (0, {})
    around = {name[: name.index(other)] + "\n" + name[name.index(other) + len(other) :]
              for name in names[:50] for other in known if other in name}  # fmt: skip
    for before, _, after in (text.partition("\n") for text in sorted(around)):
        if before[-1:].isalnum() or after[:1].isalnum() or not before + after:
            continue
        if not all(name.startswith(before) and name.endswith(after) for name in names):
            continue
        found = {name: name[len(before) : len(name) - len(after)] for name in names}
        pairs = len(known.intersection(found.values()))
        if all(found.values()) and len(set(found.values())) == len(names) and pairs > best[0]:
            best = pairs, found
    return best[1]
