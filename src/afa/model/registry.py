"""Every encoder by name, and the table of them: `python -m afa.model.registry` prints what docs/backbones.md shows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from afa.errors import AfaError
from afa.model.backbone import Backbone
from afa.model.mit import MIT_SIZES, MitSize, MixTransformer
from afa.model.vit import TOKEN_FAMILIES, TOKEN_SIZES, TokenBackbone, TokenSize
from afa.types import IMAGE_MEAN, IMAGE_STD

_MIT_LICENSE: Final = "NVIDIA, non-commercial"
_MIT_LEVELS: Final = 4


@dataclass(frozen=True)
class BackboneSpec:
    """What is known of an encoder before it is built.

    Attributes:
        kind: `mit`, or a key of `TOKEN_FAMILIES`.
        title: Family of encoders, for people.
        size: Widths, depths and heads; for plain transformers patch size and native image size too.
        weights: Hub id of published weights; empty for the small ones of ours, which have none.
        license: License of those weights, as their publishers state it.
        mean: Mean per RGB channel that the weights expect. The encoder takes ImageNet's and converts.
        std: Standard deviation, likewise.
        loaded: Whether trained weights of this architecture have been loaded and compared by a test.
    """

    kind: str
    title: str
    size: MitSize | TokenSize
    weights: str
    license: str
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    loaded: bool = False


# Hub id and license of the published weights.
_WEIGHTS: Final[Mapping[str, tuple[str, str]]] = {
    **{f"mit_b{i}": (f"nvidia/mit-b{i}", _MIT_LICENSE) for i in range(6)},
    **{f"dinov2_{size}": (f"facebook/dinov2-{size}", "Apache-2.0") for size in ("small", "base", "large")},
    **{
        f"dinov2_{size}_reg": (f"facebook/dinov2-with-registers-{size}", "Apache-2.0")
        for size in ("small", "base", "large")
    },
    "vit_small": ("WinKawaks/vit-small-patch16-224", "Apache-2.0"),
    "vit_base": ("google/vit-base-patch16-224", "Apache-2.0"),
    "vit_large": ("google/vit-large-patch16-224", "Apache-2.0"),
    **{
        f"deit_{size}": (f"facebook/deit-{size}-distilled-patch16-224", "Apache-2.0")
        for size in ("tiny", "small", "base")
    },
    "clip_b16": ("openai/clip-vit-base-patch16", "MIT"),
    "clip_b32": ("openai/clip-vit-base-patch32", "MIT"),
    "clip_l14": ("openai/clip-vit-large-patch14", "MIT"),
    "siglip_b16": ("google/siglip-base-patch16-224", "Apache-2.0"),
}
_LOADED: Final = ("mit_b0", "dinov2_small_reg")


def _token_spec(name: str, size: TokenSize) -> BackboneSpec:
    family = TOKEN_FAMILIES[size.family]
    weights, license_ = _WEIGHTS.get(name, ("", ""))
    return BackboneSpec(size.family, family.title, size, weights, license_, family.mean, family.std, name in _LOADED)


BACKBONES: Final[Mapping[str, BackboneSpec]] = {
    **{
        name: BackboneSpec("mit", "SegFormer's MiT", size, *_WEIGHTS.get(name, ("", "")), loaded=name in _LOADED)
        for name, size in MIT_SIZES.items()
    },
    **{name: _token_spec(name, size) for name, size in TOKEN_SIZES.items()},
}
"""Every encoder that `model.backbone` can name."""


def build_backbone(
    name: str,
    weights: str = "",
    *,
    drop_path: float = 0.1,
    attention_blocks: int = 2,
    freeze_blocks: int = 0,
    feature_levels: int = 4,
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

    Raises:
        AfaError: Unknown name; more blocks or levels asked for than there are; weights that are absent, unreadable
            or of another architecture; a hub that cannot be reached.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.5)
        raise AfaError(f"model.backbone is {name!r}; use " + (f"{' or '.join(near)}" if near else ", ".join(BACKBONES)))
    if BACKBONES[name].kind != "mit":
        return TokenBackbone(
            name,
            weights,
            drop_path=drop_path,
            attention_blocks=attention_blocks,
            freeze_blocks=freeze_blocks,
            feature_levels=feature_levels,
        )
    if feature_levels != _MIT_LEVELS:
        raise AfaError(
            f"model.feature_levels is {feature_levels}, but {name} has its {_MIT_LEVELS} stages; leave it at that"
        )
    return MixTransformer(
        name, weights, drop_path=drop_path, attention_blocks=attention_blocks, freeze_blocks=freeze_blocks
    )


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
        depth = sum(spec.size.depths) if isinstance(spec.size, MitSize) else spec.size.depth
        checked = "tests, real weights" if spec.loaded else "tests"
        weights = f"`{spec.weights}`" if spec.weights else "none: random"
        rows.append(
            f"| `{name}` | {spec.title} | {depth} | {strides} | {backbone.num_attention_maps} | {millions:.1f} "
            f"| {checked} | {weights} | {spec.license or '-'} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
