"""Charts as data: where lines, bars, ticks and tooltips lie. `templates/charts.html.j2` draws them.

Positions are percent of the plot, from its left and its top. What is plotted is the caller's business; values that are
not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

Point = tuple[float, float]

MAX_POINTS = 600
"""A line with more points is drawn through the means of neighbors."""

SMOOTHED_FROM = 50
"""A line with at least as many points is drawn faint, with its moving average on top."""

DOTTED_BELOW = 12
"""A line with fewer points has a dot at each."""

HOVER_BANDS = 100
"""Tooltips along a line chart."""


class Series(NamedTuple):
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
    boundaries: Sequence[tuple[float, str]] = (),
    smooth: bool = True,
) -> dict[str, Any] | None:
    """Lay out lines over training steps; the x axis starts at 0 and the y axis holds 0.

    Args:
        series: Lines; those without points are left out.
        title: Heading, and the accessible name together with the last values.
        boundaries: (step, label) of dashed vertical lines, such as the start of a phase; the label may be
            empty; lines outside the plot are left out.
        smooth: Draw long lines faint, with their moving average on top, which does not look across boundaries.

    Returns:
        `title`; `words`, the accessible name; `legend`: (name, color), empty where one series was given; `x_ticks` and
        `y_ticks`: (position, text); `lines`: `color`, `faint` and `points` of each; `dots`: (x, y, color);
        `boundaries`: (x, label); `bands`: (start, width, x, text of the tooltip). None when there is nothing to draw.
    """
    drawn = [Series(s.name, s.color, _thin([point for point in s.points if math.isfinite(point[1])])) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return None
    x_end = max(s.points[-1][0] for s in drawn) or 1.0
    values = [y for s in drawn for _, y in s.points]
    y_ticks = nice_ticks(min(0.0, *values), max(values))
    low, high = y_ticks[0], y_ticks[-1]

    def place(points: Sequence[Point]) -> list[Point]:
        return [(100 * x / x_end, 100 * (high - y) / (high - low)) for x, y in points]

    lines = []
    for s in drawn:
        is_long = smooth and len(s.points) >= SMOOTHED_FROM
        lines.append({"color": s.color, "faint": is_long, "points": place(s.points)})
        if is_long:
            averages = _smooth(s.points, [x for x, _ in boundaries])
            lines.append({"color": s.color, "faint": False, "points": place(averages)})
    last = ", ".join(f"{s.name} {number(s.points[-1][1])}" for s in drawn)
    return {
        "title": title,
        "words": f"{title} by step, up to step {number(x_end)}; at the end: {last}",
        "legend": [(s.name, s.color) for s in drawn] if len(series) > 1 else [],
        "x_ticks": [(100 * x / x_end, number(x)) for x in nice_ticks(0.0, x_end, count=4) if x <= x_end],
        "y_ticks": [(100 * (high - y) / (high - low), number(y)) for y in y_ticks],
        "lines": lines,
        "dots": [(*point, s.color) for s in drawn if len(s.points) < DOTTED_BELOW for point in place(s.points)],
        "boundaries": [(100 * x / x_end, label) for x, label in boundaries if 0 < x < x_end],
        "bands": _hover_bands(drawn, x_end),
    }


def bar_chart(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str,
    series: Sequence[tuple[str, str]],
    high: float | None = 100.0,
) -> dict[str, Any] | None:
    """Lay out horizontal bars, one group a row and one bar a series.

    Args:
        rows: (label, one value from 0 on per series; None draws no bar).
        title: Heading and accessible name.
        series: (name, CSS variable of the color) of each value.
        high: End of the value axis; None rounds the largest value up.

    Returns:
        `title`; `series`; `ticks`: (position, text); `rows`: `label`, `words` of the tooltip and `widths` of the bars.
        None when there are no rows.
    """
    if not rows:
        return None
    if high is None:
        high = nice_ticks(0.0, max(value or 0.0 for _, values in rows for value in values), count=4)[-1]
    laid_out = []
    for label, values in rows:
        texts = ["not scored" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.1f}" for v in values]
        words = "\n".join([label, *(f"{name}: {text}" for (name, _), text in zip(series, texts, strict=True))])
        widths = [None if value is None else 100 * value / high for value in values]
        laid_out.append({"label": label, "words": words, "widths": widths})
    ticks = [(100 * x / high, number(x)) for x in nice_ticks(0.0, high, count=4)]
    return {"title": title, "series": series, "ticks": ticks, "rows": laid_out}


class HeatCell(NamedTuple):
    """One cell of a matrix.

    Attributes:
        text: What stands in it.
        heat: How strong its color is, 0 to 1.
        words: What its tooltip says; empty for none.
        own: Drawn in the color of what is right, not of what is wrong.
    """

    text: str
    heat: float
    words: str
    own: bool


def heat_matrix(names: Sequence[str], rows: Sequence[Sequence[HeatCell]]) -> list[dict[str, Any]]:
    """Lay out a matrix of classes: `name` and `cells` of each row; its columns have the same names."""
    return [{"name": name, "cells": cells} for name, cells in zip(names, rows, strict=True)]


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


def number(value: float) -> str:
    """As few characters as tell four digits.

    >>> number(1200), number(0.35), number(6e-5)
    ('1,200', '0.35', '6e-5')
    """
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _hover_bands(series: Sequence[Series], x_end: float) -> list[tuple[float, float, float, str]]:
    """Invisible columns whose tooltips tell every line's value there."""
    xs = sorted({x for s in series for x, _ in s.points})
    xs = xs[:: max(1, math.ceil(len(xs) / HOVER_BANDS))]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(xs)), x_end]
    bands = []
    for x, (start, end) in zip(xs, pairwise(edges), strict=True):
        near = [(s.name, min(s.points, key=lambda point: abs(point[0] - x))) for s in series]
        lines = [f"{name}: {number(y)}" for name, (at, y) in near if start <= at <= end]
        text = "\n".join([f"step {number(x)}", *lines])
        bands.append((100 * start / x_end, 100 * (end - start) / x_end, 100 * x / x_end, text))
    return bands


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
