"""Scores as people read them: short numbers, and tables for the screen, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["latex_table", "markdown_table", "plain_number", "signed_number", "table_lines"]


def plain_number(value: float | None, unit: str = "") -> str:
    """A score as people read it: ratios with three decimals, others with two to four digits.

    >>> plain_number(0.91234), plain_number(12.3456, "mm"), plain_number(1234.6, "mL"), plain_number(None)
    ('0.912', '12.3', '1235', '–')
    >>> plain_number(0.004321, "mL"), plain_number(0.0, "mL")  # a lesion of four voxels is not nothing
    ('0.0043', '0.00')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if unit in ("", "1") and abs(value) < 10:
        return f"{value:.3f}"
    size = abs(value)
    if 0 < size < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def signed_number(value: float, unit: str) -> str:
    """A difference as people read it, with its sign; numbers without a unit are taken as sizes.

    >>> signed_number(1463.2, "px"), signed_number(-0.5, "mL")
    ('+1463', '−0.50')
    """
    return ("−" if value < 0 else "+") + plain_number(abs(value), unit or "voxel")


def table_lines(scores: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the printed table: one line per label and metric."""
    header = [
        "Label",
        "Score",
        "Mean",
        "95 % interval",
        "SD",
        "Median",
        "Quartiles",
        "Cases",
        "Missed",
        "False alarms",
        "Both empty",
    ]
    lines = []
    for s in scores:
        unit = s["unit"]
        name = f"{s['metric']} ({unit})" if unit else s["metric"]
        if s["level"] == "pooled":
            lines.append([s["label"], name, plain_number(s["mean"], unit), *["–"] * 8])
            continue
        lines.append([
            s["label"], name, plain_number(s["mean"], unit),
            _span(s["low"], s["high"], unit),
            plain_number(s["sd"], unit), plain_number(s["median"], unit),
            _span(s["q1"], s["q3"], unit),
            str(s["n"]), str(s["missed"]), str(s["false_alarm"]), str(s["both_empty"]),
        ])  # fmt: skip
    return header, lines


def markdown_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """The scores as a Markdown table; names are escaped."""
    header, lines = table_lines(scores)
    rows = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *([_markdown(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def latex_table(scores: Sequence[Mapping[str, Any]]) -> str:
    r"""The scores as a LaTeX tabular for the booktabs package; names are escaped."""
    header, lines = table_lines(scores)
    body = [r"\begin{tabular}{ll" + "r" * (len(header) - 2) + "}", r"\toprule"]
    body.append(" & ".join(_latex(cell) for cell in header) + r" \\")
    body.append(r"\midrule")
    body += [" & ".join(_latex(cell) for cell in line) + r" \\" for line in lines]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}", ""])


def _span(low: float | None, high: float | None, unit: str) -> str:
    """
    >>> _span(0.5, 0.75, ""), _span(None, None, "")  # of a single patient there is no interval
    ('0.500 to 0.750', '–')
    """
    return "–" if low is None else f"{plain_number(low, unit)} to {plain_number(high, unit)}"


def _markdown(text: str) -> str:
    text = " ".join(text.split())
    return "".join("\\" + c if c in r"\`*_{}[]<>()#+!|" else c for c in text)


def _latex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
        "<": r"\textless{}",
        ">": r"\textgreater{}", **{c: "\\" + c for c in "&%$#_{}"},
    }  # fmt: skip
    return "".join(special.get(c, c) for c in " ".join(text.split()))
