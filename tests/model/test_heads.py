"""The affinity head against Eq. 3 written plainly, and its invariants."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
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


# --- Calibrated start ----------------------------------------------------------------------------------------------


def alone(sums: Tensor) -> Tensor:
    """The sums of a single process."""
    return sums


def near_pairs() -> Tensor:
    """(2, hw, hw) bool: in the first image tokens up to 3 places apart, in the second all but the last 4 tokens."""
    place = torch.arange(TOKENS)
    near = (place[:, None] - place).abs() <= 3
    inside = place < TOKENS - 4
    return torch.stack([near, inside[:, None] & inside])


@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 100.0])
def test_calibrated_logits_are_the_standardized_mean_of_the_maps(sharpness: float, scale: float) -> None:
    attention, pairs = raw_attention(), near_pairs()
    attention = RawAttention(attention.query * sharpness + 3, attention.key)
    module = AffinityHead(NUM_MAPS, init="calibrated")
    assert torch.equal(module(attention, scale=scale), torch.full((2, TOKENS, TOKENS), 0.5))
    module.calibrate(attention, pairs, scale=scale, total=alone)
    mean_map = attention.logits.double().mean(1)
    symmetric = (mean_map + mean_map.transpose(1, 2)).numpy()
    counted = symmetric[pairs.numpy()]
    expected = 1 / (1 + np.exp(-(symmetric - counted.mean()) / counted.std()))
    np.testing.assert_allclose(module(attention, scale=scale).detach().numpy(), expected, rtol=0, atol=1e-4)


def test_weights_that_learned_are_not_calibrated() -> None:
    for module in (head(), AffinityHead(NUM_MAPS, init="calibrated")):
        module.calibrate(raw_attention(), near_pairs(), total=alone)
        kept = {key: value.clone() for key, value in module.state_dict().items()}
        assert kept["mix.weight"].count_nonzero() == NUM_MAPS
        module.calibrate(RawAttention(*(9 * part for part in dataclasses.astuple(raw_attention()))), near_pairs(),
                         total=alone)  # fmt: skip
        assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())


def test_calibration_over_processes_is_that_of_all_images() -> None:
    """Each process adds its sums to what the other one has, as an all-reduce does."""
    attention, pairs = raw_attention(), near_pairs()
    whole = AffinityHead(NUM_MAPS, init="calibrated")
    whole.calibrate(attention, pairs, total=alone)
    shares = [(RawAttention(attention.query[i, None], attention.key[i, None]), pairs[i, None]) for i in range(2)]
    meeting, sums = threading.Barrier(2), [torch.zeros(0)] * 2

    def start(rank: int) -> AffinityHead:
        def total(own: Tensor) -> Tensor:
            sums[rank] = own
            meeting.wait(timeout=10)
            both = sums[0] + sums[1]
            meeting.wait(timeout=10)
            return both

        module = AffinityHead(NUM_MAPS, init="calibrated")
        module.calibrate(*shares[rank], total=total)
        return module

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, range(2))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spoiled", ["alike", "infinite", "no pairs"])
def test_images_that_say_nothing_leave_a_half_everywhere(spoiled: str) -> None:
    attention, pairs = raw_attention(), near_pairs()
    if spoiled == "alike":
        attention = RawAttention(torch.ones_like(attention.query), torch.ones_like(attention.key))
    elif spoiled == "infinite":
        attention.query[0, 3, 2] = torch.inf
    else:
        pairs = torch.zeros_like(pairs)
    module = AffinityHead(NUM_MAPS, init="calibrated")
    module.calibrate(attention, pairs, total=alone)
    assert torch.equal(module(raw_attention()), torch.full((2, TOKENS, TOKENS), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_calibrates_alike(dtype: torch.dtype) -> None:
    module, plain = (AffinityHead(NUM_MAPS, init="calibrated") for _ in range(2))
    module.calibrate(raw_attention(dtype), near_pairs(), total=alone)
    plain.calibrate(raw_attention(), near_pairs(), total=alone)
    assert module.mix.weight.dtype == torch.float32
    torch.testing.assert_close(module.mix.weight, plain.mix.weight, rtol=0.02, atol=0)
