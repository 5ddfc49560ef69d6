"""The attention function against the formula, and what a recorder takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from afa.model.attention import ATTENTION_NAME, Agreement, Recorder, attention_forward

BATCH, HEADS, QUERIES, KEYS, DEPTH = 2, 3, 7, 5, 4


def random_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, DEPTH), (KEYS, DEPTH), (KEYS, DEPTH))
    query, key, value = (
        torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return query, key, value


def recorded_module(num_prefix_tokens: int = 0) -> tuple[nn.Module, Recorder]:
    module = nn.Module()
    return module, Recorder([module], num_prefix_tokens)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | float = 0.0) -> Tensor:
    """Softmax attention written out, (B, N, heads, d)."""
    exponent = torch.exp(torch.einsum("bhnd,bhmd->bhnm", query, key) * scale + mask)
    return torch.einsum("bhnm,bhmd->bnhd", exponent / exponent.sum(-1, keepdim=True), value)


def test_function_is_registered_with_transformers() -> None:
    assert ALL_ATTENTION_FUNCTIONS.get_interface(ATTENTION_NAME, None) is attention_forward


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_with_and_without_a_recorder_it_equals_the_formula(scaling: float | None, masked: bool) -> None:
    query, key, value = random_inputs()
    mask = torch.linspace(-2, 1, QUERIES * KEYS, dtype=torch.float64).view(1, 1, QUERIES, KEYS) if masked else None
    expected = plain_attention(query, key, value, scale=scaling or DEPTH**-0.5, mask=0.0 if mask is None else mask)
    module, recorder = recorded_module()
    with recorder.listen():
        for each in (nn.Module(), module):
            result, no_weights = attention_forward(each, query, key, value, mask, scaling=scaling)
            assert no_weights is None
            assert result.shape == (BATCH, QUERIES, HEADS, DEPTH)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_recorder_takes_the_raw_product_before_scale_and_mask(prefix: int) -> None:
    query, key, value = random_inputs()
    module, recorder = recorded_module(prefix)
    mask = torch.full((QUERIES, KEYS), -3.0, dtype=torch.float64)
    with recorder.listen() as taken:
        attention_forward(module, query, key, value, mask, scaling=0.5)
    assert len(taken) == 1
    expected = torch.einsum("bhnd,bhmd->bhnm", query, key)[:, :, prefix:, prefix:]
    torch.testing.assert_close(taken[0].logits, expected, rtol=0, atol=1e-12)


def test_only_a_listening_recorder_takes_and_only_from_its_modules() -> None:
    query, key, value = random_inputs()
    module, recorder = recorded_module()
    with recorder.listen() as taken:
        other, _ = attention_forward(nn.Module(), query, key, value)
    with recorder.listen(wanted=False) as unwanted:
        unheard, _ = attention_forward(module, query, key, value)
    after, _ = attention_forward(module, query, key, value)
    assert taken == unwanted == []
    assert torch.equal(unheard, other)
    assert torch.equal(after, other)


def test_agreement_is_the_mean_attention_and_changes_nothing() -> None:
    query, key, value = random_inputs()
    modules = [nn.Module(), nn.Module()]
    agreement = Agreement(modules, 1)
    expected = attention_forward(modules[0], query, key, value)[0]
    with agreement.listen():
        outputs = [
            attention_forward(module, query, factor * key, value)[0]
            for module, factor in zip(modules, (1, 2), strict=True)
        ]
    torch.testing.assert_close(outputs[0], expected)
    scale = query.shape[-1] ** -0.5
    maps = [(factor * scale * query @ key.mT).softmax(-1).mean(1)[:, 1:, 1:] for factor in (1, 2)]
    torch.testing.assert_close(agreement.mean(), (maps[0] + maps[1]).float() / 2)


def test_gradient_of_the_recorded_product_reaches_query_and_key() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in random_inputs())
    module, recorder = recorded_module()
    with recorder.listen() as taken:
        attention_forward(module, query, key, value)
    weight = torch.randn_like(taken[0].logits)
    (taken[0].logits * weight).sum().backward()
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
    module, recorder = recorded_module()
    with recorder.listen(recorded) as taken:
        kept, _ = attention_forward(module, query, key, value)
        dropped, _ = attention_forward(module, query, key, value, dropout=0.25)
    zero = dropped == 0
    assert 0.1 < zero.float().mean() < 0.4
    torch.testing.assert_close(dropped[~zero], kept[~zero] / 0.75)
    # What the affinity learns from is not dropped.
    assert len(taken) == 2 * recorded
    assert all(torch.equal(each.logits, taken[0].logits) for each in taken)
