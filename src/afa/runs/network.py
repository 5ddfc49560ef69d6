"""From configuration to network, and from a run folder back to the network it trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from afa.config import Config, ModelConfig
from afa.model.families import TOKEN_SIZES
from afa.model.network import AfaNetwork
from afa.model.paired import add_second
from afa.model.registry import build_backbone
from afa.model.text import embed_words
from afa.model.weights import load_weights
from afa.runs.run import Run

if TYPE_CHECKING:
    from afa.model.language import TextClassifier


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


def build_network(
    model: ModelConfig, num_classes: int, *, words: Sequence[Sequence[str]] = (), pretrained: bool = True
) -> AfaNetwork:
    """Build the network that a configuration describes.

    Args:
        model: Settings.
        num_classes: C.
        words: Words of each class, for `model.classifier` = text.
        pretrained: Load the weights of the encoders and look the words up; off, all starts random or empty.

    Raises:
        AfaError: As `build_backbone`, `add_second` and `embed_words`.
    """
    with_text = model.classifier == "text"
    backbone = build_backbone(
        model.backbone,
        model.weights if pretrained else "",
        drop_path=model.drop_path,
        attention_blocks=model.affinity_blocks,
        freeze_blocks=model.freeze_blocks,
        feature_levels=model.feature_levels,
        norm_eps=model.norm_eps,
        language=with_text,
    )
    if model.second_backbone:
        backbone = add_second(
            backbone,
            model.second_backbone,
            model.second_weights if pretrained else None,
            levels=model.second_feature_levels,
            similarity=model.second_similarity,
        )
    network = AfaNetwork(
        backbone,
        num_classes,
        pooling=model.pooling,
        pooling_percent=model.pooling_percent,
        decoder_width=model.decoder_width,
        decoder_dropout=model.decoder_dropout,
        attention_scaling=model.attention_scaling,
        affinity_init=model.affinity_init,
        text=_text_classifier(model, num_classes, words if pretrained else ()) if with_text else None,
    )
    if model.decoder_init == "kaiming":
        nn.init.kaiming_normal_(network.decoder.fuse.weight, mode="fan_out", nonlinearity="relu")
    return network


def _text_classifier(model: ModelConfig, num_classes: int, words: Sequence[Sequence[str]]) -> TextClassifier:
    from afa.model.language import TextClassifier  # here, as transformers takes seconds to import

    if not words:
        shape, width = len(model.background_words), TOKEN_SIZES[model.backbone].language
        return TextClassifier(
            torch.zeros(num_classes, width), torch.zeros(shape, width), sharpness=model.text_sharpness
        )
    vectors = embed_words(
        words,
        model.background_words,
        backbone=model.backbone,
        weights=model.weights,
        embeddings=model.text_embeddings,
        templates=model.text_templates,
    )
    return TextClassifier(vectors.classes, vectors.background, sharpness=model.text_sharpness)


def load_run(run: Path, device: torch.device) -> LoadedRun:
    """Load the network of a run folder: its final weights, or its last checkpoint's if it is not finished.

    Raises:
        AfaError: Not a run folder; no weights yet; weights that are broken or of another network.
    """
    folder = Run(run)
    classes, config = folder.classes(), folder.config()
    network = build_network(config.model, len(classes), pretrained=False)
    load_weights(network, folder.newest_weights())
    return LoadedRun(network.to(device).eval(), config, classes, run)
