"""Plain vision transformers through transformers: DINOv2, with and without registers, DINOv3, ViT, DeiT, CLIP, SigLIP.

Computes feature maps of evenly spaced blocks and the raw attention of the last blocks, over patch tokens alone;
class, distillation and register tokens take part inside and are cut from what is returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from afa.errors import AfaError
from afa.model.attention import ATTENTION_NAME, Recorder
from afa.model.backbone import AttentionLayer, Backbone, BackboneOutput, join_attention
from afa.model.families import TOKEN_FAMILIES, TOKEN_SIZES
from afa.model.layers import speed_up
from afa.model.weights import Architecture, build_encoder
from afa.types import IMAGE_MEAN, IMAGE_STD

_MAX_GRIDS: Final = 32


# DINOv2 was rebuilt in the course of transformers 5; a run's weights have the newer names whatever is installed.
_NEW_NAMES: Final[Mapping[str, str]] = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


class TokenBackbone(Backbone):
    """A plain vision transformer with its raw attention.

    Images whose sides are no multiples of the patch are resized up to the next ones: the token grid then spans
    exactly the image, mirrored images give mirrored grids, and maps interpolated back to pixels lie where they
    belong. Padding would achieve none of these.

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
        AfaError: There are fewer blocks than asked for; weights as in `afa.model.weights.build_encoder`.
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
        shape = TOKEN_SIZES[size]
        counts = {"affinity_blocks": attention_blocks, "freeze_blocks": freeze_blocks, "feature_levels": feature_levels}
        for key, count in counts.items():
            if count > shape.depth:
                raise AfaError(f"model.{key} is {count}, but {size} has {shape.depth} blocks; use at most that many")
        self.shape = shape
        self.family = TOKEN_FAMILIES[shape.family]
        self.encoder = self._build(size, weights, drop_path)
        _prepare(self.encoder, self._blocks, drop_path)
        self.levels = tuple(shape.depth * (level + 1) // feature_levels for level in range(feature_levels))
        self.channels = (shape.width,) * feature_levels
        self.strides = (shape.patch,) * feature_levels
        self.num_attention_maps = shape.heads * attention_blocks
        self.attention_scale = (shape.width // shape.heads) ** -0.5
        self.min_size = shape.patch
        self.freeze_blocks = freeze_blocks
        self._first_recorded = shape.depth - attention_blocks
        tokens = [self._part(path) for path in (*self.family.placed_tokens, *self.family.unplaced_tokens)]
        self.num_prefix_tokens = sum(token.numel() // shape.width for token in tokens)
        recorded = [attention_of(block) for block in self._blocks[self._first_recorded :]]
        self._recorder = Recorder(recorded, self.num_prefix_tokens)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._positions_of: tuple[int, int] = (0, 0)
        self._rotation: dict[str, Any] = {}
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

    def _build(self, size: str, weights: str, drop_path: float) -> Any:
        return build_encoder(architecture(size, drop_path), weights)

    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch; see `Backbone.forward`."""
        grid, features = self._grid(image), list[Tensor]()
        with self._recorder.listen(attention) as taken:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_blocks):
                hidden = self._run(range(self.freeze_blocks), self._embed(image, grid), features, grid)
            self._run(range(self.freeze_blocks, self.shape.depth), hidden, features, grid)
        return BackboneOutput(tuple(features), join_attention(taken) if attention else None)

    def _run(self, blocks: range, hidden: Tensor, features: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Run blocks over (B, p + hw, D) tokens, and collect the feature levels that end in them."""
        for index in blocks:
            hidden = self._run_block(index, hidden)
            if index + 1 in self.levels:
                features.append(self._feature(index + 1, hidden, grid))
        return hidden

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) tokens of an image."""
        # Not -(-a // b), which ONNX rounds to the other side.
        patch = self.shape.patch
        return (image.shape[2] + patch - 1) // patch, (image.shape[3] + patch - 1) // patch

    def attention_layers(self) -> Sequence[AttentionLayer]:
        """One a block, over all patches; see `Backbone.attention_layers`."""
        return [AttentionLayer(attention_of(block), self.shape.heads, self.shape.patch) for block in self._blocks]

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
        # An exported program must work for every size, so it always resizes, even to the same size.
        if torch.compiler.is_compiling() or image.shape[2:] != size:
            image = nn.functional.interpolate(image, size=size, mode="bilinear", align_corners=False)  # (B, 3, H', W')
        if self.family.mean != IMAGE_MEAN:
            image = image * self.image_scale + self.image_shift
        width, family = self.shape.width, self.family
        patches = self._part(family.patch)(image).flatten(2).transpose(1, 2)  # (B, hw, D)
        if family.positions:
            patches = patches + self._patch_positions(grid)
        if family.rotary:
            self._rotation = {"position_embeddings": self._part(family.rotary)(image)}
        prefix = [self._part(path).view(1, -1, width) for path in family.placed_tokens]
        if prefix:
            placed = torch.cat(prefix, dim=1)  # (1, placed, D)
            prefix = [placed + self._part(family.positions).view(1, -1, width)[:, : placed.shape[1]]]
        prefix += [self._part(path).view(1, -1, width) for path in family.unplaced_tokens]
        tokens = [token.expand(image.shape[0], -1, -1) for token in prefix]
        hidden = torch.cat([*tokens, patches], dim=1)  # (B, p + hw, D)
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
        table = weights.view(1, -1, self.shape.width)[:, -side * side :]  # (1, side^2, D)
        if not torch.compiler.is_compiling() and grid == (side, side):
            return table
        resized = nn.functional.interpolate(
            table.transpose(1, 2).reshape(1, self.shape.width, side, side),
            size=grid,
            mode="bicubic",
            align_corners=False,
            antialias=self.family.antialias,
        )  # (1, D, h, w)
        return resized.flatten(2).transpose(1, 2)  # (1, hw, D)

    def _run_block(self, index: int, hidden: Tensor) -> Tensor:
        # CLIP and SigLIP demand an attention mask, some versions of DINOv2 take none.
        arguments = (None,) if self.shape.family in ("clip", "siglip") else ()
        result: Tensor = self._blocks[index](hidden, *arguments, **self._rotation)
        return result

    def _feature(self, level: int, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) feature map of the tokens after `level` blocks."""
        patches = hidden[:, self.num_prefix_tokens :]  # (B, hw, D)
        if level == self.shape.depth:
            patches = self._part(self.family.norm)(patches)
        else:
            patches = nn.functional.layer_norm(patches, (self.shape.width,))
        return patches.transpose(1, 2).reshape(patches.shape[0], self.shape.width, *grid)  # (B, D, h, w)


def architecture(name: str, drop_path: float, *, language: bool = False) -> Architecture:
    """What to build for an encoder of `TOKEN_SIZES`; with `language`, also what leads into the space of its texts."""
    shape = TOKEN_SIZES[name]
    family, size = TOKEN_FAMILIES[shape.family], shape.settings()
    own: dict[str, Any] = {} if "mlp_ratio" in family.settings else {"intermediate_size": 4 * shape.width}
    own |= {"drop_path_rate": drop_path} if shape.family.startswith("dino") else {}
    own |= {"projection_dim": shape.language} if shape.language and not family.pooled else {}
    own |= dict(family.settings) | ({"vision_use_head": True} if family.pooled and language else {})
    config = getattr(transformers, family.config)(**size, **own)
    config._attn_implementation = ATTENTION_NAME
    model = getattr(transformers, family.projected if language else family.model)
    return Architecture(name, family.title, model, config, sizes=tuple(size), options=family.options)


def _prepare(encoder: Any, blocks: Any, drop_path: float) -> None:
    """Make an encoder of transformers ready to learn here."""
    if getattr(encoder.embeddings, "mask_token", None) is not None:
        # Only its pretraining needs it; here it would be a parameter without a gradient.
        encoder.embeddings.mask_token = None
    speed_up(encoder)
    if hasattr(encoder.config, "drop_path_rate") and drop_path > 0:
        for index, block in enumerate(blocks):
            block.drop_path.drop_prob = drop_path * index / max(1, len(blocks) - 1)


def attention_of(block: nn.Module) -> nn.Module:
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
