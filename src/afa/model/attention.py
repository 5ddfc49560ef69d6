"""One fused attention function for every encoder, which can record the queries and keys of chosen modules.

It is registered with transformers' attention interface as `afa`. Not every encoder hands keywords down to its attention
function, so a `Recorder` is known to the modules themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface

from afa.types import RawAttention

ATTENTION_NAME: Final = "afa"
"""Name under which the function is registered with transformers."""

_RECORDER: Final = "afa_recorder"
_WATCHER: Final = "afa_watcher"
_AGREEMENT: Final = "afa_agreement"


class Recorder:
    """Collects the queries and keys of the attention modules of one encoder while somebody listens.

    Args:
        modules: Attention modules that are recorded, in the order in which they run.
        num_prefix_tokens: Class and register tokens, which are left out: before the product, not after it.
        name: Attribute of the modules that says where they find it.
    """

    def __init__(self, modules: Iterable[nn.Module], num_prefix_tokens: int = 0, *, name: str = _RECORDER) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self._taken: list[RawAttention] | None = None
        for module in modules:
            setattr(module, name, self)

    @contextlib.contextmanager
    def listen(self, wanted: bool = True) -> Iterator[list[RawAttention]]:
        """A list that receives queries and keys, with gradient, as the modules run; stays empty if not `wanted`."""
        taken: list[RawAttention] = []
        self._taken = taken if wanted else None
        try:
            yield taken
        finally:
            self._taken = None

    def take(self, query: Tensor, key: Tensor) -> None:
        """Take the queries and keys, (B, heads, N, d), of a running module."""
        if self._taken is None:
            return
        first = self.num_prefix_tokens
        self._taken.append(RawAttention(query[:, :, first:], key[:, :, first:]))  # (B, heads, hw, d)


@contextlib.contextmanager
def watch(modules: Sequence[nn.Module], num_prefix_tokens: int) -> Iterator[list[RawAttention]]:
    """A list that receives queries and keys of modules as they run, whatever else records them.

    Args:
        modules: Attention modules; keys may be fewer than queries.
        num_prefix_tokens: As of `Recorder`.
    """
    try:
        with Recorder(modules, num_prefix_tokens, name=_WATCHER).listen() as taken:
            yield taken
    finally:
        for module in modules:
            delattr(module, _WATCHER)


class Agreement:
    """Adds up the attention of chosen modules, mean over their heads, while somebody listens.

    Such a module computes its weights one by one instead of by a fused function, and so no second time.

    Args:
        modules: Attention modules; nothing masks or drops their weights.
        num_prefix_tokens: As of `Recorder`; the weights that patches give to them are left out.
    """

    def __init__(self, modules: Sequence[nn.Module], num_prefix_tokens: int) -> None:
        self.num_modules = len(modules)
        self.num_prefix_tokens = num_prefix_tokens
        self.listens = False
        self._sum: Tensor | None = None
        for module in modules:
            setattr(module, _AGREEMENT, self)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Let `mean` be of what runs inside."""
        self.listens, self._sum = True, None
        try:
            yield
        finally:
            self.listens = False

    def add(self, weights: Tensor) -> None:
        """Add (B, heads, N, N) attention weights of a running module."""
        first = self.num_prefix_tokens
        attention = weights.detach()[:, :, first:, first:].float().mean(1)  # (B, hw, hw)
        self._sum = attention if self._sum is None else self._sum + attention

    def mean(self) -> Tensor:
        """(B, hw, hw) mean over all modules and heads."""
        assert self._sum is not None
        mean, self._sum = self._sum / self.num_modules, None
        return mean


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that gives queries and keys to the recorder of the module, if it has one.

    Args:
        module: Attention module that calls.
        query: (B, heads, N, d).
        key: (B, heads, M, d).
        value: (B, heads, M, d).
        attention_mask: Additive mask, or None.
        scaling: Factor of Q K^T before the softmax; None = 1 / sqrt(d).
        dropout: Probability of dropping an attention weight.

    Returns:
        (B, N, heads, d) and None, as transformers expects.
    """
    for name in (_RECORDER, _WATCHER):
        recorder: Recorder | None = getattr(module, name, None)
        if recorder is not None:
            recorder.take(query, key)
    agreement: Agreement | None = getattr(module, _AGREEMENT, None)
    if agreement is not None and agreement.listens:
        weights = ((query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)).softmax(-1)  # (B, heads, N, M)
        agreement.add(weights)
        return (weights @ value).transpose(1, 2).contiguous(), None  # (B, N, heads, d)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None  # (B, N, heads, d)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
