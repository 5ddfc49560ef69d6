"""The faster layers against those of transformers and PyTorch that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from afa.kernels import layers as functions
from afa.model import layers
from afa.model.layers import MixMlp, PointwiseLinear, SequenceReduction, SparingGelu, speed_up
from encoders import both, plain_encoder


def random_image(batch: int, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_mit_gives_the_same_features_and_gradients(batch: int) -> None:
    plain, faster = both(plain_encoder())
    image = random_image(batch)
    outputs = [encoder(image).last_hidden_state for encoder in (plain, faster)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in faster.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch", [1, 3])
def test_mit_without_gradient_gives_the_same_features(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough that every stage but the last takes one or two images at a time.
    monkeypatch.setattr(layers, "_PIECE_BYTES", 20_000)
    plain, faster = both(plain_encoder())
    image = random_image(batch)
    kept = image.clone()
    with torch.no_grad():
        torch.testing.assert_close(
            faster(image).last_hidden_state, plain(image).last_hidden_state, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(image, kept)


def test_plain_vision_transformers_give_the_same_features() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    plain, faster = both(Dinov2Model(config).eval())
    image = random_image(2, side=28)
    with torch.no_grad():
        torch.testing.assert_close(
            faster(image).last_hidden_state, plain(image).last_hidden_state, rtol=1e-4, atol=1e-5
        )
    assert {type(module) for module in faster.modules()} >= {PointwiseLinear, SparingGelu}


def test_every_layer_of_mit_is_replaced_and_no_name_changes() -> None:
    plain, faster = both(plain_encoder())
    kinds = {type(module) for module in faster.modules()}
    assert kinds >= {PointwiseLinear, SparingGelu, MixMlp, SequenceReduction}
    assert not kinds & set(layers._FASTER)
    assert list(faster.state_dict()) == list(plain.state_dict())


def test_layers_of_other_classes_stay() -> None:
    class Special(nn.Linear):
        pass

    module = nn.Sequential(Special(2, 2), nn.ReLU())
    speed_up(module)
    assert type(module[0]) is Special


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (33, 4), (1, 2)])
def test_stem_over_squares_of_pixels_is_the_same_convolution(size: tuple[int, int]) -> None:
    stem = plain_encoder().stages[0].patch_embeddings.proj
    results, gradients = [], []
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    for convolve in (stem, lambda image: layers.StemConv._over_squares(stem, image)):
        stem.zero_grad()
        results.append(convolve(image))
        results[-1].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in stem.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert results[1].is_contiguous(memory_format=torch.channels_last)


def test_stem_is_only_the_convolution_that_it_stands_for() -> None:
    _, faster = both(plain_encoder())
    kinds = [type(stage.patch_embeddings.proj) for stage in faster.stages]
    assert kinds == [layers.StemConv, nn.Conv2d, nn.Conv2d, nn.Conv2d]


def test_linear_takes_any_number_of_leading_dimensions_and_no_bias() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        plain = nn.Linear(6, 10, bias=bias)
        faster = copy.deepcopy(plain)
        speed_up(nn.ModuleList([faster]))
        for shape in ((6,), (5, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6)):
            tokens = torch.randn(shape)
            torch.testing.assert_close(faster(tokens), plain(tokens))
        strided = torch.randn(2, 6, 3).transpose(1, 2)
        torch.testing.assert_close(faster(strided), plain(strided))


def test_linear_in_other_precisions_is_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("float32")

    monkeypatch.setattr(functions, "_map", refuse)
    layer = PointwiseLinear(6, 10)
    tokens = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(tokens).dtype == torch.bfloat16
    assert layer.double()(tokens.double()).dtype == torch.float64


def test_gelu_overwrites_its_input_only_without_gradient() -> None:
    layer = SparingGelu()
    values = torch.linspace(-3, 3, 50)
    expected = nn.functional.gelu(values)
    kept = values.clone()
    torch.testing.assert_close(layer(kept), expected)
    assert torch.equal(kept, values)
    with torch.no_grad():
        overwritten = layer(kept)
    torch.testing.assert_close(overwritten, expected)
    assert overwritten.data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["dwconv", "sequence_reduction"])
def test_convolutions_see_tokens_as_a_channels_last_image(
    batch: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single image read as contiguous would be copied, once for each of these convolutions."""
    _, faster = both(plain_encoder())
    seen: list[Tensor] = []
    convolve = functions.conv2d

    def watch(image: Tensor, *rest: Any, **settings: Any) -> Tensor:
        if name == "dwconv" and settings.get("groups", 1) > 1:
            seen.append(image)
        return convolve(image, *rest, **settings)

    monkeypatch.setattr(functions, "conv2d", watch)
    for path, module in faster.named_modules():
        if path.endswith(f".{name}") and isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    faster(random_image(batch))
    assert len(seen) >= 3
    for image in seen:
        assert image.stride(0) == image[0].numel()
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_layer_norm_keeps_to_the_precision_of_autocast_only_without_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.LayerNorm(32)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.uniform_(layer.bias, -1, 1)
    plain, faster = both(layer)
    tokens = 5 + 3 * torch.randn(4, 7, 32)
    exact = plain(tokens).detach()
    assert torch.equal(faster(tokens), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(faster(tokens), exact)
        with torch.no_grad():
            low = faster(tokens.bfloat16())
    assert low.dtype == torch.bfloat16
    # Input and result are rounded to 8 bits, the input's mean of 5 included; the sums are not.
    assert float((low - exact).abs().max()) < 0.05


def test_layer_norm_under_autocast_to_float16_is_pytorchs() -> None:
    plain, faster = both(nn.LayerNorm(32))
    tokens = 1e5 * torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(faster(tokens), plain(tokens))


def test_layer_norm_under_autocast_without_weights_is_pytorchs() -> None:
    plain, faster = both(nn.LayerNorm(32, elementwise_affine=False))
    tokens = torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(faster(tokens), plain(tokens))
