"""Mix Transformer encoders (SegFormer's MiT) through transformers, at stride 16 in the last stage.

Computes the feature pyramid and the raw attention of the last blocks; loads weights from a transformers
folder or hub id and from the original `mit_b*.pth` files. Sizes follow Xie et al. 2021, table 6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor, nn
from transformers import SegformerConfig, SegformerModel

from afa.errors import AfaError
from afa.model.attention import ATTENTION_NAME, Recorder
from afa.model.backbone import AttentionLayer, Backbone, BackboneOutput, join_attention
from afa.model.families import MIT_SIZES, MitSize
from afa.model.layers import speed_up
from afa.model.weights import Architecture, build_encoder

STRIDES: Final = (4, 2, 2, 1)
"""Stride of each patch embedding. The last stage keeps stride 16 (paper section 4.1; the reference)."""


class MixTransformer(Backbone):
    """MiT with its raw attention.

    Args:
        size: Name in `MIT_SIZES`, or sizes that are not there.
        weights: Local folder or hub id in transformers' layout, an original `mit_b*.pth` file, or empty for
            random weights. The hub's nvidia/mit-b0..b5 are under NVIDIA's non-commercial license.
        drop_path: Stochastic depth of the last block; linear over depth.
        attention_blocks: Number of last-stage blocks, counted from the end, whose Q K^T is returned.
        freeze_blocks: Number of blocks, counted over all stages from the first, that are frozen; with them the
            patch embeddings before them, and the final norm of a stage whose blocks are all frozen.
        norm_eps: Epsilon of the norm layers in blocks and after stages.

    Raises:
        AfaError: More blocks are asked for than there are; weights as in `afa.model.weights.build_encoder`.
    """

    def __init__(
        self,
        size: str | MitSize,
        weights: str = "",
        *,
        drop_path: float = 0.1,
        attention_blocks: int = 2,
        freeze_blocks: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        shape = MIT_SIZES[size] if isinstance(size, str) else size
        if attention_blocks > shape.depths[-1]:
            raise AfaError(
                f"model.affinity_blocks is {attention_blocks}, but the last stage of {size} has "
                f"{shape.depths[-1]} blocks; use at most that many"
            )
        if freeze_blocks > shape.depth:
            raise AfaError(
                f"model.freeze_blocks is {freeze_blocks}, but {size} has {shape.depth} blocks; use at most that many"
            )
        self.encoder = build_encoder(_architecture(str(size), shape, drop_path), weights)
        for name, module in self.encoder.named_modules():
            # Those of patch embeddings and of spatial reduction have PyTorch's own, as published.
            if re.search(r"\d\.(layer_norm|layernorm_before|layernorm_after)$", name):
                module.eps = norm_eps
        speed_up(self.encoder)
        self.channels = shape.channels
        self.strides = (4, 8, 16, 16)
        self.num_attention_maps = shape.heads[-1] * attention_blocks
        self.attention_scale = (shape.channels[-1] // shape.heads[-1]) ** -0.5
        self.min_size = 32
        self.freeze_blocks = freeze_blocks
        last_blocks = self.encoder.stages[-1].blocks[-attention_blocks:]
        self._recorder = Recorder(block.attention for block in last_blocks)
        self.freeze()

    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch; see `Backbone.forward`."""
        features: list[Tensor] = []
        hidden = image
        with self._recorder.listen(attention) as taken:
            for stage in self.encoder.stages:
                hidden, height, width = stage.patch_embeddings(hidden)  # (B, h w, C)
                for block in stage.blocks:
                    hidden = block(hidden, height, width)
                # Left channels-last, as tokens are: transformers' own stage copies them here.
                hidden = stage.layer_norm(hidden).unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, C, h, w)
                features.append(hidden)
        return BackboneOutput(tuple(features), join_attention(taken) if attention else None)

    def attention_layers(self) -> Sequence[AttentionLayer]:
        """One a block, whose keys are reduced in all stages but the last; see `Backbone.attention_layers`."""
        config = self.encoder.config
        sizes = zip(self.encoder.stages, config.num_attention_heads, self.strides, config.sr_ratios, strict=True)
        return [
            AttentionLayer(block.attention, heads, stride, reduction)
            for stage, heads, stride, reduction in sizes
            for block in stage.blocks
        ]

    def frozen_modules(self) -> Sequence[nn.Module]:
        """Patch embedding, blocks and final norm of each stage, as far as they are frozen."""
        modules: list[nn.Module] = []
        left = self.freeze_blocks
        for stage in self.encoder.stages if left else ():
            modules += [stage.patch_embeddings, *stage.blocks[:left]]
            left -= len(stage.blocks)
            if left >= 0:
                modules.append(stage.layer_norm)
            if left <= 0:
                break
        return modules


def convert_original_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of an original SegFormer encoder file to those of transformers' `SegformerModel`.

    Args:
        state: Contents of a `mit_b*.pth`, such as `block1.0.attn.kv.weight`; `head.*` is left out.

    Returns:
        The same tensors under transformers' names, joint key-value layers split in two.

    Raises:
        AfaError: A key has no counterpart; the message names it.
    """
    layers = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q": "attention.q_proj",
        "attn.proj": "attention.o_proj",
        "attn.sr": "attention.sequence_reduction.sequence_reduction",
        "attn.norm": "attention.sequence_reduction.layer_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    }
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        if name == "head":
            continue
        if match := re.fullmatch(r"patch_embed([1-4])\.(proj|norm)", name):
            part = {"proj": "proj", "norm": "layer_norm"}[match[2]]
            converted[f"stages.{int(match[1]) - 1}.patch_embeddings.{part}.{kind}"] = tensor
        elif match := re.fullmatch(r"norm([1-4])", name):
            converted[f"stages.{int(match[1]) - 1}.layer_norm.{kind}"] = tensor
        elif (match := re.fullmatch(r"block([1-4])\.(\d+)\.(.+)", name)) and match[3] in layers:
            block = f"stages.{int(match[1]) - 1}.blocks.{match[2]}"
            converted[f"{block}.{layers[match[3]]}.{kind}"] = tensor
        elif match and match[3] == "attn.kv":
            block = f"stages.{int(match[1]) - 1}.blocks.{match[2]}"
            half_key, half_value = tensor.chunk(2)
            converted[f"{block}.attention.k_proj.{kind}"] = half_key
            converted[f"{block}.attention.v_proj.{kind}"] = half_value
        else:
            raise AfaError(f"unmatched key {key!r} in the original SegFormer weights; expected a mit_b*.pth file")
    return converted


def _architecture(name: str, shape: MitSize, drop_path: float) -> Architecture:
    size = shape.settings()
    config = SegformerConfig(**size, strides=list(STRIDES), drop_path_rate=drop_path)
    config._attn_implementation = ATTENTION_NAME
    return Architecture(
        name, "SegFormer (MiT)", SegformerModel, config, sizes=tuple(size), convert=convert_original_keys
    )
