"""Where fused kernels run, and what happens where Triton cannot build them."""

from __future__ import annotations

import pytest
import torch

from afa.kernels import dispatch as kernels
from afa.kernels.dispatch import fused
from interpreted import interpret

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def forgotten() -> None:
    kernels._builds_kernels.cache_clear()


def test_a_cpu_has_none() -> None:
    assert not fused(torch.device("cpu"))


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    monkeypatch.setattr(kernels, "_builds_kernels", lambda device: True)
    assert not fused(CUDA)


def test_where_kernels_cannot_be_built_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore of it.")

    monkeypatch.setattr("afa.kernels.probe_triton.try_kernel", fail)
    assert not fused(CUDA)
    assert not fused(CUDA)
    told = capsys.readouterr().err
    assert told.count("fused GPU kernels are off") == 1
    assert told.count("\n") == 1
    assert "; Triton needs a C compiler" in told


def test_where_the_kernel_starts_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("afa.kernels.probe_triton.try_kernel", lambda device: None)
    assert fused(CUDA)


def test_the_kernel_runs_in_the_interpreter() -> None:
    command = (
        "import torch; from afa.kernels.probe_triton import _fill_kernel; out = torch.zeros(1); _fill_kernel[(1,)](out)"
        "; assert out.item() == 1"
    )
    interpret(command, __file__)


@pytest.mark.gpu
def test_a_gpu_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert fused(CUDA)
    assert not capsys.readouterr().err
