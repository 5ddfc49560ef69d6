"""Checkpoints that survive a kill or a full disk: written beside, made durable, then renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from afa.errors import AfaError, first_line
from afa.runs.build import load_weights

KEPT_CHECKPOINTS = 2
"""How many of the newest checkpoints stay."""


def save_checkpoint(run: Path, *, step: int, network: nn.Module, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint; whatever happens meanwhile, the previous one stays good.

    Args:
        run: Run folder.
        step: Steps done.
        network: Network whose weights are saved.
        state: Everything else that resuming needs; tensors, numbers, texts and containers of them.

    Returns:
        Folder of the checkpoint.

    Raises:
        AfaError: The disk is full or refuses; the message names the last good checkpoint.
    """
    folder = run / "checkpoints"
    final = folder / f"step_{step:08d}"
    partial = folder / f".partial_{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(network.state_dict()), partial / "model.safetensors")
        torch.save(dict(state) | {"step": step}, partial / "training_state.pt")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
        write_atomically(folder / "latest", final.name + "\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save reports a full disk as RuntimeError, safetensors as its own exception or OSError.
        shutil.rmtree(partial, ignore_errors=True)
        good = latest_checkpoint(run)
        kept = f"the last good one is {good.name}" if good else "there is none yet"
        raise AfaError(
            f"{final}: cannot write the checkpoint ({first_line(error)}); {kept}; free space, then --resume"
        ) from None
    for old in (*sorted(folder.glob("step_*"))[:-KEPT_CHECKPOINTS], *folder.glob(".partial_*")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """Folder of the newest complete checkpoint of a run, or None."""
    complete = [
        path
        for path in sorted((run / "checkpoints").glob("step_*"))
        if (path / "model.safetensors").is_file() and (path / "training_state.pt").is_file()
    ]
    return complete[-1] if complete else None


def load_checkpoint(folder: Path, network: nn.Module) -> dict[str, Any]:
    """Load a checkpoint's weights into the network and return the rest of its state.

    Raises:
        AfaError: A file is broken or belongs to another network.
    """
    load_weights(network, folder / "model.safetensors")
    path = folder / "training_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AfaError(
            f"{path}: broken training state ({first_line(error)}); delete {folder.name} to resume from the one before"
        ) from None
    if not isinstance(state, dict) or "step" not in state:
        raise AfaError(f"{path}: not a training state of afa; delete {folder.name} to resume from the one before")
    return state


def save_weights(path: Path, network: nn.Module) -> None:
    """Write a network's weights as safetensors, atomically.

    Args:
        path: File to write.
        network: Network whose weights are saved.

    Raises:
        AfaError: The disk is full or refuses.
    """
    partial = path.with_name(f".partial_{path.name}")
    try:
        save_file(_contiguous(network.state_dict()), partial)
        _sync(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise AfaError(f"{path}: cannot write the weights ({first_line(error)}); free space, then --resume") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old contents or the new ones, never a part."""
    partial = path.with_name(f".partial_{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
