"""A run on a frozen encoder from data to export: what every command makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afa
from afa.api import SCORED_LABELS, check_data, export, pseudo_labels
from afa.config import load_config
from afa.data.open import open_data
from afa.evaluation.evaluate import evaluate_each
from afa.runs.network import load_run
from encoders import write_embeddings
from mistakes import refused
from tiny import SETTINGS, assert_same_weights

CPU = {"train.device": "cpu"}


@pytest.fixture(scope="module")
def keys(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    classes = (tiny_data / "classes.txt").read_text().split()
    words = write_embeddings(tmp_path_factory.mktemp("words"), [*classes, "sky", "grass", "wall"], 32)
    own = {"model.backbone": "clip_mini", "model.weights": "", "model.freeze_blocks": 4, "model.affinity_blocks": 1}
    left_out = ("schedule.cls_steps", "model.decoder_width")
    tiny = {key: value for key, value in SETTINGS.items() if key not in left_out}
    own |= {"pseudo.propagation": "affinity", "loss.affinity_weight": 1.0}
    return tiny | own | {"data.root": str(tiny_data), "model.text_embeddings": str(words), "evaluation.short_side": 64}


@pytest.fixture(scope="module")
def run(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("frozen") / "run"
    afa.train(load_config(None, keys, preset="frozen"), run)
    return run


def test_the_run_has_what_every_run_has(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["complete"]
    assert None not in (report["miou"], report["cam_miou"], report["propagated_miou"], report["tag_f1"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if line["kind"] == "train"] == ["initial"] * 4 + ["refined"] * 2
    assert (run / "examples" / "sheet.png").is_file()
    assert len(list((run / "features").iterdir())) == 1


def test_the_words_travel_with_the_weights(run: Path, keys: dict[str, Any]) -> None:
    network = load_run(run, torch.device("cpu")).network
    assert network.text is not None
    assert network.text.background.any(1).sum() == 3
    torch.testing.assert_close(network.text.classes.norm(dim=1), torch.ones(network.num_classes))


def test_every_command_takes_it(run: Path, keys: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    scores = [afa.evaluate(run, tiny_data, labels=labels, **CPU).to_json()["miou"]
              for labels in ("seg", "cam", "propagated", "initial", "refined")]  # fmt: skip
    assert all(np.isfinite(scores))
    report = json.loads((run / "report.json").read_text())
    assert scores[:3] == [report["miou"], report["cam_miou"], report["propagated_miou"]]
    assert np.isfinite(afa.evaluate(run, tiny_data, protocol="multiscale+crf", limit=2, **CPU).miou)
    assert pseudo_labels(run, tiny_data, tmp_path / "labels", **CPU).written > 0
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    prediction = afa.Predictor.from_run(run, device="cpu")(picture)
    other = afa.Predictor.from_pretrained(export(run, tmp_path / "hub", format="hf"), device="cpu")(picture)
    assert np.array_equal(prediction.label, other.label)
    export(run, tmp_path / "net.pt2", format="torch")
    cost = check_data(load_config(None, keys, preset="frozen"))["training"]
    assert cost["cache_seconds"] > 0
    assert cost["seconds"] > cost["cache_seconds"]


def test_scoring_runs_the_encoder_once_an_image(run: Path) -> None:
    network, config = load_run(run, torch.device("cpu")).network, load_config(run / "config.toml")
    images = open_data(config.data).masked()
    seen = []
    network.backbone.register_forward_hook(lambda *_: seen.append(1))
    evaluate_each(network, images, config, SCORED_LABELS)
    assert len(seen) == len(images)


def test_a_resumed_run_ends_the_same(run: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(None, keys | {"train.example_images": 0}, preset="frozen")
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    for name in ("config.toml", "classes.txt"):
        (other / name).write_bytes((run / name).read_bytes())
    step = other / "checkpoints" / "step_00000004"
    step.mkdir()
    for file in (run / "checkpoints" / "step_00000004").iterdir():
        (step / file.name).write_bytes(file.read_bytes())
    afa.train(config, other, resume=True)
    assert_same_weights(run, other)


def test_full_supervision_does_not_know_the_cache(keys: dict[str, Any]) -> None:
    with refused("train.feature_cache", "train.supervision is masks"):
        load_config(None, keys | {"train.supervision": "masks"}, preset="frozen")
