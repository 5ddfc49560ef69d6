"""Where an encoder's weights come from: a transformers folder, a hub id, or fan-in scaled random numbers.

Checks weights against the architecture that they are meant for; every mismatch is one line for the user.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from afa.errors import AfaError


def load_pretrained(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: str,
    *,
    architecture: str,
    family: str,
    wanted: str,
    sizes: Sequence[str],
    foreign: tuple[str, ...],
    accepted: str = "a folder or a hub id",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Load an encoder in float32 whose architecture is known beforehand.

    Args:
        model_class: Class of the encoder in transformers.
        config: The architecture; whatever the weights' own configuration says beyond `sizes` is overruled.
        weights: Local folder in transformers' layout, or hub id; an encoder alone, or a model that holds one.
        architecture: Name of the architecture, for messages.
        family: Name of the family of encoders, for messages.
        wanted: What the user should pass, for messages.
        sizes: Fields of the configuration that must agree.
        foreign: Starts of the keys that an encoder has no place for, such as those of a classification head.
        accepted: Which kinds of weights the caller takes, for messages.
        options: Further arguments of the class.

    Raises:
        AfaError: No such folder; no configuration in it; a model of another type or size; a key that is missing,
            unmatched or of another shape; files that cannot be read; a hub that cannot be reached.
    """
    folder = Path(weights)
    if not folder.is_dir() and (weights.count("/") != 1 or weights.startswith((".", "/", "~"))):
        raise AfaError(f"{weights}: no such weights folder; pass {accepted} as model.weights")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise AfaError(f"{weights}: has no config.json; model.weights needs a transformers model folder")
    try:
        with _silence():
            stored, _ = type(config).get_config_dict(weights)
            _check_config(config, stored, weights, architecture=architecture, wanted=wanted, sizes=sizes)
            # Mismatched shapes are let through here so that the message below can name the key.
            loaded: Any = model_class.from_pretrained(
                weights,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **(options or {}),
            )
    except AfaError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "Weights only load failed" in reason:  # the rest of that message invites to load it regardless
            raise AfaError(
                f"{weights}: its weights are a pickle that holds more than tensors, and could run any program; pass "
                "weights as model.safetensors"
            ) from None
        if folder.is_dir():
            raise AfaError(f"{weights}: cannot be loaded as {family} encoder weights ({reason})") from None
        raise AfaError(
            f"{weights}: cannot be fetched from the Hugging Face hub ({reason}); "
            "download it elsewhere and pass its folder as model.weights"
        ) from None
    encoder, info = loaded
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(foreign))
    missing = sorted(info["missing_keys"])
    if missing or unexpected:
        odd = missing or unexpected
        what = "lacks" if missing else "has unmatched"
        raise AfaError(f"{weights}: {what} key {odd[0]!r} ({len(odd)} in all); check model.backbone")
    if info["mismatched_keys"]:
        key, found, needed = min(info["mismatched_keys"])
        raise AfaError(
            f"{weights}: {key!r} has shape {tuple(found)}, the backbone needs {tuple(needed)}; check model.backbone"
        )
    return encoder


def init_from_scratch(encoder: nn.Module) -> None:
    """Fan-in scaled weights, linear layers at half gain.

    The usual standard deviation of 0.02 leaves the branches of a narrow encoder almost linear and nearly silent:
    it takes thousands of steps before it sees texture at all.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.5 * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check_config(
    config: PretrainedConfig,
    stored: Mapping[str, Any],
    weights: str,
    *,
    architecture: str,
    wanted: str,
    sizes: Sequence[str],
) -> None:
    """Compare type and sizes; an image-text model such as CLIP describes its image encoder in a part of its own."""
    found = stored.get("model_type")
    if found not in (config.model_type, config.model_type.removesuffix("_vision_model")):
        raise AfaError(f"{weights}: holds a {found!r} model; model.weights needs a {wanted}")
    vision: Any = stored if found == config.model_type else stored.get("vision_config") or {}
    described = type(config).from_dict(vision)
    for name in sizes:
        if getattr(described, name) != getattr(config, name):
            raise AfaError(
                f"{weights}: {name} is {getattr(described, name)}, but {architecture} has {getattr(config, name)}; "
                "set model.backbone to the architecture of the weights"
            )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the loading libraries from printing anything but errors, which become ours."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loggers = (transformers_logging, hub_logging)
    verbosities = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            yield
    finally:
        for logger, verbosity in zip(loggers, verbosities, strict=True):
            logger.set_verbosity(verbosity)
