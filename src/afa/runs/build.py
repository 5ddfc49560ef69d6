"""From configuration to network, and from a run folder back to the network it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from afa.config import Config, ModelConfig, load_config
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.model.registry import build_backbone


@dataclass(frozen=True)
class LoadedRun:
    """A trained network and what it was trained with.

    Attributes:
        network: In evaluation mode, on the device asked for.
        config: Resolved configuration of the run.
        classes: Names of the C foreground classes.
        origin: Folder that it was loaded from.
    """

    network: AfaNetwork
    config: Config
    classes: tuple[str, ...]
    origin: Path


def build_network(model: ModelConfig, num_classes: int, *, pretrained: bool = True) -> AfaNetwork:
    """Build the network that a configuration describes.

    Args:
        model: Settings.
        num_classes: C.
        pretrained: Load `model.weights` into the encoder; off, it starts random.

    Raises:
        AfaError: As `build_backbone`.
    """
    backbone = build_backbone(
        model.backbone,
        model.weights if pretrained else "",
        drop_path=model.drop_path,
        attention_blocks=model.affinity_blocks,
        freeze_blocks=model.freeze_blocks,
        feature_levels=model.feature_levels,
    )
    return AfaNetwork(
        backbone,
        num_classes,
        pooling=model.pooling,
        pooling_percent=model.pooling_percent,
        decoder_width=model.decoder_width,
        decoder_dropout=model.decoder_dropout,
        attention_scaling=model.attention_scaling,
    )


def load_run(run: Path, device: torch.device) -> LoadedRun:
    """Load the network of a run folder: its final weights, or its last checkpoint's if it is not finished.

    Args:
        run: Run folder.
        device: Where the network goes.

    Raises:
        AfaError: Not a run folder; no weights yet; weights that are broken or of another network.
    """
    classes = read_classes(run)
    config = load_config(run / "config.toml")
    network = build_network(config.model, len(classes), pretrained=False)
    load_weights(network, find_weights(run))
    return LoadedRun(network.to(device).eval(), config, classes, run)


def read_classes(run: Path) -> tuple[str, ...]:
    """Names of the C foreground classes of a run, in index order.

    Raises:
        AfaError: Not a run folder.
    """
    if not (run / "config.toml").is_file() or not (run / "classes.txt").is_file():
        raise AfaError(f"{run}: not a run folder (no config.toml and classes.txt); pass the --out of afa train")
    return tuple((run / "classes.txt").read_text(encoding="utf-8").splitlines())


def find_weights(run: Path) -> Path:
    """Path of a run's newest weights.

    Raises:
        AfaError: The run has none yet.
    """
    final = run / "model.safetensors"
    if final.is_file():
        return final
    latest = run / "checkpoints" / "latest"
    if latest.is_file():
        checkpoint = run / "checkpoints" / latest.read_text().strip() / "model.safetensors"
        if checkpoint.is_file():
            return checkpoint
    raise AfaError(f"{run}: has no weights yet (neither model.safetensors nor a checkpoint); train it first")


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into a network, all keys or none.

    Raises:
        AfaError: The file is missing or broken, or a key or shape does not match (the message names it).
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise AfaError(f"{path}: no such weights file") from None
    except (SafetensorError, OSError) as error:
        raise AfaError(f"{path}: broken weights file ({error}); restore it or train again") from None
    expected = network.state_dict()
    odd = sorted(expected.keys() ^ state.keys())
    if odd:
        what = "lacks" if odd[0] in expected else "has the unmatched"
        raise AfaError(f"{path}: {what} key {odd[0]!r} ({len(odd)} in all); it belongs to another network")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise AfaError(
                f"{path}: {key!r} has shape {tuple(tensor.shape)}, the network needs "
                f"{tuple(expected[key].shape)}; it belongs to another network"
            )
    network.load_state_dict(state)
