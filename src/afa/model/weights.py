"""Where an encoder's weights come from: a transformers folder, a hub id, an original file, or scaled random numbers.

Checks weights against the architecture that they are meant for; every mismatch is one line for the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from afa.errors import AfaError, first_line, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FOREIGN: Final = (
    *("classifier.", "cls_classifier.", "distillation_classifier.", "decode_head.", "head."),
    *("pooler.", "embeddings.mask_token", "text_model.", "text_projection.", "visual_projection.", "logit_"),
)
"""Starts of the keys of published checkpoints that an encoder has no place for: heads, text encoders."""


@dataclass(frozen=True)
class Architecture:
    """The architecture of an encoder, before its weights are loaded.

    Attributes:
        name: As in `model.backbone`, for messages.
        family: Name of its family, for messages.
        model: Class of the encoder in transformers.
        config: Its configuration.
        sizes: Fields of the configuration in which weights must agree; whatever else theirs says is overruled.
        options: Further arguments of the class.
        convert: Renames the keys of an original `.pth` file to those of the class; None where there are no such files.
    """

    name: str
    family: str
    model: Any
    config: PretrainedConfig
    sizes: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def build_encoder(architecture: Architecture, weights: str) -> Any:
    """Build an encoder in float32.

    Args:
        architecture: What to build.
        weights: Local folder in transformers' layout, or hub id, of an encoder alone or of a model that holds one; an
            original `.pth` file where the architecture has such; empty for random weights.

    Raises:
        AfaError: No such folder; no configuration in it; a model of another type or size; a key that is missing,
            unmatched or of another shape; files that cannot be read; a hub that cannot be reached.
    """
    if architecture.convert and weights.endswith((".pth", ".pt")):
        return _load_original(architecture, Path(weights))
    if weights:
        return _load_folder(architecture, weights)
    encoder = architecture.model(architecture.config, **architecture.options)
    init_from_scratch(encoder)
    return encoder


def init_from_scratch(encoder: nn.Module) -> None:
    """Fan-in scaled weights, linear layers at half gain.

    The usual standard deviation of 0.02 leaves the branches of a narrow encoder almost linear and nearly silent:
    it takes thousands of steps before it sees texture at all.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.5 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def describe_encoder(config: type[PretrainedConfig], stored: Mapping[str, Any]) -> Any:
    """The encoder of a `config.json`, as far as it says, else by the defaults of `config`; None for another type.

    An image-text model such as CLIP describes its image encoder in a part of its own.
    """
    kind, found = config.model_type, stored.get("model_type")
    if found not in (kind, kind.removesuffix("_vision_model")):
        return None
    vision: Any = stored if found == kind else stored.get("vision_config") or {}
    return config.from_dict(dict(vision))


def _load_folder(architecture: Architecture, weights: str) -> Any:
    """Load from a folder or the hub, through transformers."""
    is_folder = Path(weights).is_dir()
    if not is_folder and (weights.count("/") != 1 or weights.startswith((".", "/", "~"))):
        accepted = "a folder, a hub id or a .pth" if architecture.convert else "a folder or a hub id"
        raise AfaError(f"{weights}: no such weights folder; pass {accepted} as model.weights")
    if is_folder and not (Path(weights) / "config.json").is_file():
        raise AfaError(f"{weights}: has no config.json; model.weights needs a transformers model folder")
    try:
        with quiet("transformers", "huggingface_hub"):
            stored, _ = type(architecture.config).get_config_dict(weights)
            _check_config(architecture, stored, weights)
            # Mismatched shapes are let through here so that `_check_keys` can name the key.
            encoder, info = architecture.model.from_pretrained(
                weights,
                config=architecture.config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **architecture.options,
            )
    except AfaError:
        raise
    except Exception as error:
        reason = first_line(error)
        if "Weights only load failed" in reason:  # the rest of that message invites to load it regardless
            raise AfaError(
                f"{weights}: its weights are a pickle that holds more than tensors, and could run any program; pass "
                "weights as model.safetensors"
            ) from None
        if is_folder:
            raise AfaError(f"{weights}: cannot be loaded as {architecture.family} encoder weights ({reason})") from None
        raise AfaError(
            f"{weights}: cannot be fetched from the Hugging Face hub ({reason}); "
            "download it elsewhere and pass its folder as model.weights"
        ) from None
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(_FOREIGN)]
    _check_keys(weights, info["missing_keys"], unexpected, info["mismatched_keys"])
    return encoder


def _load_original(architecture: Architecture, path: Path) -> Any:
    """Load from a file of the architecture's authors."""
    encoder = architecture.model(architecture.config, **architecture.options)
    try:
        with quiet():  # of warnings about pickles that it refuses anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AfaError(f"{path}: no such weights file; check model.weights") from None
    except Exception:
        raise AfaError(
            f"{path}: not a plain PyTorch weights file (broken, or it holds more than tensors); check model.weights"
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AfaError(f"{path}: holds no state dictionary; expected an original {architecture.name}.pth")
    assert architecture.convert is not None
    try:
        state = architecture.convert(state)
    except AfaError as error:
        raise AfaError(f"{path}: {error}") from None
    expected = encoder.state_dict()
    mismatched = [
        (key, tensor.shape, expected[key].shape)
        for key, tensor in state.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    _check_keys(path, expected.keys() - state.keys(), state.keys() - expected.keys(), mismatched)
    encoder.load_state_dict(state)
    return encoder


def _check_config(architecture: Architecture, stored: Mapping[str, Any], weights: str) -> None:
    config = architecture.config
    described = describe_encoder(type(config), stored)
    if described is None:
        kind = stored.get("model_type")
        raise AfaError(f"{weights}: holds a {kind!r} model; model.weights needs a {architecture.family} encoder")
    for name in architecture.sizes:
        if getattr(described, name) != getattr(config, name):
            raise AfaError(
                f"{weights}: {name} is {getattr(described, name)}, but {architecture.name} has "
                f"{getattr(config, name)}; set model.backbone to the architecture of the weights"
            )


def _check_keys(
    origin: str | Path,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]],
) -> None:
    """Refuse weights whose keys, or the shapes found and needed under them, are not the encoder's."""
    for what, keys in (("lacks", sorted(missing)), ("has unmatched", sorted(unexpected))):
        if keys:
            raise AfaError(f"{origin}: {what} key {keys[0]!r} ({len(keys)} in all); check model.backbone")
    for key, found, needed in sorted(mismatched):
        raise AfaError(
            f"{origin}: {key!r} has shape {tuple(found)}, the backbone needs {tuple(needed)}; check model.backbone"
        )


def load_weights(network: nn.Module, path: Path) -> None:
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
    load_state(network, state, path)


def load_state(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a network, all keys or none.

    Args:
        network: Where they go.
        state: Tensors of any shape by key.
        path: File that they come from, for messages.

    Raises:
        AfaError: A key or shape does not match; the message names it.
    """
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
