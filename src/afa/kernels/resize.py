"""Bilinear resizing of maps, corners not aligned, as in `torch.nn.functional.interpolate`; fused kernels on a GPU.

On a GPU, PyTorch's gradient adds up one value at a time, in no fixed order, and its forward pass reaches only a
fraction of the memory's speed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from afa.kernels.dispatch import FUSED_TYPES, MOST_BLOCKS, fused_by


def _takes_maps(maps: Tensor, *_: object) -> bool:
    return maps.dtype in FUSED_TYPES and maps.shape[0] * maps.shape[1] <= MOST_BLOCKS


def _takes_levels(fine: Tensor, *coarse: Tensor) -> bool:
    return len(coarse) in (1, 2) and all(_takes_maps(level) and level.dtype == fine.dtype for level in (fine, *coarse))


@fused_by("resize_triton", when=_takes_maps)
def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps.

    Args:
        maps: (B, P, h, w) floating.
        size: (H, W).

    Returns:
        (B, P, H, W), contiguous on a GPU.
    """
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)  # (B, P, H, W)


@fused_by("resize_triton", when=_takes_levels)
def sum_levels(fine: Tensor, *coarse: Tensor) -> Tensor:
    """Enlarge the levels of a pyramid to the finest one's size and add them up.

    Args:
        fine: (B, P, H, W); may be overwritten.
        coarse: (B, P, h_i, w_i) maps of the same precision.

    Returns:
        (B, P, H, W), channels-last on a GPU.
    """
    for level in coarse:
        # Fresh memory costs more than the sum: nothing needs the finest level again.
        fine.add_(interpolate(level, size=fine.shape[2:], mode="bilinear", align_corners=False))  # (B, P, H, W)
    return fine
