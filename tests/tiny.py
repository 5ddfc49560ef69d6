"""A training run small enough for tests: its settings, as a configuration and as flags, and what it left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afa.config import Config, config_to_toml, load_config
from afa.data.open import open_data
from afa.runs.network import build_network
from afa.training.loop import TrainResult, train

SETTINGS: dict[str, Any] = {
    "data.workers": 0,
    "augment.crop_size": 64,
    "model.decoder_width": 16,
    "model.affinity_init": "calibrated",
    "schedule.max_steps": 6,
    "schedule.batch_size": 4,
    "schedule.cls_steps": 2,
    "schedule.refined_steps": 3,
    "schedule.warmup_steps": 2,
    "train.device": "cpu",
    "train.log_steps": 1,
    "train.eval_steps": 0,
    "train.save_steps": 2,
    "train.example_images": 2,
    "train.tensorboard": False,
}
"""What turns the preset `demo` into six steps: two of `cls`, two of `initial`, two of `refined`."""

NO_DROPOUT = {"model.drop_path": 0.0, "model.decoder_dropout": 0.0}


def tiny_config(root: Path, keys: dict[str, Any] | None = None) -> Config:
    """The configuration of a tiny run on the data set `root`, with some keys changed."""
    return load_config(None, SETTINGS | {"data.root": str(root)} | (keys or {}), preset="demo")


def train_tiny(config: Config, run: Path, *, resume: bool = False) -> TrainResult:
    """Train alone on the CPU."""
    data = open_data(config.data)
    return train(config, data, run, device=torch.device("cpu"), resume=resume)


def write_untrained(run: Path, classes: Sequence[str], keys: dict[str, Any] | None = None) -> Config:
    """Write a run folder whose weights are random."""
    keys = {"model.backbone": "mit_tiny", "model.weights": "", "model.decoder_width": 8} | (keys or {})
    config = load_config(None, keys)
    torch.manual_seed(0)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(config_to_toml(config))
    (run / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    save_file(build_network(config.model, len(classes), pretrained=False).state_dict(), run / "model.safetensors")
    return config


def tiny_flags(root: Path, keys: dict[str, Any] | None = None) -> list[str]:
    """The same as arguments of `afa train`."""
    merged = SETTINGS | {"data.root": root} | (keys or {})
    flags = [word for key, value in merged.items() for word in (f"--{key}", str(value))]
    return ["train", "--preset", "demo", *flags]


def start_python(arguments: list[str], **settings: Any) -> subprocess.Popen[str]:
    """Start Python with pipes for its output, and as many threads as this process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **settings,
    )


def final_weights(run: Path) -> dict[str, Tensor]:
    """The final weights of a run."""
    weights: dict[str, Tensor] = load_file(run / "model.safetensors")
    return weights


def assert_same_weights(run: Path, other: Path) -> None:
    """Assert that two runs ended with the same weights, bit for bit, none of them NaN."""
    weights, others = final_weights(run), final_weights(other)
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert tensor.isfinite().all(), key
        assert torch.equal(tensor, others[key]), f"{key}: {(tensor - others[key]).abs().max()}"
