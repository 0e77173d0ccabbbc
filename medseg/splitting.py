"""Folds: deterministic, grouped, and without neighbours on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medseg.data_layout import Case
from medseg.errors import DataError, MedsegError, UsageError, counted, listed

__all__ = ["Fold", "check_leaks", "check_parts", "make_split", "tell_test_leaks"]


@dataclass(frozen=True)
class Fold:
    """Ids of the cases to train on and to validate on; `unused` frames part the two where cases are neighbours."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    unused: tuple[str, ...] = ()


def make_split(cases: Sequence[Case], *, folds: int | Literal["auto"] | None = 5, seed: int = 0) -> list[Fold]:
    """Folds of the training cases: each case is validated on once, and no group stands on both sides.

    The result depends on the ids, groups and `seed` alone, not on the order of `cases`. Test cases are left out. Where
    the set has an official validation part, that is the one fold. Groups are spread so that folds are about equally
    large. Frames (`Case.frame`) of fewer sequences than folds are cut into contiguous blocks, one for each fold, and
    `Case.gap` frames on both sides of a block are neither trained nor validated on in that fold.

    Args:
        cases: from `find_cases`.
        folds: their number; "auto" is 5, or the number of groups if that is smaller; None is one fold of all cases,
            none of which is validated on.
        seed: which groups come together; any integer >= 0.

    Raises:
        UsageError: E105, fewer than two groups, or fewer than folds; the number needed is told. Frames of which a fold
            would have none to train or to validate on ("auto" takes fewer folds first).

    >>> cases = [Case(id=f"{volume}_{i}", images=(), group=volume) for volume in "abc" for i in range(2)]
    >>> sorted(fold.validation for fold in make_split(cases, folds=3))
    [('a_0', 'a_1'), ('b_0', 'b_1'), ('c_0', 'c_1')]
    """
    usable = sorted(
        (case for case in cases if case.split != "test"), key=lambda case: (case.group, case.frame or 0, case.id)
    )
    official = tuple(case.id for case in usable if case.split == "validation")
    if official or folds is None:
        official = () if folds is None else official
        training = tuple(case.id for case in usable if case.id not in official)
        if not training:
            raise UsageError("no case to train on", code="E105", expected="at least 1", found=0)
        return [Fold(_sorted(training), _sorted(official))]
    groups: dict[str, list[Case]] = {}
    for case in usable:
        groups.setdefault(case.group, []).append(case)
    framed = all(case.frame is not None for case in usable)
    blocks = framed and len(groups) < (5 if folds == "auto" else folds)
    # the smallest thing that can be moved from one side to the other
    units = sum(map(len, groups.values())) if blocks else len(groups)
    wanted = min(5, units) if folds == "auto" else folds
    if units < max(wanted, 2):
        what = "groups (cases, patients or volumes that must stay together)" if units != len(usable) else "cases"
        fix = (
            f"add cases, or --set train.folds={units}"
            if units >= 2
            else "add cases: one is trained on, one is validated on; or --fold none, which keeps none back"
        )
        raise UsageError(
            "too few cases to split",
            code="E105",
            field="train.folds",
            expected=f"at least {max(wanted, 2)} {what}",
            found=units,
            fix=fix,
        )
    if not blocks:
        return _group_folds(groups, wanted, _random(seed))
    # few frames, and what the gap takes of them, may leave a fold with nothing on one of its sides
    for count in range(wanted, 1 if folds == "auto" else wanted - 1, -1):
        make = _block_folds if len(groups) < count else _group_folds
        found = make(groups, count, _random(seed))
        if all(fold.training and fold.validation for fold in found):
            return found
    gap = max(case.gap for case in usable)
    raise UsageError(
        "too few frames to split",
        code="E105",
        field="train.folds",
        expected=f"in each fold a frame to train and one to validate on, beside the gap of {gap}",
        found=f"{units} frames, {wanted} folds",
        fix="add frames, take fewer folds, or `gap: 0` in the set's `split`; or --fold none, which keeps none back",
    )


def check_leaks(training: Iterable[Case], validation: Iterable[Case]) -> list[MedsegError]:
    """Files and groups that stand on both sides, by path after resolving links (`checking` looks at contents)."""
    places: dict[Path, str] = {}
    groups: dict[str, Case] = {}
    for case in training:
        places |= {path.resolve(): case.id for path in case.images}
        groups[case.group] = case
    problems: list[MedsegError] = []
    for case in validation:
        for path in case.images:
            if (other := places.get(path.resolve())) is not None:
                found, fix = f"{other} too", "remove one of the two"
                problems.append(
                    DataError(
                        "one image on both sides of the split",
                        code="E354",
                        case=case.id,
                        file=path,
                        found=found,
                        fix=fix,
                    )
                )
        if case.frame is None and case.group in groups:
            fix = "put all cases of a patient on one side"
            first = groups[case.group]
            found = f"{case.group} is also the group of {first.id}"
            if first.split != case.split:
                found += f", which is for {first.split}; this one for {case.split}"
            problems.append(
                DataError("one group on both sides of the split", code="E355", case=case.id, found=found, fix=fix)
            )
    return problems


def check_parts(cases: Iterable[Case]) -> list[MedsegError]:
    """`check_leaks` between all parts of a set: weights are chosen on validation cases, so these are no test either.

    >>> cases = [Case(id=part, images=(), group="p1", split=part) for part in ("validation", "test")]
    >>> [problem.found for problem in check_parts(cases)]
    ['p1 is also the group of validation, which is for validation; this one for test']
    """
    parts: dict[str, list[Case]] = {"training": [], "validation": [], "test": []}
    for case in cases:
        parts[case.split].append(case)
    training, validation, test = parts.values()
    return check_leaks(training, validation) + check_leaks([*training, *validation], test)


def tell_test_leaks(cases: Iterable[Case], test: Iterable[Case]) -> list[str]:
    """A note where images or patients of the test part are among the other cases, which training may see.

    >>> tell_test_leaks([Case("a", (), group="p1")], [Case("b", (), group="p1", split="test")])
    ['1 test case shares image or patient with training: b; its scores are no test (`medseg data check`)']
    """
    shared = list(dict.fromkeys(str(problem.case) for problem in check_leaks(cases, test)))
    if not shared:
        return []
    are, their = ("share image or patient", "their") if len(shared) > 1 else ("shares image or patient", "its")
    told = f"{counted(len(shared), 'test case')} {are} with training: {listed(shared)}"
    return [f"{told}; {their} scores are no test (`medseg data check`)"]


def _group_folds(groups: dict[str, list[Case]], folds: int, random: np.random.Generator) -> list[Fold]:
    names = [sorted(groups)[i] for i in random.permutation(len(groups))]
    names.sort(key=lambda name: -len(groups[name]))  # stable: equal groups stay in random order
    members: list[list[str]] = [[] for _ in range(folds)]
    for name in names:
        smallest = min(members, key=len)
        smallest += [case.id for case in groups[name]]
    result = []
    for mine in members:
        others = [case for theirs in members if theirs is not mine for case in theirs]
        result.append(Fold(_sorted(others), _sorted(mine)))
    return result


def _block_folds(groups: dict[str, list[Case]], folds: int, random: np.random.Generator) -> list[Fold]:
    order = random.permutation(folds)
    # position of a frame -> its block; the longer blocks of several sequences fall to different folds
    validation: list[list[str]] = [[] for _ in range(folds)]
    unused: list[list[str]] = [[] for _ in range(folds)]
    everything: list[str] = []
    for number, name in enumerate(sorted(groups)):
        frames = groups[name]
        everything += [case.id for case in frames]
        edges = np.linspace(0, len(frames), folds + 1).round().astype(int)
        for block in range(folds):
            fold = int(order[(block + number) % folds])
            low, high = int(edges[block]), int(edges[block + 1])
            validation[fold] += [case.id for case in frames[low:high]]
            if high > low:
                gap = frames[0].gap
                beside = [*frames[max(0, low - gap) : low], *frames[high : high + gap]]
                unused[fold] += [case.id for case in beside]
    result = []
    for mine, beside in zip(validation, unused, strict=True):
        kept = set(mine) | set(beside)
        result.append(Fold(_sorted(c for c in everything if c not in kept), _sorted(mine), _sorted(beside)))
    return result


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, 0x5EED])


def _sorted(ids: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(ids))
