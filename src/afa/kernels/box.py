"""Resizing between boxes that differ by image, for a whole batch at once.

A crop, a bilinear resize and a paste are linear along each axis, so for a batch of boxes they are two batched matrix
products. The shapes of these depend on the canvas alone and the host reads no box, so the GPU is not synchronized. On a
GPU they are one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afa.kernels.dispatch import MOST_BLOCKS, fused_by


def axis_weights(
    out_size: int,
    in_size: int,
    *,
    out_start: Tensor,
    out_length: Tensor,
    in_start: Tensor,
    in_length: Tensor,
    align_corners: bool,
) -> Tensor:
    """Bilinear weights along one axis, from one span of each image to another.

    Args:
        out_size: Positions of the result.
        in_size: Positions of the source.
        out_start: (B,) int64 first position that is written.
        out_length: (B,) int64 positions written, at least 1.
        in_start: (B,) int64 first position that is read.
        in_length: (B,) int64 positions read, at least 1.
        align_corners: As in `torch.nn.functional.interpolate`.

    Returns:
        (B, out_size, in_size) float32, 0 in the rows outside the written span.
    """
    position = torch.arange(out_size, device=out_start.device)[None] - out_start[:, None]  # (B, out_size)
    inside = (position >= 0) & (position < out_length[:, None])
    position = position.clamp(min=0).double()
    if align_corners:
        source = position * (in_length - 1)[:, None] / (out_length - 1).clamp(min=1)[:, None]
    else:
        source = ((position + 0.5) * in_length[:, None] / out_length[:, None] - 0.5).clamp(min=0)
    last = (in_length - 1)[:, None]  # (B, 1)
    low = torch.minimum(source.floor().long(), last)
    high = torch.minimum(low + 1, last)
    part = (source - low).clamp(max=1).float()
    weights = torch.zeros(*position.shape, in_size, device=out_start.device)  # (B, out_size, in_size)
    weights.scatter_add_(2, (low + in_start[:, None])[:, :, None], ((1 - part) * inside)[:, :, None])
    return weights.scatter_add_(2, (high + in_start[:, None])[:, :, None], (part * inside)[:, :, None])


@fused_by("box_triton", when=lambda maps, *_, **__: maps.shape[0] * maps.shape[1] <= MOST_BLOCKS)
def move_box(maps: Tensor, size: tuple[int, int], *, source: Tensor, target: Tensor, align_corners: bool) -> Tensor:
    """Cut a box out of each image, resize it, and paste it into another box of an empty canvas.

    Args:
        maps: (B, P, h, w) floating.
        size: (H, W) of the canvas.
        source: (B, 4) int64 (top, bottom, left, right) of the box in `maps`, half open, not empty.
        target: (B, 4) int64 of the box in the result, likewise.
        align_corners: As in `torch.nn.functional.interpolate`.

    Returns:
        (B, P, H, W) float32, 0 outside the box.
    """
    weights = []
    for axis, (out_size, in_size) in enumerate(zip(size, maps.shape[2:], strict=True)):
        (start, end), (first, last) = (box[:, 2 * axis : 2 * axis + 2].unbind(1) for box in (source, target))  # (B,)
        spans = {"out_start": first, "out_length": last - first, "in_start": start, "in_length": end - start}
        weights.append(axis_weights(out_size, in_size, **spans, align_corners=align_corners))  # (B, out, in)
    rows, columns = weights  # (B, H, h), (B, W, w)
    return rows[:, None] @ maps.float() @ columns.transpose(1, 2)[:, None]  # (B, P, H, W)
