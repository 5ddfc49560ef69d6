"""The end of the affinity head, sigmoid(M + M^T + bias), as one fused GPU kernel.

Importing it needs Triton. The reference is in `afa.kernels.affinity`. Each pair of tiles that mirror each other
is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64


@triton.jit
def _symmetric_sigmoid_kernel(mixed, bias, out, size, TILE: tl.constexpr):
    upper = tl.program_id(0)
    left = tl.program_id(1)
    if left > upper:
        return
    start = tl.program_id(2).to(tl.int64) * size * size
    mixed += start
    out += start
    row = upper * TILE + tl.arange(0, TILE)
    column = left * TILE + tl.arange(0, TILE)
    place = row[:, None].to(tl.int64) * size + column[None, :]
    mirrored = column[:, None].to(tl.int64) * size + row[None, :]
    inside = (row < size)[:, None] & (column < size)[None, :]
    mirrored_inside = (column < size)[:, None] & (row < size)[None, :]
    value = tl.load(mixed + place, mask=inside, other=0).to(tl.float32)
    mirror = tl.load(mixed + mirrored, mask=mirrored_inside, other=0).to(tl.float32)
    affinity = tl.sigmoid(value + tl.trans(mirror) + tl.load(bias).to(tl.float32))
    tl.store(out + place, affinity, mask=inside)
    if left < upper:
        tl.store(out + mirrored, tl.trans(affinity), mask=mirrored_inside)


def symmetric_sigmoid(mixed: Tensor, bias: Tensor) -> Tensor:
    """Fused, without gradient; see `afa.kernels.affinity.symmetric_sigmoid`."""
    batch, size, columns = mixed.shape
    assert size == columns, mixed.shape
    assert bias.numel() == 1, bias.shape
    out = torch.empty(mixed.shape, dtype=torch.float32, device=mixed.device)
    if out.numel():
        tiles = triton.cdiv(size, _TILE)
        _symmetric_sigmoid_kernel[(tiles, tiles, batch)](mixed.contiguous(), bias, out, size, TILE=_TILE)
    return out
