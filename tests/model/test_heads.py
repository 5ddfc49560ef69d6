"""The affinity head against Eq. 3 written plainly, and its invariants."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from afa.model.heads import AffinityHead
from afa.types import RawAttention

NUM_MAPS, TOKENS, DEPTH = 16, 12, 5


def raw_attention(dtype: torch.dtype = torch.float32) -> RawAttention:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, NUM_MAPS, TOKENS, DEPTH, generator=generator).to(dtype) / 2 for _ in range(2))
    return RawAttention(query, key)


def head() -> AffinityHead:
    torch.manual_seed(0)
    result = AffinityHead(NUM_MAPS)
    nn.init.constant_(result.mix.bias, -0.7)  # type: ignore[arg-type]
    return result


def plain_affinity(module: AffinityHead, logits: Tensor) -> Tensor:
    """sigmoid(conv(S + S^T)), the transpose first and the convolution as a sum over maps."""
    symmetric = logits + logits.transpose(2, 3)
    weight, bias = module.mix.weight.to(logits.dtype).view(-1), module.mix.bias
    assert bias is not None
    mixed = sum(weight[n] * symmetric[:, n] for n in range(NUM_MAPS)) + bias.to(logits.dtype)
    return 1 / (1 + torch.exp(-mixed))


def test_equals_equation_3() -> None:
    module = head()
    affinity = module(raw_attention())
    assert affinity.shape == (2, TOKENS, TOKENS)
    torch.testing.assert_close(affinity, plain_affinity(module, raw_attention().logits), rtol=0, atol=1e-6)
    # And it is the plain convolution of the symmetric maps, as a layer computes it.
    logits = raw_attention().logits
    layer = torch.sigmoid(module.mix(logits + logits.transpose(2, 3)))[:, 0]
    torch.testing.assert_close(affinity, layer, rtol=0, atol=1e-6)


def test_is_symmetric_and_between_zero_and_one() -> None:
    affinity = head()(raw_attention())
    torch.testing.assert_close(affinity, affinity.transpose(1, 2), rtol=0, atol=1e-6)
    assert affinity.min() > 0
    assert affinity.max() < 1
    assert affinity.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_affinity(dtype: torch.dtype) -> None:
    module = head()
    affinity = module(raw_attention(dtype))
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity, plain_affinity(module, raw_attention().logits), rtol=0, atol=0.1)


def test_input_is_left_alone_and_receives_gradient() -> None:
    module = head()
    given, expected = ([part.requires_grad_() for part in dataclasses.astuple(raw_attention())] for _ in range(2))
    weight = torch.randn(2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))
    (module(RawAttention(*given)) * weight).sum().backward()
    (plain_affinity(module, expected[0] @ expected[1].transpose(2, 3)) * weight).sum().backward()
    for ours, before, plain in zip(given, dataclasses.astuple(raw_attention()), expected, strict=True):
        assert torch.equal(ours.detach(), before)
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-5)


def test_scale_multiplies_the_products() -> None:
    module = head()
    expected = plain_affinity(module, 0.3 * raw_attention().logits)
    torch.testing.assert_close(module(raw_attention(), scale=0.3), expected, rtol=0, atol=1e-6)


def test_weights_start_from_kaiming_normal_over_fan_out() -> None:
    torch.manual_seed(0)
    weights = torch.cat([AffinityHead(NUM_MAPS).mix.weight.flatten() for _ in range(500)])
    # gain of leaky ReLU with slope sqrt 5 is sqrt(2 / 6); fan_out of 16 -> 1 maps is 1.
    assert weights.std().item() == pytest.approx((2 / 6) ** 0.5, rel=0.03)
    assert weights.mean().item() == pytest.approx(0, abs=0.03)
