"""Plain vision transformers through transformers: DINOv2, with and without registers, ViT, DeiT, CLIP and SigLIP.

Computes feature maps of evenly spaced blocks and the raw attention of the last blocks, over patch tokens alone;
class, distillation and register tokens take part inside and are cut from what is returned. The forward pass comes
in two halves, `frozen` and `trainable`, so that the first can be computed once and kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from afa.errors import AfaError
from afa.model.attention import attention_forward
from afa.model.backbone import Backbone, BackboneOutput, FrozenTokens, join_attention
from afa.model.layers import speed_up
from afa.model.weights import init_from_scratch, load_pretrained
from afa.types import IMAGE_MEAN, IMAGE_STD, RawAttention

TOKEN_ATTENTION: Final = "afa_tokens"
"""Name under which `token_attention` is registered with transformers."""

_RECORDER: Final = "afa_recorder"
_MAX_GRIDS: Final = 32


@dataclass(frozen=True)
class TokenFamily:
    """What the encoders of one family share, and where their parts are called what.

    Attributes:
        title: Name for people.
        model: Class of the encoder in transformers.
        config: Class of its configuration.
        patch: Path of the patch embedding, a convolution.
        positions: Path of the position embeddings.
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
        foreign: Starts of the keys of its checkpoints that the encoder here has no place for.
    """

    title: str
    model: Any
    config: Any
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
    foreign: tuple[str, ...] = ("classifier.", "pooler.", "embeddings.mask_token")


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
    """

    family: str
    width: int
    depth: int
    heads: int
    patch: int
    image_size: int


_DINO: Final[Mapping[str, Any]] = {
    "patch": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "blocks": "encoder.layer",
    "norm": "layernorm",
    "placed_tokens": ("embeddings.cls_token",),
    "foreign": ("classifier.", "embeddings.mask_token"),
}
_VIT: Final[Mapping[str, Any]] = {
    "patch": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "blocks": "layers",
    "norm": "layernorm",
    "options": {"add_pooling_layer": False},
    "foreign": ("classifier.", "cls_classifier.", "distillation_classifier.", "pooler.", "embeddings.mask_token"),
}
_CONTRASTIVE: Final[Mapping[str, Any]] = {
    "patch": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "blocks": "encoder.layers",
    "norm": "post_layernorm",
    "foreign": ("text_model.", "text_projection.", "visual_projection.", "logit_", "head.", "classifier."),
}

TOKEN_FAMILIES: Final[Mapping[str, TokenFamily]] = {
    "dinov2": TokenFamily(
        "DINOv2", Dinov2Model, Dinov2Config, settings={"use_mask_token": False, "mlp_ratio": 4}, **_DINO
    ),
    "dinov2_reg": TokenFamily(
        "DINOv2 with registers",
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        unplaced_tokens=("embeddings.register_tokens",),
        antialias=True,
        settings={"num_register_tokens": 4, "mlp_ratio": 4},
        **_DINO,
    ),
    "vit": TokenFamily(
        "ViT",
        ViTModel,
        ViTConfig,
        placed_tokens=("embeddings.cls_token",),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        **_VIT,
    ),
    "deit": TokenFamily(
        "distilled DeiT",
        DeiTModel,
        DeiTConfig,
        placed_tokens=("embeddings.cls_token", "embeddings.distillation_token"),
        **_VIT,
    ),
    "clip": TokenFamily(
        "CLIP vision",
        CLIPVisionModel,
        CLIPVisionConfig,
        placed_tokens=("embeddings.class_embedding",),
        first_norm="pre_layrnorm",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        **_CONTRASTIVE,
    ),
    "siglip": TokenFamily(
        "SigLIP vision",
        SiglipVisionModel,
        SiglipVisionConfig,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        settings={"vision_use_head": False},
        **_CONTRASTIVE,
    ),
}
"""The families. CLIP norms only its class token at the end; here that layer norms the patch tokens too."""

TOKEN_SIZES: Final[Mapping[str, TokenSize]] = {
    "dinov2_tiny": TokenSize("dinov2", 64, 4, 4, 8, 64),
    "dinov2_small": TokenSize("dinov2", 384, 12, 6, 14, 518),
    "dinov2_base": TokenSize("dinov2", 768, 12, 12, 14, 518),
    "dinov2_large": TokenSize("dinov2", 1024, 24, 16, 14, 518),
    "dinov2_tiny_reg": TokenSize("dinov2_reg", 64, 4, 4, 8, 64),
    "dinov2_small_reg": TokenSize("dinov2_reg", 384, 12, 6, 14, 518),
    "dinov2_base_reg": TokenSize("dinov2_reg", 768, 12, 12, 14, 518),
    "dinov2_large_reg": TokenSize("dinov2_reg", 1024, 24, 16, 14, 518),
    "vit_mini": TokenSize("vit", 64, 4, 4, 8, 64),
    "vit_small": TokenSize("vit", 384, 12, 6, 16, 224),
    "vit_base": TokenSize("vit", 768, 12, 12, 16, 224),
    "vit_large": TokenSize("vit", 1024, 24, 16, 16, 224),
    "deit_mini": TokenSize("deit", 64, 4, 4, 8, 64),
    "deit_tiny": TokenSize("deit", 192, 12, 3, 16, 224),
    "deit_small": TokenSize("deit", 384, 12, 6, 16, 224),
    "deit_base": TokenSize("deit", 768, 12, 12, 16, 224),
    "clip_mini": TokenSize("clip", 64, 4, 4, 8, 64),
    "clip_b16": TokenSize("clip", 768, 12, 12, 16, 224),
    "clip_b32": TokenSize("clip", 768, 12, 12, 32, 224),
    "clip_l14": TokenSize("clip", 1024, 24, 16, 14, 224),
    "siglip_mini": TokenSize("siglip", 64, 4, 4, 8, 64),
    "siglip_b16": TokenSize("siglip", 768, 12, 12, 16, 224),
}
"""The published sizes, and small ones of ours for tests and generated data: *_mini, as ViT and DeiT have a tiny of
their own, and dinov2_tiny, dinov2_tiny_reg."""

# DINOv2 was rebuilt in the course of transformers 5; a run's weights have the newer names whatever is installed.
_NEW_NAMES: Final[Mapping[str, str]] = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


class _Recorder:
    """Where the attention modules of one backbone leave the patch tokens' queries and keys, if it is a list."""

    def __init__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.taken: list[RawAttention] | None = None
        self.suffices = False


class _Enough(Exception):  # noqa: N818  (no error)
    """Ends a block once its queries and keys are known, where nothing else of it is wanted."""


class TokenBackbone(Backbone):
    """A plain vision transformer with its raw attention.

    Images whose sides are no multiples of the patch are resized up to the next ones: the token grid then spans
    exactly the image, mirrored images give mirrored grids, and maps interpolated back to pixels lie where they
    belong; padding would do none of these.

    Args:
        size: Name in `TOKEN_SIZES`.
        weights: Local folder or hub id in transformers' layout, or empty for random weights.
        drop_path: Stochastic depth of the last block, linear over depth; DINOv2 only, the others have none.
        attention_blocks: Number of blocks, counted from the end, whose Q K^T is returned.
        freeze_blocks: k; patch and position embeddings and the first k blocks are frozen, and with all of them the
            final norm. 0 freezes nothing.
        feature_levels: Number of feature maps, of evenly spaced blocks. The last one is the encoder's normed
            output; the others are normed per token without weights, as the scale of tokens varies over depth.

    Raises:
        AfaError: The size is unknown; it has fewer blocks than asked for; weights as in `load_pretrained`.
    """

    def __init__(
        self,
        size: str,
        weights: str = "",
        *,
        drop_path: float = 0.1,
        attention_blocks: int = 2,
        freeze_blocks: int = 0,
        feature_levels: int = 4,
    ) -> None:
        super().__init__()
        if size not in TOKEN_SIZES:
            raise AfaError(f"model.backbone is {size!r}; use one of {', '.join(TOKEN_SIZES)}")
        shape = TOKEN_SIZES[size]
        counts = {"affinity_blocks": attention_blocks, "freeze_blocks": freeze_blocks, "feature_levels": feature_levels}
        for key, count in counts.items():
            if count > shape.depth:
                raise AfaError(f"model.{key} is {count}, but {size} has {shape.depth} blocks; use at most that many")
        self.shape = shape
        self.family = TOKEN_FAMILIES[shape.family]
        self.encoder = _build_encoder(size, weights, drop_path)
        self.levels = tuple(shape.depth * (level + 1) // feature_levels for level in range(feature_levels))
        self.channels = (shape.width,) * feature_levels
        self.strides = (shape.patch,) * feature_levels
        self.num_attention_maps = shape.heads * attention_blocks
        self.attention_scale = (shape.width // shape.heads) ** -0.5
        self.min_size = shape.patch
        self.freeze_blocks = freeze_blocks
        self._first_recorded = shape.depth - attention_blocks
        tokens = [self._part(path) for path in (*self.family.placed_tokens, *self.family.unplaced_tokens)]
        self._num_prefix_tokens = sum(token.numel() // shape.width for token in tokens)
        self._recorder = _Recorder(self._num_prefix_tokens)
        for block in self._blocks[self._first_recorded :]:
            setattr(_attention_of(block), _RECORDER, self._recorder)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._positions_of: tuple[int, int] = (0, 0)
        # From ImageNet's normalization to the family's: image * scale + shift.
        self.image_scale: Tensor
        self.image_shift: Tensor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.family.mean, self.family.std))
        ours = [torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD)]
        self.register_buffer("image_scale", ours[1] / std, persistent=False)
        self.register_buffer("image_shift", (ours[0] - mean) / std, persistent=False)
        if any(old in name for name, _ in self.encoder.named_parameters() for old in _NEW_NAMES):
            self.register_state_dict_post_hook(_rename_saved)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_rename_loaded)  # type: ignore[no-untyped-call]
        self.freeze()

    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch; see `Backbone.forward`."""
        return self.trainable(self.frozen(image), attention=attention)

    def frozen(self, image: Tensor) -> FrozenTokens:
        """Run the frozen part, without gradient; with nothing frozen this is the embedding alone, with gradient.

        Args:
            image: (B, 3, H, W) normalized image, H and W at least `min_size`.

        Returns:
            All that `trainable` needs of the images.
        """
        # Not -(-a // b), which ONNX rounds to the other side.
        patch = self.shape.patch
        grid = ((image.shape[2] + patch - 1) // patch, (image.shape[3] + patch - 1) // patch)
        features: list[Tensor] = []
        attention_tokens: Tensor | None = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_blocks):
            hidden = self._embed(image, grid)
            for index in range(self.freeze_blocks):
                if index == self._first_recorded:
                    attention_tokens = hidden
                hidden = self._run_block(index, hidden)
                if index + 1 in self.levels and index + 1 < self.freeze_blocks:
                    features.append(self._feature(index + 1, hidden, grid))
        return FrozenTokens(hidden, tuple(features), grid, attention_tokens)

    def trainable(self, frozen: FrozenTokens, *, attention: bool = False) -> BackboneOutput:
        """Run what follows the frozen part.

        Args:
            frozen: Result of `frozen`, in any floating-point type. Where blocks whose attention is wanted are frozen,
                they are run once more from its `attention_tokens`, the last of them up to its attention.
            attention: Also return the raw attention of the last blocks.

        Returns:
            As `forward` on the images.
        """
        dtype = self._part(self.family.positions).dtype
        hidden = frozen.tokens.to(dtype)
        features = [feature.to(dtype) for feature in frozen.features]
        with self._record(attention) as taken:
            if attention and frozen.attention_tokens is not None:
                with torch.no_grad():
                    again = frozen.attention_tokens.to(dtype)
                    for index in range(self._first_recorded, self.freeze_blocks - 1):
                        again = self._run_block(index, again)
                    self._recorder.suffices = True
                    with contextlib.suppress(_Enough):
                        self._run_block(self.freeze_blocks - 1, again)
                    self._recorder.suffices = False
            if self.freeze_blocks in self.levels:
                features.append(self._feature(self.freeze_blocks, hidden, frozen.grid))
            for index in range(self.freeze_blocks, self.shape.depth):
                hidden = self._run_block(index, hidden)
                if index + 1 in self.levels:
                    features.append(self._feature(index + 1, hidden, frozen.grid))
        return BackboneOutput(tuple(features), join_attention(taken) if attention else None)

    def frozen_modules(self) -> Sequence[nn.Module]:
        """Embeddings, the first blocks, and after the last block the final norm."""
        if not self.freeze_blocks:
            return ()
        first_norm = [self._part(self.family.first_norm)] if self.family.first_norm else []
        final_norm = [self._part(self.family.norm)] if self.freeze_blocks == self.shape.depth else []
        return [self.encoder.embeddings, *first_norm, *self._blocks[: self.freeze_blocks], *final_norm]

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self._part(self.family.blocks)
        return blocks

    def _part(self, path: str) -> Any:
        return attrgetter(path)(self.encoder)

    def _embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        size = (grid[0] * self.shape.patch, grid[1] * self.shape.patch)
        # An exported program must hold for every size, so that it always resizes, be it to the same size.
        if torch.compiler.is_compiling() or image.shape[2:] != size:
            image = nn.functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
        if self.family.mean != IMAGE_MEAN:
            image = image * self.image_scale + self.image_shift
        width, family = self.shape.width, self.family
        patches = self._part(family.patch)(image).flatten(2).transpose(1, 2) + self._patch_positions(grid)
        prefix = [self._part(path).view(1, -1, width) for path in family.placed_tokens]
        if prefix:
            placed = torch.cat(prefix, dim=1)
            prefix = [placed + self._part(family.positions).view(1, -1, width)[:, : placed.shape[1]]]
        prefix += [self._part(path).view(1, -1, width) for path in family.unplaced_tokens]
        hidden = torch.cat([*(token.expand(image.shape[0], -1, -1) for token in prefix), patches], dim=1)
        if family.first_norm:
            hidden = self._part(family.first_norm)(hidden)
        return hidden

    def _patch_positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, hw, D) position embeddings of a grid; kept for the next time where they cannot learn."""
        weights: Tensor = self._part(self.family.positions)
        if weights.requires_grad or weights.is_inference() or torch.compiler.is_compiling():
            return self._interpolate_positions(weights, grid)
        # Both change when other values are loaded, copied in or moved to another device.
        identity = (weights.data_ptr(), weights._version)
        if identity != self._positions_of:
            self._positions, self._positions_of = {}, identity
        if grid not in self._positions:
            if len(self._positions) == _MAX_GRIDS:
                del self._positions[next(iter(self._positions))]
            self._positions[grid] = self._interpolate_positions(weights, grid)
        return self._positions[grid]

    def _interpolate_positions(self, weights: Tensor, grid: tuple[int, int]) -> Tensor:
        side = self.shape.image_size // self.shape.patch
        table = weights.view(1, -1, self.shape.width)[:, -side * side :]
        if not torch.compiler.is_compiling() and grid == (side, side):
            return table
        resized = nn.functional.interpolate(
            table.transpose(1, 2).reshape(1, self.shape.width, side, side),
            size=grid,
            mode="bicubic",
            align_corners=False,
            antialias=self.family.antialias,
        )
        return resized.flatten(2).transpose(1, 2)

    def _run_block(self, index: int, hidden: Tensor) -> Tensor:
        # CLIP and SigLIP demand an attention mask, some versions of DINOv2 take none.
        arguments = (None,) if self.shape.family in ("clip", "siglip") else ()
        result: Tensor = self._blocks[index](hidden, *arguments)
        return result

    def _feature(self, level: int, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) feature map of the tokens after `level` blocks."""
        patches = hidden[:, self._num_prefix_tokens :]
        if level == self.shape.depth:
            patches = self._part(self.family.norm)(patches)
        else:
            patches = nn.functional.layer_norm(patches, (self.shape.width,))
        return patches.transpose(1, 2).reshape(patches.shape[0], self.shape.width, *grid)

    @contextlib.contextmanager
    def _record(self, attention: bool) -> Iterator[list[RawAttention]]:
        """A list that receives Q K^T of the last blocks as they run, if asked for."""
        taken: list[RawAttention] = []
        self._recorder.taken = taken if attention else None
        try:
            yield taken
        finally:
            self._recorder.taken = None
            self._recorder.suffices = False


def token_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Fused attention that leaves Q K^T of the patch tokens with the module's recorder, if it has one that listens.

    Not every encoder hands keywords down to its attention function, so that the sink of `attention_forward` would not
    arrive; and class and register tokens are left out before the product, not after it.

    Args:
        module: Attention module that calls.
        query: (B, heads, N, d).
        key: (B, heads, N, d).
        value: (B, heads, N, d).
        attention_mask: Additive mask, or None.
        settings: As for `attention_forward`.

    Returns:
        (B, N, heads, d) and None, as transformers expects.
    """
    recorder: _Recorder | None = getattr(module, _RECORDER, None)
    if recorder is not None and recorder.taken is not None:
        first = recorder.num_prefix_tokens
        recorder.taken.append(RawAttention(query[:, :, first:], key[:, :, first:]))
        if recorder.suffices:
            raise _Enough
    return attention_forward(module, query, key, value, attention_mask, **settings)


def _build_encoder(name: str, weights: str, drop_path: float) -> Any:
    size = TOKEN_SIZES[name]
    family = TOKEN_FAMILIES[size.family]
    settings = dict(family.settings)
    if family.model in (Dinov2Model, Dinov2WithRegistersModel):
        settings["drop_path_rate"] = drop_path
    else:
        settings["intermediate_size"] = 4 * size.width
    config = family.config(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        patch_size=size.patch,
        image_size=size.image_size,
        **settings,
    )
    config._attn_implementation = TOKEN_ATTENTION
    if weights:
        encoder = load_pretrained(
            family.model,
            config,
            weights,
            architecture=name,
            family=family.title,
            wanted=f"{family.title} encoder",
            sizes=("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
            foreign=family.foreign,
            options=family.options,
        )
    else:
        encoder = family.model(config, **family.options)
        init_from_scratch(encoder)
    if getattr(encoder.embeddings, "mask_token", None) is not None:
        # Only its pretraining needs it; here it would be a parameter without a gradient.
        encoder.embeddings.mask_token = None
    speed_up(encoder)
    if "drop_path_rate" in settings and drop_path > 0:
        for index, block in enumerate(encoder.encoder.layer):
            block.drop_path.drop_prob = drop_path * index / max(1, size.depth - 1)
    return encoder


def _attention_of(block: nn.Module) -> nn.Module:
    """The module of a block that calls the attention function; every one of transformers' has `is_causal`."""
    return next(part for part in block.modules() if hasattr(part, "is_causal"))


def _rename(state: dict[str, Any], names: Mapping[str, str], prefix: str) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        for old, new in names.items():
            if old in key:
                state[key.replace(old, new)] = state.pop(key)


def _rename_saved(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state, _NEW_NAMES, prefix)


def _rename_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, {new: old for old, new in _NEW_NAMES.items()}, prefix)


AttentionInterface.register(TOKEN_ATTENTION, token_attention)
