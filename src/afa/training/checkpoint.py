"""Checkpoints that survive a kill or a full disk: written beside, made durable, then renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor, nn

from afa.errors import AfaError, first_line
from afa.model.weights import load_weights
from afa.runs.files import write_whole
from afa.runs.run import Run

KEPT_CHECKPOINTS = 2
"""Number of checkpoints to keep, the newest ones."""


def save_checkpoint(run: Path, *, step: int, network: nn.Module, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint; whatever happens meanwhile, the previous one stays good.

    Args:
        run: Run folder.
        step: Steps done.
        network: Network whose weights are saved.
        state: Everything else that resuming needs; tensors, numbers, texts and containers of them.

    Raises:
        AfaError: The disk is full or refuses; the message names the last good checkpoint.
    """
    folder = Run(run).checkpoints
    final = folder / f"step_{step:08d}"
    partial = folder / f".partial_{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(network.state_dict()), Run.weights_of(partial))
        torch.save(dict(state) | {"step": step}, Run.state_of(partial))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
        write_whole(Run(run).latest_file, final.name + "\n", durable=True)
    except (OSError, RuntimeError, SafetensorError, AfaError) as error:
        # torch.save reports a full disk as RuntimeError, safetensors as its own exception or OSError.
        shutil.rmtree(partial, ignore_errors=True)
        good = Run(run).latest_checkpoint()
        kept = f"the last good one is {good.name}" if good else "there is none yet"
        raise AfaError(
            f"{final}: cannot write the checkpoint ({first_line(error)}); {kept}; free space, then --resume"
        ) from None
    for old in (*sorted(folder.glob("step_*"))[:-KEPT_CHECKPOINTS], *folder.glob(".partial_*")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path, network: nn.Module) -> dict[str, Any]:
    """Load a checkpoint's weights into the network and return the rest of its state.

    Raises:
        AfaError: A file is broken or belongs to another network.
    """
    load_weights(network, Run.weights_of(folder))
    path = Run.state_of(folder)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # PyTorch's words advise to load it unsafely
        raise AfaError(
            f"{path}: broken training state, or of a program that is not afa; delete {folder.name} to resume from the "
            "one before"
        ) from None
    if not isinstance(state, dict) or "step" not in state:
        raise AfaError(f"{path}: not a training state of afa; delete {folder.name} to resume from the one before")
    return state


def save_weights(path: Path, network: nn.Module) -> None:
    """Write a network's weights as safetensors, whole or not at all.

    Raises:
        AfaError: The disk is full or refuses.
    """
    write_whole(path, save(_contiguous(network.state_dict())), durable=True, remedy="free space, then --resume")


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
