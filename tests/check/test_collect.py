"""The whole check on a small data set of each kind."""

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
from afa.check.page import render_page, write_check
from afa.check.text import render_text
from afa.config import Config
from afa.data.palette import write_index_png
from afa.errors import AfaError
from tiny import tiny_config

CLASSES = ("cat", "dog")


def picture(seed: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC))


def write_images(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed)).save(folder / name)


def write_voc(root: Path) -> None:
    names = [f"i{i}" for i in range(50)]
    write_images(root / "JPEGImages", [f"{name}.png" for name in names])
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("\n".join(names[:40]), encoding="utf-8")
    (root / "lists" / "val.txt").write_text("\n".join(names[40:]), encoding="utf-8")
    (root / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    tags = [f"{name},{CLASSES[i % 2]}\n" for i, name in enumerate(names)]
    (root / "lists" / "tags.csv").write_text("image,tags\n" + "".join(tags), encoding="utf-8")
    (root / "SegmentationClassAug").mkdir()
    for i, name in enumerate(names[40:]):
        write_index_png(root / "SegmentationClassAug" / f"{name}.png", np.full((72, 96), 1 + i % 2, dtype=np.uint8))


def write_table(root: Path) -> None:
    write_images(root / "images", [f"i{i}.png" for i in range(50)])
    rows = [f"i{i}.png,{CLASSES[i % 2]}\n" for i in range(50)]
    (root / "tags.csv").write_text("file,tags\n" + "".join(rows), encoding="utf-8")


def write_folders(root: Path) -> None:
    write_images(root, [f"{CLASSES[i % 2]}/i{i}.png" for i in range(50)])


def write_hf(root: Path) -> None:
    names = [f"{'train' if i < 40 else 'validation'}/i{i}.png" for i in range(50)]
    write_images(root, names)
    for side in ("train", "validation"):
        lines = [
            json.dumps({"file_name": name.split("/")[1], "labels": [CLASSES[i % 2]]}) + "\n"
            for i, name in enumerate(names)
            if name.startswith(side)
        ]
        (root / side / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def write_coco(root: Path) -> None:
    write_images(root / "images", [f"i{i}.png" for i in range(50)])
    content = {
        "images": [{"id": i, "file_name": f"i{i}.png", "width": 96, "height": 72} for i in range(50)],
        "annotations": [{"id": i, "image_id": i, "category_id": 3 + 4 * (i % 2)} for i in range(50)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (root / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def write_label_studio(root: Path) -> None:
    write_images(root / "images", [f"i{i}.png" for i in range(50)])
    tasks = [
        {
            "id": i,
            "data": {"image": f"/data/upload/1/i{i}.png"},
            "annotations": [
                {
                    "result": [
                        {
                            "type": "choices",
                            "from_name": "choice",
                            "to_name": "image",
                            "value": {"choices": [CLASSES[i % 2]]},
                        }
                    ]
                }
            ],
        }
        for i in range(50)
    ]
    (root / "project-1.json").write_text(json.dumps(tasks), encoding="utf-8")


def write_cvat(root: Path) -> None:
    write_images(root / "images", [f"i{i}.png" for i in range(50)])
    images = "".join(
        f'<image id="{i}" name="i{i}.png" width="96" height="72"><tag label="{CLASSES[i % 2]}"/></image>'
        for i in range(50)
    )
    (root / "annotations.xml").write_text(f"<annotations><version>1.1</version>{images}</annotations>", "utf-8")


WRITERS = {
    "voc": write_voc,
    "table": write_table,
    "imagefolder": write_folders,
    "hf": write_hf,
    "coco": write_coco,
    "labelstudio": write_label_studio,
    "cvat": write_cvat,
}


def settings(root: Path, keys: dict[str, Any] | None = None) -> Config:
    return tiny_config(root, {"data.cache_gib": 0.001, **(keys or {})})


def severities(report: dict[str, Any]) -> list[str]:
    return [problem["severity"] for problem in report["problems"]]


def messages(report: dict[str, Any], severity: str) -> list[str]:
    return [problem["message"] for problem in report["problems"] if problem["severity"] == severity]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_is_checked_from_end_to_end(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    WRITERS[kind](root)
    report = check_data(settings(root), limit=12, progress=False)
    assert report["kind"] == kind
    assert (report["num_train"], report["num_validation"], report["num_untagged"]) == (40, 10, 0)
    assert report["classes"] == [{"name": name, "train": 20, "validation": 5} for name in CLASSES]
    assert report["together"] == [[20, 0], [0, 20]]
    assert report["scored"] == (kind == "voc")
    assert severities(report) == ["note"] * (kind != "voc")
    images = report["images"]
    assert (images["total"], images["read"], images["broken"]) == (50, 12, [])
    assert images["width"] == {"minimum": 96, "median": 96, "maximum": 96}
    assert images["height"]["median"] == 72
    assert report["cache"]["needed"] == 40 * 96 * 72 * 3
    assert report["training"]["steps"] == 6
    assert report["training"]["epochs"] == pytest.approx(6 * 4 / 40)
    assert json.loads(json.dumps(report)) == report


def test_a_fast_check_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path)
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("opened an image"))
    report = check_data(settings(tmp_path), fast=True, progress=False)
    assert (report["images"], report["training"], report["cache"]) == (None, None, None)
    assert report["num_train"] == 40


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


def test_what_is_wrong_with_images_is_said_by_name(troubled: Path) -> None:
    report = check_data(settings(troubled), progress=False)
    errors = messages(report, "error")
    assert report["errors"] == len(errors) == 3
    assert "i0.png: cannot be read as an image" in errors[0]
    assert "i41.png: the mask is 96x72" in errors[1]
    assert "i42.png: the mask has value 9" in errors[2]
    warnings = messages(report, "warning")
    assert warnings == [
        "1 image with a side below 64 pixels (JPEGImages/i5.png 40x30): too little detail; take larger ones, or leave "
        "them out",
        "JPEGImages/i1.png has the same pixels as JPEGImages/i2.png, but other tags, (dog) and (cat): correct one of "
        "them, or keep one image",
        "JPEGImages/i4.png looks the same as JPEGImages/i5.png, but other tags, (cat) and (dog): correct one of them, "
        "or keep one image",
        "near copies of training images among those for validation: 1 (first: JPEGImages/i41.png looks the same as "
        "JPEGImages/i3.png): scores will be too high; keep one of each",
    ]
    assert messages(report, "note") == [
        "copies of other images: 1 (first: JPEGImages/i2.png has the same pixels as JPEGImages/i1.png): keep one of "
        "each",
        "near copies of other images: 2 (first: JPEGImages/i41.png looks the same as JPEGImages/i3.png): keep one of "
        "each",
    ]
    images = report["images"]
    assert (images["broken"], images["broken_masks"]) == (
        ["JPEGImages/i0.png"],
        ["JPEGImages/i41.png", "JPEGImages/i42.png"],
    )
    assert images["tiny"] == ["JPEGImages/i5.png"]
    assert images["identical"] == [
        [
            {"image": "JPEGImages/i1.png", "side": "train", "tags": ["dog"]},
            {"image": "JPEGImages/i2.png", "side": "train", "tags": ["cat"]},
        ]
    ]


def test_the_report_can_be_read_as_text_and_as_a_page(troubled: Path, tmp_path: Path) -> None:
    report = check_data(settings(troubled), progress=False)
    text = render_text(report)
    assert text.startswith(report["layout"])
    assert "broken          1\n" in text
    assert all(f"{problem['severity']}: {problem['message']}" in text for problem in report["problems"])
    page = write_check(report, tmp_path / "out")
    html = page.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8")) == report
    assert html.count("data:image/jpeg;base64,") == 6  # three groups of two
    assert "<script" not in html
    assert "http" not in html
    assert "3 errors, 4 warnings" in html


def test_names_in_the_page_are_escaped(tmp_path: Path) -> None:
    report = check_data(settings(tmp_path), fast=True, progress=False)
    report["problems"][0]["message"] = "<b>&"
    assert "&lt;b&gt;&amp;" in render_page(report, {})


def test_a_data_set_that_cannot_be_opened_is_a_report_with_that_error(tmp_path: Path) -> None:
    report = check_data(settings(tmp_path), progress=False)
    assert (report["layout"], report["errors"], severities(report)) == (None, 1, ["error"])
    assert "no tags found" in render_text(report)
    assert "could not be opened" in render_page(report, {})


def test_no_folder_is_a_mistake_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match="no such folder"):
        check_data(settings(tmp_path / "absent"), progress=False)


def test_small_images_for_the_crop_are_a_warning(tmp_path: Path) -> None:
    write_table(tmp_path)
    report = check_data(settings(tmp_path, {"augment.crop_size": 96}), limit=4, progress=False)
    (warning,) = messages(report, "warning")
    assert re.match("augment.crop_size is 96, .* 72 pixels", warning)
    keys = {"augment.crop_size": 96, "augment.short_side": 96}
    assert messages(check_data(settings(tmp_path, keys), limit=4, progress=False), "warning") == []


def test_many_messages_and_classes_stay_readable() -> None:
    problem = {"severity": "warning", "message": "odd"}
    classes = [{"name": f"class{i}", "train": i, "validation": 0} for i in range(30)]
    report = {"root": "data", "layout": "words", "num_train": 9, "images": None, "training": None, "cache": None}
    report |= {"classes": classes, "together": np.eye(30, dtype=int).tolist(), "problems": [problem] * 100}
    lines = render_text(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 30
    assert lines[-1].startswith("warning: and 88 more; --json")
