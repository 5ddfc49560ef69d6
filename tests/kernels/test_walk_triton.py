"""The fused walk against the plain code: in Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from afa.kernels import dispatch as kernels
from afa.kernels.dispatch import fused
from afa.kernels.walk import spread
from interpreted import interpret
from tensors import unchanged

CASES = (
    # Rows and columns of tokens, score maps, radius, power, epsilon.
    ((5, 19), 6, 2, 2.0, 0.1),
    ((3, 37), 4, 8, 2.0, 0.1),
    ((2, 50), 5, 20, 0.5, 0.1),
    ((6, 5), 3, 9, 3.0, 0.0),
    ((1, 16), 1, 3, 1.0, 0.0),
    ((17, 1), 21, 4, 2.0, 0.0),
    ((4, 6), 8, 0, 2.0, 0.1),
)


def draw(grid: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """An affinity that is not symmetric, a third of it 0, with one token that is like none; and scores."""
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    affinity = torch.rand(2, tokens, tokens, generator=generator)
    affinity[torch.rand(affinity.shape, generator=generator) < 0.3] = 0
    affinity[1, :, tokens // 2] = 0
    return affinity, torch.rand(2, channels, *grid, generator=generator)


plain = inspect.unwrap(spread)


def check(device: str) -> None:
    """Compare with the plain code in float64, then what is not the usual case."""
    assert fused(torch.device(device))
    for grid, channels, radius, power, epsilon in CASES:
        affinity, scores = draw(grid, channels)
        knobs: dict[str, Any] = {"radius": radius, "power": power, "epsilon": epsilon}
        expected = plain(affinity.double(), scores.double(), **knobs)
        found = spread(affinity.to(device), scores.to(device), **knobs)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.cpu().double(), expected, rtol=1e-5, atol=1e-7, msg=lambda text, case=(grid, knobs): f"{case}: {text}"
        )
        assert not found.flatten(2)[1, :, grid[0] * grid[1] // 2].any()
    affinity, scores = (values.to(device) for values in draw((3, 4), 3))
    usual: dict[str, Any] = {"radius": 1, "power": 2.0, "epsilon": 0.1}
    # Any strides are read as they are meant, and nothing is written to.
    strided = affinity.transpose(1, 2), scores.transpose(2, 3).contiguous().transpose(2, 3)
    with unchanged(*strided):
        torch.testing.assert_close(spread(*strided, **usual), plain(*strided, **usual))
    # Half precision: stored values are rounded, sums are not.
    low = affinity.bfloat16(), scores.bfloat16()
    rounded = spread(*low, **usual)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), plain(low[0].float(), low[1].float(), **usual), rtol=1e-2, atol=1e-4)
    # The power of 0, and whatever a gradient is asked of, take the plain code.
    to_0 = usual | {"power": 0.0}
    assert torch.equal(spread(affinity, scores, **to_0), plain(affinity, scores, **to_0))
    spread(affinity.requires_grad_(), scores, **usual).sum().backward()
    assert affinity.grad is not None
    assert affinity.grad.isfinite().all()
    assert spread(affinity.detach()[:0], scores[:0], **usual).shape == (0, 3, 3, 4)


def test_interpreted_kernel_equals_the_plain_code() -> None:
    interpret("import test_walk_triton as t; t.check('cpu')", __file__)


@pytest.mark.gpu
def test_compiled_kernel_equals_the_plain_code() -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_gpu_without_triton_takes_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    given = tuple(values.to("cuda") for values in draw((3, 4), 3))
    usual: dict[str, Any] = {"radius": 1, "power": 2.0, "epsilon": 0.1}
    assert torch.equal(spread(*given, **usual), plain(*given, **usual))
