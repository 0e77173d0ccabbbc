"""The report's figures: training curves, strip plots, Bland-Altman and reliability diagrams."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from medseg.report_svg import Axis, Canvas
from medseg.tables import ScoreRow
from medseg.tables_text import plain_number, signed_number

__all__ = ["agreement_plot", "curve_plot", "reliability_plot", "strip_plot"]

WIDTH = 440
SHAPES = {
    "scored": ("dot", "scored"),
    "both_empty": ("ring", "empty"),
    "missed": ("cross", "missed"),
    "false_alarm": ("diamond", "alarm"),
}
WORDS = {"scored": "", "both_empty": ", absent in both", "missed": ", missed", "false_alarm": ", false alarm"}


def curve_plot(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str) -> Markup:
    """Lines over time, one per name, with a legend; names of more than 6 series are left to the colours' tips."""
    height, left, right, top, bottom = 260, 58, WIDTH - 12, 12 + 18 * -(-len(series) // 2), 212
    canvas = Canvas(WIDTH, height, f"{y_label} over {x_label}")
    x = Axis([p[0] for points in series.values() for p in points], left, right, margin=0)
    y = Axis([p[1] for points in series.values() for p in points], bottom, top)
    canvas.x_axis(x, top, bottom, x_label)
    canvas.y_axis(y, left, right, y_label)
    for number, (name, points) in enumerate(series.items()):
        css = f"line c{number % 6}"
        canvas.path([(x(a), y(b)) for a, b in points], css)
        if len(points) == 1:
            canvas.mark(x(points[0][0]), y(points[0][1]), f"fill c{number % 6}", tip=name)
        column, row = number % 2, number // 2
        at = left + column * (right - left) / 2
        canvas.line(at, 12 + row * 18, at + 18, 12 + row * 18, css)
        canvas.text(at + 24, 16 + row * 18, name if len(name) < 26 else name[:24] + "…", "legend", "start")
    return canvas.svg()


def strip_plot(rows: Mapping[str, Sequence[ScoreRow]], scores: Mapping[str, Mapping[str, Any]], better: str) -> Markup:
    """All cases of one metric, one band per label: every case a mark, the mean a bar with its interval.

    Missed structures and false alarms stand in a lane of their own at the bad end, since their distances (the image's
    diagonal) would press all others together; the mean counts them with their full value.
    """
    lane = any(row.status in ("missed", "false_alarm") for band in rows.values() for row in band)
    head = next(iter(rows.values()))[0]
    height_of_band = 62
    top, left, right = 30, 16, WIDTH - 16
    bottom = top + height_of_band * len(rows)
    name = f"{head.metric} ({head.unit})" if head.unit else head.metric
    canvas = Canvas(WIDTH, bottom + 44, f"{name} of every case")
    shown = [row.value for band in rows.values() for row in band if row.status in ("scored", "both_empty")]
    shown += [s[k] for s in scores.values() for k in ("mean", "low", "high") if s.get(k) is not None]
    worst_left = better == "higher"
    edges = (left + (34 if lane and worst_left else 0), right - (34 if lane and not worst_left else 0))
    if not head.unit and set(shown) <= {0.0, 1.0}:
        shown += [0.0, 1.0]  # nothing found, or all of it: half of the scale would look like all of it
    x = Axis(shown, *edges)
    if not head.unit and all(0 <= v <= 1 for v in shown):
        x.bounded(0, 1)
    elif all(v >= 0 for v in shown):
        x.bounded(0, None)
    canvas.x_axis(
        x, top - 4, bottom, f"{name}: {'higher' if worst_left else 'lower'} is better" if better != "none" else name
    )
    lane_x = left + 10 if worst_left else right - 10
    if lane:
        canvas.rect(lane_x - 15, top - 4, 30, bottom - top + 4, "lane")
    for number, (label, band) in enumerate(rows.items()):
        y0 = top + number * height_of_band
        canvas.line(left, y0 + height_of_band - 4, right, y0 + height_of_band - 4, "band")
        canvas.text(left, y0 + 8, label, "label", "start")
        _swarm(canvas, x, band, y0 + 27, lane_x)
        score = scores.get(label)
        if score and score.get("mean") is not None:
            y = y0 + 47
            if score.get("low") is not None:
                canvas.line(x(score["low"]), y, x(score["high"]), y, "interval")
            low, mean, high = (plain_number(score.get(key), head.unit) for key in ("low", "mean", "high"))
            tip = f"mean {mean}" + (f", 95 % interval {low} to {high}" if score.get("low") is not None else "")
            canvas.mark(x(score["mean"]), y, "mean", "diamond", tip, 4)
    return canvas.svg()


def _swarm(canvas: Canvas, x: Axis, band: Sequence[ScoreRow], y: float, lane_x: float) -> None:
    # marks that would cover one another move up and down; the same table draws the same picture
    used: dict[int, int] = {}
    for row in sorted(band, key=lambda r: (r.value, r.case)):
        at = lane_x if row.status in ("missed", "false_alarm") else x(row.value)
        place = round(at / 5)
        count = used.get(place, 0)
        used[place] = count + 1
        offset = (count + 1) // 2 * 3.2 * (1 if count % 2 else -1)
        shape, css = SHAPES[row.status]
        canvas.mark(
            at,
            y + max(-13, min(13, offset)),
            css,
            shape,
            f"{row.case}: {plain_number(row.value, row.unit)} {row.unit}{WORDS[row.status]}",
        )


def agreement_plot(points: Sequence[tuple[str, float, float]], unit: str) -> tuple[Markup, dict[str, float]]:
    """Bland-Altman: difference (prediction - reference) over mean, with bias and limits of agreement (mean ± 1.96 sd).

    Args:
        points: (case, volume of the prediction, volume of the reference).
        unit: of both.

    Returns:
        The picture and {"bias", "low", "high", "n"}; with fewer than two cases there are no limits.

    Source: Bland and Altman, Lancet 1986, doi:10.1016/S0140-6736(86)90837-8.
    """
    differences = [p - r for _, p, r in points]
    bias = statistics.fmean(differences)
    sd = statistics.stdev(differences) if len(points) > 1 else None
    facts = {"bias": bias, "n": float(len(points))}
    if sd is not None:
        facts |= {"low": bias - 1.96 * sd, "high": bias + 1.96 * sd}
    height, left, right, top, bottom = 270, 66, WIDTH - 12, 12, 224
    canvas = Canvas(WIDTH, height, "difference of volumes over their mean")
    x = Axis([(p + r) / 2 for _, p, r in points], left, right)
    y = Axis([*differences, 0.0, *[facts[k] for k in ("low", "high") if k in facts]], bottom, top)
    canvas.x_axis(x, top, bottom, f"mean of prediction and reference ({unit})", 4)
    canvas.y_axis(y, left, right, f"prediction − reference ({unit})")
    canvas.line(left, y(0), right, y(0), "zero")
    canvas.line(left, y(bias), right, y(bias), "bias")
    canvas.text(right, y(bias) - 5, f"bias {plain_number(bias, unit or 'x')}", "note", "end")
    for key in ("low", "high"):
        if key in facts:
            canvas.line(left, y(facts[key]), right, y(facts[key]), "limit")
            canvas.text(
                right, y(facts[key]) + (13 if key == "low" else -5), signed_number(facts[key], unit), "note", "end"
            )
    for case, p, r in points:
        canvas.mark(
            x((p + r) / 2), y(p - r), "scored", "dot", f"{case}: prediction {p:.4g} {unit}, reference {r:.4g} {unit}"
        )
    return canvas.svg(), facts


def reliability_plot(bins: Sequence[Mapping[str, float]], name: str) -> Markup:
    """Observed frequency over predicted probability; the diagonal is perfect calibration.

    Args:
        bins: dicts with mean predicted "probability", observed "frequency" and "count" of voxels.
        name: of the label.
    """
    height, left, right, top, bottom = 300, 58, WIDTH - 90, 12, 254
    canvas = Canvas(WIDTH, height, f"calibration of {name}")
    x = Axis([0, 1], left, right, margin=0)
    y = Axis([0, 1], bottom, top, margin=0)
    canvas.x_axis(x, top, bottom, "probability that the network gave")
    canvas.y_axis(y, left, right, "share that was right")
    canvas.line(x(0), y(0), x(1), y(1), "zero")
    filled = [b for b in bins if b["count"] > 0]
    if filled:
        canvas.path([(x(b["probability"]), y(b["frequency"])) for b in filled], "line c0")
    for b in filled:
        tip = f"probability {b['probability']:.2f}: {b['frequency']:.2f} right, {b['count']:.0f} voxels"
        canvas.mark(x(b["probability"]), y(b["frequency"]), "fill c0", "dot", tip)
    return canvas.svg()
