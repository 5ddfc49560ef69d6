"""From training to prediction and export with pictures as instruments and phones leave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa import Predictor
from afa.api import evaluate, train_and_report
from afa.data.images import read_image
from layouts import with_masks
from mistakes import refused
from tiny import tiny_config

KEYS = {
    "schedule.max_steps": 2,
    "schedule.cls_steps": 1,
    "schedule.refined_steps": 1,
    "schedule.warmup_steps": 0,
    "data.white_level": 4095,
}


@pytest.fixture
def twelve_bit(tmp_path: Path) -> Path:
    """Gray pictures of 12 bits in files of 16, two classes, one of them cut off."""
    rng = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "data" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 4096, (70, 80)).astype(np.uint16)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return tmp_path / "data"


def test_the_white_level_goes_from_training_to_prediction_and_export(
    twelve_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = tiny_config(twelve_bit, KEYS | {"data.skip_broken": True})
    train_and_report(config, run)
    said = capsys.readouterr().err
    assert "1 broken image of 20 left out (first: " in said
    assert "nearly black" not in said
    path = twelve_bit / "cat" / "0.png"
    seen = read_image(path, white_level=4095)
    assert seen.max() > 250
    predictor = Predictor.from_run(run, device="cpu")
    passed_on = Predictor.from_pretrained(predictor.save_pretrained(tmp_path / "hub"), device="cpu")
    for each in (predictor, passed_on):
        np.testing.assert_array_equal(each.prepare(path).pixels, seen)
        np.testing.assert_array_equal(each.prepare(Image.open(path)).pixels, seen)
    prediction = predictor(Image.open(path))
    np.testing.assert_array_equal(
        np.asarray(prediction.overlay(path)), np.asarray(prediction.overlay(Image.open(path)))
    )
    assert evaluate(run, twelve_bit).num_images > 0


def test_a_training_on_dark_pictures_says_so(
    twelve_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(twelve_bit, KEYS | {"data.white_level": 65535, "data.skip_broken": True})
    train_and_report(config, tmp_path / "run")
    assert "of 65535, so they are nearly black; set data.white_level to 4095" in capsys.readouterr().err


def test_white_masks_stop_a_training_before_it_begins(tmp_path: Path) -> None:
    with_masks(tmp_path / "data")
    for path in (tmp_path / "data" / "masks").iterdir():
        Image.fromarray(np.array([[0, 0, 255, 255, 0, 0]] * 4, dtype=np.uint8)).save(path)
    with refused("masks have the values 0 and 255 alone", "data.mask_values"):
        train_and_report(tiny_config(tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
