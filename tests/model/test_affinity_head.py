"""The affinity head against Eq. 3 written plainly, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from afa.model.affinity_head import AffinityHead

NUM_MAPS, TOKENS = 16, 12


def attention_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, NUM_MAPS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)).to(dtype) / 2


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
    affinity = module(attention_logits())
    assert affinity.shape == (2, TOKENS, TOKENS)
    torch.testing.assert_close(affinity, plain_affinity(module, attention_logits()), rtol=0, atol=1e-6)
    # And it is the plain convolution of the symmetric maps, as a layer computes it.
    logits = attention_logits()
    layer = torch.sigmoid(module.mix(logits + logits.transpose(2, 3)))[:, 0]
    torch.testing.assert_close(affinity, layer, rtol=0, atol=1e-6)


def test_is_symmetric_and_between_zero_and_one() -> None:
    affinity = head()(attention_logits())
    torch.testing.assert_close(affinity, affinity.transpose(1, 2), rtol=0, atol=1e-6)
    assert affinity.min() > 0
    assert affinity.max() < 1
    assert affinity.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_affinity(dtype: torch.dtype) -> None:
    module = head()
    affinity = module(attention_logits(dtype))
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity, plain_affinity(module, attention_logits()), rtol=0, atol=0.1)


def test_input_is_left_alone_and_receives_gradient() -> None:
    module = head()
    logits = attention_logits().requires_grad_()
    weight = torch.randn(2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))
    (module(logits) * weight).sum().backward()
    expected = attention_logits().requires_grad_()
    (plain_affinity(module, expected) * weight).sum().backward()
    assert torch.equal(logits.detach(), attention_logits())
    assert logits.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(logits.grad, expected.grad, rtol=0, atol=1e-5)


def test_weights_start_from_kaiming_normal_over_fan_out() -> None:
    torch.manual_seed(0)
    weights = torch.cat([AffinityHead(NUM_MAPS).mix.weight.flatten() for _ in range(500)])
    # gain of leaky ReLU with slope sqrt 5 is sqrt(2 / 6); fan_out of 16 -> 1 maps is 1.
    assert weights.std().item() == pytest.approx((2 / 6) ** 0.5, rel=0.03)
    assert weights.mean().item() == pytest.approx(0, abs=0.03)
