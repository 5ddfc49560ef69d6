"""The decoder against SegFormer's own formulation: plainly written, and as transformers has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from afa.model.decoder import MlpDecoder

CHANNELS = (4, 6, 10, 8)
WIDTH, NUM_CLASSES = 12, 5
SIZES = [
    ((16, 24), (8, 12), (4, 6), (4, 6)),
    ((13, 9), (7, 5), (4, 3), (4, 3)),
    ((8, 8), (8, 8), (8, 8), (8, 8)),
]


def random_features(sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def random_decoder(*, dropout: float = 0.1) -> MlpDecoder:
    torch.manual_seed(0)
    decoder = MlpDecoder(CHANNELS, NUM_CLASSES, width=WIDTH, dropout=dropout).double()
    for tensor in (decoder.norm.weight, decoder.norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2)
    for tensor in (decoder.norm.bias, decoder.norm.running_mean):
        assert tensor is not None
        nn.init.uniform_(tensor, -1, 1)
    return decoder


def plain_decoder(decoder: MlpDecoder, features: list[Tensor], *, batch_statistics: bool = False) -> Tensor:
    """Project each level, upsample, concatenate, fuse, normalize, ReLU, classify."""
    size = features[0].shape[2:]
    projected = [
        interpolate(layer(feature), size=size, mode="bilinear", align_corners=False)
        for layer, feature in zip(decoder.projections, features, strict=True)
    ]
    fused = conv2d(torch.cat(projected, dim=1), decoder.fuse.weight)
    norm = decoder.norm
    if batch_statistics:
        mean, variance = fused.mean((0, 2, 3)), fused.var((0, 2, 3), unbiased=False)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    mean, variance, weight, bias = (t.view(1, -1, 1, 1) for t in (mean, variance, norm.weight, norm.bias))
    hidden = ((fused - mean) / torch.sqrt(variance + norm.eps) * weight + bias).clamp(min=0)
    return conv2d(hidden, decoder.classify.weight, decoder.classify.bias)


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_plain_formulation(sizes: tuple[tuple[int, int], ...]) -> None:
    features = random_features(sizes)
    decoder = random_decoder().eval()
    logits = decoder(features)
    assert logits.shape == (2, NUM_CLASSES, *sizes[0])
    torch.testing.assert_close(logits, plain_decoder(decoder, features), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES)
def test_training_without_dropout_equals_the_plain_formulation(sizes: tuple[tuple[int, int], ...]) -> None:
    features = random_features(sizes)
    decoder = random_decoder(dropout=0.0).train()
    expected = plain_decoder(decoder, features, batch_statistics=True)
    torch.testing.assert_close(decoder(features), expected, rtol=0, atol=1e-10)


def test_equals_transformers_decode_head() -> None:
    features = random_features(SIZES[1])
    decoder = random_decoder().eval()
    config = SegformerConfig(hidden_sizes=list(CHANNELS), decoder_hidden_size=WIDTH, num_labels=NUM_CLASSES)
    oracle = SegformerDecodeHead(config).double().eval()
    for theirs, ours in zip(oracle.linear_projections, decoder.projections, strict=True):
        theirs.proj.load_state_dict({"weight": ours.weight[:, :, 0, 0], "bias": ours.bias})
    # transformers concatenates the coarsest level first.
    parts = decoder.fuse.weight.detach().split(WIDTH, dim=1)
    oracle.linear_fuse.load_state_dict({"weight": torch.cat(parts[::-1], dim=1)})
    oracle.batch_norm.load_state_dict(decoder.norm.state_dict())
    oracle.classifier.load_state_dict(decoder.classify.state_dict())
    torch.testing.assert_close(decoder(features), oracle(tuple(features)), rtol=0, atol=1e-10)


def test_gradient_reaches_every_level_and_every_weight() -> None:
    features = [feature.requires_grad_() for feature in random_features(SIZES[0])]
    decoder = random_decoder().train()
    decoder(features).square().sum().backward()
    biases = [layer.bias for layer in decoder.projections]
    moved = [tensor for tensor in decoder.parameters() if all(tensor is not bias for bias in biases)]
    assert len(moved) == 4 + 1 + 2 + 2
    for tensor in (*features, *moved):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


def test_a_bias_that_batch_statistics_take_away_is_not_moved_by_rounding() -> None:
    features = random_features(SIZES[0])
    decoder = random_decoder().train()
    decoder(features).square().sum().backward()
    for layer in decoder.projections:
        assert torch.equal(layer.bias.grad, torch.zeros_like(layer.bias))
    decoder.eval()(features).square().sum().backward()
    for layer in decoder.projections:
        assert layer.bias.grad is not None
        assert layer.bias.grad.abs().max() > 1e-3


def test_dropout_takes_whole_channels_before_the_class_layer() -> None:
    decoder = random_decoder(dropout=0.5).train()
    seen: list[Tensor] = []
    decoder.classify.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = random_features(SIZES[0])
    torch.manual_seed(0)
    decoder(features)
    decoder.dropout.eval()
    decoder(features)
    dropped, kept = seen
    gone = dropped.abs().amax((2, 3)) == 0
    assert 0.2 < gone.double().mean() < 0.8
    torch.testing.assert_close(dropped[~gone], 2 * kept[~gone])


@pytest.mark.parametrize("training", [False, True])
def test_levels_of_one_grid_are_decoded_token_by_token(training: bool) -> None:
    """So mixing the token grids of images would teach nothing: it moves logits with their tokens, and no more."""
    decoder = random_decoder(dropout=0.0).train(training)
    features = random_features(SIZES[2])

    def mixed(maps: Tensor) -> Tensor:
        swapped = maps.clone()
        swapped[:, :, 2:7, 1:5] = maps.flip(0)[:, :, 2:7, 1:5]
        return swapped

    torch.testing.assert_close(decoder([mixed(feature) for feature in features]), mixed(decoder(features)))
