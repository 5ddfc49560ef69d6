"""Every encoder by name, and the table of them: `python -m afa.model.registry` prints what docs/backbones.md shows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from afa.errors import AfaError
from afa.model.backbone import Backbone
from afa.model.families import MIT_SIZES, TOKEN_FAMILIES, TOKEN_SIZES, MitSize, TokenSize
from afa.model.weights import describe_encoder

_MIT_LICENSE: Final = "NVIDIA, non-commercial"
_MIT_LEVELS: Final = 4
_LOADED: Final = ("mit_b0", "dinov2_small_reg")


@dataclass(frozen=True)
class BackboneSpec:
    """What is known about an encoder before it is built.

    Attributes:
        kind: `mit`, or a key of `TOKEN_FAMILIES`.
        title: Display name of the family of encoders.
        size: Widths, depths and heads; for plain transformers patch size and native image size too.
        license: License of its published weights, as their publishers state it; empty where there are none.
        loaded: Whether trained weights of this architecture have been loaded and compared by a test.
    """

    kind: str
    title: str
    size: MitSize | TokenSize
    license: str
    loaded: bool

    @property
    def weights(self) -> str:
        """Hub id of published weights; empty for the small ones of ours, which have none."""
        return self.size.weights


def _spec(name: str, size: MitSize | TokenSize) -> BackboneSpec:
    kind, title, license_ = "mit", "SegFormer's MiT", _MIT_LICENSE
    if isinstance(size, TokenSize):
        family = TOKEN_FAMILIES[size.family]
        kind, title, license_ = size.family, family.title, family.license
    return BackboneSpec(kind, title, size, license_ if size.weights else "", name in _LOADED)


_SIZES: Final[Mapping[str, MitSize | TokenSize]] = {**MIT_SIZES, **TOKEN_SIZES}
BACKBONES: Final[Mapping[str, BackboneSpec]] = {name: _spec(name, size) for name, size in _SIZES.items()}
"""Every encoder that `model.backbone` can name."""


def build_backbone(
    name: str,
    weights: str = "",
    *,
    drop_path: float = 0.1,
    attention_blocks: int = 2,
    freeze_blocks: int = 0,
    feature_levels: int = 4,
    norm_eps: float = 1e-5,
    language: bool = False,
) -> Backbone:
    """Build an encoder. The name alone decides the architecture, so that weights of a run can be loaded into it.

    Args:
        name: Key in `BACKBONES`.
        weights: Local folder or hub id in transformers' layout, for MiT also an original `mit_b*.pth`; empty for
            random weights.
        drop_path: Stochastic depth of the last block, linear over depth; MiT and DINOv2 only.
        attention_blocks: Number of blocks, counted from the end, whose Q K^T is returned.
        freeze_blocks: Number of blocks, counted from the image, that are frozen with all before them.
        feature_levels: Number of feature maps; MiT always has the four of its stages.
        norm_eps: MiT only: epsilon of the norm layers in blocks and after stages.
        language: Let the last feature map be one in which words can be looked up: a `LanguageBackbone`.

    Raises:
        AfaError: Unknown name; more blocks or levels asked for than there are; weights that are absent, unreadable
            or of another architecture; a hub that cannot be reached.
    """
    if name not in BACKBONES:
        near = " or ".join(difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.5))
        advice = f"use one of {', '.join(BACKBONES)}"
        if near:
            advice = f"did you mean {near}? python -m afa.model.registry lists all"
        raise AfaError(f"model.backbone is {name!r}; {advice}")
    shared: dict[str, Any] = {
        "drop_path": drop_path,
        "attention_blocks": attention_blocks,
        "freeze_blocks": freeze_blocks,
    }
    # Here, as transformers takes seconds to import and the tables above need none of it.
    if language and not (name in TOKEN_SIZES and TOKEN_SIZES[name].language):
        known = ", ".join(each for each, size in TOKEN_SIZES.items() if size.language)
        raise AfaError(f"model.backbone is {name!r}, which knows no words, but model.classifier is text; use {known}")
    if language:
        from afa.model.language import LanguageBackbone

        return LanguageBackbone(name, weights, feature_levels=feature_levels, **shared)
    if name in TOKEN_SIZES:
        from afa.model.vit import TokenBackbone

        return TokenBackbone(name, weights, feature_levels=feature_levels, **shared)
    if feature_levels != _MIT_LEVELS:
        raise AfaError(
            f"model.feature_levels is {feature_levels}, but {name} has its {_MIT_LEVELS} stages; leave it at that"
        )
    from afa.model.mit import MixTransformer

    return MixTransformer(name, weights, norm_eps=norm_eps, **shared)


def backbone_of(weights: str) -> str | None:
    """Identify the encoder by its weights.

    Args:
        weights: Folder in transformers' layout, hub id, or an original `mit_b*.pth`.

    Returns:
        Key in `BACKBONES`; None if it cannot be determined.

    >>> backbone_of("openai/clip-vit-base-patch16")
    'clip_b16'
    """
    path = Path(weights)
    if path.suffix == ".pth":
        return path.stem if path.stem in BACKBONES else None
    if not path.is_dir():
        return next((name for name, spec in BACKBONES.items() if spec.weights == weights), None)
    try:
        stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict):
        return None
    return next((name for name, spec in BACKBONES.items() if _fits(spec, stored)), None)


def _fits(spec: BackboneSpec, stored: Mapping[str, Any]) -> bool:
    """Whether a configuration of transformers has the sizes of an encoder, made for images of whatever size."""
    import transformers

    config = getattr(transformers, "SegformerConfig" if spec.kind == "mit" else TOKEN_FAMILIES[spec.kind].config)
    try:
        described = describe_encoder(config, stored)
    except Exception:  # loading the weights reports what is wrong with it
        return False
    sizes = {name: value for name, value in spec.size.settings().items() if name != "image_size"}
    return described is not None and all(getattr(described, name) == value for name, value in sizes.items())


def table() -> str:
    """The encoders as a Markdown table; parameters are counted, the rest is read off the built encoder."""
    rows = [
        "| name | family | blocks | stride | maps | million parameters | checked | published weights | their license |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, spec in BACKBONES.items():
        with torch.device("meta"):
            backbone = build_backbone(name)
        millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        strides = ", ".join(map(str, dict.fromkeys(backbone.strides)))
        checked = "tests, real weights" if spec.loaded else "tests"
        weights = f"`{spec.weights}`" if spec.weights else "none: random"
        cells = (f"`{name}`", spec.title, spec.size.depth, strides, backbone.num_attention_maps, f"{millions:.1f}")
        rows.append(" | ".join(("", *map(str, cells), checked, weights, spec.license or "-", "")).strip())
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
