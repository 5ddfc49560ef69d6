"""Moving a box of each image to another canvas as one fused GPU kernel.

Importing it needs Triton. The reference is in `afa.kernels.box`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4
_LINE = 128


def move_box(maps: Tensor, size: tuple[int, int], *, source: Tensor, target: Tensor, align_corners: bool) -> Tensor:
    """Cut boxes out of (B, P, h, w) maps, resize and paste them; see `afa.kernels.box.move_box`."""
    batch, planes, height, width = maps.shape
    maps = maps.contiguous()
    out = maps.new_empty(batch, planes, *size, dtype=torch.float32)  # (B, P, H, W)
    grid = (triton.cdiv(size[1], _LINE), triton.cdiv(size[0], _ROWS), batch * planes)
    if out.numel():
        _move_kernel[grid](
            maps,
            source.contiguous(),
            target.contiguous(),
            out,
            planes,
            height,
            width,
            *size,
            ALIGN=align_corners,
            ROWS=_ROWS,
            LINE=_LINE,
        )
    return out


@triton.jit
def _source(position, source, target, ALIGN: tl.constexpr):
    """Whether each position is written, the two positions it is read from, and the share of the second one."""
    start = tl.load(source)
    length = tl.load(source + 1) - start
    first = tl.load(target)
    count = tl.load(target + 1) - first
    position = position - first
    written = (position >= 0) & (position < count)
    position = tl.maximum(position, 0).to(tl.float64)
    if ALIGN:
        place = position * (length - 1).to(tl.float64) / tl.maximum(count - 1, 1).to(tl.float64)
    else:
        place = tl.maximum((position + 0.5) * length.to(tl.float64) / count.to(tl.float64) - 0.5, 0.0)
    low = tl.minimum(place.to(tl.int64), length - 1)
    share = tl.minimum(place - low.to(tl.float64), 1.0).to(tl.float32)
    return written, start + low, start + tl.minimum(low + 1, length - 1), share


@triton.jit
def _move_kernel(
    maps,
    source,
    target,
    out,
    planes,
    height,
    width,
    rows,
    columns,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    plane = tl.program_id(2).to(tl.int64)
    image = plane // planes
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(0) * LINE + tl.arange(0, LINE)[None, :]
    written_y, top, bottom, down = _source(y, source + 4 * image, target + 4 * image, ALIGN)
    written_x, left, right, across = _source(x, source + 4 * image + 2, target + 4 * image + 2, ALIGN)
    written = written_y & written_x & (y < rows) & (x < columns)
    maps += plane * height * width
    upper = tl.load(maps + top * width + left, mask=written, other=0).to(tl.float32) * (1 - across)
    upper += tl.load(maps + top * width + right, mask=written, other=0).to(tl.float32) * across
    lower = tl.load(maps + bottom * width + left, mask=written, other=0).to(tl.float32) * (1 - across)
    lower += tl.load(maps + bottom * width + right, mask=written, other=0).to(tl.float32) * across
    value = tl.where(written, upper * (1 - down) + lower * down, 0.0)
    tl.store(out + plane * rows * columns + y * columns + x, value, mask=(y < rows) & (x < columns))
