"""The fused resizing against `interpolate`: in Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.kernels.dispatch import fused
from afa.kernels.resize import resize, sum_levels
from interpreted import interpret

SIZES = (((4, 5), (16, 20)), ((7, 3), (10, 33)), ((1, 6), (9, 6)), ((9, 8), (5, 3)), ((3, 2), (10, 14)))
"""Sizes of maps before and after: whole and broken factors, edges, smaller ones."""


def interpolated(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return interpolate(maps, size=size, mode="bilinear", align_corners=False)


def assert_near(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


def check_resizing(device: str) -> None:
    """Results and gradients in float32 and bfloat16, for maps and for pyramids."""
    assert fused(torch.device(device))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 1e-2)):
        for small, large in SIZES[: None if dtype == torch.float32 else 1]:
            maps = draw(1, 2, *small).to(dtype).requires_grad_()
            exact = maps.detach().double().requires_grad_()
            grad = draw(1, 2, *large).to(dtype)
            result, expected = resize(maps, large), interpolated(exact, large)
            result.backward(grad)
            expected.backward(grad.double())
            assert result.is_contiguous()
            assert_near(result.detach(), expected.detach(), tolerance)
            assert_near(maps.grad, exact.grad, tolerance)
        for sizes in (((5, 18), (3, 9), (5, 9)), ((5, 18), (2, 18))):
            levels = [draw(2, 20, *size).to(dtype).requires_grad_() for size in sizes]
            exacts = [level.detach().double().requires_grad_() for level in levels]
            total = sum_levels(*levels)
            expected = exacts[0] + sum(interpolated(level, sizes[0]) for level in exacts[1:])
            grad = draw(2, 20, *sizes[0]).to(dtype)
            total.backward(grad)
            expected.backward(grad.double())
            assert total.is_contiguous(memory_format=torch.channels_last)
            assert_near(total.detach(), expected.detach(), tolerance)
            for level, other in zip(levels, exacts, strict=True):
                assert_near(level.grad, other.grad, tolerance)
    assert resize(draw(0, 3, 4, 5), (8, 10)).shape == (0, 3, 8, 10)


def test_interpreted_kernels_equal_interpolate() -> None:
    command = (
        "import test_resize_triton as t, afa.kernels.resize_triton as r; r._CHANNELS = 16; t.check_resizing('cpu')"
    )
    interpret(command, __file__)


@pytest.mark.gpu
def test_compiled_kernels_equal_interpolate() -> None:
    check_resizing("cuda")


def test_plain_resizing_is_interpolate() -> None:
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(resize(maps, (8, 9)), interpolated(maps, (8, 9)))
    levels = [torch.randn(2, 3, *size) for size in ((8, 10), (4, 5), (2, 3), (1, 1))]
    expected = levels[0] + sum(interpolated(level, (8, 10)) for level in levels[1:])
    torch.testing.assert_close(sum_levels(levels[0].clone(), *levels[1:]), expected)
    assert sum_levels(levels[0]) is levels[0]
