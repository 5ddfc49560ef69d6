import re
from xml.etree import ElementTree

import pytest

from afa.report.charts import MAX_POINTS, SMOOTHED_FROM, Series, bar_chart, line_chart, nice_ticks


def lines_of(figure: ElementTree.Element) -> list[list[tuple[float, float]]]:
    texts = [line.attrib["points"] for line in figure.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in text.split())] for text in texts]


def texts_of(figure: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in figure.iter("text")]


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
    figure = ElementTree.fromstring(line_chart([Series("a", "seg", [(0, 0.0), (5, 1.0), (10, 0.25)])], title="T"))
    assert lines_of(figure) == [[(0, 1000), (500, 0), (1000, 750)]]
    assert {"0", "0.2", "1", "10"} <= set(texts_of(figure))


def test_values_that_are_not_finite_leave_no_mark() -> None:
    points = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    html = line_chart([Series("a", "seg", points), Series("gone", "cam", [])], title="T")
    assert len(lines_of(ElementTree.fromstring(html))[0]) == 2
    assert not re.search(r"nan|inf\b|gone", html)


def test_boundaries_outside_the_plot_are_left_out() -> None:
    boundaries = [(0, "zero"), (4, "in & side"), (10, "end"), (20, "beyond")]
    html = line_chart([Series("a", "seg", [(0, 0), (10, 1)])], title="T", boundaries=boundaries)
    figure = ElementTree.fromstring(html)
    marks = [text.text for text in figure.iter("text") if text.get("class") == "mark"]
    assert marks == ["in & side"]
    assert [line.get("x1") for line in figure.iter("line") if line.get("class") == "boundary"] == ["40.00%"]


def test_smoothing_keeps_ends_and_does_not_look_across_boundaries() -> None:
    points = [(float(x), 1.0 if x < 100 else 3.0) for x in range(200)]
    figure = ElementTree.fromstring(line_chart([Series("a", "seg", points)], title="T", boundaries=[(100, "b")]))
    raw, smoothed = lines_of(figure)
    assert smoothed == raw
    blurred = ElementTree.fromstring(line_chart([Series("a", "seg", points)], title="T"))
    assert lines_of(blurred)[1] != raw
    for s, smooth in ((points[: SMOOTHED_FROM - 1], True), (points, False)):
        one = ElementTree.fromstring(line_chart([Series("a", "seg", s)], title="T", smooth=smooth))
        assert len(lines_of(one)) == 1


def test_long_lines_are_thinned_to_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(4 * MAX_POINTS)]
    figure = ElementTree.fromstring(line_chart([Series("a", "seg", points)], title="T"))
    raw = lines_of(figure)[0]
    assert len(raw) == MAX_POINTS
    assert len({y for _, y in raw}) == 1


def test_tooltips_and_accessible_name() -> None:
    series = [Series("a<b", "seg", [(0, 0.5), (1000, 0.125)]), Series("late", "cam", [(1000, 7.0)])]
    figure = ElementTree.fromstring(line_chart(series, title="Loss"))
    assert [title.text for title in figure.iter("title")] == ["step 0\na<b: 0.5", "step 1,000\na<b: 0.125\nlate: 7"]
    svg = next(figure.iter("svg"))
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == "Loss by step, up to step 1,000; at the end: a<b 0.125, late 7"


def test_nothing_to_draw_is_empty() -> None:
    assert line_chart([Series("a", "seg", [])], title="T") == ""
    assert bar_chart([], title="T", series=[("a", "seg")]) == ""


def test_one_point_is_drawn() -> None:
    figure = ElementTree.fromstring(line_chart([Series("a", "seg", [(0, 0.0)])], title="T"))
    assert len(list(figure.iter("circle"))) == 1


def test_bars_are_as_long_as_their_values() -> None:
    rows: list[tuple[str, list[float | None]]] = [("cat <i>", [50.0, None]), ("a very long class name", [100.0, 12.5])]
    figure = ElementTree.fromstring(bar_chart(rows, title="T", series=[("seg", "seg"), ("CAM", "cam")]))
    bars = [(bar.get("fill"), bar.get("width")) for bar in figure.iter("rect") if bar.get("fill")]
    assert bars == [("var(--seg)", "50.00%"), ("var(--seg)", "100.00%"), ("var(--cam)", "12.50%")]
    assert [title.text for title in figure.iter("title")] == [
        "cat <i>\nseg: 50.0\nCAM: not scored",
        "a very long class name\nseg: 100.0\nCAM: 12.5",
    ]
    assert "a very long cl…" in texts_of(figure)
