import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from afa.report.examples import PICTURES
from afa.report.html import write_report
from PIL import Image

from afa.config import config_to_toml, load_config
from afa.errors import AfaError
from afa.report import html

VOID = {"meta", "link", "img", "br"}


class Balanced(HTMLParser):
    """Checks that tags are closed in order and collects attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert all(link.startswith("data:") for link in parser.links)
    assert not re.search(r"url\(|@import|https?://", page)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    folder = tmp_path / "my<run>"
    folder.mkdir()
    overrides = {"schedule.max_steps": 40, "schedule.cls_steps": 10, "schedule.refined_steps": 20}
    config = load_config(None, overrides | {"data.tags": "<script>.csv"})
    (folder / "config.toml").write_text(config_to_toml(config))
    (folder / "classes.txt").write_text("cat\ndog & <b>\n")
    return folder


@pytest.fixture
def full(bare: Path) -> Path:
    (bare / "model.safetensors").touch()
    environment = {"device": "cpu", "torch": "2.13.0", "seconds_train": 307.0, "steps": 40, "num_parameters": 700_000}
    (bare / "environment.json").write_text(json.dumps(environment))
    lines = [
        {"kind": "train", "step": step, "loss": 1 / step, "cls_loss": 1 / step, "learning_rate": 6e-5, "seg_loss": None}
        for step in range(1, 41)
    ]
    lines += [{"kind": "eval", "step": step, "labels": "seg", "miou": float(step)} for step in (20, 40)]
    (bare / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (bare / "evaluation").mkdir()
    for kind, miou in (("seg", 71.25), ("propagated", 65.0), ("cam", 60.0)):
        per_class = {"background": 90.0, "cat": miou, "dog & <b>": None}
        scores = {"miou": miou, "per_class": per_class, "protocol": "single", "num_images": 3, "tag_f1": 88.0}
        (bare / "evaluation" / f"{kind}.json").write_text(json.dumps(scores))
    for number, pictures in (("000", "image cam propagated pseudo prediction truth"), ("001", "image cam")):
        (bare / "examples" / number).mkdir(parents=True)
        for name in pictures.split():
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(bare / "examples" / number / f"{name}.png")
    index = [{"name": "a", "tags": ["cat"], "folder": "000"}, {"name": "<i>", "tags": ["dog & <b>"], "folder": "001"}]
    (bare / "examples" / "index.json").write_text(json.dumps(index))
    return bare


def test_full_page(full: Path) -> None:
    path = write_report(full)
    page = path.read_text(encoding="utf-8")
    check_page(page)
    for shown in ("71.2", "+11.2", "65.0", "88.0", "5:07", "single scale, 3 images", "finished, 40 steps", "0.7 M"):
        assert shown in page
    assert page.count("data:image/jpeg;base64,") == 8
    assert page.count('class="hole"') == 4
    assert 'class="missing"' not in page
    for title in ("Losses", "mIoU in percent", "Total loss", "Learning rate of the encoder", "IoU in percent"):
        assert f"<b>{title}</b>" in page
    assert "Segmentation loss" not in page
    assert "background:rgb(128,0,0)" in page
    assert {file.name for file in full.iterdir() if file.name.startswith(".")} == set()


def test_texts_are_escaped(full: Path) -> None:
    page = write_report(full).read_text(encoding="utf-8")
    assert "my&lt;run&gt;" in page
    assert "dog &amp; &lt;b&gt;" in page
    assert "&lt;script&gt;.csv" in page
    assert not re.search(r"<script|my<run>|dog & |<i>", page)


def test_report_json_is_written_beside(full: Path) -> None:
    write_report(full)
    report = json.loads((full / "report.json").read_text())
    assert report["miou"] == 71.25
    assert report["config"]["schedule"]["max_steps"] == 40


def test_bare_run_says_what_is_missing(bare: Path) -> None:
    page = write_report(bare).read_text(encoding="utf-8")
    check_page(page)
    assert "unfinished, step 0 of 40" in page
    for text in ("No examples were drawn.", "No training step is logged yet.", "has no environment.json"):
        assert text in page
    assert "Not evaluated: segmentation, propagated CAM, CAM." in page
    for kind in ("seg", "propagated", "cam"):
        name = "my&lt;run&gt;"
        assert f"afa evaluate {name} --data DIR --labels {kind} --json {name}/evaluation/{kind}.json" in page


def test_partly_evaluated_run_shows_what_there_is(full: Path) -> None:
    (full / "evaluation" / "cam.json").unlink()
    page = write_report(full).read_text(encoding="utf-8")
    check_page(page)
    assert "Not evaluated: CAM." in page
    assert "gain over CAM" not in page
    assert '<th scope="col">propagated CAM</th>' in page


def test_interrupted_run(full: Path) -> None:
    (full / "model.safetensors").unlink()
    (full / "environment.json").unlink()
    (full / "metrics.jsonl").write_text('{"kind": "train", "step": 7, "loss": 1.0, "seconds": 3.0}\n{"kind": "tr')
    page = write_report(full).read_text(encoding="utf-8")
    check_page(page)
    assert "unfinished, step 7 of 40" in page


def test_many_classes_leave_the_legend_to_those_tagged(full: Path) -> None:
    (full / "classes.txt").write_text("".join(f"class{i}\n" for i in range(40)) + "cat\n")
    page = write_report(full).read_text(encoding="utf-8")
    legend = re.search(r'<ul class="legend classes">.*?</ul>', page)
    assert legend is not None
    assert "cat" in legend[0]
    assert "class7" not in legend[0]


def test_columns_are_the_pictures_that_are_drawn() -> None:
    assert tuple(html._COLUMNS) == PICTURES


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match="not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
