"""Tables of scores: cases.csv and summary.json, read and written in one place.

Evaluation writes these files, comparison and report read them: stages meet through files only. Schemas:
docs/cases_csv.md.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from medseg.errors import DataError, FormatError
from medseg.files import write_text

__all__ = [
    "POOLED",
    "SCHEMA",
    "STATUSES",
    "ScoreRow",
    "all_scores",
    "main_metric",
    "named_as_pooled",
    "quote_cell",
    "read_cases",
    "read_summary",
    "summarise_rows",
    "write_cases",
    "write_summary",
]

SCHEMA = "medseg-summary/1"
STATUSES = ("scored", "missed", "false_alarm", "both_empty")
POOLED = "all cases"  # in the column `case` of scores that are computed over all cases at once
_MAIN = ("Dice", "SEG", "mAP", "PQ", "V_rand", "IoU", "PooledDice")  # in order of preference
_RISKY = ("=", "+", "-", "@", "\t", "\r", "'")


@dataclass(frozen=True)
class ScoreRow:
    """One line of cases.csv: one score of one label in one case.

    `value` is in `unit` ("" for a ratio); `status` is one of scored, missed, false_alarm, both_empty.
    """

    case: str
    label: str
    metric: str
    value: float
    unit: str
    status: str
    definition: str


COLUMNS = tuple(field.name for field in fields(ScoreRow))


def named_as_pooled(files: Mapping[str, Path | None]) -> list[DataError]:
    """What to say of a case with the name that pooled scores have: its own scores would be taken for those of all.

    >>> named_as_pooled({"liver_7": None}), named_as_pooled({"all cases": None})[0].code
    ([], 'E352')
    """
    message, fix = f"tables call the scores of all cases together `{POOLED}`: no case can have this name", "rename it"
    return [DataError(message, code="E352", case=case, file=f, fix=fix) for case, f in files.items() if case == POOLED]


def all_scores(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The lines of the table of scores: the predictions', then a second observer's where there is one."""
    observer = (summary.get("observer") or {}).get("scores", [])
    own = summary.get("scores", [])
    return [*own, *({**line, "label": f"{line['label']} (second observer)"} for line in observer)]


def quote_cell(text: str) -> str:
    """Text that a spreadsheet would take for a formula, made harmless by an apostrophe; the rest as it is.

    >>> quote_cell("=1+1"), quote_cell("liver_7")
    ("'=1+1", 'liver_7')
    """
    return "'" + text if text.startswith(_RISKY) else text


def unquote_cell(text: str) -> str:
    """The inverse of `quote_cell`."""
    return text[1:] if text[:1] == "'" and text[1:2] in _RISKY else text


def write_cases(path: str | Path, rows: Iterable[ScoreRow]) -> Path:
    """Write cases.csv atomically: UTF-8, comma, one header line, numbers with all their digits.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = [
            repr(float(cell)) if name == "value" else quote_cell(cell)
            for name, cell in zip(COLUMNS, astuple(row), strict=True)
        ]
        writer.writerow(cells)
    write_text(path, out.getvalue())
    return Path(path)


def read_cases(path: str | Path) -> list[ScoreRow]:
    """Read a cases.csv; every line is checked.

    Raises:
        DataError: the file is missing.
        FormatError: columns are missing, a value is no number, or a status is unknown.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        raise DataError(
            "there is no table of scores", code="E302", file=path, fix="run `medseg evaluate` first"
        ) from error
    except OSError as error:
        raise FormatError("the table of scores cannot be read", file=path, found=error) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise FormatError(
            "the table of scores lacks columns", file=path, field=", ".join(missing), expected=", ".join(COLUMNS),
            found=", ".join(reader.fieldnames or ["nothing"]),
        )  # fmt: skip
    rows = []
    for cells in reader:
        try:
            row = {name: unquote_cell(cells[name]) for name in COLUMNS}
            value = float(row.pop("value"))
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                "a line of the table of scores is wrong", file=path, field=f"line {reader.line_num}", found=error
            ) from error
        if row["status"] not in STATUSES or not math.isfinite(value):
            raise FormatError(
                "a line of the table of scores is wrong", file=path, field=f"line {reader.line_num}",
                expected=f"a finite value and one of {', '.join(STATUSES)}", found=f"{value}, {row['status']}",
            )  # fmt: skip
        rows.append(ScoreRow(value=value, **row))
    return rows


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write summary.json atomically (no NaN: JSON has none)."""
    write_text(path, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return Path(path)


def read_summary(path: str | Path) -> dict[str, Any]:
    """Read a summary.json.

    Raises:
        DataError: the file is missing.
        FormatError: it is no summary of a schema that this version knows.
    """
    path = Path(path)
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError as error:
        raise DataError(
            "there is no summary of scores", code="E302", file=path, fix="run `medseg evaluate` first"
        ) from error
    except (ValueError, OSError) as error:
        raise FormatError("summary.json is broken", file=path, found=error) from error
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else type(summary).__name__
        raise FormatError("summary.json is of another schema", file=path, field="schema", expected=SCHEMA, found=found)
    return summary


def summarise_rows(
    rows: Sequence[ScoreRow], *, better: Mapping[str, str], groups: Mapping[str, str] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """One entry per label and metric: mean, spread, bootstrap 95 % interval and the counts of every status.

    Args:
        rows: lines of cases.csv; pooled ones have case `all cases` and come out with their value only.
        better: metric -> "higher" | "lower" | "none"; what medseg knows of the metric where it is not told.
        groups: case -> patient; whole patients are resampled then.
        seed: of the bootstrap.

    Returns:
        A list of plain dicts in the order of first appearance; the key `scores` of summary.json.
    """
    from medseg.metrics import METRICS
    from medseg.metrics.statistics import summarise

    parts: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in rows:
        parts.setdefault((row.label, row.metric), []).append(row)
    scores = []
    for (label, metric), members in parts.items():
        head = members[0]
        known = METRICS.get(re.split(r"[@( ]", metric, maxsplit=1)[0])  # "SurfaceDice@2mm" is a SurfaceDice
        way = better.get(metric) or ("none" if known is None else known.better)
        entry: dict[str, Any] = {
            "label": label, "metric": metric, "unit": head.unit, "better": way,
            "definition": head.definition,
        }  # fmt: skip
        cases = [row for row in members if row.case != POOLED]
        if cases:
            values = [row.value for row in cases]
            by = [groups[row.case] for row in cases] if groups and all(row.case in groups for row in cases) else None
            bounds = (-math.inf, math.inf) if known is None else known.bounds
            summary = summarise(values, groups=by, seed=seed, bounds=bounds)
            numbers: dict[str, float | None] = {
                name: getattr(summary, name) for name in ("mean", "sd", "median", "q1", "q3", "low", "high")
            }
            if summary.groups < 2:  # one case, or one patient, tells nothing about others
                numbers |= {"sd": None if summary.n < 2 else summary.sd, "low": None, "high": None}
            entry |= {"level": "case", "n": len(values), "patients": len(set(by)) if by else len(values), **numbers}
            entry |= {status: sum(row.status == status for row in cases) for status in STATUSES}
        else:
            entry |= {"level": "pooled", "n": 1, "mean": head.value, "status": head.status}
        scores.append(entry)
    return scores


def main_metric(names: Iterable[str], wanted: str | None = None) -> str | None:
    """The score that stands for the others: the wanted one, else Dice, else one of the usual ones, else the first.

    >>> main_metric(["HD95", "Dice"]), main_metric(["HD95", "Dice"], "HD95"), main_metric(["HD95", "Dice"], "SEG")
    ('Dice', 'HD95', 'Dice')
    """
    names = list(dict.fromkeys(names))
    return next((name for name in (wanted, *_MAIN) if name in names), names[0] if names else None)
