"""Decides where fused Triton kernels (modules named `*_triton`) compute; plain PyTorch computes everywhere else.

A computation is a pair: a reference in PyTorch, and a fused function of the same name and signature in a `*_triton`
module. `fused_by` joins them: a call of the reference runs the faster one of the two.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from afa.errors import first_line

MOST_BLOCKS = 65_535
"""Blocks that a CUDA grid can have along its second and its third axis."""

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that kernels read and write; their sums are float32."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_P = ParamSpec("_P")
_R = TypeVar("_R")


def fused_by(module: str, *, when: Callable[..., bool] | None = None) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a fused function stand in for the PyTorch reference below it, wherever kernels run.

    Compiled and exported programs always hold the reference. `inspect.unwrap` gives the reference alone.

    Args:
        module: Module in `afa.kernels` that holds the fused function, under the name of the reference and with its
            signature. It is imported at the first use, as it needs Triton.
        when: Whether the fused function takes these arguments; called with all of them, on a device that has kernels.
            None: it takes all.

    Returns:
        A decorator of functions whose first argument is a tensor.
    """

    def join(reference: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(reference)
        def choose(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            first = next(iter(args or kwargs.values()))
            assert isinstance(first, torch.Tensor), type(first)
            if not torch.compiler.is_compiling() and fused(first.device) and (when is None or when(*args, **kwargs)):
                kernel: Callable[_P, _R] = getattr(importlib.import_module(f"afa.kernels.{module}"), reference.__name__)
                return kernel(*args, **kwargs)
            return reference(*args, **kwargs)

        return choose

    return join


def fused(device: torch.device) -> bool:
    """Whether fused kernels run on a device: on CUDA, where Triton is installed and can build kernels.

    Setting `TRITON_INTERPRET=1` before the start runs the same kernels on a CPU, very slowly, to test them.
    """
    if not _HAS_TRITON:
        return False
    return _INTERPRETED or (device.type == "cuda" and _builds_kernels(device))


@functools.cache
def _builds_kernels(device: torch.device) -> bool:
    """Whether Triton can build and start a kernel; if not, says so once. It needs a C compiler and Python's headers."""
    # Triton 3.9 warns without this setting, and later versions no longer fuse products and sums by themselves.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        from afa.kernels.probe_triton import try_kernel

        try_kernel(device)
    except Exception as error:
        print(
            f"fused GPU kernels are off, computing goes on without them and slower: {first_line(error)}; "
            "Triton needs a C compiler and the headers of Python (on Debian: gcc and python3-dev)",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True
