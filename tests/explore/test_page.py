"""The page of the explorer in a real browser: Chromium, where playwright and the browser are installed."""

from __future__ import annotations

import base64
import http.client
import io
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from afa.explore.explorer import ExploredRun
from afa.model.families import MIT_SIZES
from afa.runs.run import Run
from chromium import chromium, watch
from encoders import TEXT_KEYS, write_embeddings
from tiny import start_python, write_untrained

pytest.importorskip("gradio", reason="gradio is not installed (afa[explore])")

pytestmark = pytest.mark.slow
WAIT = 60_000
SOURCE = "document.querySelector('[data-key=image] img').src"
MESSAGE = "document.querySelector('.message').textContent"


@contextmanager
def served(*arguments: Any) -> Iterator[str]:
    """The address of a page that is served by the command."""
    process = start_python(["-m", "afa", "explore", *map(str, arguments), "--no-browser", "--port", "0"])
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
def address(tiny_run: Path) -> Iterator[str]:
    """The address of the page of a trained run."""
    with served(tiny_run) as found:
        yield found


@pytest.fixture(scope="module")
def address_of_two(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """That of an untrained run with a text encoder, compared with the trained one."""
    folder = tmp_path_factory.mktemp("words")
    words = write_embeddings(folder / "words", [*Run(tiny_run).classes(), "zebra", "tree", "sky", "grass"], 32)
    write_untrained(folder / "run", Run(tiny_run).classes(), TEXT_KEYS | {"model.text_embeddings": str(words)})
    with served(folder / "run", "--data", tiny_data, "--compare", tiny_run) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    with chromium() as started:
        yield started


@contextmanager
def opened_page(browser: Any, address: str) -> Iterator[Any]:
    """A page, loaded; what the console says and which addresses were asked is checked at the end."""
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


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page of the trained run."""
    with opened_page(browser, address) as opened:
        yield opened


@pytest.fixture
def page_of_two(browser: Any, address_of_two: str) -> Iterator[Any]:
    """The page of two runs."""
    with opened_page(browser, address_of_two) as opened:
        yield opened


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


def test_the_sheet_has_every_block_and_head_and_a_click_enlarges_one(page: Any) -> None:
    rows = sum(MIT_SIZES["mit_tiny"].depths)
    assert f"{rows} rows of blocks" in page.inner_text("#board .sheet-text")
    box = page.locator("#board .sheet img").bounding_box()
    last = {"x": box["width"] * 8.5 / 9, "y": box["height"] * (rows - 0.5) / rows}
    changes(page, layer("attention"), lambda: page.locator("#board .sheet").click(position=last))
    assert f"block {rows}, head 8" in page.inner_text("[data-key=attention] figcaption")
    assert page.get_by_label("Attention map").input_value() == f"block {rows}, head 8"
    # The first block has a single head, so that most of its row is empty.
    page.locator("#board .sheet").click(position={"x": box["width"] * 0.8, "y": 5})
    first = {"x": 5, "y": 5}
    changes(page, layer("attention"), lambda: page.locator("#board .sheet").click(position=first))
    assert "block 1, mean" in page.inner_text("[data-key=attention] figcaption")
    # The mark lies on a narrow sheet, too.
    photo = io.BytesIO()
    Image.new("RGB", (60, 480)).save(photo, format="PNG")
    tall = {"name": "tall.png", "mimeType": "image/png", "buffer": photo.getvalue()}
    changes(page, SOURCE, lambda: page.locator("#board input[type=file]").set_input_files(tall))
    box, mark = page.locator("#board .sheet img").bounding_box(), page.locator("#board .mark").bounding_box()
    assert mark["width"] == pytest.approx(box["width"] / 9, abs=1)
    assert mark["height"] == pytest.approx(box["height"] / rows, abs=1)


def test_a_slider_changes_the_label_and_reset_brings_it_back(page: Any) -> None:
    first = page.evaluate(layer("pseudo"))
    low = page.get_by_label(re.compile("number input for beta_l"))
    changes(page, layer("pseudo"), lambda: (low.fill("0.02"), low.press("Enter")))
    changes(page, layer("pseudo"), lambda: page.get_by_role("button", name="settings of the run").click())
    assert page.evaluate(layer("pseudo")) == first
    changes(page, MESSAGE, lambda: (low.fill("0.9"), low.press("Enter")))
    assert "background_low is 0.9" in page.inner_text("#board .message")
    changes(page, MESSAGE, lambda: (low.fill(""), low.press("Enter")))
    assert "background_low is empty" in page.inner_text("#board .message")
    changes(page, MESSAGE, lambda: (low.fill("-5"), low.press("Enter")))
    assert "background_low is -5" in page.inner_text("#board .message")
    low.fill("0.1")
    changes(page, SOURCE, lambda: page.get_by_role("button", name="next").click())


def test_a_photo_is_dropped_and_a_bomb_is_refused(page: Any) -> None:
    photo, bomb = io.BytesIO(), io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(photo, format="JPEG")
    Image.new("1", (20_000, 20_000)).save(bomb, format="PNG")
    chooser = page.locator("#board input[type=file]")

    def give(name: str, content: bytes) -> None:
        chooser.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})

    shown = changes(page, SOURCE, lambda: give("a photo.jpg", photo.getvalue()))
    assert page.locator("[data-key=truth]").count() == 0
    changes(page, MESSAGE, lambda: give("bomb.png", bomb.getvalue()))
    assert "bomb.png: more than" in page.inner_text("#board .message")
    assert page.evaluate(SOURCE) == shown


DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const dragged = new DataTransfer();
  dragged.items.add(new File([bytes], name, { type: "image/jpeg" }));
  const target = document.querySelector("#board figure");
  for (const type of ["dragover", "drop"])
    target.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: dragged }));
}"""


def test_a_photo_is_dragged_onto_the_page(page: Any) -> None:
    photo = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(photo, format="JPEG")
    data = base64.b64encode(photo.getvalue()).decode()
    changes(page, SOURCE, lambda: page.evaluate(DROP, ["dragged.jpg", data]))
    assert page.locator("[data-key=truth]").count() == 0
    said = changes(page, MESSAGE, lambda: page.evaluate(DROP, ["notes.txt", "bm90ZXM="]))
    assert "notes.txt" in said


def test_presses_that_come_while_an_image_is_encoded_add_up(page: Any, tiny_run: Path) -> None:
    images = ExploredRun.open(tiny_run, None, torch.device("cpu")).images
    assert images is not None
    assert page.get_by_label("image", exact=True).input_value() == images.names[0]
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="next").click()
    read = "name => document.querySelector('#afa-images input[aria-label=image]').value === name"
    page.wait_for_function(read, arg=images.names[5])
    assert "busy" not in page.get_attribute("#board .afa", "class")


NEXT_AND_CLICK = """() => {
  document.dispatchEvent(new CustomEvent("afa-step", { detail: 1 }));
  const box = document.querySelector("[data-key=image] .stack").getBoundingClientRect();
  const at = { clientX: box.left + 9, clientY: box.top + 9, bubbles: true };
  document.querySelector("[data-key=image] .stack").dispatchEvent(new MouseEvent("click", at));
}"""


def test_a_click_while_an_image_is_encoded_is_answered_of_the_new_one(page: Any) -> None:
    changes(page, SOURCE, lambda: page.evaluate(NEXT_AND_CLICK))
    page.wait_for_timeout(2000)
    star = "document.querySelector('.star').style.cssText"
    place, found = page.evaluate(star), page.evaluate(layer("affinity"))
    picture = page.locator("[data-key=image] .stack")
    changes(page, star, lambda: picture.click(position={"x": 150, "y": 150}))
    changes(page, star, lambda: picture.click(position={"x": 9, "y": 9}))
    if page.evaluate(star) == place:  # else the click came first, and the star was where the CAM is strongest
        assert page.evaluate(layer("affinity")) == found


def test_a_narrow_screen_has_the_pictures_before_the_settings(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 900})
    places = [page.locator(f"#afa-{part}").bounding_box() for part in ("images", "board", "settings")]
    assert places[0]["y"] < places[1]["y"] < places[2]["y"]
    assert all(place["x"] >= 0 and place["x"] + place["width"] <= 400 for place in places)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_other_words_are_looked_for_and_unknown_ones_refused(page_of_two: Any) -> None:
    page = page_of_two
    words = page.get_by_label(re.compile("other words"))
    changes(page, layer("cam"), lambda: (words.fill("zebra, tree"), words.press("Enter")))
    assert page.locator("[data-key=prediction]").count() == 0
    assert "Where the classifier sees zebra, tree" in page.inner_text("[data-key=cam] figcaption")
    assert page.locator("#afa-settings").get_by_label("zebra").is_checked()
    said = changes(page, MESSAGE, lambda: (words.fill("unicorn"), words.press("Enter")))
    assert "has no vector for 'unicorn'" in said
    # What was found is still there to change.
    caption = "document.querySelector('[data-key=cam] figcaption').textContent"
    seen = changes(page, caption, lambda: page.locator("#afa-settings").get_by_label("zebra").uncheck())
    assert "Where the classifier sees tree." in seen
    # The wipe, which had the prediction on its right, shows what there is.
    assert page.locator("#board .right").input_value()
    # Without words, the classes come back.
    words.fill("")
    words.press("Enter")
    page.wait_for_selector("[data-key=prediction]")


def test_two_runs_are_compared_by_the_wipe(page_of_two: Any) -> None:
    page = page_of_two
    left, right = page.locator("#board .left"), page.locator("#board .right")
    left.select_option("now:prediction")
    right.select_option("other:prediction")
    one, two = (page.locator("#board .wipe img.layer").nth(at).get_attribute("src") for at in (0, 1))
    assert one != two
    cut = "document.querySelector('.wipe [style*=clip-path]').style.clipPath"
    assert "20%" in changes(page, cut, lambda: page.locator("#board .wipe input").fill("20"))


def test_arrows_step_through_the_images_and_an_address_names_one(page: Any, address: str) -> None:
    page.locator("#board h3").first.click()
    second = changes(page, SOURCE, lambda: page.keyboard.press("ArrowRight"))
    first = changes(page, SOURCE, lambda: page.get_by_role("button", name="previous").click())
    name = page.get_by_label("image", exact=True).input_value()
    assert first != second
    page.goto(f"{address}?image={name[:-1]}1")
    page.wait_for_selector("#board .panes figure")
    assert page.evaluate(SOURCE) == second


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
    changes(page, SOURCE, lambda: page.get_by_role("button", name="next").click())
    assert "kept" not in page.inner_html("#board .left")  # it was of another image


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
