"""The attention function: fused and recorded paths against the formula, and what goes into the sink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from afa.model.attention import ATTENTION_NAME, attention_forward, mark_recorded
from afa.types import RawAttention

BATCH, HEADS, QUERIES, KEYS, DEPTH = 2, 3, 7, 5, 4


def random_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, DEPTH), (KEYS, DEPTH), (KEYS, DEPTH))
    query, key, value = (
        torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return query, key, value


def recorded_module() -> nn.Module:
    module = nn.Module()
    mark_recorded(module)
    return module


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | float = 0.0) -> Tensor:
    """Softmax attention written out, (B, N, heads, d)."""
    exponent = torch.exp(torch.einsum("bhnd,bhmd->bhnm", query, key) * scale + mask)
    return torch.einsum("bhnm,bhmd->bnhd", exponent / exponent.sum(-1, keepdim=True), value)


def test_function_is_registered_with_transformers() -> None:
    assert ALL_ATTENTION_FUNCTIONS.get_interface(ATTENTION_NAME, None) is attention_forward


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_both_paths_equal_the_formula(scaling: float | None, masked: bool) -> None:
    query, key, value = random_inputs()
    mask = torch.linspace(-2, 1, QUERIES * KEYS, dtype=torch.float64).view(1, 1, QUERIES, KEYS) if masked else None
    expected = plain_attention(query, key, value, scale=scaling or DEPTH**-0.5, mask=0.0 if mask is None else mask)
    fused, no_weights = attention_forward(nn.Module(), query, key, value, mask, scaling=scaling)
    assert no_weights is None
    assert fused.shape == (BATCH, QUERIES, HEADS, DEPTH)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-12)
    recorded, no_weights = attention_forward(
        recorded_module(), query, key, value, mask, scaling=scaling, attention_sink=[]
    )
    assert no_weights is None
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-12)


def test_sink_receives_the_raw_product_before_scale_and_mask() -> None:
    query, key, value = random_inputs()
    sink: list[RawAttention] = []
    mask = torch.full((QUERIES, KEYS), -3.0, dtype=torch.float64)
    attention_forward(recorded_module(), query, key, value, mask, scaling=0.5, attention_sink=sink)
    assert len(sink) == 1
    torch.testing.assert_close(sink[0].logits, torch.einsum("bhnd,bhmd->bhnm", query, key), rtol=0, atol=1e-12)


def test_only_a_marked_module_with_a_sink_records() -> None:
    query, key, value = random_inputs()
    sink: list[RawAttention] = []
    unmarked, _ = attention_forward(nn.Module(), query, key, value, attention_sink=sink)
    assert sink == []
    marked, _ = attention_forward(recorded_module(), query, key, value)
    assert torch.equal(marked, unmarked)


def test_gradient_of_the_recorded_product_reaches_query_and_key() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in random_inputs())
    sink: list[RawAttention] = []
    attention_forward(recorded_module(), query, key, value, attention_sink=sink)
    weight = torch.randn_like(sink[0].logits)
    (sink[0].logits * weight).sum().backward()
    assert query.grad is not None
    assert key.grad is not None
    torch.testing.assert_close(query.grad, weight @ key.detach())
    torch.testing.assert_close(key.grad, weight.transpose(2, 3) @ query.detach())
    assert value.grad is None


@pytest.mark.parametrize("recorded", [False, True])
def test_dropout_zeroes_weights_and_rescales_the_rest(recorded: bool) -> None:
    torch.manual_seed(0)
    query, key, _ = (tensor.float() for tensor in random_inputs())
    value = torch.eye(KEYS).expand(BATCH, HEADS, KEYS, KEYS)
    sink: list[RawAttention] = []
    module = recorded_module()
    kept, _ = attention_forward(module, query, key, value, attention_sink=sink if recorded else None)
    dropped, _ = attention_forward(module, query, key, value, dropout=0.25, attention_sink=sink if recorded else None)
    zero = dropped == 0
    assert 0.1 < zero.float().mean() < 0.4
    torch.testing.assert_close(dropped[~zero], kept[~zero] / 0.75)
    # What the affinity learns from is not dropped.
    assert all(torch.equal(taken.logits, sink[0].logits) for taken in sink)
