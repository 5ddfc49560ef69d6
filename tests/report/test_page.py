"""The page of a run: what its template is given, and that the page is whole and loads nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from afa.report.collect import collect_report
from afa.report.page import collect_page, read_examples, write_report
from afa.runs.run import Run
from mistakes import refused

VOID = {"meta", "link", "img", "br"}


class Balanced(HTMLParser):
    """Checks that tags are closed in order and collects attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script" or not attrs
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(run: Path) -> str:
    """The page, found to be whole."""
    page = write_report(run).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    # The explorer on this machine is the only place that a page leads to; it loads nothing.
    own = "http://127.0.0.1:7860/?image="
    assert all(link.startswith(("data:", own)) for link in parser.links)
    assert not re.search(r"url\(|@import|https?://", page.replace(own, ""))
    return page


def shown(run: Path) -> dict[str, Any]:
    return collect_page(collect_report(run), Run(run).metrics(), read_examples(Run(run).examples))


def test_what_a_finished_run_shows(full: Path) -> None:
    page = shown(full)
    titles = {size: [chart["title"] for chart in charts] for size, charts in page["charts"].items()}
    assert titles == {
        "wide": ["Losses", "mIoU in percent"],
        "panels": ["Total loss", "Classification loss", "Learning rate of the encoder"],
    }
    assert page["gain"] == 11.25
    assert page["colors"][0] == ("cat", (128, 0, 0))
    assert [len(example["pictures"]) for example in page["examples"]] == [6, 2]
    assert (len(page["columns"]), page["scores"]["missing"]) == (6, {})
    assert page["scores"]["rows"] == [
        {"name": "background", "figures": [90.0, 90.0, 90.0], "gain": 0.0},
        {"name": "cat", "figures": [71.25, 65.0, 60.0], "gain": 11.25},
        {"name": "mean", "figures": [71.25, 65.0, 60.0], "gain": 11.25},
    ]
    assert page["environment"] == {"device": "cpu", "parameters": "0.7 M parameters", "torch": "2.13.0"}


def test_page_and_figures_are_written_and_texts_escaped(full: Path) -> None:
    html = written(full)
    for text in ("71.2", "+11.2", "65.0", "88.0", "5:07", "single scale, 3 images", "finished, 40 steps", "0.7 M"):
        assert text in html
    assert html.count("data:image/jpeg;base64,") == 8
    assert html.count('class="hole"') == 4
    assert 'class="missing"' not in html
    for text in ("my&lt;run&gt;", "dog &amp; &lt;b&gt;", "&lt;script&gt;.csv"):
        assert text in html
    assert not re.search(r"<script [^>]|my<run>|dog & |<i>(?!explore)", html)
    assert 'href="http://127.0.0.1:7860/?image=%3Ci%3E"' in html
    report = json.loads((full / "report.json").read_text())
    assert (report["miou"], report["config"]["schedule"]["max_steps"]) == (71.25, 40)
    assert not [path for path in full.iterdir() if path.name.startswith(".")]


def test_bare_run_says_what_is_missing(bare: Path) -> None:
    html = written(bare)
    for text in (
        "unfinished, step 0 of 40",
        "No examples were drawn.",
        "No training step is logged yet.",
        "has no environment.json",
        "Not evaluated: segmentation, propagated CAM, CAM.",
    ):
        assert text in html
    name = "my&lt;run&gt;"
    for kind in ("seg", "propagated", "cam"):
        assert f"afa evaluate {name} --data DIR --labels {kind} --json {name}/evaluation/{kind}.json" in html


def test_interrupted_and_partly_evaluated_run_shows_what_there_is(full: Path) -> None:
    for name in ("evaluation/cam.json", "model.safetensors", "environment.json"):
        (full / name).unlink()
    scores = shown(full)["scores"]
    assert scores["missing"] == {"cam": "CAM"}
    assert scores["rows"][1] == {"name": "cat", "figures": [71.25, 65.0], "gain": None}
    html = written(full)
    assert "unfinished, step 40 of 40" in html
    assert "gain over CAM" not in html
    assert '<th scope="col">propagated CAM</th>' in html


def test_a_run_that_an_earlier_version_scored_says_how_to_rank_its_images(full: Path) -> None:
    scores = full / "evaluation" / "seg.json"
    figures = json.loads(scores.read_text())
    del figures["images"], figures["confusion"]
    scores.write_text(json.dumps(figures))
    (line,) = re.findall(r'<p class="missing">(.*?)</p>', written(full), re.DOTALL)
    assert line.startswith("<b>No images are ranked yet.</b> An earlier version scored this run.")
    name = "my&lt;run&gt;"
    commands = re.findall("<code>(.*?)</code>", line)
    assert commands == [
        f"afa evaluate {name} --data DIR --labels seg --json {name}/evaluation/seg.json", f"afa report {name}"
    ]  # fmt: skip


@pytest.mark.parametrize("contents", [b"\xaa", b"[{}]", b"7"])
def test_broken_index_of_the_examples(full: Path, contents: bytes) -> None:
    (full / "examples" / "index.json").write_bytes(contents)
    with refused("index.json", "broken", "delete"):
        read_examples(Run(full).examples)


def test_broken_picture_of_an_example(full: Path) -> None:
    next((full / "examples").rglob("image.png")).write_bytes(b"no picture")
    with refused("index.json", "broken", "delete"):
        read_examples(Run(full).examples)


def test_many_classes_leave_the_legend_to_those_tagged(full: Path) -> None:
    (full / "classes.txt").write_text("".join(f"class{i}\n" for i in range(40)) + "cat\n")
    assert [name for name, _ in shown(full)["colors"]] == ["cat"]


def test_a_running_training_says_so_and_is_looked_for_again(full: Path) -> None:
    (full / "model.safetensors").unlink()
    page = write_report(full, running=True).read_text(encoding="utf-8")
    assert "running, step 40 of 40" in page
    assert '<noscript><meta http-equiv="refresh" content="30"></noscript>' in page
    assert 'data-refresh="30"' in page
    assert "http-equiv" not in written(full)


def test_before_the_first_scores_the_last_evaluation_is_shown(full: Path) -> None:
    shutil.rmtree(full / "evaluation")
    lines = [{"kind": "eval", "step": 20, "labels": "seg", "miou": 33.3, "num_images": 12}]
    (full / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    html = written(full)
    assert "mIoU so far" in html
    assert "Not evaluated" in html
    assert "at its end" in write_report(full, running=True).read_text(encoding="utf-8")
    assert "step 20, 12 images" in html
