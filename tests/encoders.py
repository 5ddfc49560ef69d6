"""Encoders for tests: one of each kind with random weights, transformers' own of these weights, and a faster copy."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerModel

from afa.model.layers import speed_up
from afa.model.registry import build_backbone

SMALL = ("dinov2_tiny", "dinov2_tiny_reg", "dinov3_mini", "vit_mini", "deit_mini", "clip_mini", "siglip_mini")
"""One plain vision transformer of each family."""

ONE_OF_EACH_KIND = ("mit_tiny", *SMALL)


def random_image(size: tuple[int, int], *, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def random_backbone(name: str, **settings: Any) -> Any:
    """The same weights for every setting, each parameter off its initial value; in evaluation mode."""
    torch.manual_seed(0)
    backbone = build_backbone(name, **settings)
    state = backbone.state_dict()
    generator = torch.Generator().manual_seed(0)
    for key in sorted(state):
        state[key] = state[key] + 0.1 * torch.randn(state[key].shape, generator=generator)
    backbone.load_state_dict(state)
    return backbone.eval()


def load_eager(backbone: Any) -> Any:
    """transformers' own model with the weights of a backbone and its own attention."""
    encoder = backbone.encoder
    config = copy.deepcopy(encoder.config)
    config._attn_implementation = "eager"
    family = getattr(backbone, "family", None)
    eager = SegformerModel(config) if family is None else type(encoder)(config, **family.options)
    state = encoder.state_dict()
    if getattr(config, "vision_use_head", False):  # its pooling head, whose query is not needed here
        state |= {f"head.{key}": value for key, value in backbone.projection.state_dict().items()}
    missing, unexpected = eager.load_state_dict(state, strict=False)
    assert set(missing) <= {"embeddings.mask_token", "head.probe"}
    assert unexpected == []
    return eager.eval()


TEXT_KEYS: dict[str, Any] = {
    "model.backbone": "clip_mini", "model.classifier": "text", "model.freeze_blocks": 4, "model.affinity_blocks": 1,
    "model.text_embeddings": "", "pseudo.propagation": "none", "pseudo.scales": "1", "pseudo.mirror": "false",
    "evaluation.short_side": 48,
}  # fmt: skip
"""Settings of a small run whose classes are found by their names."""


def write_embeddings(folder: Path, names: Sequence[str], width: int, **more: Any) -> Path:
    """A folder of text embeddings: random vectors, the same for the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = torch.randn(len(names), width, generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": vectors}, folder / "embeddings.safetensors")
    (folder / "names.json").write_text(json.dumps({"names": list(names)} | more))
    return folder


def plain_encoder() -> SegformerModel:
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], strides=[4, 2, 2, 1]
    )
    return SegformerModel(config).eval()


def both(encoder: nn.Module) -> tuple[nn.Module, nn.Module]:
    faster = copy.deepcopy(encoder)
    speed_up(faster)
    return encoder, faster
