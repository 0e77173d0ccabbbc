"""The report's sections that come from scores: cards, sentences, alerts, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medseg.report_figures import agreement_plot, reliability_plot, strip_plot
from medseg.report_words import GLOSSARY, plain_words
from medseg.tables import POOLED, ScoreRow, all_scores, main_metric
from medseg.tables_text import plain_number, signed_number

__all__ = ["score_sections"]

LINES = 1500  # lines of the table of all cases that the page carries; cases.csv has all
NEVER = "–"
FEW = 5  # cases below which the head of the page does not speak of confidence


def score_sections(rows: Sequence[ScoreRow], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template needs about scores.

    Args:
        rows: lines of cases.csv; may be empty (a run without scores).
        summary: content of summary.json; {} when there is none.
    """
    scores = summary.get("scores", [])
    by_case = [row for row in rows if row.case != POOLED]
    lines = all_scores(summary)
    page: dict[str, Any] = {"scores": [_score_line(s) for s in lines if s.get("level") != "pooled"]}
    page["pooled"] = [_pooled_line(s) for s in lines if s.get("level") == "pooled"]
    page["cards"], page["sentences"] = _head(scores, summary, by_case)
    page["alerts"] = _alerts(by_case, summary)
    page["strips"] = _strips(by_case, scores)
    page["agreement"] = _agreement(summary)
    page["calibration"] = _calibration(summary)
    page["wide"] = _wide(by_case) if by_case else None
    page["words"] = _words(rows)
    return page


def _cell(value: float | None, unit: str, css: str = "") -> dict[str, Any]:
    return {"text": plain_number(value, unit), "sort": "" if value is None else repr(float(value)), "css": css}


def _named(s: Mapping[str, Any]) -> str:
    return f"{s['metric']} ({s['unit']})" if s["unit"] else s["metric"]


def _pooled_line(s: Mapping[str, Any]) -> dict[str, Any]:
    over = "mean over patients" if s["metric"].startswith("Patient") else "all cases at once"
    return {"label": s["label"], "name": _named(s), "value": _cell(s["mean"], s["unit"]), "over": over}


def _score_line(s: Mapping[str, Any]) -> dict[str, Any]:
    unit = s["unit"]

    def span(low: str, high: str) -> dict[str, Any]:
        if s.get(low) is None:
            return {"text": NEVER, "sort": "", "css": ""}
        return {
            "text": f"{plain_number(s[low], unit)} – {plain_number(s[high], unit)}",
            "sort": repr(s[low]),
            "css": "",
        }

    def count(key: str, css: str = "") -> dict[str, Any]:
        return {"text": str(s.get(key, 0)), "sort": str(s.get(key, 0)), "css": css if s.get(key) else ""}

    cells = [
        _cell(s["mean"], unit), span("low", "high"), _cell(s.get("sd"), unit), _cell(s.get("median"), unit),
        span("q1", "q3"), count("n"), count("missed", "missed"), count("false_alarm", "false_alarm"),
        count("both_empty", "both_empty"),
    ]  # fmt: skip
    return {"label": s["label"], "name": _named(s), "cells": cells}


def _head(
    scores: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], rows: Sequence[ScoreRow]
) -> tuple[list, list]:
    cards, sentences = [], []
    cases = sorted({row.case for row in rows})
    wanted = summary.get("main_score")
    metric = main_metric((s["metric"] for s in scores if s.get("level") == "case"), wanted) or main_metric(
        (s["metric"] for s in scores), wanted
    )
    shown = [s for s in scores if s["metric"] == metric]
    for s in shown[:6]:
        whole = s["label"] == "all" and len(shown) == 1  # of everything, and there is nothing to tell it from
        interval = ""
        if s.get("low") is not None and s["n"] >= FEW:
            interval = f"95 % interval {plain_number(s['low'], s['unit'])} to {plain_number(s['high'], s['unit'])}"
        value = f"{plain_number(s['mean'], s['unit'])} {s['unit']}".strip()
        name = f"mean {metric}" if whole else f"mean {metric}, {s['label']}"
        cards.append({"value": value, "name": name, "note": interval, "kind": ""})
        if s.get("level") == "case":
            sentences.append(_sentence(s, metric or "", "In" if whole else f"{s['label']}: in"))
    # "all" repeats what the labels say, unless the scores are of all of them alone
    named = [r for r in rows if r.label != "all"] or rows
    missed = len({(r.case, r.label) for r in named if r.status == "missed"})
    alarms = len({(r.case, r.label) for r in named if r.status == "false_alarm"})
    if rows:
        cards.append({"value": len(cases), "name": "cases scored", "note": "", "kind": ""})
        cards.append(
            {
                "value": missed,
                "name": "structures missed",
                "note": f"{alarms} false alarm{'s' * (alarms != 1)}",
                "kind": "bad" if missed else "",
            }
        )
    elif not summary:
        sentences.append("This run has no scores yet: its validation cases have not been evaluated.")
    return cards, sentences[:4]


def _sentence(s: Mapping[str, Any], metric: str, start: str) -> str:
    n, unit = s["n"], s["unit"]
    mean, low, high = (plain_number(s.get(key), unit) for key in ("mean", "low", "high"))
    text = f"{start} {n} case{'s' * (n != 1)} the mean {metric} was {mean} {unit}".rstrip()
    if n < FEW:
        text += "; so few cases say little about others"
    elif s.get("low") is not None:
        text += f"; the true mean lies between {low} and {high} with 95 % confidence"
    words = (("missed", "missed"), ("false_alarm", "marked where there is none"), ("both_empty", "rightly empty"))
    counts = [f"{s[key]} {word}" for key, word in words if s.get(key)]
    return text + (f" ({', '.join(counts)})." if counts else ".")


def _alerts(rows: Sequence[ScoreRow], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    cases = summary.get("cases", {})
    alerts = []

    def add(kind: str, title: str, lines: Sequence[str]) -> None:
        shown = [str(line) for line in lines[:50]]
        if len(lines) > 50:
            shown.append(f"... and {len(lines) - 50} more in summary.json")
        alerts.append({"kind": kind, "title": title, "lines": shown})

    if missing := cases.get("missing"):
        add("bad", f"{len(missing)} case{'s' * (len(missing) != 1)} without a prediction, counted as missed", missing)
    missed = sorted({(r.case, r.label) for r in rows if r.status == "missed" and r.case not in (missing or ())})
    if missed:
        add(
            "bad",
            f"{len(missed)} structure{'s' * (len(missed) != 1)} missed",
            [f"{case}: {label}" for case, label in missed],
        )
    alarms = sorted({(r.case, r.label) for r in rows if r.status == "false_alarm"})
    if alarms:
        add(
            "warn",
            f"{len(alarms)} false alarm{'s' * (len(alarms) != 1)}",
            [f"{case}: {label}" for case, label in alarms],
        )
    if extra := cases.get("extra"):
        add("warn", f"{len(extra)} prediction{'s' * (len(extra) != 1)} without a reference, not scored", extra)
    if resampled := cases.get("resampled"):
        add(
            "warn",
            f"{len(resampled)} prediction{'s' * (len(resampled) != 1)} on another grid, resampled as asked",
            resampled,
        )
    if summary.get("notes"):
        add("warn", "Notes", summary["notes"])
    return alerts


def _strips(rows: Sequence[ScoreRow], scores: Sequence[Mapping[str, Any]]) -> list:
    figures = []
    better = {s["metric"]: s.get("better", "none") for s in scores}
    for metric in dict.fromkeys(row.metric for row in rows):
        if better.get(metric) == "none":  # a size, not a score: the volumes have a section of their own
            continue
        bands: dict[str, list[ScoreRow]] = {}
        for row in rows:
            if row.metric == metric:
                bands.setdefault(row.label, []).append(row)
        of = {s["label"]: s for s in scores if s["metric"] == metric and s.get("level") == "case"}
        figures.append(strip_plot(bands, of, better.get(metric, "none")))
    return figures


def _agreement(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for volume in summary.get("volumes", []):
        found.setdefault(volume["label"], []).append(volume)
    sections = []
    for label, volumes in found.items():
        unit = volumes[0]["unit"]
        points = [(v["case"], v["prediction"], v["reference"]) for v in volumes]
        if len(points) < 2:
            continue
        figure, facts = agreement_plot(points, unit)
        size, way = plain_number(abs(facts["bias"]), unit), "larger" if facts["bias"] >= 0 else "smaller"
        low, high = (signed_number(facts.get(key, 0.0), unit) for key in ("low", "high"))
        text = f"On average the prediction is {size} {unit} {way} than the reference"
        text += f"; 95 % of differences are expected between {low} and {high} {unit}." if "low" in facts else "."
        sections.append({"label": label, "figure": figure, "text": text})
    return sections


def _calibration(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    sections = []
    for one in summary.get("calibration", []):
        text = (
            f"Expected calibration error {one['error']:.3f}: by so much the probabilities are off on average "
            "(0 is perfect)."
        )
        sections.append({"label": one["label"], "figure": reliability_plot(one["bins"], one["label"]), "text": text})
    return sections


def _wide(rows: Sequence[ScoreRow]) -> dict[str, Any]:
    columns = {row.metric: row.unit for row in rows}
    lines: dict[tuple[str, str], dict[str, ScoreRow]] = {}
    for row in rows:
        lines.setdefault((row.case, row.label), {})[row.metric] = row
    shown = []
    for (case, label), members in list(lines.items())[:LINES]:
        cells = [_cell(members[m].value if m in members else None, unit) for m, unit in columns.items()]
        shown.append({"case": case, "label": label, "status": next(iter(members.values())).status, "cells": cells})
    hint = "cases.csv has the same numbers with all digits."
    if len(lines) > LINES:
        hint = f"The first {LINES} of {len(lines)} lines; cases.csv has all."
    return {"columns": [f"{m} ({u})" if u else m for m, u in columns.items()], "rows": shown, "hint": hint}


def _words(rows: Sequence[ScoreRow]) -> list[tuple[str, str, str]]:
    words = [(name, text, "") for name, text in GLOSSARY]
    seen = {row.metric: row for row in rows}
    return [(metric, plain_words(metric), row.definition) for metric, row in seen.items()] + words
