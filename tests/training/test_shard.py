"""`train.shard`: two processes that each keep a part compute what one computes; a checkpoint goes on either way."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from afa.config import Config
from afa.data.open import open_data
from afa.runtime import process_group
from afa.training.loop import train
from mistakes import refused
from tiny import NO_DROPOUT, final_weights, tiny_config, train_tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def shard_config(root: Path) -> Config:
    keys: dict[str, Any] = {
        "train.shard": True,
        "model.affinity_init": "calibrated",
        "schedule.grad_clip": 1.0,
        "train.save_steps": 3,
        "train.eval_steps": 3,
    }
    return tiny_config(root, NO_DROPOUT | keys)


def _train_shards(rank: int, root: str, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = shard_config(Path(root))
    data = open_data(config.data)
    with process_group(CPU) as processes:
        train(config, data, Path(folder, "two"), device=CPU, processes=processes)
        train(config, data, Path(folder, "resumed"), device=CPU, processes=processes, resume=True)
        half = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp16"))
        with refused("train.precision is fp16, which train.shard does not know"):
            train(half, data, Path(folder, "half"), device=CPU, processes=processes)


def largest_difference(run: Path, other: Path) -> float:
    ours, theirs = final_weights(run), final_weights(other)
    assert ours.keys() == theirs.keys()
    # A bias of the keys has no influence, and its gradient is rounding: tests/training/test_distributed.py.
    names = [name for name in ours if not name.endswith("k_proj.bias")]
    return max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()) for n in names)


def half_of(run: Path, copy: Path) -> None:
    """Copy a run as if it had been killed after its first checkpoint."""
    shutil.copytree(run, copy)
    (copy / "model.safetensors").unlink()
    shutil.rmtree(copy / "checkpoints" / "step_00000006")


@pytest.mark.slow
def test_shards_equal_one_process_and_checkpoints_go_on_either_way(tiny_data: Path, tmp_path: Path) -> None:
    config = shard_config(tiny_data)
    one, two, there, back = (tmp_path / name for name in ("one", "two", "resumed", "back"))
    train_tiny(config, one)  # a single process has nothing to spread
    half_of(one, there)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (str(tiny_data), str(tmp_path), port)
    multiprocessing.spawn(_train_shards, args=arguments, nprocs=2)  # type: ignore[no-untyped-call]
    half_of(two, back)
    train_tiny(config, back, resume=True)
    for run in (two, there, back):
        assert largest_difference(one, run) <= TOLERANCE, run.name
