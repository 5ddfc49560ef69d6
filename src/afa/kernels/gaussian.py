"""Sums over all pairs of points, weighted by the exponential of a product of rows; on a GPU one fused kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from afa.kernels.dispatch import fused_by

_LARGEST_HEAD = 256  # of fused attention
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # the third one would store all pairs
_WIDEST_KEY = 64  # of `gaussian_triton`


def _takes_rows(query: Tensor, *_: object, **__: object) -> bool:
    """Whether the fused kernel is used; on GPUs before Ampere, Triton cannot use tensor cores and is slow."""
    if query.dtype != torch.float16 or query.shape[2] > _WIDEST_KEY:
        return False
    return query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) >= (8, 0)


@fused_by("gaussian_triton", when=_takes_rows)
def sum_pairs(query: Tensor, key: Tensor, values: Tensor, *, scale: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum values over all points, weighted by the exponential of a product of rows. No pair is stored.

    The reference is fused attention, which divides by the sum of the weights of all keys. One more key, of weight
    exp(0) = 1 for every query, with a value channel of its own, tells that sum: dividing by that channel undoes the
    division.

    Args:
        query: (B, N, D) float16, float32 or float64.
        key: (B, N, D), likewise. In half precision no product of a query and a key may exceed log 65504.
        values: (B, N, V) float32 or float64, of a largest magnitude of 1 because half precision has few exponents.
        scale: Factor of the sums, a scalar.
        count: (B,) integer: only the first `count` points of each image take part. The fused kernel reads no other, and
            makes their sums 0. The reference reads all: the values of the others have to be 0, and their sums mean
            nothing. None: all N.

    Returns:
        (B, N, V): scale * sum_j exp(q_i . k_j) v_j.
    """
    key = pad(key, (0, 0, 0, 1))  # (B, N + 1, D)
    level = 2.0 ** round(math.log2(values.shape[1] + 1) / 2)  # for the extra channel the middle of the range
    sums = []
    for part in torch.split(values, _LARGEST_HEAD - 1, 2):
        value = pad(part, (0, 1, 0, 1))  # (B, N + 1, V + 1)
        value[:, -1, -1] = level
        width = value.shape[2]
        size = math.ceil(max(width, query.shape[2]) / 8) * 8  # fused attention wants one size, a multiple of 8
        q, k, v = (pad(rows.to(query.dtype), (0, size - rows.shape[2]))[:, None] for rows in (query, key, value))
        with sdpa_kernel(_FUSED):
            attended = scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, :width].to(values.dtype)
        sums.append(attended[..., :-1] * (level * scale) / attended[..., -1:])  # (B, N, V)
    return torch.cat(sums, 2)
