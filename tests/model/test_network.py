"""The whole network: pooling, CAM passes that leave no trace, and work that is done only when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from afa.model.mit import MixTransformer
from afa.model.network import AfaNetwork
from afa.types import NetworkOutput

NUM_CLASSES = 5


def random_network(*, drop_path: float = 0.0, decoder_dropout: float = 0.1, **settings: Any) -> AfaNetwork:
    torch.manual_seed(0)
    backbone = MixTransformer("mit_tiny", drop_path=drop_path)
    return AfaNetwork(backbone, NUM_CLASSES, decoder_width=16, decoder_dropout=decoder_dropout, **settings)


def random_image(size: tuple[int, int] = (80, 112)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def count_calls(module: nn.Module) -> list[str]:
    """A list that grows by one entry whenever the module runs."""
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("call"))
    return calls


# --- Classifier ----------------------------------------------------------------------------------------------------


def pooled(feature: np.ndarray, *, pooling: str, percent: float) -> np.ndarray:
    """Mean of the largest share of each channel's values, by sorting; (B, D)."""
    flat = np.sort(feature.reshape(*feature.shape[:2], -1), axis=2)[:, :, ::-1]
    positions = flat.shape[2]
    count = {"gmp": 1, "gap": positions, "topk": max(1, math.ceil(positions * percent / 100))}[pooling]
    result: np.ndarray = flat[:, :, :count].mean(axis=2)
    return result


@pytest.mark.parametrize(
    ("pooling", "percent"),
    [("gmp", 25.0), ("gap", 25.0), ("topk", 50.0), ("topk", 25.0), ("topk", 10.0), ("topk", 0.0), ("topk", 100.0)],
)
def test_image_logits_are_the_classifier_on_the_pooled_feature(pooling: str, percent: float) -> None:
    network = random_network(pooling=pooling, pooling_percent=percent).eval()
    image = random_image()
    with torch.no_grad():
        feature = network.backbone(image).features[-1].numpy()
        logits = network(image, segmentation=False, affinity=False).image_logits
        scored = network.score(image).image_logits
    expected = (
        pooled(feature, pooling=pooling, percent=percent) @ network.classifier.weight.detach().numpy()[:, :, 0, 0].T
    )
    assert logits.shape == (2, NUM_CLASSES)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)
    assert torch.equal(scored, logits)


@pytest.mark.parametrize(("percent", "same_as"), [(100.0, "gap"), (0.0, "gmp"), (0.5, "gmp")])
def test_extreme_shares_of_topk_are_gap_and_gmp(percent: float, same_as: str) -> None:
    image = random_image()
    logits = [
        random_network(pooling=pooling, pooling_percent=percent).eval().score(image).image_logits
        for pooling in ("topk", same_as)
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


def test_class_scores_are_the_classifier_weight_on_the_last_feature() -> None:
    network = random_network().eval()
    image = random_image()
    with torch.no_grad():
        feature = network.backbone(image).features[-1]
        expected = torch.einsum("cd,bdhw->bchw", network.classifier.weight[:, :, 0, 0], feature)
    scores = network(image).class_scores
    assert scores.shape == (2, NUM_CLASSES, 5, 7)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_class_scores_carry_no_gradient_and_the_rest_does() -> None:
    output = random_network().train()(random_image())
    assert not output.class_scores.requires_grad
    for tensor in (output.image_logits, output.seg_logits, output.affinity, output.attention_logits):
        assert tensor is not None
        assert tensor.requires_grad


# --- CAM passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affinity", [False, True])
def test_score_equals_the_forward_of_a_network_in_evaluation(affinity: bool) -> None:
    network = random_network(drop_path=0.5)
    image = random_image()
    scored = network.train().score(image, affinity)
    expected = network.eval()(image, affinity=affinity)
    assert torch.equal(scored.class_scores, expected.class_scores)
    assert torch.equal(scored.image_logits, expected.image_logits)
    assert scored.attention_scale == expected.attention_scale == 16**-0.5
    assert scored.seg_logits is None
    if affinity:
        assert torch.equal(scored.affinity, expected.affinity)
        assert torch.equal(scored.attention_logits, expected.attention_logits)
    else:
        assert scored.affinity is None
        assert scored.attention_logits is None


def test_score_leaves_no_trace() -> None:
    network = random_network(drop_path=0.5).train()
    # A mixed state: parts that somebody froze in evaluation mode must stay there.
    network.backbone.encoder.stages[1].eval()
    network.decoder.norm.eval()
    flags = {name: module.training for name, module in network.named_modules()}
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    generator = torch.get_rng_state()
    output = network.score(random_image(), affinity=True)
    assert {name: module.training for name, module in network.named_modules()} == flags
    assert {True, False} == set(flags.values())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    # Neither dropout nor stochastic depth drew a number.
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in network.parameters())
    for tensor in (output.image_logits, output.class_scores, output.affinity, output.attention_logits):
        assert tensor is not None
        assert not tensor.requires_grad


def test_score_restores_the_training_flags_when_the_pass_fails() -> None:
    network = random_network().train()
    with pytest.raises(RuntimeError):
        network.score(torch.zeros(2, 4, 64, 64))
    assert all(module.training for module in network.modules())


def test_score_is_deterministic_where_training_is_not() -> None:
    network = random_network(drop_path=0.9).train()
    image = random_image()
    first, second = (network.score(image).class_scores for _ in range(2))
    assert torch.equal(first, second)
    first, second = (network(image).class_scores for _ in range(2))
    assert not torch.equal(first, second)


def test_a_training_forward_moves_only_the_batch_norm_of_the_decoder() -> None:
    network = random_network().train()
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    network(random_image())
    moved = {name for name, tensor in network.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved == {f"decoder.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


# --- Only what is asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmentation", [False, True])
@pytest.mark.parametrize("affinity", [False, True])
def test_forward_computes_only_what_is_asked_for(segmentation: bool, affinity: bool) -> None:
    network = random_network().train()
    parts = [count_calls(part) for part in (network.backbone, network.decoder, network.affinity_head)]
    output = network(random_image(), segmentation=segmentation, affinity=affinity)
    assert [len(calls) for calls in parts] == [1, int(segmentation), int(affinity)]
    assert (output.seg_logits is not None) == segmentation
    assert (output.affinity is not None) == affinity
    assert (output.attention_logits is not None) == affinity


def test_what_is_asked_for_does_not_change_the_rest() -> None:
    network = random_network().eval()
    image = random_image()
    everything = network(image)
    nothing = network(image, segmentation=False, affinity=False)
    torch.testing.assert_close(nothing.image_logits, everything.image_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(nothing.class_scores, everything.class_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("affinity", [False, True])
def test_score_runs_the_encoder_alone(affinity: bool) -> None:
    network = random_network().train()
    parts = [count_calls(part) for part in (network.backbone, network.decoder, network.affinity_head)]
    network.score(random_image(), affinity)
    assert [len(calls) for calls in parts] == [1, 0, int(affinity)]


def test_segment_is_the_decoder_on_the_encoder() -> None:
    network = random_network().eval()
    image = random_image((67, 97))
    expected = network(image, affinity=False).seg_logits
    calls = count_calls(network.affinity_head)
    logits = network.segment(image)
    assert logits.shape == (2, NUM_CLASSES + 1, 17, 25)
    assert torch.equal(logits, expected)
    assert calls == []


# --- Affinity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention_scaling", [False, True])
def test_affinity_comes_from_raw_or_scaled_attention(attention_scaling: bool) -> None:
    network = random_network(attention_scaling=attention_scaling).eval()
    output = network(random_image())
    assert output.attention_scale == 16**-0.5
    logits = output.attention_logits * (output.attention_scale if attention_scaling else 1.0)
    mixed = network.affinity_head.mix(logits + logits.transpose(2, 3))[:, 0]
    torch.testing.assert_close(output.affinity, torch.sigmoid(mixed), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.affinity, output.affinity.transpose(1, 2), rtol=0, atol=1e-6)
    # Raw attention is handed out either way.
    raw = network.backbone(random_image(), attention=True).attention_logits
    assert torch.equal(output.attention_logits, raw)


LOSSES: dict[str, Callable[[NetworkOutput], Tensor]] = {
    "affinity": lambda output: output.affinity.square().mean(),  # type: ignore[union-attr]
    "segmentation": lambda output: output.seg_logits.square().mean(),  # type: ignore[union-attr]
    "classification": lambda output: output.image_logits.square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_reaches_the_attention_of_the_encoder(loss: str) -> None:
    network = random_network().train()
    LOSSES[loss](network(random_image())).backward()
    for block in network.backbone.encoder.stages[-1].blocks[-2:]:
        for projection in (block.attention.q_proj, block.attention.k_proj):
            assert projection.weight.grad.abs().max() > 0


# --- Precision -----------------------------------------------------------------------------------------------------


def test_outputs_are_float32_under_autocast() -> None:
    network = random_network().eval()
    image = random_image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(image)
        scored = network.score(image, affinity=True)
        segmented = network.segment(image)
    assert output.attention_logits.dtype == torch.bfloat16
    for name in ("image_logits", "class_scores", "seg_logits", "affinity"):
        assert getattr(output, name).dtype == torch.float32, name
        assert getattr(output, name).isfinite().all(), name
    assert {scored.image_logits.dtype, scored.class_scores.dtype, scored.affinity.dtype, segmented.dtype} == {
        torch.float32
    }


def test_the_classifier_learns_under_autocast() -> None:
    """Class scores use its weight without gradient: autocast must not keep that copy for the image logits."""
    network = random_network().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(random_image()).image_logits.sum().backward()
    assert network.classifier.weight.grad is not None
    assert network.classifier.weight.grad.abs().max() > 0
