"""Where computations run as fused Triton kernels (modules named `*_triton`); plain PyTorch serves everywhere else."""

from __future__ import annotations

import importlib.util
import os

import torch

MOST_BLOCKS = 65_535
"""Blocks that a CUDA grid can have along its second and its third axis."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fused(device: torch.device) -> bool:
    """Whether fused kernels run on a device: on CUDA, where Triton is installed.

    Setting `TRITON_INTERPRET=1` before the start runs the same kernels on a CPU, very slowly, to test them.
    """
    return (device.type == "cuda" or _INTERPRETED) and _HAS_TRITON
