"""A small encoder of transformers, and its faster copy."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import SegformerConfig, SegformerModel

from afa.model.layers import speed_up


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
