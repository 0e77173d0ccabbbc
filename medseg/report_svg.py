"""Drawing primitives of the report's figures: axes with round ticks, marks and escaped text, as inline SVG.

Colours come from the report's style sheet through classes, so that figures follow dark mode and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

__all__ = ["Axis", "Canvas", "nice_ticks", "tick_text"]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high], about `count` of them.

    >>> nice_ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short.

    >>> tick_text(0.25), tick_text(12000.0), tick_text(-3.0)
    ('0.25', '12 000', '−3')
    """
    text = f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.2g}"
    return text.replace(",", " ").replace("-", "−")


class Axis:
    """A linear scale from data to pixels, widened to a little margin around the data."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, margin: float = 0.05) -> None:
        finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        room = (high - low) * margin or (abs(high) * 0.05 or 0.5)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def bounded(self, low: float | None = None, high: float | None = None) -> Axis:
        """The same axis, not reaching beyond the values that are possible."""
        self.low = self.low if low is None else max(low, self.low)
        self.high = self.high if high is None else min(high, self.high)
        if not self.high > self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        return self

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.05, max(-0.05, share)) * (self.end - self.start)


class Canvas:
    """Collects SVG elements; `svg()` returns the picture as Markup."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>')

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through several points."""
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{way}" class="{css}"/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str) -> None:
        """A rectangle; a negative height or width is taken as 0."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0, width):.1f}" height="{max(0, height):.1f}" class="{css}"/>'
        )

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "middle", turn: bool = False) -> None:
        """A line of text, escaped."""
        way = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}"{way}>{escape(text)}</text>'
        )

    def mark(self, x: float, y: float, css: str, shape: str = "dot", tip: str = "", radius: float = 3.4) -> None:
        """A dot, ring, cross or diamond, with a tool tip."""
        note = f"<title>{escape(tip)}</title>" if tip else ""
        r, d = radius, radius * 1.35
        if shape == "cross":
            way = f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
            body = f'<path d="{way}" class="{css} cross">{note}</path>'
        elif shape == "diamond":
            way = f"M{x:.1f} {y - d:.1f}l{d} {d}l{-d} {d}l{-d} {-d}z"
            body = f'<path d="{way}" class="{css}">{note}</path>'
        else:
            body = (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" class="{css}{" ring" * (shape == "ring")}">{note}</circle>'
            )
        self.parts.append(body)

    def x_axis(self, axis: Axis, top: float, bottom: float, label: str, count: int = 5) -> None:
        """Vertical grid lines with numbers below, and the axis' name."""
        for tick in nice_ticks(axis.low, axis.high, count):
            self.line(axis(tick), top, axis(tick), bottom, "grid")
            self.text(axis(tick), bottom + 16, tick_text(tick), "tick")
        self.text((axis.start + axis.end) / 2, bottom + 34, label, "axis")

    def y_axis(self, axis: Axis, left: float, right: float, label: str, count: int = 5) -> None:
        """Horizontal grid lines with numbers at the left, and the axis' name."""
        for tick in nice_ticks(axis.low, axis.high, count):
            self.line(left, axis(tick), right, axis(tick), "grid")
            self.text(left - 6, axis(tick) + 4, tick_text(tick), "tick", "end")
        self.text(14, (axis.start + axis.end) / 2, label, "axis", turn=True)

    def svg(self) -> Markup:
        """The picture."""
        box = f"0 0 {self.width:g} {self.height:g}"
        head = f'<svg class="figure" viewBox="{box}" role="img" aria-label="{escape(self.title)}">'
        return Markup(head + "".join(self.parts) + "</svg>")  # every text went through escape
