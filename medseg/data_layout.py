"""Which cases a data set has, whatever way its files are described, and which of them belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from medseg.config import DatasetSpec
from medseg.config_dataset import Layout
from medseg.data_case import PARTS, Case, Problems
from medseg.data_folder import by_msd, by_nnunet
from medseg.data_pattern import by_pattern
from medseg.data_table import by_csv, read_table
from medseg.errors import ConfigError, DataError, MedsegError
from medseg.tables import named_as_pooled
from medseg.volumes import natural_key

__all__ = ["PARTS", "Case", "list_cases"]

_READERS: dict[str, Callable[[Layout, DatasetSpec, Path], tuple[list[Case], Problems]]] = {
    "training": by_pattern,
    "msd": by_msd,
    "nnunet": by_nnunet,
    "csv": by_csv,
}


def list_cases(spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    """All cases of all parts in natural order of their ids, from the first layout whose images are there."""
    problems: Problems = []
    for layout in spec.files:
        reader = next(read for name, read in _READERS.items() if getattr(layout, name) is not None)
        cases, found = reader(layout, spec, root)
        if cases or found:
            named = named_as_pooled({case.id: next(iter(case.images), None) for case in cases})
            told = {problem.case for problem in found if problem.code == "E352"}  # by a table, with the line
            repeated = [problem for problem in _repeated(cases) if problem.case not in told]
            cases, problems = _unique(cases), [*found, *repeated, *named, *_own_images(cases)]
            break
    else:
        return [], problems
    if spec.select is not None:
        cases, more = _select(cases, spec, root)
        problems = [p for p in problems if p.case is None or p.case in {c.id for c in cases}] + more
    cases.sort(key=lambda case: (PARTS.index(case.split), natural_key(case.id)))
    return _group(cases, spec, problems), problems


def _select(cases: list[Case], spec: DatasetSpec, root: Path) -> tuple[list[Case], Problems]:
    rule = spec.select
    assert rule is not None
    columns, rows, _ = read_table(root / rule.file)
    if missing := [name for name in (rule.id, rule.column) if name not in columns]:
        found = ", ".join(columns)
        return [], [
            ConfigError(
                "a column is missing",
                code="E119",
                field=name,
                file=root / rule.file,
                found=found,
                fix="add it, or mend `select` in the entry",
            )
            for name in missing
        ]
    wanted = {row[rule.id] for row in rows if row[rule.column] in rule.value}
    return [case for case in cases if case.id in wanted], []


def _unique(cases: list[Case]) -> list[Case]:
    return list({(case.split, case.id): case for case in reversed(cases)}.values())


def _repeated(cases: list[Case]) -> Iterator[MedsegError]:
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            fix = "give each case an id of its own"
            yield ConfigError(
                "two cases have the same id", code="E352", case=case.id, file=next(iter(case.images), None), fix=fix
            )
        seen.add(case.id)


def _own_images(cases: list[Case]) -> Iterator[MedsegError]:
    for case in cases:
        own = {os.path.realpath(path) for path in case.images}
        more = {"label": (case.label,), "instance mask": case.instances, "field-of-view mask": (case.fov,)}
        for what, paths in more.items():
            for path in paths:
                if path is not None and os.path.realpath(path) in own:
                    fix = "name the files of images and labels so that their patterns, or the rows of the table, differ"
                    message = f"the {what} of a case is its own image"
                    yield DataError(message, code="E357", case=case.id, file=path, fix=fix)


def _group(cases: list[Case], spec: DatasetSpec, problems: Problems) -> list[Case]:
    rule = spec.split
    expression = None if rule.group is None else re.compile(rule.group)
    sequence = rule.unit == "sequence"
    result: list[Case] = []
    counts: dict[tuple[str, str], int] = {}
    for case in cases:
        group = case.group
        if not group and expression is not None:
            match = expression.search(case.id)
            group = "" if match is None else (match[1] if expression.groups else match[0]) or ""
            if not group and not sequence:  # frames without a video's name are one sequence
                problem = DataError(
                    f"no {rule.unit} can be read from the id",
                    code="E353",
                    case=case.id,
                    field="split.group",
                    expected=rule.group,
                    fix="mend the expression (`group` in the entry's split; data add: --group): it has to fit every id",
                )
                problems.append(problem)
        if sequence:
            key = (case.split, group)
            frame = counts[key] = counts.get(key, -1) + 1
            case = replace(case, group=group, frame=frame, gap=rule.gap)
        else:
            case = replace(case, group=group or case.id)
        result.append(case)
    return result
