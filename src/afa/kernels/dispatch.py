"""Where computations run as fused Triton kernels (modules named `*_triton`); plain PyTorch serves everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

MOST_BLOCKS = 65_535
"""Blocks that a CUDA grid can have along its second and its third axis."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fused(device: torch.device) -> bool:
    """Whether fused kernels run on a device: on CUDA, where Triton is installed and can build kernels.

    Setting `TRITON_INTERPRET=1` before the start runs the same kernels on a CPU, very slowly, to test them.
    """
    if not _HAS_TRITON:
        return False
    return _INTERPRETED or (device.type == "cuda" and _builds_kernels(device))


@functools.cache
def _builds_kernels(device: torch.device) -> bool:
    """Whether Triton builds and starts a kernel; told once if not. It wants a C compiler and Python's headers."""
    # Triton 3.9 warns where this is not said, and later versions no longer join products with sums by themselves.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        from afa.kernels.probe_triton import try_kernel

        try_kernel(device)
    except Exception as error:
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        print(
            f"fused GPU kernels are off, computing goes on without them and slower: {reason}; Triton needs a C "
            "compiler and the headers of Python (on Debian: gcc and python3-dev)",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True
