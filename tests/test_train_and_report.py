"""Whole jobs: train, score and report in one call, and the demo on generated images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from afa.api import SCORED_LABELS, run_demo, train_and_report, training
from afa.config import config_to_dict, load_config
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.report.page import write_report
from tiny import SETTINGS, assert_same_weights, tiny_config

REPORT_KEYS = {
    "miou", "cam_miou", "propagated_miou", "tag_f1", "seconds_train", "steps", "device", "torch", "config",
}  # fmt: skip
SCORE_KEYS = {"miou", "per_class", "protocol", "labels", "num_images", "seconds"}
PICTURES = {"image.png", "cam.png", "propagated.png", "pseudo.png", "prediction.png", "truth.png"}


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set that may be changed."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    return root


def test_run_folder(tiny_run: Path, tiny_data: Path) -> None:
    """Everything that docs/interfaces.md promises of a run folder."""
    promised = {"config.toml", "classes.txt", "metrics.jsonl", "checkpoints", "model.safetensors", "evaluation",
                "examples", "report.json", "report.html"}  # fmt: skip
    assert promised <= {path.name for path in tiny_run.iterdir()}
    classes = (tiny_data / "classes.txt").read_text().split()
    for labels in SCORED_LABELS:
        figures = json.loads((tiny_run / "evaluation" / f"{labels}.json").read_text())
        assert figures.keys() >= SCORE_KEYS
        assert (figures["labels"], figures["protocol"], figures["num_images"]) == (labels, "single", 6)
        assert list(figures["per_class"]) == ["background", *classes]
        assert 0 <= figures["miou"] <= 100
    index = json.loads((tiny_run / "examples" / "index.json").read_text())
    assert [example["folder"] for example in index] == ["000", "001"]
    for example in index:
        assert {path.name for path in (tiny_run / "examples" / example["folder"]).iterdir()} == PICTURES
        assert set(example["tags"]) <= set(classes)
    assert not list(tiny_run.rglob(".partial*"))


def test_scoring_keeps_to_the_batch_size(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Scores of a finished run, made again; no image of the tiny data is larger than one that a batch size means."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    sizes: set[int] = set()

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, AfaNetwork):
            sizes.add(len(inputs[0]))

    config = tiny_config(tiny_data, {"evaluation.batch_size": 3, "train.example_images": 0})
    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        train_and_report(config, run, resume=True)
    assert sizes & {3, 6}  # pseudo labels also see each image mirrored
    assert not sizes - {3, 6}


def test_report_tells_what_the_run_did(tiny_run: Path, tiny_data: Path) -> None:
    report = json.loads((tiny_run / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    scores = {
        labels: json.loads((tiny_run / "evaluation" / f"{labels}.json").read_text())["miou"] for labels in SCORED_LABELS
    }
    assert [report[key] for key in ("miou", "cam_miou", "propagated_miou")] == [
        scores[labels] for labels in ("seg", "cam", "propagated")
    ]
    assert 0 <= report["tag_f1"] <= 100
    assert (report["steps"], report["device"], report["torch"]) == (6, "cpu", torch.__version__)
    assert report["seconds_train"] > 0
    assert report["config"] == config_to_dict(tiny_config(tiny_data))
    assert "<svg" in (tiny_run / "report.html").read_text()


def test_without_validation_list_nothing_is_scored(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_data, {"data.val_list": "", "schedule.max_steps": 1})
    train_and_report(config, tmp_path)
    assert not (tmp_path / "evaluation").exists()
    assert not (tmp_path / "examples").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["miou"], report["steps"]) == (None, 1)
    *warnings, last = capsys.readouterr().err.splitlines()
    assert last == f"run folder {tmp_path}; open {tmp_path / 'report.html'}"
    assert {line.partition(":")[0] for line in warnings} == {"warning"}


def test_without_masks_the_tags_are_scored(own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (own_data / "SegmentationClassAug").rename(tmp_path / "gone")
    train_and_report(tiny_config(own_data, {"schedule.max_steps": 1}), run)
    assert (run / "model.safetensors").is_file()
    assert [path.name for path in (run / "evaluation").iterdir()] == ["tags.json"]
    figures = json.loads((run / "evaluation" / "tags.json").read_text())
    assert figures.keys() >= SCORE_KEYS
    assert (figures["miou"], figures["labels"], figures["num_images"]) == (None, "tags", 6)
    report = json.loads((run / "report.json").read_text())
    assert (report["miou"], report["tag_f1"]) == (None, figures["tag_f1"])
    assert f"no masks in {own_data}: only tags will be scored\n" in capsys.readouterr().err
    worth = json.loads((run / "worth.json").read_text())
    assert (worth["num_images"], [each["name"] for each in worth["thresholds"]]) == (6, ["lower", "set", "higher"])
    for folder in ("examples", "uncertain", "thresholds"):
        assert (run / folder / "sheet.png").is_file()
    page = (run / "report.html").read_text()
    assert "what the result is worth" in page
    assert page.count("Lower background scores") >= 2


def test_a_folder_without_validation_list_trains_and_says_so(
    own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_data / "lists" / "val.txt").unlink()
    train_and_report(tiny_config(own_data, {"schedule.max_steps": 1}), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "evaluation").exists()
    assert f"no {own_data / 'lists/val.txt'}: nothing" in capsys.readouterr().err


def test_errors_of_the_check_are_one_line(own_data: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        with (own_data / "lists" / f"{name}.txt").open("a") as file:
            file.write("nothing\n")
    config = tiny_config(own_data, {"data.val_list": "lists/../lists/val.txt"})
    with pytest.raises(AfaError, match=rf"^.*'nothing'.*1 more; afa check {own_data} .*$"):
        train_and_report(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_images_without_tags_are_scored_by_their_segmentation_alone(
    own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = own_data / "lists" / "tags.csv"
    tags.write_text("".join(line for line in tags.read_text().splitlines(keepends=True) if "val_" not in line))
    train_and_report(tiny_config(own_data, {"schedule.max_steps": 1}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "evaluation").iterdir()] == ["seg.json"]
    assert "are not scored" in capsys.readouterr().err


def test_resuming_a_finished_run_scores_it_again(tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for name in ("evaluation", "examples", "report.json", "report.html"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_and_report(tiny_config(tiny_data), run, resume=True)
    assert_same_weights(run, tiny_run)
    for labels in SCORED_LABELS:
        again, before = (json.loads((r / "evaluation" / f"{labels}.json").read_text()) for r in (run, tiny_run))
        assert again["per_class"] == before["per_class"]
    assert (run / "report.html").is_file()


def test_bad_masks_are_found_before_training(own_data: Path, tmp_path: Path) -> None:
    path = own_data / "SegmentationClassAug" / "val_00003.png"
    path.unlink()
    with pytest.raises(AfaError, match=r"no val_00003\.png"):
        train_and_report(tiny_config(own_data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


TINY_DEMO: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key != "data.root"}


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "demo"
    run_demo(run, smoke=True, overrides=TINY_DEMO)
    config = load_config(run / "config.toml")
    assert config.preset == "demo"
    assert config.data.root == str(run / "data")
    assert config.schedule.max_steps == 6
    assert (run / "data" / "SegmentationClassAug").is_dir()
    report = json.loads((run / "report.json").read_text())
    assert min(report[key] for key in ("miou", "cam_miou", "propagated_miou")) >= 0
    messages = capsys.readouterr().err
    *_, figures, last = messages.splitlines()
    assert f"segmentation mIoU {report['miou']:.1f}, CAM {report['cam_miou']:.1f}" in figures
    assert last.endswith(f"open {run / 'report.html'}, or ask about each pixel with: afa explore {run}")
    # Resuming keeps what is there; the same command without it starts over.
    leftover = run / "leftover"
    leftover.touch()
    run_demo(run, smoke=True, resume=True, overrides=TINY_DEMO)
    assert leftover.exists()
    run_demo(run, smoke=True, overrides=TINY_DEMO | {"train.seed": 1})
    assert not leftover.exists()
    assert load_config(run / "config.toml").train.seed == 1


def test_the_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    precious = tmp_path / "data" / "precious.txt"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(AfaError, match=r"not a demo run; .*--out$"):
        run_demo(tmp_path, smoke=True, overrides=TINY_DEMO)
    assert precious.exists()


def test_the_full_demo_is_larger_than_the_smoke_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and schedules, without training."""
    calls: list[tuple[int, int, int]] = []

    class StopError(Exception):
        pass

    def stop(config: Any, *_: Any, **__: Any) -> None:
        calls[-1] = (*calls[-1][:2], config.schedule.max_steps)
        raise StopError

    def sizes(root: Path, *, num_train: int, num_val: int, **_: Any) -> None:
        calls.append((num_train, num_val, 0))

    monkeypatch.setattr(training, "write_shapes", sizes)
    monkeypatch.setattr(training, "train_and_report", stop)
    for smoke in (True, False):
        with pytest.raises(StopError):
            run_demo(tmp_path, smoke=smoke)
    small, full = calls
    assert all(a < b for a, b in zip(small, full, strict=True))
    assert full[1] >= 100  # enough held-out images for a figure that means something


def test_the_page_is_written_at_each_evaluation_and_after_the_last_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []

    def noted(run: Path, **settings: Any) -> Path:
        page = write_report(run, **settings)
        pages.append(page.read_text(encoding="utf-8"))
        return page

    monkeypatch.setattr(training, "write_report", noted)
    keys = {"schedule.max_steps": 4, "train.eval_steps": 2, "train.eval_images": 3, "train.example_images": 4}
    train_and_report(tiny_config(tiny_data, keys), tmp_path)
    said = ("running, step 2 of 4", "trained, being scored", "finished, 4 steps")
    assert [[words in page for words in said] for page in pages] == [[i == j for j in range(3)] for i in range(3)]
    assert "step 2, 3 images" in pages[0]
    assert 'alt="Prediction of ' in pages[0]
    assert ["http-equiv" in page for page in pages] == [True, True, False]
    # A quarter as many best images as examples, and twice as many of the worst.
    assert [len(list((tmp_path / name).glob("0*"))) for name in ("examples", "worst", "best")] == [4, 2, 1]
    worst = json.loads((tmp_path / "worst" / "index.json").read_text())
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["name"] for each in worst] == [each["image"] for each in report["worst"][:2]]
