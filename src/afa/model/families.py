"""The families of encoders and their sizes, as tables: what `afa.model.mit` and `afa.model.vit` have to know of each.

A further family is a row of `TOKEN_FAMILIES`, a further encoder a row of `TOKEN_SIZES`. The tables name classes of
transformers, so that reading them does not import it, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from afa.types import IMAGE_MEAN, IMAGE_STD


@dataclass(frozen=True)
class MitSize:
    """Channels, blocks and heads of the four stages; hub id of published weights, if there are any."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    weights: str = ""

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    def settings(self) -> dict[str, Any]:
        """The fields of transformers' configuration that say this."""
        heads = list(self.heads)
        return {"hidden_sizes": list(self.channels), "depths": list(self.depths), "num_attention_heads": heads}


MIT_SIZES: Final[Mapping[str, MitSize]] = {
    "mit_tiny": MitSize((16, 32, 64, 128), (1, 1, 1, 2), (1, 2, 4, 8)),
    "mit_b0": MitSize((32, 64, 160, 256), (2, 2, 2, 2), weights="nvidia/mit-b0"),
    "mit_b1": MitSize((64, 128, 320, 512), (2, 2, 2, 2), weights="nvidia/mit-b1"),
    "mit_b2": MitSize((64, 128, 320, 512), (3, 4, 6, 3), weights="nvidia/mit-b2"),
    "mit_b3": MitSize((64, 128, 320, 512), (3, 4, 18, 3), weights="nvidia/mit-b3"),
    "mit_b4": MitSize((64, 128, 320, 512), (3, 8, 27, 3), weights="nvidia/mit-b4"),
    "mit_b5": MitSize((64, 128, 320, 512), (3, 6, 40, 3), weights="nvidia/mit-b5"),
}
"""MiT-B0..B5 of the paper, and a tiny one of ours for generated data."""


@dataclass(frozen=True)
class TokenFamily:
    """What the encoders of one family share, and the names of their parts.

    Attributes:
        title: Display name.
        model: Name of the encoder's class in transformers.
        config: Name of its configuration's class.
        patch: Path of the patch embedding, a convolution.
        positions: Path of the position embeddings; empty where blocks rotate queries and keys instead.
        blocks: Path of the list of blocks.
        norm: Path of the final norm layer.
        placed_tokens: Paths of the tokens before the patches that have a position embedding.
        unplaced_tokens: Paths of the tokens before the patches that have none.
        first_norm: Path of the norm layer before the first block; empty if there is none.
        mean: Mean per RGB channel that the weights expect images to be normalized with.
        std: Standard deviation, likewise.
        antialias: Whether the family smooths its position embeddings before it shrinks them.
        settings: Fixed fields of the configuration.
        options: Further arguments of the model class.
        license: License of the published weights, as their publishers state it.
        projected: Name of the class that also leads into the space of the text encoder; empty if there is none.
        text: Name of the text encoder's class.
        rotary: Path of the module that says how blocks rotate queries and keys; empty if they do not.
        pooled: A pooling head leads into the space of the text encoder, not a projection of the class token; texts are
            lower case, and padded to the full length without a mask.
    """

    title: str
    model: str
    config: str
    patch: str
    positions: str
    blocks: str
    norm: str
    placed_tokens: tuple[str, ...] = ()
    unplaced_tokens: tuple[str, ...] = ()
    first_norm: str = ""
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    antialias: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    license: str = "Apache-2.0"
    projected: str = ""
    text: str = ""
    rotary: str = ""
    pooled: bool = False


@dataclass(frozen=True)
class TokenSize:
    """Size of one encoder.

    Attributes:
        family: Key in `TOKEN_FAMILIES`.
        width: D, channels of a token.
        depth: Number of blocks.
        heads: Attention heads of a block.
        patch: Side of a patch, pixels.
        image_size: Side of the image that the position embeddings were made for, pixels.
        weights: Hub id of published weights; empty for the small ones of ours, which have none.
        language: Width of the space that images and texts share; 0 for an encoder without text encoder.
    """

    family: str
    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    weights: str = ""
    language: int = 0

    def settings(self) -> dict[str, Any]:
        """The fields of transformers' configuration that say this."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "patch_size": self.patch,
            "image_size": self.image_size,
        }


_DINO: Final[Mapping[str, Any]] = {
    "patch": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "blocks": "encoder.layer",
    "norm": "layernorm",
    "placed_tokens": ("embeddings.cls_token",),
}
_VIT: Final[Mapping[str, Any]] = {
    "patch": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "blocks": "layers",
    "norm": "layernorm",
    "options": {"add_pooling_layer": False},
}
_CONTRASTIVE: Final[Mapping[str, Any]] = {
    "patch": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "blocks": "encoder.layers",
    "norm": "post_layernorm",
}

TOKEN_FAMILIES: Final[Mapping[str, TokenFamily]] = {
    "dinov2": TokenFamily(
        "DINOv2", "Dinov2Model", "Dinov2Config", settings={"use_mask_token": False, "mlp_ratio": 4}, **_DINO
    ),
    "dinov2_reg": TokenFamily(
        "DINOv2 with registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        unplaced_tokens=("embeddings.register_tokens",),
        antialias=True,
        settings={"num_register_tokens": 4, "mlp_ratio": 4},
        **_DINO,
    ),
    "dinov3": TokenFamily(
        "DINOv3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        patch="embeddings.patch_embeddings",
        positions="",
        blocks="model.layer",
        norm="norm",
        unplaced_tokens=("embeddings.cls_token", "embeddings.register_tokens"),
        settings={"num_register_tokens": 4, "pos_embed_rescale": None},
        license="DINOv3 License",
        rotary="rope_embeddings",
    ),
    "vit": TokenFamily(
        "ViT",
        "ViTModel",
        "ViTConfig",
        placed_tokens=("embeddings.cls_token",),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        **_VIT,
    ),
    "deit": TokenFamily(
        "distilled DeiT",
        "DeiTModel",
        "DeiTConfig",
        placed_tokens=("embeddings.cls_token", "embeddings.distillation_token"),
        **_VIT,
    ),
    "clip": TokenFamily(
        "CLIP vision",
        "CLIPVisionModel",
        "CLIPVisionConfig",
        placed_tokens=("embeddings.class_embedding",),
        first_norm="pre_layrnorm",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        license="MIT",
        projected="CLIPVisionModelWithProjection",
        text="CLIPTextModelWithProjection",
        **_CONTRASTIVE,
    ),
    "siglip": TokenFamily(
        "SigLIP vision",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        settings={"vision_use_head": False},
        projected="SiglipVisionModel",
        text="SiglipTextModel",
        pooled=True,
        **_CONTRASTIVE,
    ),
}
"""The families. CLIP norms only its class token at the end; here that layer norms the patch tokens too."""

TOKEN_SIZES: Final[Mapping[str, TokenSize]] = {
    "dinov2_tiny": TokenSize("dinov2", 64, 4, 4, 8, 64),
    "dinov2_small": TokenSize("dinov2", 384, 12, 6, 14, 518, "facebook/dinov2-small"),
    "dinov2_base": TokenSize("dinov2", 768, 12, 12, 14, 518, "facebook/dinov2-base"),
    "dinov2_large": TokenSize("dinov2", 1024, 24, 16, 14, 518, "facebook/dinov2-large"),
    "dinov2_tiny_reg": TokenSize("dinov2_reg", 64, 4, 4, 8, 64),
    "dinov2_small_reg": TokenSize("dinov2_reg", 384, 12, 6, 14, 518, "facebook/dinov2-with-registers-small"),
    "dinov2_base_reg": TokenSize("dinov2_reg", 768, 12, 12, 14, 518, "facebook/dinov2-with-registers-base"),
    "dinov2_large_reg": TokenSize("dinov2_reg", 1024, 24, 16, 14, 518, "facebook/dinov2-with-registers-large"),
    "dinov3_mini": TokenSize("dinov3", 64, 4, 4, 8, 64),
    "dinov3_small": TokenSize("dinov3", 384, 12, 6, 16, 224, "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "dinov3_base": TokenSize("dinov3", 768, 12, 12, 16, 224, "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "dinov3_large": TokenSize("dinov3", 1024, 24, 16, 16, 224, "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    "vit_mini": TokenSize("vit", 64, 4, 4, 8, 64),
    "vit_small": TokenSize("vit", 384, 12, 6, 16, 224, "WinKawaks/vit-small-patch16-224"),
    "vit_base": TokenSize("vit", 768, 12, 12, 16, 224, "google/vit-base-patch16-224"),
    "vit_large": TokenSize("vit", 1024, 24, 16, 16, 224, "google/vit-large-patch16-224"),
    "deit_mini": TokenSize("deit", 64, 4, 4, 8, 64),
    "deit_tiny": TokenSize("deit", 192, 12, 3, 16, 224, "facebook/deit-tiny-distilled-patch16-224"),
    "deit_small": TokenSize("deit", 384, 12, 6, 16, 224, "facebook/deit-small-distilled-patch16-224"),
    "deit_base": TokenSize("deit", 768, 12, 12, 16, 224, "facebook/deit-base-distilled-patch16-224"),
    "clip_mini": TokenSize("clip", 64, 4, 4, 8, 64, language=32),
    "clip_b16": TokenSize("clip", 768, 12, 12, 16, 224, "openai/clip-vit-base-patch16", 512),
    "clip_b32": TokenSize("clip", 768, 12, 12, 32, 224, "openai/clip-vit-base-patch32", 512),
    "clip_l14": TokenSize("clip", 1024, 24, 16, 14, 224, "openai/clip-vit-large-patch14", 768),
    "siglip_mini": TokenSize("siglip", 64, 4, 4, 8, 64, language=64),
    "siglip_b16": TokenSize("siglip", 768, 12, 12, 16, 224, "google/siglip-base-patch16-224", 768),
    "siglip2_b16": TokenSize("siglip", 768, 12, 12, 16, 224, "google/siglip2-base-patch16-224", 768),
}
"""The published sizes, and small ones of ours for tests and generated data: *_mini, as ViT and DeiT have a tiny of
their own, and dinov2_tiny, dinov2_tiny_reg."""
