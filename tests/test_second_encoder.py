"""A run on two frozen encoders from the feature cache, and without it, to export and resumption."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afa
from afa.api import check_data, export, pseudo_labels
from afa.config import load_config
from afa.data.open import open_data
from afa.runs.network import build_network, load_run
from afa.training.feature_cache import feature_key
from encoders import random_backbone, write_embeddings
from tiny import SETTINGS, assert_same_weights

CPU = {"train.device": "cpu"}


@pytest.fixture(scope="module")
def keys(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("given")
    classes = (tiny_data / "classes.txt").read_text().split()
    words = write_embeddings(folder / "words", [*classes, "sky", "grass", "wall"], 32)
    second = random_backbone("dinov3_mini").encoder
    second.embeddings.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 64))  # which published weights have
    second.save_pretrained(folder / "second")
    tiny = {key: value for key, value in SETTINGS.items() if key != "schedule.cls_steps"}
    first = {"model.backbone": "clip_mini", "model.weights": "", "model.freeze_blocks": 4, "model.affinity_blocks": 1}
    second = {"model.second_backbone": "dinov3_mini", "model.second_weights": str(folder / "second")}
    own = {"data.root": str(tiny_data), "model.text_embeddings": str(words), "model.second_similarity": True}
    return tiny | first | second | own | {"evaluation.short_side": 64}


@pytest.fixture(scope="module")
def run(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    afa.train(load_config(None, keys, preset="frozen"), run)
    return run


def test_the_cache_has_the_tokens_of_both(run: Path, keys: dict[str, Any]) -> None:
    (folder,) = (run / "features").iterdir()
    key = json.loads((folder / "index.json").read_text())["about"]["key"]
    assert key["second"] == ["dinov3_mini", 1, True]
    network = load_run(run, torch.device("cpu")).network
    assert network.backbone.channels == (64,) * 4 + (32,)
    # The weights of both travel with the run.
    expected = random_backbone("dinov3_mini").state_dict()
    for name, tensor in network.backbone.second.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert key["weights"] == network.backbone.weights_hash()


def test_a_cache_of_another_second_encoder_is_another_one(keys: dict[str, Any]) -> None:
    found = []
    words = [("a",), ("b",), ("c",), ("d",), ("e",)]
    for changed in (
        {},
        {"model.second_feature_levels": 2},
        {"model.second_similarity": False},
        {"model.second_backbone": "vit_mini", "model.second_weights": ""},
        {"model.second_backbone": "", "model.second_weights": "", "model.second_similarity": False},
    ):
        torch.manual_seed(0)
        config = load_config(None, keys | changed, preset="frozen")
        images = open_data(config.data).train()
        text = write_embeddings(Path(keys["model.text_embeddings"]).parent / "more", [*"abcde", "sky"], 32)
        model = dataclasses.replace(config.model, text_embeddings=str(text))
        network = build_network(model, len(images.classes), words=words[: len(images.classes)])
        found.append(feature_key(network, images, config))
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert ["second" in key for key in found] == [True] * 4 + [False]


def test_every_command_takes_it(run: Path, keys: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["complete"]
    assert afa.evaluate(run, tiny_data, **CPU).to_json()["miou"] == report["miou"]
    assert pseudo_labels(run, tiny_data, tmp_path / "labels", **CPU).written > 0
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    prediction = afa.Predictor.from_run(run, device="cpu")(picture)
    saved = export(run, tmp_path / "hub", format="hf")
    assert np.array_equal(prediction.label, afa.Predictor.from_pretrained(saved, device="cpu")(picture).label)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["config"]["model"]["second_weights"] == "second"
    assert check_data(load_config(None, keys, preset="frozen"))["training"]["cache_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name"), [("onnx", "net.onnx"), ("torch", "net.pt2")])
def test_files_for_other_programs(run: Path, tmp_path: Path, format: str, name: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert "as PyTorch" in str(export(run, tmp_path / name, format=format))


def test_a_resumed_run_ends_the_same(run: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "run"
    for part in ("features", "checkpoints/step_00000004"):
        shutil.copytree(run / part, other / part)
    for name in ("config.toml", "classes.txt"):
        shutil.copy(run / name, other)
    (rows,) = (other / "features").glob("*/rows.bin")
    made = rows.stat().st_mtime_ns
    config = load_config(None, keys | {"train.example_images": 0}, preset="frozen")
    afa.train(config, other, resume=True)
    assert_same_weights(run, other)
    assert rows.stat().st_mtime_ns == made


def test_it_trains_without_the_cache(keys: dict[str, Any], tmp_path: Path) -> None:
    """Of SigLIP, whose last block learns."""
    names = (Path(keys["data.root"]) / "classes.txt").read_text().split()
    words = write_embeddings(tmp_path / "words", [*names, "sky"], 64)
    changed = {"train.feature_cache": False, "model.second_similarity": False, "model.freeze_blocks": 3}
    changed |= {"model.backbone": "siglip_mini", "model.text_embeddings": str(words)}
    short = {"schedule.max_steps": 3, "schedule.refined_steps": 1, "train.example_images": 0}
    afa.train(load_config(None, keys | changed | short, preset="frozen"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["complete"]
    assert not (tmp_path / "run" / "features").exists()


def test_masks_without_training(keys: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    given = {key: value for key, value in keys.items() if key.startswith(("model.", "evaluation."))}
    made = [afa.masks(tiny_data, tmp_path / str(similar), examples=0,
                      **given | CPU | {"model.second_similarity": similar}) for similar in (False, True)]  # fmt: skip
    assert made[0].written.written == made[1].written.written > 0
    masks = [sorted((tmp_path / str(similar) / "masks").iterdir()) for similar in (False, True)]
    assert any(one.read_bytes() != two.read_bytes() for one, two in zip(*masks, strict=True))
