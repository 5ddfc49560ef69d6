"""Mix Transformer encoders (SegFormer's MiT) through transformers, at stride 16 in the last stage.

Computes the feature pyramid and the raw attention of the last blocks; loads weights from a transformers
folder or hub id and from the original `mit_b*.pth` files. Sizes follow Xie et al. 2021, table 6.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerModel

from afa.errors import AfaError
from afa.model.attention import ATTENTION_NAME, mark_recorded
from afa.model.backbone import Backbone, BackboneOutput, join_attention
from afa.model.layers import speed_up
from afa.model.weights import init_from_scratch, load_pretrained
from afa.types import RawAttention

STRIDES: Final = (4, 2, 2, 1)
"""Stride of each patch embedding. The last stage keeps stride 16 (paper section 4.1; the reference)."""


@dataclass(frozen=True)
class MitSize:
    """Channels, blocks and heads of the four stages."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)


MIT_SIZES: Final[Mapping[str, MitSize]] = {
    "mit_tiny": MitSize((16, 32, 64, 128), (1, 1, 1, 2), (1, 2, 4, 8)),
    "mit_b0": MitSize((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": MitSize((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": MitSize((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": MitSize((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": MitSize((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": MitSize((64, 128, 320, 512), (3, 6, 40, 3)),
}
"""MiT-B0..B5 of the paper, and a tiny one of ours for generated data."""


class MixTransformer(Backbone):
    """MiT with its raw attention.

    Args:
        size: Name in `MIT_SIZES`.
        weights: Local folder or hub id in transformers' layout, an original `mit_b*.pth` file, or empty for
            random weights. The hub's nvidia/mit-b0..b5 are under NVIDIA's non-commercial licence.
        drop_path: Stochastic depth of the last block; linear over depth.
        attention_blocks: Number of last-stage blocks, counted from the end, whose Q K^T is returned.
        freeze_blocks: Number of blocks, counted over all stages from the first, that are frozen; with them the
            patch embeddings before them, and the final norm of a stage whose blocks are all frozen.

    Raises:
        AfaError: The size is unknown; more blocks are asked for than there are; weights are absent, unreadable, of
            another size, or have a key that does not match (the message names it).
    """

    def __init__(
        self,
        size: str,
        weights: str = "",
        *,
        drop_path: float = 0.1,
        attention_blocks: int = 2,
        freeze_blocks: int = 0,
    ) -> None:
        super().__init__()
        if size not in MIT_SIZES:
            raise AfaError(f"model.backbone is {size!r}; use one of {', '.join(MIT_SIZES)}")
        shape = MIT_SIZES[size]
        if attention_blocks > shape.depths[-1]:
            raise AfaError(
                f"model.affinity_blocks is {attention_blocks}, but the last stage of {size} has "
                f"{shape.depths[-1]} blocks; use at most that many"
            )
        if freeze_blocks > sum(shape.depths):
            raise AfaError(
                f"model.freeze_blocks is {freeze_blocks}, but {size} has {sum(shape.depths)} blocks; "
                "use at most that many"
            )
        self.encoder = _load_encoder(size, weights, drop_path)
        speed_up(self.encoder)
        self.channels = shape.channels
        self.strides = (4, 8, 16, 16)
        self.num_attention_maps = shape.heads[-1] * attention_blocks
        self.attention_scale = (shape.channels[-1] // shape.heads[-1]) ** -0.5
        self.min_size = 32
        self.freeze_blocks = freeze_blocks
        last_blocks: Any = self.encoder.stages[-1].blocks
        for block in last_blocks[-attention_blocks:]:
            mark_recorded(block.attention)
        self.freeze()

    def forward(self, image: Tensor, *, attention: bool = False) -> BackboneOutput:
        """Encode a batch; see `Backbone.forward`."""
        sink: list[RawAttention] | None = [] if attention else None
        features: list[Tensor] = []
        hidden = image
        stages: Any = self.encoder.stages
        for stage in stages:
            hidden, height, width = stage.patch_embeddings(hidden)
            for block in stage.blocks:
                hidden = block(hidden, height, width, attention_sink=sink)
            # Left channels-last, as tokens are: transformers' own stage copies them here.
            hidden = stage.layer_norm(hidden).unflatten(1, (height, width)).permute(0, 3, 1, 2)
            features.append(hidden)
        return BackboneOutput(tuple(features), join_attention(sink) if sink else None)

    def frozen_modules(self) -> Sequence[nn.Module]:
        """Patch embedding, blocks and final norm of each stage, as far as they are frozen."""
        modules: list[nn.Module] = []
        left = self.freeze_blocks
        stages: Any = self.encoder.stages if left else ()
        for stage in stages:
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


def _load_encoder(size: str, weights: str, drop_path: float) -> SegformerModel:
    shape = MIT_SIZES[size]
    config = SegformerConfig(
        hidden_sizes=list(shape.channels),
        depths=list(shape.depths),
        num_attention_heads=list(shape.heads),
        strides=list(STRIDES),
        drop_path_rate=drop_path,
    )
    config._attn_implementation = ATTENTION_NAME
    if not weights:
        encoder = SegformerModel(config)
        init_from_scratch(encoder)
        return encoder
    if weights.endswith((".pth", ".pt")):
        encoder = SegformerModel(config)
        _load_original(encoder, Path(weights))
        return encoder
    loaded: SegformerModel = load_pretrained(
        SegformerModel,
        config,
        weights,
        architecture=size,
        family="SegFormer",
        wanted="SegFormer (MiT) encoder",
        sizes=("hidden_sizes", "depths", "num_attention_heads"),
        foreign=("classifier.", "decode_head."),
        accepted="a folder, a hub id or a .pth",
    )
    return loaded


def _load_original(encoder: nn.Module, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it refuses anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AfaError(f"{path}: no such weights file; check model.weights") from None
    except Exception:
        raise AfaError(
            f"{path}: not a plain PyTorch weights file (broken, or it holds more than tensors); check model.weights"
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AfaError(f"{path}: holds no state dictionary; expected an original mit_b*.pth")
    try:
        converted = convert_original_keys(state)
    except AfaError as error:
        raise AfaError(f"{path}: {error}") from None
    _check_keys(str(path), encoder, converted)
    encoder.load_state_dict(converted)


def _check_keys(origin: str, encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = encoder.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    if missing or unexpected:
        what = f"lacks key {missing[0]!r}" if missing else f"has unmatched key {unexpected[0]!r}"
        more = len(missing) + len(unexpected) - 1
        raise AfaError(f"{origin}: {what}" + (f" (and {more} more)" if more else "") + "; check model.backbone")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise AfaError(
                f"{origin}: {key!r} has shape {tuple(tensor.shape)}, the backbone needs "
                f"{tuple(expected[key].shape)}; check model.backbone"
            )
