"""The page of a run in a real Chromium: it enlarges, tells, sorts, logs no error and asks for nothing else.

Needs the package playwright and a Chromium of the system; skipped without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afa.report.page import write_report
from chromium import chromium, watch

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any, full: Path) -> Iterator[Any]:
    """The page of a finished run, found at its end to have logged nothing and loaded nothing but itself."""
    address = write_report(full).absolute().as_uri()
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    said, asked = watch(page)
    page.goto(address)
    yield page
    page.close()
    assert not said
    assert [each for each in asked if not each.startswith("data:")] == [address]


def test_pictures_enlarge_and_step_by_the_arrows(page: Any) -> None:
    first = page.locator(".example img").first
    first.focus()
    page.keyboard.press("Enter")
    box, shown = page.locator("dialog"), page.locator("dialog .caption > b")
    assert box.evaluate("box => box.open")
    assert shown.inner_text() == "Image"
    page.keyboard.press("ArrowRight")
    assert shown.inner_text() == "CAM"
    assert "IoU 40.0 %" in page.locator("dialog .caption").inner_text()
    assert box.evaluate("box => box.querySelector('img').naturalWidth") == 8
    page.keyboard.press("ArrowDown")  # the same picture of the next example
    assert shown.inner_text() == "CAM"
    assert "<i>" in page.locator("dialog .caption").inner_text()
    page.keyboard.press("ArrowRight")  # that has no more pictures, so that the first one comes again
    assert page.locator("dialog img").get_attribute("alt") == "Image of a"
    page.keyboard.press("ArrowLeft")
    assert page.locator("dialog img").get_attribute("alt") == "CAM of <i>"
    page.keyboard.press("Escape")
    assert not box.evaluate("box => box.open")
    assert page.evaluate("document.activeElement.alt") == "CAM of <i>"
    page.locator("img[alt='Prediction of a']").click()
    assert shown.inner_text() == "Prediction"
    page.locator("dialog .close").click()
    assert not box.evaluate("box => box.open")


def test_curves_tell_their_value_under_the_pointer_and_by_the_arrows(page: Any) -> None:
    chart, tip = page.locator(".plot").first, page.locator(".tip")
    chart.scroll_into_view_if_needed()
    assert tip.is_hidden()
    place = chart.locator("svg").first.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    assert tip.inner_text() == "step 20\nclassification: 0.05"
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    chart.focus()
    page.keyboard.press("End")
    assert tip.inner_text() == "step 40\nclassification: 0.025"
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("step 39\n")


def test_the_confusion_matrix_tells_its_cells(page: Any) -> None:
    page.locator(".matrix").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip").inner_text() == "15.0 % of the pixels of background\nare taken for cat"


def test_tables_sort_by_a_click_and_by_the_keyboard(page: Any) -> None:
    table = page.locator("table.sortable", has=page.locator("tr.mean"))

    def names() -> list[str]:
        return [str(each) for each in table.locator("tbody th").all_inner_texts()]

    assert names() == ["background", "cat", "mean"]
    head = table.locator("thead button").nth(1)
    head.focus()
    page.keyboard.press("Enter")
    assert names() == ["background", "cat", "mean"]  # descending
    head.click()
    assert names() == ["cat", "background", "mean"]
    assert table.locator("thead th").nth(1).get_attribute("aria-sort") == "ascending"
    table.locator("thead button").first.click()
    assert names() == ["background", "cat", "mean"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_no_page_sideways(browser: Any, full: Path, scheme: str) -> None:
    address = write_report(full).absolute().as_uri()
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.close()


def test_without_scripts_everything_is_there(browser: Any, full: Path) -> None:
    address = write_report(full, running=True).absolute().as_uri()
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address)
    assert page.locator(".example img").count() == 8
    assert page.locator(".plot title").count() > 40
    assert page.locator("noscript meta, meta[http-equiv]").count() == 1
    page.close()
