"""Run folders: one with its configuration alone, and one of a finished run of two classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.config import config_to_toml, load_config

IMAGES = [
    {"image": "a", "iou": 40.0, "accuracy": 80.0, "truth": "background", "prediction": "cat", "share": 20.0},
    {"image": "<i>", "iou": 12.5, "accuracy": 25.0, "truth": "cat", "prediction": "dog & <b>", "share": 75.0},
    {"image": "empty", "iou": None, "accuracy": None, "truth": "", "prediction": "", "share": None},
]


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
        if kind == "seg":
            scores |= {"confusion": [[80, 15, 5], [10, 30, 0], [0, 0, 0]], "images": IMAGES}
        (bare / "evaluation" / f"{kind}.json").write_text(json.dumps(scores))
    for number, pictures in (("000", "image cam propagated pseudo prediction truth"), ("001", "image cam")):
        (bare / "examples" / number).mkdir(parents=True)
        for name in pictures.split():
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(bare / "examples" / number / f"{name}.png")
    index = [{"name": "a", "tags": ["cat"], "folder": "000"}, {"name": "<i>", "tags": ["dog & <b>"], "folder": "001"}]
    (bare / "examples" / "index.json").write_text(json.dumps(index))
    return bare
