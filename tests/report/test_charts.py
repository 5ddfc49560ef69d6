"""Where lines, bars and tooltips lie, and that the template draws them."""

from typing import Any
from xml.etree import ElementTree

import pytest

from afa.report.charts import MAX_POINTS, SMOOTHED_FROM, Series, bar_chart, line_chart, nice_ticks
from afa.report.render import render_page


def drawn(chart: dict[str, Any] | None) -> dict[str, Any]:
    assert chart is not None
    return chart


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 0.83, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 6e-5, [0, 2e-5, 4e-5, 6e-5]), (3, 3, [3, 4, 5, 6])],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


@pytest.mark.parametrize("low", [-7.3, 0.0, 1e-7])
@pytest.mark.parametrize("span", [1e-9, 0.37, 1.0, 123456.0])
def test_ticks_cover_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert ticks[0] <= low
    assert ticks[-1] >= low + span
    assert 3 <= len(ticks) <= 12


def test_points_land_where_the_axes_say() -> None:
    chart = drawn(line_chart([Series("a", "seg", [(0, 0.0), (5, 1.0), (10, 0.25)])], title="T"))
    assert [line["points"] for line in chart["lines"]] == [[(0, 100), (50, 0), (100, 75)]]
    assert chart["dots"] == [(0, 100, "seg"), (50, 0, "seg"), (100, 75, "seg")]
    assert {(100, "0"), (80, "0.2"), (0, "1")} <= {(round(y, 9), text) for y, text in chart["y_ticks"]}
    assert chart["x_ticks"][-1] == (100, "10")


def test_values_that_are_not_finite_leave_no_mark() -> None:
    points = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    chart = drawn(line_chart([Series("a", "seg", points), Series("gone", "cam", [])], title="T"))
    assert [x for x, _ in chart["lines"][0]["points"]] == [0, 100]
    assert chart["legend"] == [("a", "seg")]
    assert line_chart([Series("a", "seg", [])], title="T") is None
    assert bar_chart([], title="T", series=[("a", "seg")]) is None


def test_boundaries_outside_the_plot_are_left_out() -> None:
    boundaries = [(0, "zero"), (4, "inside"), (10, "end"), (20, "beyond")]
    chart = drawn(line_chart([Series("a", "seg", [(0, 0), (10, 1)])], title="T", boundaries=boundaries))
    assert chart["boundaries"] == [(40, "inside")]


def test_smoothing_keeps_ends_and_does_not_look_across_boundaries() -> None:
    points = [(float(x), 1.0 if x < 100 else 3.0) for x in range(200)]

    def lines(points: list[tuple[float, float]], **settings: Any) -> list[tuple[bool, list[tuple[float, float]]]]:
        chart = line_chart([Series("a", "seg", points)], title="T", **settings)
        return [(line["faint"], line["points"]) for line in drawn(chart)["lines"]]

    raw, smoothed = lines(points, boundaries=[(100, "b")])
    assert (raw[0], smoothed[0]) == (True, False)
    assert smoothed[1] == raw[1]
    assert lines(points)[1][1] != raw[1]
    assert len(lines(points[: SMOOTHED_FROM - 1])) == len(lines(points, smooth=False)) == 1


def test_long_lines_are_thinned_to_means() -> None:
    chart = drawn(
        line_chart([Series("a", "seg", [(float(x), float(x % 2)) for x in range(4 * MAX_POINTS)])], title="T")
    )
    raw = chart["lines"][0]["points"]
    assert len(raw) == MAX_POINTS
    assert len({y for _, y in raw}) == 1


def test_tooltips_and_accessible_name() -> None:
    series = [Series("a", "seg", [(0, 0.5), (1000, 0.125)]), Series("late", "cam", [(1000, 7.0)])]
    chart = drawn(line_chart(series, title="Loss"))
    assert chart["bands"] == [(0, 50, 0, "step 0\na: 0.5"), (50, 50, 100, "step 1,000\na: 0.125\nlate: 7")]
    assert chart["words"] == "Loss by step, up to step 1,000; at the end: a 0.125, late 7"


def test_bars_are_as_long_as_their_values() -> None:
    chart = drawn(
        bar_chart([("a", [50.0, None]), ("b", [100.0, 12.5])], title="T", series=[("seg", "seg"), ("CAM", "cam")])
    )
    assert [row["widths"] for row in chart["rows"]] == [[50, None], [100, 12.5]]
    assert [row["words"] for row in chart["rows"]] == ["a\nseg: 50.0\nCAM: not scored", "b\nseg: 100.0\nCAM: 12.5"]
    counts = drawn(bar_chart([("a", [1200])], title="T", series=[("n", "seg")], high=None))
    assert (counts["ticks"][-1], counts["rows"][0]["words"]) == ((100, "1,500"), "a\nn: 1,200")


def test_the_template_draws_what_the_charts_say() -> None:
    rows: list[tuple[str, list[float | None]]] = [("cat <i>", [50.0, None]), ("a very long class name", [100.0, 12.5])]
    chart = bar_chart(rows, title="T", series=[("seg", "seg"), ("CAM", "cam")])
    page = render_page("compare", tables=[{"title": "", "head": [], "rows": [], "notes": [], "chart": chart}])
    figure = ElementTree.fromstring(page[page.index("<figure") : page.index("</figure>") + 9])
    bars = [(bar.get("fill"), bar.get("width")) for bar in figure.iter("rect") if bar.get("fill")]
    assert bars == [("var(--seg)", "50.00%"), ("var(--seg)", "100.00%"), ("var(--cam)", "12.50%")]
    assert next(title.text for title in figure.iter("title")) == "cat <i>\nseg: 50.0\nCAM: not scored"
    assert "a very long cl…" in [text.text for text in figure.iter("text")]
