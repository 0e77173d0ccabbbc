"""Comparison: is one set of predictions better than another, on the same cases?

Reads the cases.csv of evaluations; pairs cases; gives for each label and score the mean difference with its bootstrap
interval, Wilcoxon's signed-rank test, and Holm's correction over everything that is compared at once.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medseg.comparison_notes import comparison_notes
from medseg.errors import DataError, MedsegError, UsageError, collect, listed
from medseg.errors_arguments import checked
from medseg.files import write_json, write_text
from medseg.run import newest_run
from medseg.tables import POOLED, ScoreRow, quote_cell, read_cases, read_summary
from medseg.tables_text import plain_number

__all__ = ["Comparison", "Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """One label and score of one method against the first.

    Attributes:
        first, second: names of the two methods.
        label, metric, unit, better: of the score.
        n, patients: cases and patients that both were scored on.
        mean_first, mean_second: means of the two.
        difference: mean of (second - first); low, high: its 95 % bootstrap interval.
        p, p_holm: Wilcoxon's signed-rank test, and after Holm's correction over all lines.
        verdict: "better", "worse" or "no difference shown" (of the second; "not judged" for scores without a
            direction).
    """

    first: str
    second: str
    label: str
    metric: str
    unit: str
    better: str
    n: int
    patients: int
    mean_first: float
    mean_second: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All differences against the first method, and what could not be compared."""

    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": "medseg-comparison/1",
            "names": list(self.names),
            "differences": [asdict(d) for d in self.differences],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The result in plain sentences and one line for each score."""
        lines = []
        for name in self.names[1:]:
            own = [d for d in self.differences if d.second == name]
            lines.append(f"{name} against {self.names[0]}, {own[0].n} cases")
            width = max(len(f"{d.label}, {d.metric}") for d in own)
            for d in own:
                unit = f" {d.unit}" if d.unit else ""
                means = f"{plain_number(d.mean_first, d.unit)} -> {plain_number(d.mean_second, d.unit)}{unit}"
                interval = f"{_signed(d.difference)} ({_signed(d.low)} to {_signed(d.high)})"
                score = f"{d.label}, {d.metric}"
                lines.append(f"  {score:{width}}  {d.verdict:19}  {means}  difference {interval}  p {d.p_holm:.3g}")
        lines.append("Intervals: 95 %, bootstrap. p: Wilcoxon signed-rank, corrected by Holm over all lines.")
        return "\n".join([*lines, *self.notes])


@checked
def compare(*scores: str | Path | Sequence[str | Path], output: str | Path | None = None, seed: int = 0) -> Comparison:
    """Compare two or more evaluations of the same cases; each is compared with the first.

    Args:
        scores: folders with cases.csv (of `evaluate`, or runs with `validation/cases.csv`), such files, or folders of
            runs, which stand for their newest; also as one list.
        output: folder to write comparison.csv and comparison.json to; nothing is written when None.
        seed: of the bootstrap.

    Returns:
        Comparison: one line for each method, label and score. "better" and "worse" are only said when the interval
        leaves out 0, the corrected p is below 0.05, and mean and ranks are on the same side; "no difference shown" is
        no proof that they are equal.

    Raises:
        UsageError: less than two evaluations, or nothing in common to compare.
        DataError: a file is missing or broken, units differ, or the cases do: which ones only one of them has is told.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> head = "case,label,metric,value,unit,status,definition"
    >>> for name, gain in (("before", 0.0), ("after", 0.1)):
    ...     lines = [f"c{n},cell,Dice,{0.5 + n / 100 + gain},1,scored,Dice" for n in range(10)]
    ...     _ = (folder / f"{name}.csv").write_text("\\n".join([head, *lines]))
    >>> (found,) = compare(folder / "before.csv", folder / "after.csv").differences
    >>> found.n, round(found.difference, 3), found.verdict
    (10, 0.1, 'better')
    """
    from medseg.metrics.statistics import compare_paired, holm, verdict

    paths = [Path(p) for one in scores for p in ([one] if isinstance(one, str | Path) else one)]
    if len(paths) < 2:
        raise UsageError("a comparison needs two evaluations or more", field="scores", found=len(paths))
    chosen = [_newest(path) for path in paths]
    files = [_find(path) for path in chosen]
    names = _names(paths)
    tables = [_table(file) for file in files]
    summaries = [_summary(file) for file in files]
    _check_cases(names, files, tables)
    better = {s["metric"]: s["better"] for summary in reversed(summaries) for s in summary.get("scores", [])}
    # which cases are of one patient, whichever of them knows it
    groups = {case: patient for summary in summaries[::-1] for case, patient in (summary.get("groups") or {}).items()}
    differences: list[Difference] = []
    ranks: list[int] = []
    notes = [f"{n} is {c}, its newest run." for n, p, c in zip(names, paths, chosen, strict=True) if c != p]
    notes += comparison_notes(names, summaries)
    for name, table in zip(names[1:], tables[1:], strict=True):
        common = [key for key in tables[0] if key in table]
        if not common:
            raise UsageError(
                "the evaluations have no label and score in common", field="scores",
                expected=_shown(tables[0]), found=_shown(table),
                fix="evaluate both with the same scores and names, for example --metric Dice --labels 1=liver",
            )  # fmt: skip
        only = [key for key in (*tables[0], *table) if (key in tables[0]) != (key in table)]
        if only:
            notes.append(f"Only one of {names[0]} and {name} has {_shown(dict.fromkeys(only))}: not compared.")
        for label, metric in common:
            one, two = tables[0][label, metric], table[label, metric]
            cases = list(one)
            a, b = [one[case].value for case in cases], [two[case].value for case in cases]
            row = one[cases[0]]
            by = [groups[case] for case in cases] if all(case in groups for case in cases) and groups else None
            known = _known(metric)
            way = better.get(metric) or ("none" if known is None else known.better)
            bounds = (-math.inf, math.inf) if known is None else known.bounds
            found = compare_paired(a, b, better=way, groups=by, seed=seed, bounds=bounds)
            ranks.append(found.ranks)
            differences.append(
                Difference(
                    names[0], name, label, metric, row.unit, way, found.n, found.groups, sum(a) / len(a),
                    sum(b) / len(b),
                    found.difference, found.low, found.high, found.p, found.p, "",
                )
            )  # fmt: skip
    judged = [d for d in differences if d.better != "none"]  # signed errors have no better side: they are not tested
    corrected = dict(zip(map(id, judged), holm([d.p for d in judged]), strict=True))
    final = [
        replace(d, p_holm=corrected[id(d)], verdict=verdict(d.low, d.high, corrected[id(d)], d.better, ranks=side))
        if id(d) in corrected
        else replace(d, verdict="not judged")
        for d, side in zip(differences, ranks, strict=True)
    ]
    split = [d for d, side in zip(differences, ranks, strict=True) if side * d.low < 0 < d.low * d.high]
    notes += [f"{d.second}, {d.label}, {d.metric}: the mean and most cases point to different sides." for d in split]
    result = Comparison(tuple(names), tuple(final), tuple(notes))
    if output is not None:
        write_text(Path(output) / "comparison.csv", _csv(result))
        write_json(Path(output) / "comparison.json", result.as_dict())
    return result


def _newest(path: Path) -> Path:
    """The newest run of a folder of runs; anything with scores of its own as it is."""
    return path if _scores_in(path) is not None else newest_run(path)


def _scores_in(path: Path) -> Path | None:
    candidates = (path, path / "cases.csv", path / "validation" / "cases.csv", path / "scores" / "cases.csv")
    return next((p for p in candidates if p.is_file()), None)


def _find(path: Path) -> Path:
    found = _scores_in(path)
    if found is None:
        raise DataError(
            "there are no scores here", code="E302", file=path, expected="cases.csv", fix="run `medseg evaluate` first"
        )
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: as much of the end of each path as is needed."""
    parts = [
        [p for p in path.resolve().parts if p not in ("cases.csv", "scores", "validation")] or [str(path)]
        for path in paths
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(("/".join(part[-1:]) for part in parts), start=1)]


def _table(file: Path) -> dict[tuple[str, str], dict[str, ScoreRow]]:
    table: dict[tuple[str, str], dict[str, ScoreRow]] = {}
    for row in read_cases(file):
        if row.case == POOLED:
            continue  # one number for all cases: nothing to pair
        column = table.setdefault((row.label, row.metric), {})
        if row.case in column:
            raise DataError(
                "a case is scored twice", code="E350", case=row.case, file=file, field=f"{row.label}, {row.metric}"
            )
        column[row.case] = row
    if not table:
        raise DataError("the table of scores is empty", code="E302", file=file, fix="run `medseg evaluate` again")
    return table


def _summary(file: Path) -> dict[str, Any]:
    path = file.with_name("summary.json")
    return read_summary(path) if path.is_file() else {}


def _check_cases(
    names: Sequence[str], files: Sequence[Path], tables: Sequence[Mapping[tuple[str, str], Mapping[str, Any]]]
) -> None:
    """Refuse tables whose cases or units are not the same, score by score."""
    problems: list[MedsegError] = []
    for name, file, table in zip(names[1:], files[1:], tables[1:], strict=True):
        shared = [key for key in tables[0] if key in table]
        found = (_difference(key, names[0], tables[0][key], name, table[key], file) for key in shared)
        problems += [problem for problem in found if problem is not None][:1]  # the other scores say the same
    if problems:
        raise collect(problems)


def _difference(
    key: tuple[str, str], first: str, one: Mapping[str, Any], second: str, two: Mapping[str, Any], file: Path
) -> DataError | None:
    """Why the lines of one score, by case, in two evaluations (of these names, the second in `file`) are no pairs."""
    field = ", ".join(key)
    if one.keys() != two.keys():
        missing = ", ".join(sorted(one.keys() - two.keys())[:5]) or "none"
        extra = ", ".join(sorted(two.keys() - one.keys())[:5]) or "none"
        return DataError(
            "the evaluations are not of the same cases", code="E350", file=file, field=field,
            expected=f"the {len(one)} cases of {first}",
            found=f"{len(two)} cases in {second}; lacking {missing}; extra {extra}",
            fix="evaluate all of them against the same references; of runs compare the same fold and seed",
        )  # fmt: skip
    units = [next(iter(rows.values())).unit or "a ratio" for rows in (one, two)]
    if units[0] == units[1]:
        return None
    return DataError(
        "the evaluations have different units", code="E350", file=file, field=field,
        expected=units[0], found=units[1], fix="evaluate both with one `unit` in datasets.yaml",
    )  # fmt: skip


def _known(metric: str) -> Any:
    """What medseg knows of a score by its name: direction and possible values; None for one from elsewhere."""
    from medseg.metrics import METRICS

    return METRICS.get(metric.split("@")[0].split(" ")[0].split("(")[0])


def _shown(keys: Mapping[tuple[str, str], Any]) -> str:
    return listed(map(" ".join, keys), 6)


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _csv(result: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = list(Difference.__dataclass_fields__)
    writer.writerow(columns)
    for d in result.differences:
        cells = asdict(d)
        writer.writerow([quote_cell(cells[c]) if isinstance(cells[c], str) else repr(cells[c]) for c in columns])
    return out.getvalue()
