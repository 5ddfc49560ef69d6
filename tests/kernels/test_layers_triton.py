"""The fused layers against PyTorch's: in Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afa.kernels import dispatch as kernels
from afa.kernels.dispatch import fused
from afa.model.layers import InnerLayerNorm, LowLayerNorm
from encoders import both, plain_encoder
from interpreted import interpret

SHAPES = ((20, 7, 9), (16, 3, 8), (1, 9, 1))
"""Channels, height and width of images of tokens: whole and partial blocks."""

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
"""Largest norm of a difference, relative to the norm. The interpreter cuts bfloat16 off instead of rounding."""


def differences(
    first: Callable[..., Tensor], second: Callable[..., Tensor], values: list[Tensor], dtype: torch.dtype
) -> Iterator[float]:
    """How far results and gradients lie apart: the first of tokens in `dtype`, the second in float64."""
    grad: Tensor | None = None
    found: list[list[Tensor]] = []
    for function, kind, other in ((second, torch.float64, torch.float64), (first, dtype, torch.float32)):
        rounded = [values[0].to(dtype).to(kind), *(value.to(other) for value in values[1:])]
        leaves = [value.detach().clone().requires_grad_() for value in rounded]
        result = function(*leaves)
        if grad is None:
            grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.device).to(dtype)
        result.backward(grad.to(result.dtype))
        found.append([result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + len(values)
    for exact, fast in zip(*found, strict=True):
        yield float((fast.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check_kernels(device: str) -> None:
    """Compare both kernels with PyTorch for all shapes, with and without bias, in each precision."""
    from afa.kernels.depthwise_triton import depthwise_gelu, linear
    from afa.kernels.norm_triton import layer_norm

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in TOLERANCES.items():
        for channels, height, width in SHAPES:
            tokens = draw(2, height * width, channels)
            for bias in ([draw(channels)], []):

                def convolve(tokens: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
                    image = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # noqa: B023
                    mapped = F.conv2d(image, weight, *bias, padding=1, groups=len(weight))
                    return F.gelu(mapped).flatten(2).transpose(1, 2)

                def convolve_fused(tokens: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
                    return depthwise_gelu(tokens, weight, bias[0] if bias else None, height, width)  # noqa: B023

                def normalize(tokens: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
                    return F.layer_norm(tokens, weight.shape, weight, bias[0] if bias else None, 1e-5)

                def normalize_fused(tokens: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
                    return layer_norm(tokens, weight, bias[0] if bias else None, 1e-5, tokens.dtype)

                for what, first, second, weight in (
                    ("depthwise", convolve_fused, convolve, draw(channels, 1, 3, 3)),
                    ("norm", normalize_fused, normalize, draw(channels)),
                    ("linear", linear, F.linear, draw(min(3, channels), channels)),
                ):
                    if what == "norm" and channels == 1:
                        continue  # of one channel nothing is left
                    if what == "linear" and (not bias or dtype != torch.float32):
                        continue  # takes a bias, and half precision under autocast alone
                    inputs = [tokens, weight, *(each[: len(weight)] for each in bias)]
                    for part, difference in enumerate(differences(first, second, inputs, dtype)):
                        assert difference < tolerance, (what, dtype, channels, len(bias), part, difference)
    # Without gradient nothing is kept, and the result is the same.
    tokens, weight = draw(1, 6, 4), draw(4, 1, 3, 3)
    kept = depthwise_gelu(tokens.requires_grad_(), weight, None, 2, 3)
    with torch.no_grad():
        assert torch.equal(depthwise_gelu(tokens, weight, None, 2, 3), kept)
    scale = draw(4)
    kept = layer_norm(tokens, scale, None, 1e-5, torch.float32)
    with torch.no_grad():
        assert torch.equal(layer_norm(tokens, scale, None, 1e-5, torch.float32), kept)
    assert layer_norm(draw(0, 3, 4), draw(4), None, 1e-5, torch.float32).shape == (0, 3, 4)
    assert depthwise_gelu(draw(0, 6, 4), weight, None, 2, 3).shape == (0, 6, 4)


def check_encoder(device: str) -> None:
    """A whole encoder: its features and gradients, then its precisions under autocast."""
    assert fused(torch.device(device))
    plain, faster = (encoder.to(device) for encoder in both(plain_encoder()))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = [encoder(image).last_hidden_state for encoder in (plain, faster)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
        for output in outputs:
            output.square().mean().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in faster.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-2, atol=1e-5, msg=name)
    for precise in (True, False):
        written = precisions(faster, image, gradient=precise)
        assert written[InnerLayerNorm] == {torch.bfloat16}
        assert written[LowLayerNorm] == {torch.float32 if precise else torch.bfloat16}


def precisions(encoder: nn.Module, image: Tensor, *, gradient: bool) -> dict[type[nn.Module], set[torch.dtype]]:
    """What norms of each kind write under autocast to bfloat16."""
    written: dict[type[nn.Module], set[torch.dtype]] = {}
    handles = [
        module.register_forward_hook(lambda norm, _, out: written.setdefault(type(norm), set()).add(out.dtype))
        for module in encoder.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    with torch.set_grad_enabled(gradient), torch.autocast(image.device.type, dtype=torch.bfloat16):
        encoder(image)
    for handle in handles:
        handle.remove()
    return written


def test_interpreted_kernels_equal_pytorch() -> None:
    command = (
        "import test_layers_triton as t, afa.kernels.depthwise_triton as l; l._ROWS = 4; l._COLUMNS = 8"
        "; l._CHANNELS = 16; t.check_kernels('cpu'); t.check_encoder('cpu')"
    )
    interpret(command, __file__)


@pytest.mark.gpu
def test_compiled_kernels_equal_pytorch() -> None:
    check_kernels("cuda")
    check_encoder("cuda")


@pytest.mark.gpu
def test_a_gpu_without_triton_takes_the_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    plain, faster = (encoder.to("cuda") for encoder in both(plain_encoder()))
    image = torch.randn(2, 3, 64, 64, device="cuda")
    outputs = [encoder(image).last_hidden_state for encoder in (plain, faster)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-3)
