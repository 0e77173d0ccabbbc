"""What makes evaluations hard to compare though their tables look alike: other references, missing predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medseg.errors import counted, listed

__all__ = ["comparison_notes"]


def comparison_notes(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on references of the same cases that have another volume than in the first evaluation, and on cases that
    count as missed because an evaluation has no prediction of them.

    >>> one, two = ({"volumes": [{"case": "a", "label": "liver", "reference": v}]} for v in (1.0, 1.2))
    >>> len(comparison_notes(["x", "y"], [one, two])), comparison_notes(["x", "y"], [one, one])
    (1, [])
    """
    volumes = [{(v["case"], v["label"]): v["reference"] for v in s.get("volumes") or ()} for s in summaries]
    first, notes = volumes[0], []
    for name, own in zip(names[1:], volumes[1:], strict=True):
        other = {key[0] for key in first.keys() & own.keys() if not math.isclose(first[key], own[key], rel_tol=1e-4)}
        if other:
            notes.append(
                f"The references of {counted(len(other), 'case')} ({listed(sorted(other))}) have other volumes in "
                f"{name} than in {names[0]}: the two were scored against different references."
            )
    for name, summary in zip(names, summaries, strict=True):
        if missing := (summary.get("cases") or {}).get("missing"):
            notes.append(
                f"{name} has no prediction of {counted(len(missing), 'case')} ({listed(missing)}): counted as missed."
            )
    return notes
