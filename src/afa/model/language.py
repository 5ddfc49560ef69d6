"""Image encoders that were trained together with a text encoder: feature maps in which words can be looked up.

`LanguageBackbone` computes such a map, `TextClassifier` compares it with the vectors of class names and of background
words. Nothing here learns: together they give class scores, and so CAMs, without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from afa.errors import AfaError
from afa.model.attention import Agreement
from afa.model.backbone import BackboneOutput, join_attention
from afa.model.families import TOKEN_SIZES
from afa.model.vit import TokenBackbone, architecture, attention_of
from afa.model.weights import build_encoder
from afa.types import RawAttention

_AGREEING_BLOCKS: Final = 7
"""How many blocks before the last one say which tokens belong together. The attention of earlier ones is local, that
of the last one looks for what the class token needs."""


class LanguageBackbone(TokenBackbone):
    """An encoder of image-text pairs, such as CLIP's, whose last feature map lies in the space of the text encoder.

    The last block of CLIP gathers for its class token what the whole image shows; its patch tokens are of little use.
    So its values are gathered otherwise here, in two ways whose mean is the map: by the similarity of queries to
    queries and of keys to keys in that block, and by the agreement, the mean attention of the seven blocks before it.
    Residual and MLP of the block are left out.

    SigLIP has no class token: a head attends to all tokens after the last block. What this head makes of the value of a
    token alone, and of the values gathered by the agreement, are the two ways there; its query is not needed. SigLIP's
    own factor and bias of the cosines are not used: the bias would cancel between words, `sharpness` is the factor.

    The other levels lie in the second half of the encoder; `BackboneOutput.attention` is that of the blocks that
    follow these levels, computed from the levels alone: whoever keeps the levels needs no more.

    Args:
        size: Name in `TOKEN_SIZES` of an encoder with a text encoder.
        weights: As `TokenBackbone`.
        attention_blocks: Number of levels, counted from the end, whose following blocks give their Q K^T.
        freeze_blocks: As `TokenBackbone`.
        feature_levels: Number of feature maps, the one in the space of the text encoder among them; 3 or more.

    Raises:
        AfaError: Too few levels; as `TokenBackbone`.

    Source:
        Similarity of queries and of keys: Wang et al. 2024 (SCLIP), Li et al. 2023 (CLIP Surgery). Agreement:
        Lin et al. 2023 (CLIP-ES), who refine class maps by the mean attention of the last eight blocks.
    """

    def __init__(
        self,
        size: str,
        weights: str = "",
        *,
        attention_blocks: int = 2,
        freeze_blocks: int = 0,
        feature_levels: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        shape = TOKEN_SIZES[size]
        if feature_levels < 3:
            raise AfaError(f"model.feature_levels is {feature_levels}; with model.classifier = text use 3 or more")
        if attention_blocks > feature_levels - 2:
            raise AfaError(
                f"model.affinity_blocks is {attention_blocks}, but model.feature_levels {feature_levels} has "
                f"{feature_levels - 2} levels that a block follows; use at most that many"
            )
        super().__init__(
            size,
            weights,
            drop_path=drop_path,
            attention_blocks=attention_blocks,
            freeze_blocks=freeze_blocks,
            feature_levels=feature_levels,
        )
        last, steps = shape.depth - 1, feature_levels - 2
        self.levels = tuple(shape.depth - shape.depth // 2 * step // steps for step in range(feature_levels - 1))[::-1]
        self.channels = (*(shape.width,) * (feature_levels - 1), shape.language)
        self._attending = self.levels[:-1][-attention_blocks:]
        modules = [attention_of(block) for block in self._blocks[max(0, last - _AGREEING_BLOCKS) : last]]
        self._agreement = Agreement(modules, self.num_prefix_tokens)

    def _build(self, size: str, weights: str, drop_path: float) -> Any:
        """The image encoder; what leads from it into the space of the text encoder becomes `self.projection`."""
        whole = build_encoder(architecture(size, drop_path, language=True), weights)
        if self.family.pooled:
            self.projection = whole.head
            # The query of the pooling, which here would be a parameter without a gradient.
            del whole.head, self.projection.probe
            return whole
        self.projection = whole.visual_projection
        return whole.vision_model

    def frozen_modules(self) -> Sequence[nn.Module]:
        """As `TokenBackbone`, and the projection: the words keep their places."""
        frozen = super().frozen_modules()
        return [*frozen, self.projection] if frozen else ()

    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch; see `Backbone.forward`. The last level has mean vectors of two of unit length."""
        grid, features = self._grid(image), list[Tensor]()
        last = self.shape.depth - 1
        learns = torch.is_grad_enabled()
        with self._agreement.listen():
            with torch.set_grad_enabled(learns and not self.freeze_blocks):
                hidden = self._run(range(min(self.freeze_blocks, last)), self._embed(image, grid), features, grid)
            hidden = self._run(range(min(self.freeze_blocks, last), last), hidden, features, grid)
        with torch.set_grad_enabled(learns and self.freeze_blocks <= last):
            whole = self._run(range(last, last + 1), hidden, features, grid)
            agreement = self._agreement.mean()  # (B, hw, hw)
            language = self._pooled(whole, agreement) if self.family.pooled else self._projected(hidden, agreement)
        features.append(_as_map(language, grid))  # (B, E, h, w)
        return BackboneOutput(tuple(features), self.attention_of_levels(features) if attention else None, agreement)

    def attention_of_levels(self, features: Sequence[Tensor]) -> RawAttention:
        """Queries and keys of the blocks that follow the last levels; see `Backbone.attention_of_levels`."""
        blocks = []
        for level, feature in zip(self.levels, features, strict=False):
            if level in self._attending:
                block: Any = self._blocks[level]
                norm = block.layer_norm1
                # The feature is normed already, without the weights.
                tokens = feature.flatten(2).transpose(1, 2).to(norm.weight.dtype) * norm.weight + norm.bias
                query, key = (self._heads(part(tokens)) for part in (block.self_attn.q_proj, block.self_attn.k_proj))
                blocks.append(RawAttention(query, key))  # (B, heads, hw, d)
        return join_attention(blocks)

    def _feature(self, level: int, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) tokens after `level` blocks, normed without weights."""
        patches = nn.functional.layer_norm(hidden[:, self.num_prefix_tokens :], (self.shape.width,))  # (B, hw, D)
        return _as_map(patches, grid)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, d)."""
        return tokens.view(*tokens.shape[:2], self.shape.heads, -1).transpose(1, 2)

    def _projected(self, hidden: Tensor, agreement: Tensor) -> Tensor:
        """(B, p + hw, D) tokens before the last block, (B, hw, hw) -> (B, hw, E)."""
        first = self.num_prefix_tokens
        block: Any = self._blocks[-1]
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        query, key, value = (
            self._heads(part(normed)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # (B, heads, p + hw, d) each
        alike = [scaled_dot_product_attention(each, each, value)[:, :, first:] for each in (query, key)]
        shares = agreement / agreement.sum(2, keepdim=True)
        gathered = (
            (alike[0] + alike[1]) / 2,
            shares[:, None].to(value.dtype) @ value[:, :, first:],
        )  # (B, heads, hw, d) each
        found = [attention.out_proj(each.transpose(1, 2).flatten(2)) for each in gathered]  # (B, hw, D) each
        norm = self._part(self.family.norm)
        one, two = (normalize(self.projection(norm(each)).float(), dim=2) for each in found)
        return (one + two) / 2  # (B, hw, E)

    def _pooled(self, hidden: Tensor, agreement: Tensor) -> Tensor:
        """(B, hw, D) tokens after the last block, (B, hw, hw) -> (B, hw, E), by the head without its attention."""
        head: Any = self.projection
        attention = head.attention
        weight, bias = (part.chunk(3)[2] for part in (attention.in_proj_weight, attention.in_proj_bias))
        value = nn.functional.linear(self._part(self.family.norm)(hidden), weight, bias)  # (B, hw, D)
        shares = agreement / agreement.sum(2, keepdim=True)
        found = [attention.out_proj(each) for each in (value, shares.to(value.dtype) @ value)]  # (B, hw, D) each
        one, two = (normalize((each + head.mlp(head.layernorm(each))).float(), dim=2) for each in found)
        return (one + two) / 2  # (B, hw, E)


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, hw, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


class TextClassifier(nn.Module):
    """Class scores of a feature map in the space of a text encoder: no weight of it learns.

    A position has a class with the probability that the softmax over the class name and all background words gives to
    the name. Classes do not compete with each other here, so that scores do not depend on the tags. The scores then
    walk twice along the agreement of the tokens.

    Args:
        classes: (C, E) vectors of the class names, unit length.
        background: (W, E) vectors of the background words; a row of zeros is no word.
        sharpness: Factor of the cosines.
    """

    def __init__(self, classes: Tensor, background: Tensor, *, sharpness: float = 50.0) -> None:
        super().__init__()
        self.classes: Tensor
        self.background: Tensor
        self.register_buffer("classes", classes)
        self.register_buffer("background", background)
        self.sharpness = sharpness

    def forward(self, language: Tensor) -> Tensor:
        """Compare a feature map with the words.

        Args:
            language: (B, E, h, w) last level of `LanguageBackbone`.

        Returns:
            (B, C, h, w) logits of each class against all background words.
        """
        with torch.autocast(language.device.type, enabled=False):
            return self._compare(language)

    def _compare(self, language: Tensor) -> Tensor:
        tokens = self.sharpness * language.float().flatten(2).transpose(1, 2)  # (B, hw, E)
        words = (tokens @ self.background.T).masked_fill(~self.background.any(1), -torch.inf)  # (B, hw, W)
        logits = tokens @ self.classes.T - words.logsumexp(2, keepdim=True)  # (B, hw, C)
        return _as_map(logits, (language.shape[2], language.shape[3]))

    def scores(self, logits: Tensor, agreement: Tensor) -> Tensor:
        """Class scores, as a learned classifier has them.

        Args:
            logits: (B, C, h, w) of `forward`.
            agreement: (B, hw, hw) of the backbone's output.

        Returns:
            (B, C, h, w) probabilities after the walk, in [0, 1].
        """
        with torch.autocast(logits.device.type, enabled=False):
            walked = agreement_walk(agreement) @ logits.sigmoid().flatten(2).transpose(1, 2)  # (B, hw, C)
        return _as_map(walked, (logits.shape[2], logits.shape[3]))


def agreement_walk(agreement: Tensor) -> Tensor:
    """Turn the agreement of tokens into the transition matrix of two steps.

    Args:
        agreement: (B, hw, hw) non-negative.

    Returns:
        (B, hw, hw), rows sum to 1: squared, scaled to rows and columns of sum 1, made symmetric, then applied twice.

    Source:
        Lin et al. 2023 (CLIP-ES), Eq. 8; there the attention is not squared first.
    """
    weights = agreement.float().square()
    weights = weights / weights.sum(1, keepdim=True)
    weights = weights / weights.sum(2, keepdim=True)
    weights = (weights + weights.transpose(1, 2)) / 2
    twice = weights @ weights
    return twice / twice.sum(2, keepdim=True)
