"""The functions of the package `afa` do what the commands do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import afa
from afa import runtime
from afa.api import train_and_report, training_config
from afa.cli import main
from afa.config import config_to_dict
from afa.data.images import read_mask
from opened import Opened
from tiny import assert_same_weights, tiny_config

CPU = {"train.device": "cpu"}


def test_every_name_resolves_and_no_other() -> None:
    assert set(afa.__all__) <= set(dir(afa))
    for name in afa.__all__:
        assert getattr(afa, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'segment'"):
        _ = afa.segment  # type: ignore[attr-defined]


def test_train_takes_a_configuration_a_file_or_a_folder(
    tiny_data: Path, tiny_run: Path, tiny_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = {"schedule.max_steps": 1, "data.val_list": ""}
    predictor = afa.train(tiny_config(tiny_data), tmp_path / "one", **{"train.example_images": 0})
    assert_same_weights(tmp_path / "one", tiny_run)
    assert predictor.loaded is not None
    assert (predictor.loaded.origin, predictor.device.type) == (tmp_path / "one", "cpu")
    stored = afa.load_config(tmp_path / "one" / "config.toml")
    assert config_to_dict(stored) == config_to_dict(tiny_config(tiny_data, {"train.example_images": 0}))
    afa.train(tiny_run / "config.toml", tmp_path / "two", **once)
    assert afa.load_config(tmp_path / "two" / "config.toml").schedule.max_steps == 1
    capsys.readouterr()
    predictor = afa.train(tiny_table, tmp_path / "three", **(CPU | once | {"model.weights": ""}))
    assert capsys.readouterr().err.startswith(f"data: {tiny_table}: table of tags")
    assert predictor(np.zeros((40, 50, 3), dtype=np.uint8)).label.shape == (40, 50)


def test_the_configuration_of_an_old_run_means_what_the_run_did(tiny_run: Path, tmp_path: Path) -> None:
    """A run of the preset `paper` from before today's keys; a file of the user's own has today's defaults."""
    later = ("decoder_init", "norm_eps", "affinity_init", "propagated_scale", "par_image", "reduction", "walk_steps")
    lines = (tiny_run / "config.toml").read_text().replace('"demo"', '"paper"').splitlines(keepends=True)
    old = "".join(line for line in lines if not line.startswith(later))
    run, own = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "config.toml"
    for path in (run / "config.toml", own):
        path.write_text(old)
    (tmp_path / "classes.txt").write_text("cat\n")  # beside the user's file, as of a data set
    found = {}
    for path in (run / "config.toml", own):
        config = training_config(file=path)[0]
        found[path] = (config.model.decoder_init, config.pseudo.par_image, config.loss.reduction)
    assert found == {
        run / "config.toml": ("uniform", "exact", "batch"),
        own: ("kaiming", "truncated", "process"),
    }
    train_and_report(training_config(file=run / "config.toml")[0], run, resume=True)


def test_evaluate_predict_and_pseudo_labels_are_the_commands(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = afa.evaluate(tiny_run, tiny_data, labels="cam", limit=3)
    main(["evaluate", str(tiny_run), "--data", str(tiny_data), "--labels", "cam", "--limit", "3", "--json", "-"])
    figures = json.loads(capsys.readouterr().out)
    assert {**result.to_json(), "seconds": 0} == {**figures, "seconds": 0}

    images = tiny_data / "JPEGImages" / "val_00000.jpg"
    summary = afa.predict(tiny_run, images, tmp_path / "a", formats="coco,voc", overlay=False)
    assert (summary.written, summary.failed) == (1, ())
    assert [written.format for written in summary.formats] == ["coco", "voc"]
    main(["predict", str(tiny_run), str(images), "--out", str(tmp_path / "b"), "--format", "coco"])
    assert (tmp_path / "a" / "coco.json").read_bytes() == (tmp_path / "b" / "coco.json").read_bytes()
    one, other = (read_mask(tmp_path / folder / "masks" / "val_00000.png") for folder in "ab")
    assert np.array_equal(one, other)

    names = tmp_path / "names.txt"
    names.write_text("train_00001\n")
    summary = afa.pseudo_labels(tiny_run, tiny_data, tmp_path / "c", list_file=str(names), formats="voc")
    assert [path.name for path in (tmp_path / "c" / "masks").iterdir()] == ["train_00001.png"]
    assert (tmp_path / "c" / "voc" / "labelmap.txt").is_file()


def test_formats_leave_out_images_that_failed(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Their masks are those of an earlier call."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("val_00000.jpg", "val_00001.jpg"):
        shutil.copyfile(tiny_data / "JPEGImages" / name, images / name)
    afa.predict(tiny_run, images, out, overlay=False)
    (images / "val_00001.jpg").write_bytes(b"broken")
    summary = afa.predict(tiny_run, images, out, formats="coco", overlay=False)
    assert (summary.written, len(summary.failed), summary.formats[0].num_images) == (1, 1, 1)
    names = [image["file_name"] for image in json.loads((out / "coco.json").read_text())["images"]]
    assert names == ["val_00000.jpg"]
    assert (out / "masks" / "val_00001.png").is_file()


def test_check_data_takes_a_folder_or_a_configuration(tiny_data: Path) -> None:
    by_folder = afa.check_data(tiny_data, fast=True)
    by_config = afa.check_data(tiny_config(tiny_data), fast=True)
    assert (by_folder["num_train"], by_config["num_train"]) == (24, 24)
    subset = afa.check_data(tiny_config(tiny_data), fast=True, **{"data.split_seed": 3})
    assert subset["errors"] == 0


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_command_opens_its_data_set_once(tiny_table: Path, tmp_path: Path, command: str) -> None:
    """The folder of images is listed once, and the tags are read once."""
    with Opened.recorded() as paths:
        if command == "check":
            afa.check_data(tiny_table, fast=True)
        else:
            once = {"schedule.max_steps": 1, "model.weights": "", "train.example_images": 0}
            afa.train(tiny_table, tmp_path / "run", **(CPU | once))
    opened = [Path(path) for path in paths if path.startswith(str(tiny_table))]
    assert opened.count(tiny_table / "images") == 1
    assert opened.count(tiny_table / "tags.csv") == 1


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_if_it_is_wanted(
    tiny_run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, progress: bool
) -> None:
    monkeypatch.setattr(runtime, "_TOLD_SECONDS", -1.0)
    afa.evaluate(tiny_run, tiny_data, limit=2, progress=progress, **CPU)
    assert ("evaluate seg 2/2" in capsys.readouterr().err) is progress
