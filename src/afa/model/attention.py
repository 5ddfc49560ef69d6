"""One attention function for every encoder: fused, but for the blocks whose raw Q K^T is asked for.

Registered with transformers' attention interface as `afa`. A caller that wants the raw maps of a forward pass
hands a list down as the keyword `attention_sink`; modules marked by `mark_recorded` append to it.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME: Final = "afa"
"""Name under which the function is registered with transformers."""

_RECORDED: Final = "afa_recorded"


def mark_recorded(module: nn.Module) -> None:
    """Let an attention module append its raw Q K^T whenever a forward pass carries a sink."""
    setattr(module, _RECORDED, True)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_sink: list[Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that can give away its raw logits.

    Args:
        module: Attention module that calls; recorded if `mark_recorded` was called on it.
        query: (B, heads, N, d).
        key: (B, heads, M, d).
        value: (B, heads, M, d).
        attention_mask: Additive mask, or None.
        scaling: Factor of Q K^T before the softmax; None = 1 / sqrt(d).
        dropout: Probability of dropping an attention weight.
        attention_sink: List that receives (B, heads, N, M) raw Q K^T, unscaled, with gradient; None records nothing.

    Returns:
        (B, N, heads, d) and None, as transformers expects.
    """
    if attention_sink is None or not getattr(module, _RECORDED, False):
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None
    logits = query @ key.transpose(2, 3)
    attention_sink.append(logits)
    scaled = logits * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scaled = scaled + attention_mask
    weights = scaled.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
