"""Where fused kernels run, and what happens where Triton cannot build them."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from afa.kernels import dispatch as kernels
from afa.kernels.dispatch import fused, fused_by
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


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, int], Tensor]:
    """A reference that adds, and a fused function that subtracts, of vectors alone."""

    @fused_by("pair_triton", when=lambda tokens, amount: tokens.dim() == 1)
    def shift(tokens: Tensor, amount: int) -> Tensor:
        return tokens + amount

    module = SimpleNamespace(shift=lambda tokens, amount: tokens - amount)
    monkeypatch.setitem(sys.modules, "afa.kernels.pair_triton", module)  # type: ignore[arg-type]
    return shift


@pytest.mark.parametrize(
    ("where", "fits", "compiling", "expected"),
    [(True, True, False, -1), (False, True, False, 1), (True, False, False, 1), (True, True, True, 1)],
)
def test_the_fused_function_serves_where_kernels_run_and_take_the_arguments(
    pair: Callable[..., Tensor],
    where: bool,
    fits: bool,
    compiling: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "fused", lambda device: where)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    tokens = torch.zeros(3) if fits else torch.zeros(3, 1)
    for found in (pair(tokens, 1), pair(tokens=tokens, amount=1)):
        assert found.unique().tolist() == [expected]
    assert inspect.unwrap(pair)(tokens, 1).unique().tolist() == [1]


PAIRS = [
    (path.stem, *pair)
    for path in sorted(Path(kernels.__file__).parent.glob("*.py"))
    for pair in re.findall(
        r'^@fused_by\("(\w+)".*\n(?:@.*\n)*def (\w+)', path.read_text(encoding="utf-8"), re.MULTILINE
    )
]
"""Module of the reference, module of the fused function, name of both."""


@pytest.mark.parametrize(("module", "fused_module", "name"), PAIRS)
def test_a_pair_has_one_signature(module: str, fused_module: str, name: str) -> None:
    pytest.importorskip("triton")
    functions = [getattr(importlib.import_module(f"afa.kernels.{each}"), name) for each in (module, fused_module)]
    of_reference, of_fused = (
        [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
        for function in functions
    )
    assert of_reference == of_fused


def test_every_triton_module_belongs_to_a_pair() -> None:
    modules = {path.stem for path in Path(kernels.__file__).parent.glob("*_triton.py")}
    assert {fused_module for _, fused_module, _ in PAIRS} == modules - {"probe_triton"}


@pytest.mark.gpu
def test_a_gpu_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert fused(CUDA)
    assert not capsys.readouterr().err
