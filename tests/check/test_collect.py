"""The whole check, and the text and page that show it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from afa.check.collect import check_data
from afa.check.page import collect_page, write_check
from afa.check.text import render_text
from afa.config import Config
from afa.data.palette import write_index_png
from layouts import LAYOUTS
from mistakes import refused
from tiny import tiny_config

CLASSES = ("cat", "dog")


def picture(seed: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC))


def write_table(root: Path) -> None:
    """Fifty different images of cats and dogs in turn, in a table."""
    (root / "images").mkdir(parents=True)
    for i in range(50):
        Image.fromarray(picture(i)).save(root / "images" / f"i{i}.png")
    rows = [f"i{i}.png,{CLASSES[i % 2]}\n" for i in range(50)]
    (root / "tags.csv").write_text("image,tags\n" + "".join(rows), encoding="utf-8")


def write_voc(root: Path) -> None:
    """The same in VOC's layout, with masks for the last ten."""
    write_table(root)
    (root / "images").rename(root / "JPEGImages")
    (root / "lists").mkdir()
    for side, numbers in (("train", range(40)), ("val", range(40, 50))):
        (root / "lists" / f"{side}.txt").write_text("\n".join(f"i{i}" for i in numbers), encoding="utf-8")
    (root / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    (root / "SegmentationClassAug").mkdir()
    for i in range(40, 50):
        write_index_png(root / "SegmentationClassAug" / f"i{i}.png", np.full((72, 96), 1 + i % 2, dtype=np.uint8))


def settings(root: Path, keys: dict[str, Any] | None = None) -> Config:
    return tiny_config(root, {"data.cache_gib": 0.001, **(keys or {})})


def messages(report: dict[str, Any], severity: str) -> list[str]:
    return [problem["message"] for problem in report["problems"] if problem["severity"] == severity]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_checked_and_a_fast_check_opens_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LAYOUTS[name](tmp_path)
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("opened an image"))
    report = check_data(settings(tmp_path), fast=True)
    assert report["kind"]
    tagged = sum(entry["train"] for entry in report["classes"])
    assert tagged + report["num_negatives"] >= report["num_train"] > 0
    assert (report["images"], report["training"], report["cache"]) == (None, None, None)


@pytest.mark.parametrize(("write", "kind"), [(write_voc, "voc"), (write_table, "table")])
def test_figures_of_a_sound_data_set(write: Any, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "data")
    report = check_data(settings(tmp_path / "data"), limit=12)
    assert (report["num_train"], report["num_validation"], report["num_untagged"]) == (40, 10, 0)
    assert report["classes"] == [{"name": name, "train": 20, "validation": 5} for name in CLASSES]
    assert report["together"] == [[20, 0], [0, 20]]
    assert report["kind"] == kind
    assert report["scored"] == (kind == "voc")
    assert [problem["severity"] for problem in report["problems"]] == ["note"] * (kind != "voc")
    images = report["images"]
    assert (images["total"], images["read"], images["broken"]) == (50, 12, [])
    assert images["width"] == {"minimum": 96, "median": 96, "maximum": 96}
    assert images["height"]["median"] == 72
    assert report["cache"]["needed"] == 40 * 96 * 72 * 3
    assert report["training"]["steps"] == 6
    assert report["training"]["epochs"] == pytest.approx(6 * 4 / 40)
    assert json.loads(json.dumps(report)) == report


@pytest.fixture
def troubled(tmp_path: Path) -> Path:
    """A VOC layout with a truncated image, copies of other tags and of the other side, a tiny image, odd masks."""
    root = tmp_path / "data"
    write_voc(root)
    folder = root / "JPEGImages"
    (folder / "i0.png").write_bytes((folder / "i0.png").read_bytes()[:500])
    Image.fromarray(picture(1)).save(folder / "i2.png")  # i1, a dog, as a cat
    smaller = Image.fromarray(picture(3)).resize((88, 66), Image.Resampling.BICUBIC)
    smaller.save(folder / "i41.png")  # i3, of the training list
    Image.fromarray(picture(4)).resize((40, 30)).save(folder / "i5.png")
    write_index_png(root / "SegmentationClassAug" / "i42.png", np.full((72, 96), 9, dtype=np.uint8))
    return root


def test_what_is_wrong_with_images_is_said_by_name(troubled: Path, tmp_path: Path) -> None:
    report = check_data(settings(troubled))
    expected = {
        "error": ("i0.png: cannot be read as an image", "i41.png: the mask is 96x72", "i42.png: the mask has value 9"),
        "warning": (
            r"^1 image .* below 64 pixels \(JPEGImages/i5.png 40x30\): .*larger",
            r"^JPEGImages/i1.png has the same pixels as JPEGImages/i2.png, .* \(dog\) and \(cat\): correct",
            r"^JPEGImages/i4.png looks the same as JPEGImages/i5.png, .* \(cat\) and \(dog\): correct",
            r"^near copies of training images .*: 1 \(first: JPEGImages/i41.png .* JPEGImages/i3.png\): .* keep one",
        ),
        "note": (
            r"^copies .*: 1 \(first: JPEGImages/i2.png has the same pixels as JPEGImages/i1.png\): keep one",
            r"^near copies .*: 2 \(first: JPEGImages/i41.png looks the same as JPEGImages/i3.png\): keep one",
        ),
    }
    for severity, patterns in expected.items():
        for message, pattern in zip(messages(report, severity), patterns, strict=True):
            assert re.search(pattern, message), message
    assert (report["errors"], report["warnings"]) == (3, 4)
    images = report["images"]
    broken = {"broken": ["i0"], "broken_masks": ["i41", "i42"], "tiny": ["i5"]}
    assert all(images[key] == [f"JPEGImages/{name}.png" for name in names] for key, names in broken.items())
    copies = [{"image": f"JPEGImages/i{i}.png", "side": "train", "tags": [tag]} for i, tag in ((1, "dog"), (2, "cat"))]
    assert images["identical"] == [copies]

    text = render_text(report)
    assert text.startswith(report["layout"])
    assert "broken          1\n" in text
    assert all(f"{problem['severity']}: {problem['message']}" in text for problem in report["problems"])
    page = write_check(report, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8")) == report
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg;base64,") == 6  # three groups of two
    assert not re.search("<script [^>]|http", html)
    assert "3 errors, 4 warnings" in html


def test_broken_images_are_a_note_where_they_are_left_out(troubled: Path) -> None:
    report = check_data(settings(troubled, {"data.skip_broken": True}))
    assert report["images"]["broken"] == ["JPEGImages/i0.png"]
    (note,) = [message for message in messages(report, "note") if "i0.png" in message]
    assert note.startswith("broken images left out by data.skip_broken: 1 (first: ")
    assert not [message for message in messages(report, "error") if "i0.png" in message]


def test_twelve_bits_are_warned_of_and_the_key_helps(tmp_path: Path) -> None:
    write_table(tmp_path)
    for i in range(50):
        levels = picture(i)[:, :, 0].astype(np.uint16) * 16
        levels[0, 0] = 4095
        Image.fromarray(levels).save(tmp_path / "images" / f"i{i}.png")
    told = {
        level: messages(check_data(settings(tmp_path, keys)), "warning")
        for level, keys in ((65535, {}), (4095, {"data.white_level": 4095}), (1023, {"data.white_level": 1023}))
    }
    assert any("largest value of 50 images of" in m and "4095 of 65535" in m for m in told[65535])
    assert any("all above 1023 is white; set data.white_level to 4095" in m for m in told[1023])
    assert not [message for message in told[4095] if "white" in message]


def test_white_masks_are_an_error(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for path in (tmp_path / "SegmentationClassAug").iterdir():
        Image.fromarray(np.full((72, 96), 255, dtype=np.uint8)).save(path)
    (error,) = messages(check_data(settings(tmp_path)), "error")
    assert "all 10 masks have the values 0 and 255 alone" in error


def test_the_page_has_a_chart_and_shares_and_escapes_texts(tmp_path: Path) -> None:
    write_table(tmp_path)
    report = check_data(settings(tmp_path), fast=True)
    report["problems"] = [{"severity": "note", "message": "<b>&"}] * 300
    report["classes"][0]["train"] = 5
    page = collect_page(report)
    assert [row["label"] for row in page["chart"]["rows"]] == ["dog", "cat"]
    assert page["chart"]["rows"][0]["words"] == "dog\nto train on: 20\nfor validation: 5"
    report["together"] = [[20, 5], [5, 10]]
    cells = [[(cell.text, cell.heat) for cell in row["cells"]] for row in collect_page(report)["matrix"]]
    assert cells == [[("20", 0.0), ("5", 0.65 * 0.25)], [("5", 0.65 * 0.5), ("10", 0.0)]]
    html = write_check(report, tmp_path).read_text(encoding="utf-8")
    assert html.count("&lt;b&gt;&amp;") == len(page["problems"]) == 200
    assert "and 100 more in check.json" in html


def test_a_data_set_that_cannot_be_opened_is_a_report_with_that_error(tmp_path: Path) -> None:
    report = check_data(settings(tmp_path))
    assert (report["layout"], report["errors"], len(report["problems"])) == (None, 1, 1)
    assert "no tags found" in render_text(report)
    assert "could not be opened" in write_check(report, tmp_path).read_text(encoding="utf-8")


def test_no_folder_is_a_mistake_of_the_call(tmp_path: Path) -> None:
    with refused(tmp_path / "absent", "no such folder"):
        check_data(settings(tmp_path / "absent"))


def test_small_images_for_the_crop_are_a_warning(tmp_path: Path) -> None:
    write_table(tmp_path)
    keys = {"augment.crop_size": 96}
    (warning,) = messages(check_data(settings(tmp_path, keys), limit=4), "warning")
    assert re.match("augment.crop_size is 96, .* 72 pixels", warning)
    keys |= {"augment.short_side": 96}
    assert messages(check_data(settings(tmp_path, keys), limit=4), "warning") == []


def test_many_messages_and_classes_stay_readable() -> None:
    problem = {"severity": "warning", "message": "odd"}
    classes = [{"name": f"class{i}", "train": i, "validation": 0} for i in range(30)]
    report = {"root": "data", "layout": "words", "num_train": 9, "images": None, "training": None, "cache": None}
    report |= {"classes": classes, "together": np.eye(30, dtype=int).tolist(), "problems": [problem] * 100}
    lines = render_text(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 30
    assert lines[-1].startswith("warning: and 88 more; --json")
