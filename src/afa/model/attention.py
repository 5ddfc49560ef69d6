"""One fused attention function for every encoder, which can give away the queries and keys of chosen blocks.

Registered with transformers' attention interface as `afa`. A caller that wants the raw maps of a forward pass
hands a list down as the keyword `attention_sink`; modules marked by `mark_recorded` append to it.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface

from afa.types import RawAttention

ATTENTION_NAME: Final = "afa"
"""Name under which the function is registered with transformers."""

_RECORDED: Final = "afa_recorded"


def mark_recorded(module: nn.Module) -> None:
    """Let an attention module append its queries and keys whenever a forward pass carries a sink."""
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
    attention_sink: list[RawAttention] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that can give away what its logits are made of.

    Args:
        module: Attention module that calls; recorded if `mark_recorded` was called on it.
        query: (B, heads, N, d).
        key: (B, heads, M, d).
        value: (B, heads, M, d).
        attention_mask: Additive mask, or None.
        scaling: Factor of Q K^T before the softmax; None = 1 / sqrt(d).
        dropout: Probability of dropping an attention weight.
        attention_sink: List that receives query and key, with gradient; None records nothing.

    Returns:
        (B, N, heads, d) and None, as transformers expects.
    """
    if attention_sink is not None and getattr(module, _RECORDED, False):
        attention_sink.append(RawAttention(query, key))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
