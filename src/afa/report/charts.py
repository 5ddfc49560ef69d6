"""Charts as inline SVG, written by hand: no library, no script, no file of its own.

Positions along an axis are percentages and text keeps its pixel size, so a chart is as readable on a phone
as on a wide screen. Colors are CSS variables that the page defines for light and dark. What is plotted is the
caller's business; values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

Point = tuple[float, float]

MAX_POINTS = 600
"""A line with more points is drawn through the means of neighbors."""

SMOOTHED_FROM = 50
"""A line with at least as many points is drawn faint, with its moving average on top."""

HOVER_BANDS = 100
"""Tooltips along a line chart."""


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Text of the legend.
        color: Name of the CSS variable without its dashes.
        points: (x, y) in order of x.
    """

    name: str
    color: str
    points: Sequence[Point]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    boundaries: Sequence[tuple[float, str]] = (),
    smooth: bool = True,
) -> str:
    """Draw lines over a common x axis that starts at 0; the y axis holds 0 too.

    Args:
        series: Lines; those without points are left out.
        title: Heading, and the accessible name together with the last values.
        x_label: What x counts.
        boundaries: (x, label) of dashed vertical lines, such as the start of a phase; the label may be
            empty; lines outside the plot are left out.
        smooth: Draw long lines faint, with their moving average on top, which does not look across boundaries.

    Returns:
        One HTML `<figure>`; empty text when there is nothing to draw.
    """
    several = len(series) > 1
    series = [Series(s.name, s.color, _thin(_finite(s.points))) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    x_end = max(s.points[-1][0] for s in series) or 1.0
    values = [y for s in series for _, y in s.points]
    y_ticks = nice_ticks(min(0.0, *values), max(values))
    low, high = y_ticks[0], y_ticks[-1]

    def left(x: float) -> float:
        return 100.0 * x / x_end

    def top(y: float) -> float:
        return 100.0 * (high - y) / (high - low)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{top(y):.2f}%" y2="{top(y):.2f}%"/>')
        parts.append(f'<text class="tick" x="-8" y="{top(y):.2f}%" dy=".35em" text-anchor="end">{_number(y)}</text>')
    for x in [x for x in nice_ticks(0.0, x_end, count=4) if x <= x_end]:
        anchor = "middle" if left(x) < 95 else "end"
        parts.append(
            f'<text class="tick" x="{left(x):.2f}%" y="100%" dy="1.5em" text-anchor="{anchor}">{_number(x)}</text>'
        )
    parts.append('<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">')
    for s in series:
        lines = [("line", s.points)]
        if smooth and len(s.points) >= SMOOTHED_FROM:
            lines = [("line faint", s.points), ("line", _smooth(s.points, [x for x, _ in boundaries]))]
        for style, points in lines:
            path = " ".join(f"{10 * left(x):.1f},{10 * top(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="{style}" stroke="var(--{s.color})" points="{path}"/>')
    parts.append("</svg>")
    for s in series:
        if len(s.points) < 12:
            parts += [
                f'<circle cx="{left(x):.2f}%" cy="{top(y):.2f}%" r="3.5" fill="var(--{s.color})"/>' for x, y in s.points
            ]
    inside = [(x, label) for x, label in boundaries if 0 < x < x_end]
    for i, (x, label) in enumerate(inside):
        at = left(x)
        anchor, shift = ("start", 6) if at < 60 else ("end", -6)
        parts.append(f'<line class="boundary" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>')
        if label:
            parts.append(
                f'<text class="mark" x="{at:.2f}%" dx="{shift}" y="{12 + 16 * (i % 2)}" text-anchor="{anchor}">'
                f"{escape(label)}</text>"
            )
    parts += _hover_bands(series, x_end, x_label)

    last = ", ".join(f"{s.name} {_number(s.points[-1][1])}" for s in series)
    name = f"{title} by {x_label}, up to {x_label} {_number(x_end)}; at the end: {last}"
    legend = [(s.name, s.color) for s in series] if several else []
    svg = f'<svg class="lines" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
    return _figure(title, legend, f'<div class="plot">{svg}</div>', detail=f"by {x_label}")


def bar_chart(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str,
    series: Sequence[tuple[str, str]],
    high: float = 100.0,
) -> str:
    """Draw horizontal bars, one group a row and one bar a series.

    Args:
        rows: (label, one value in 0..high per series; None draws no bar).
        title: Heading and accessible name.
        series: (name, CSS variable of the color) of each value.
        high: End of the value axis.

    Returns:
        One HTML `<figure>`; empty text when there are no rows.
    """
    if not rows:
        return ""
    bar, gap, header = 8, 2, 20
    pitch = len(series) * (bar + gap) + 10
    height = header + pitch * len(rows)
    parts = []
    for x in nice_ticks(0.0, high, count=4):
        at = 100.0 * x / high
        anchor = "middle" if at < 100 else "end"
        parts.append(f'<line class="grid" x1="{at:.2f}%" x2="{at:.2f}%" y1="{header}" y2="100%"/>')
        parts.append(f'<text class="tick" x="{at:.2f}%" y="11" text-anchor="{anchor}">{_number(x)}</text>')
    for i, (label, values) in enumerate(rows):
        y = header + i * pitch + 6
        bars = list(zip(series, values, strict=True))
        texts = [f"{name}: {'not scored' if v is None else f'{v:.1f}'}" for (name, _), v in bars]
        parts.append(f"<g><title>{escape(label)}\n{escape(chr(10).join(texts))}</title>")
        parts.append(f'<rect class="band" x="0" y="{y - 5}" width="100%" height="{pitch}"/>')
        short = label if len(label) <= 15 else label[:14] + "…"
        middle = y + (pitch - 10) / 2
        parts.append(f'<text class="name" x="-10" y="{middle:g}" dy=".35em" text-anchor="end">{escape(short)}</text>')
        for j, ((_, color), value) in enumerate(bars):
            if value is not None:
                box = f'x="0" y="{y + j * (bar + gap)}" width="{100.0 * value / high:.2f}%" height="{bar}"'
                parts.append(f'<rect {box} rx="2" fill="var(--{color})"/>')
        parts.append("</g>")
    svg = f'<svg role="img" aria-label="{escape(title)}" height="{height}">{"".join(parts)}</svg>'
    return _figure(title, series, f'<div class="plot bars">{svg}</div>')


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers that span a range: multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: Smallest value to cover.
        high: Largest value to cover; raised when it does not exceed `low`.
        count: How many intervals to aim at.

    Returns:
        Ascending; the first is at most `low`, the last at least `high`.

    >>> nice_ticks(0, 0.83)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _figure(title: str, legend: Sequence[tuple[str, str]], body: str, *, detail: str = "") -> str:
    keys = "".join(f'<li><i style="background:var(--{color})"></i>{escape(name)}</li>' for name, color in legend)
    keys = f'<ul class="legend">{keys}</ul>' if keys else ""
    heading = f"<span><b>{escape(title)}</b> {escape(detail)}</span>"
    return f'<figure class="chart"><figcaption>{heading}{keys}</figcaption>{body}</figure>'


def _hover_bands(series: Sequence[Series], x_end: float, x_label: str) -> list[str]:
    """Invisible columns whose tooltips tell every line's value there."""
    xs = sorted({x for s in series for x, _ in s.points})
    xs = xs[:: max(1, math.ceil(len(xs) / HOVER_BANDS))]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(xs)), x_end]
    parts = []
    for x, (start, end) in zip(xs, pairwise(edges), strict=True):
        near = [(s.name, min(s.points, key=lambda point: abs(point[0] - x))) for s in series]
        lines = [f"{name}: {_number(y)}" for name, (at, y) in near if start <= at <= end]
        text = escape("\n".join([f"{x_label} {_number(x)}", *lines]))
        left, width = 100 * start / x_end, 100 * (end - start) / x_end
        parts.append(
            f'<rect class="band" x="{left:.2f}%" y="0" width="{width:.2f}%" height="100%"><title>{text}</title></rect>'
        )
    return parts


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thin(points: Sequence[Point]) -> list[Point]:
    """Means of neighbors, at most MAX_POINTS of them."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: Sequence[Point], breaks: Sequence[float]) -> list[Point]:
    """Moving average over a twentieth of the line, narrower towards its ends and the breaks."""
    half = max(1, len(points) // 40)
    result: list[Point] = []
    for _, group in groupby(points, key=lambda point: sum(point[0] >= x for x in breaks)):
        part = list(group)
        for i, (x, _) in enumerate(part):
            reach = min(half, i, len(part) - 1 - i)
            window = part[i - reach : i + reach + 1]
            result.append((x, sum(y for _, y in window) / len(window)))
    return result


def _number(value: float) -> str:
    """As few characters as tell four digits: 1,200, 0.35, 6e-5."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
