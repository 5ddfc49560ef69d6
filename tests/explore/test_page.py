"""The page of the explorer in a real browser: Chromium, where playwright and the browser are installed."""

from __future__ import annotations

import http.client
import io
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chromium import chromium, watch
from tiny import start_python

pytest.importorskip("gradio", reason="gradio is not installed (afa[explore])")

pytestmark = pytest.mark.slow
WAIT = 60_000


@pytest.fixture(scope="module")
def address(tiny_run: Path) -> Iterator[str]:
    """The address of a page that is served by the command."""
    process = start_python(["-m", "afa", "explore", str(tiny_run), "--no-browser"])
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", line), (line, process.poll())
        yield line.strip()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, loaded; what the console says and which addresses were asked is checked at the end."""
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.set_default_timeout(WAIT)
    said, asked = watch(opened, errors_only=True)
    opened.goto(address)
    opened.wait_for_selector("#board .panes figure")
    yield opened
    assert not said
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked
    assert not foreign
    opened.close()


def changes(page: Any, read: str, act: Any) -> str:
    """What a script reads once it is another than before an action."""
    before = page.evaluate(read)
    act()
    page.wait_for_function(f"(before) => ({read}) && ({read}) !== before", arg=before)
    return str(page.evaluate(read))


def layer(key: str) -> str:
    return f"document.querySelector('[data-key={key}] .layer')?.src"


def test_all_maps_are_shown_and_a_click_moves_the_look(page: Any) -> None:
    keys = page.eval_on_selector_all("#board figure", "all => all.map(each => each.dataset.key)")
    assert keys == [
        "image", "cam", "propagated", "pseudo", "prediction", "doubt", "truth", "attention", "affinity"
    ]  # fmt: skip
    picture = page.locator("[data-key=image] .stack")
    changes(page, layer("attention"), lambda: picture.click(position={"x": 20, "y": 20}))
    before = page.evaluate(layer("affinity"))
    picture.focus()
    changes(page, layer("attention"), lambda: page.keyboard.press("ArrowRight"))
    assert page.evaluate(layer("affinity")) != before


def test_a_slider_changes_the_label_and_reset_brings_it_back(page: Any) -> None:
    first = page.evaluate(layer("pseudo"))
    low = page.get_by_label(re.compile("number input for beta_l"))
    changes(page, layer("pseudo"), lambda: (low.fill("0.02"), low.press("Enter")))
    changes(page, layer("pseudo"), lambda: page.get_by_role("button", name="settings of the run").click())
    assert page.evaluate(layer("pseudo")) == first
    changes(page, "document.querySelector('.message').textContent", lambda: (low.fill("0.9"), low.press("Enter")))
    assert "background_low is 0.9" in page.inner_text("#board .message")


def test_a_photo_is_dropped_and_a_bomb_is_refused(page: Any) -> None:
    photo, bomb = io.BytesIO(), io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(photo, format="JPEG")
    Image.new("1", (20_000, 20_000)).save(bomb, format="PNG")
    chooser = page.locator("#board input[type=file]")

    def give(name: str, content: bytes) -> None:
        chooser.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})

    source = "document.querySelector('[data-key=image] img').src"
    shown = changes(page, source, lambda: give("a photo.jpg", photo.getvalue()))
    assert page.locator("[data-key=truth]").count() == 0
    message = "document.querySelector('.message').textContent"
    changes(page, message, lambda: give("bomb.png", bomb.getvalue()))
    assert "bomb.png: more than" in page.inner_text("#board .message")
    assert page.evaluate(source) == shown


def test_arrows_step_through_the_images_and_an_address_names_one(page: Any, address: str) -> None:
    source = "document.querySelector('[data-key=image] img').src"
    page.locator("#board h3").first.click()
    second = changes(page, source, lambda: page.keyboard.press("ArrowRight"))
    first = changes(page, source, lambda: page.get_by_role("button", name="previous").click())
    name = page.get_by_label("image", exact=True).input_value()
    assert first != second
    page.goto(f"{address}?image={name[:-1]}1")
    page.wait_for_selector("#board .panes figure")
    assert page.evaluate(source) == second


def test_masks_and_settings_are_saved_and_settings_are_compared(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="Save", exact=False).first.click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="save the mask").click()
    saved.value.save_as(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (64, 64)
    with page.expect_download() as saved:
        page.get_by_role("button", name="save the settings").click()
    assert saved.value.suggested_filename.endswith(".toml")
    page.get_by_role("button", name="Keep these settings").click()
    assert page.locator("#board .left").input_value() == "kept:pseudo"
    assert page.locator("#board .wipe img").count() == 4


@pytest.mark.parametrize(
    "path",
    ["gradio_api/file=/etc/passwd", "gradio_api/file=config.toml", "file=/etc/passwd", "gradio_api/upload",
     "gradio_api/proxy=http://example.org/", "assets/../../routes.py", "static/%2e%2e/%2e%2e/%2e%2e/routes.py",
     "gradio_api/deep_link", "docs"],
)  # fmt: skip
def test_no_file_is_served(address: str, path: str) -> None:
    assert status(address, f"/{path}") == 404


def test_the_page_answers_to_its_own_name_alone(address: str) -> None:
    assert status(address, "/") == 200
    assert status(address, "/", {"Host": "evil.example"}) == 404


def status(address: str, path: str, headers: dict[str, str] | None = None) -> int:
    """The status that a path is answered with, sent as it is."""
    connection = http.client.HTTPConnection(address.removeprefix("http://").strip("/"), timeout=60)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    finally:
        connection.close()
