"""The fused end of the affinity head against the plain code: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from afa.kernels import dispatch
from afa.kernels.dispatch import fused
from afa.model.heads import AffinityHead
from afa.types import RawAttention
from interpreted import interpret

SIZES = (1, 12, 64, 65, 150)
"""Rows of the matrices: less than a tile, whole tiles, partial ones."""


def check(device: str) -> None:
    """Compare the kernel with the plain code for all sizes and precisions, then the whole head."""
    from afa.kernels.affinity_triton import symmetric_sigmoid

    assert fused(torch.device(device))
    generator = torch.Generator().manual_seed(0)
    bias = torch.tensor([-0.7], device=device)
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            mixed = (3 * torch.randn(2, size, size, generator=generator)).to(device, dtype)
            before = mixed.clone()
            for given in (mixed, mixed.transpose(1, 2)):
                found = symmetric_sigmoid(given, bias)
                assert found.dtype == torch.float32
                expected = torch.sigmoid(mixed.float() + mixed.float().transpose(1, 2) + bias)
                torch.testing.assert_close(
                    found, expected, rtol=1e-5, atol=0, msg=lambda text, at=(size, dtype): f"{at}: {text}"
                )
                assert torch.equal(found, found.transpose(1, 2))
            assert torch.equal(mixed, before)
    assert symmetric_sigmoid(mixed[:0], bias).shape == (0, SIZES[-1], SIZES[-1])
    far = symmetric_sigmoid(torch.tensor([[[200.0, -200.0], [-200.0, 0.0]]], device=device), bias)
    assert far[0, 0].tolist() == [1, 0]
    check_head(device)


def check_head(device: str) -> None:
    """With gradient the plain code, without it the kernel, of the same affinity."""
    torch.manual_seed(0)
    head = AffinityHead(4)
    nn.init.constant_(head.mix.bias, -0.7)  # type: ignore[arg-type]
    head.to(device)
    for dtype in (torch.float32, torch.bfloat16):
        attention = RawAttention(*(torch.randn(2, 4, 70, 5).to(device, dtype) for _ in range(2)))
        plain = head(attention, scale=0.3)
        plain.sum().backward()
        with torch.no_grad():
            fast = head(attention, scale=0.3)
        assert plain.requires_grad
        assert torch.equal(fast, fast.transpose(1, 2))
        torch.testing.assert_close(fast, plain.detach(), rtol=1e-5, atol=0)


def test_interpreted_kernel_equals_the_plain_code() -> None:
    command = "import test_affinity_triton as t; t.check('cpu')"
    interpret(command, __file__)


@pytest.mark.gpu
def test_compiled_kernel_equals_the_plain_code() -> None:
    check("cuda")


def test_a_compiled_graph_holds_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    head, attention = AffinityHead(4), RawAttention(*(torch.randn(2, 4, 7, 5) for _ in range(2)))
    plain = head(attention)
    monkeypatch.setattr(dispatch, "fused", lambda device: True)
    monkeypatch.setitem(sys.modules, "afa.kernels.affinity_triton", None)  # whoever imports it fails
    with torch.no_grad():
        with pytest.raises(ImportError):
            head(attention)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(head(attention), plain)
