"""Bilinear resizing of maps, corners not aligned, as `torch.nn.functional.interpolate` has it; on a GPU fused kernels.

There PyTorch's gradient adds up one value at a time, in no fixed order, and its forward pass reaches a fraction of the
memory's speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.kernels.dispatch import MOST_BLOCKS, fused


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps.

    Args:
        maps: (B, P, h, w) floating.
        size: (H, W).

    Returns:
        (B, P, H, W), contiguous on a GPU.
    """
    if _takes_kernels(maps):
        from afa.kernels.resize_triton import resize as fused_resize

        return fused_resize(maps, (int(size[0]), int(size[1])))
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def sum_levels(levels: Sequence[Tensor]) -> Tensor:
    """Enlarge all levels of a pyramid to the first one's size and add them up.

    Args:
        levels: (B, P, h_i, w_i) maps of one precision. The first may be overwritten.

    Returns:
        (B, P, h_0, w_0), channels-last on a GPU.
    """
    total, *others = levels
    if len(others) in (1, 2) and all(_takes_kernels(level) and level.dtype == total.dtype for level in levels):
        from afa.kernels.resize_triton import sum_levels as fused_sum

        return fused_sum(total, *others)
    size = total.shape[2:]
    for coarse in others:
        # Fresh memory costs more than the sum: nothing needs the first term again.
        total.add_(interpolate(coarse, size=size, mode="bilinear", align_corners=False))
    return total


def _takes_kernels(maps: Tensor) -> bool:
    plain = torch.compiler.is_compiling() or maps.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    return fused(maps.device) and not plain and maps.shape[0] * maps.shape[1] <= MOST_BLOCKS
