"""Gaussian filter over scattered points through the permutohedral lattice, in tensor operations on any device.

Each point adds its values to the vertices of the lattice simplex that holds it (splat). The vertices are blurred along
each lattice axis. Each point then reads its values back from the same vertices (slice). This approximates the sum over
all pairs, in a time linear in the number of points. The exact sum is in `afa.filtering.gaussian`.

Splat, blur and slice are weighted sums of rows, so a lattice consists of row indices and weights. It finds its vertices
by sorting integer keys, without a loop over points.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from afa.errors import AfaError


class PermutohedralLattice:
    """The part of the permutohedral lattice that the points of a batch touch. It is built once and filters any values.

    Construction sorts B x N x (F + 1) keys. The lattice keeps 20 bytes per point and vertex of its simplex, and 12 per
    lattice vertex and axis: at least 60 MB for 8 images of 256 x 256 pixels with 5 features.

    Args:
        features: (B, N, F), divided by their bandwidths: the kernel is exp(-|f_i - f_j|^2 / 2). The images of a batch
            share no vertex.

    Attributes:
        size: Number of lattice vertices M, of the whole batch.

    Raises:
        AfaError: The features are not finite, or too far apart for their bandwidths.

    Source:
        Adams, Baek and Davis 2010; blur weights 1/2, 1, 1/2, order of the axes and final factor as in the filter
        that Kraehenbuehl and Koltun 2011 published with the dense CRF.
    """

    def __init__(self, features: Tensor) -> None:
        batch, count, dim = features.shape
        points = features.detach().flatten(0, 1).t()  # (B, N, F) -> (F, BN)
        if points.dtype not in (torch.float32, torch.float64):
            points = points.float()
        corner, rank, weights = _enclosing_simplex(points)
        keys, strides, bound = _vertex_keys(corner, rank, batch)
        self.batch, self.count, self.dim = batch, count, dim
        # Weights of the vertices of each point's simplex. Splat and slice both apply the factor; with it the filter of
        # a point that lies on a vertex is 1 at distance 0.
        self._weights = weights.t().flatten().mul_(math.sqrt(1 / (1 + 0.5**dim)))  # (F + 1, BN) -> (BN (F + 1),)

        # An entry is a point's share in a vertex; sorted, all entries of a vertex stand together.
        ordered, self._order = _sorted_entries(keys, bound)
        self._sorted_weights = self._weights.index_select(0, self._order)
        self._sources = torch.div(self._order, dim + 1, rounding_mode="floor")  # point of each entry
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
        starts = is_first.nonzero().flatten()
        self.size = len(starts)
        vertex = torch.empty_like(self._order)
        vertex.scatter_(0, self._order.long(), is_first.cumsum(0, dtype=torch.int32).sub_(1))
        self._vertex = vertex  # (BN (F + 1),), rows of the vertices of each point's simplex
        # One more row, which has no entries and is 0, stands for all vertices that no point touches.
        self._starts = pad(starts.int(), (0, 1), value=len(ordered))  # (M + 1,), first entry of each row
        vertices = ordered.index_select(0, starts)
        self._neighbors = [_axis_neighbors(vertices, (dim + 1) * stride - sum(strides)) for stride in strides]
        self._blur_weights = self._weights.new_tensor([1, 0.5, 0.5]).repeat(self.size + 1)

    def filter(self, values: Tensor, *, transpose: bool = False) -> Tensor:
        """Filter values that sit at the points.

        Differentiable in the values: the gradient is the transposed filter of the incoming gradient.

        Args:
            values: (B, N, V), computed in float64 if it is that, else in float32.
            transpose: Apply the transposed filter, which blurs the axes in opposite order. The two filters differ only
                where vertices lack neighbors.

        Returns:
            (B, N, V), about sum_j exp(-|f_i - f_j|^2 / 2) v_j up to a factor: for the colors and positions of a
            photograph the sums are 0.5 to 0.7 of the exact ones. The factor cancels in normalized sums.
        """
        assert values.shape[:2] == (self.batch, self.count), (values.shape, self.batch, self.count)
        filtered: Tensor = _Filter.apply(values, self, transpose)  # type: ignore[no-untyped-call]
        return filtered

    def scaled(self, scale: Tensor) -> PermutohedralLattice:
        """Put a diagonal matrix on both sides of the filter.

        Args:
            scale: (B, N), the diagonal s.

        Returns:
            Lattice whose filter is s * filter(s * values), at no further cost.
        """
        other = object.__new__(PermutohedralLattice)
        other.__dict__.update(self.__dict__)
        spread = scale.to(self._weights).flatten().repeat_interleave(self.dim + 1)
        other._weights = self._weights * spread
        other._sorted_weights = other._weights.index_select(0, self._order)
        return other

    def _apply(self, rows: Tensor, *, transpose: bool) -> Tensor:
        """Splat, blur and slice rows (BN, V) of float32 or float64."""
        table = self._splat(rows)
        weights, starts = self._blur_weights.to(table.dtype), _run_starts(self.size + 1, 3, rows.device)
        for neighbors in reversed(self._neighbors) if transpose else self._neighbors:
            table = embedding_bag(neighbors, table, starts, mode="sum", per_sample_weights=weights)
        weights, starts = self._weights.to(table.dtype), _run_starts(len(rows), self.dim + 1, rows.device)
        return embedding_bag(self._vertex, table, starts, mode="sum", per_sample_weights=weights)

    def _splat(self, rows: Tensor) -> Tensor:
        """Sum rows (BN, V) over the vertices: (M + 1, V), the last row 0."""
        if rows.device.type == "cpu":
            weights = self._sorted_weights.to(rows.dtype)
            return embedding_bag(self._sources, rows, self._starts, mode="sum", per_sample_weights=weights)
        return self._splat_by_addition(rows)

    def _splat_by_addition(self, rows: Tensor) -> Tensor:
        """As `_splat`, for GPUs, where `embedding_bag` would sum a vertex that holds most of an image in one thread."""
        table = rows.new_zeros(self.size + 1, rows.shape[1])
        weights = self._weights.to(rows.dtype)
        for k in range(self.dim + 1):
            table.index_add_(0, self._vertex[k :: self.dim + 1], rows * weights[k :: self.dim + 1, None])
        return table


class _Filter(torch.autograd.Function):
    """A lattice's filter, with the transposed one as its derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: PermutohedralLattice, transpose: bool) -> Tensor:
        ctx.lattice, ctx.transpose = lattice, transpose
        rows = values.flatten(0, 1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return lattice._apply(rows.contiguous(), transpose=transpose).view(values.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.lattice.filter(grads[0], transpose=not ctx.transpose), None, None


def _enclosing_simplex(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the simplex of the lattice around each point.

    The lattice lies in the hyperplane of F + 1 coordinates that sum to 0. The vertices of a simplex differ in their
    remainder: all coordinates of vertex k are k modulo F + 1.

    Args:
        points: (F, P).

    Returns:
        Vertex of remainder 0, (F + 1, P) whole multiples of F + 1, divided by that; rank of each coordinate
        by how far the point lies above that vertex, (F + 1, P) with 0 for the farthest; weight of vertex k,
        (F + 1, P), barycentric.
    """
    dim, count = points.shape
    size = dim + 1
    # Isometry into the hyperplane, times the width that the splat, the blur and the slice have together.
    scale = [math.sqrt(2 / 3) * size / math.sqrt((i + 1) * (i + 2)) for i in range(dim)]
    elevated = points.new_empty(size, count)
    total = points.new_zeros(count)
    for i in reversed(range(dim)):
        scaled = points[i] * scale[i]
        torch.sub(total, scaled, alpha=i + 1, out=elevated[i + 1])
        total += scaled
    elevated[0] = total

    corner = (elevated / size).round_()
    above = elevated.sub_(corner, alpha=size)
    rank = torch.zeros(size, count, dtype=torch.int8, device=points.device)
    for i in range(dim):
        is_lower = above[i] < above[i + 1 :]
        rank[i] += is_lower.sum(0, dtype=torch.int8)
        rank[i + 1 :] += is_lower.logical_not_()
    # Rounding may leave the hyperplane; the coordinates with the largest rounding errors lead back to it.
    rank += corner.sum(0).to(torch.int8)
    wrap = (rank < 0).to(torch.int8) - (rank > dim).to(torch.int8)
    rank += size * wrap
    corner += wrap
    above.sub_(wrap, alpha=size)

    rank = rank.long()
    falling = torch.empty_like(above).scatter_(0, rank, above).div_(size)
    weights = torch.empty_like(above)
    weights[0] = 1 - (falling[0] - falling[dim])
    torch.sub(falling[:dim].flip(0), falling[1:].flip(0), out=weights[1:])
    return corner, rank, weights


def _vertex_keys(corner: Tensor, rank: Tensor, batch: int) -> tuple[Tensor, list[int], int]:
    """Number the vertices of each point's simplex.

    A key is a sum of strides times coordinates, so a step along an axis of the lattice changes it by a constant. The
    coordinates of a vertex are equal modulo F + 1, so a plain numbering would use few of its keys. Strides that are
    multiples of F + 1, apart from the last one, leave the unused keys out.

    Args:
        corner: (F + 1, P) of `_enclosing_simplex`.
        rank: (F + 1, P) of `_enclosing_simplex`.
        batch: Number of images that the points belong to, in order.

    Returns:
        Keys (F + 1, P) int64, which are equal only for equal vertices of an image; the stride of each coordinate, 0 for
        the last one, which follows from the others; and a bound above all keys.
    """
    size = len(corner)
    if not bool(corner.isfinite().all()):
        raise AfaError("features of the Gaussian filter are not finite; check the image and the bandwidths")
    low = corner[:-1].amin(1) - 2  # room for the neighbors of the outermost vertices
    spans = [math.ceil(span / size) * size for span in (corner[:-1].amax(1) + 3 - low).tolist()]
    bound = batch * size * math.prod(spans)
    if bound >= 2**62:
        raise AfaError("features of the Gaussian filter lie too far apart for their bandwidths; use larger bandwidths")
    strides = [*(math.prod(spans[i + 1 :]) for i in range(size - 1)), 0]

    keys = torch.zeros_like(rank)
    for i in range(size - 1):
        keys[0].add_((corner[i] - low[i]).long(), alpha=size * strides[i])
    image = torch.arange(batch, device=corner.device)[:, None] * (bound // batch)
    keys[0].view(batch, -1).add_(image)
    stride = torch.tensor(strides, device=corner.device)
    by_rank = torch.empty_like(rank).scatter_(0, rank, stride[:, None].expand_as(rank))
    for k in range(1, size):
        # All coordinates grow by 1, except one that falls to the other end of the simplex.
        torch.sub(keys[k - 1], by_rank[size - k], alpha=size, out=keys[k])
        keys[k] += sum(strides)
    return keys, strides, bound


def _sorted_entries(keys: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Sort entries (k, p) of (F + 1, P) keys.

    Returns:
        Ascending keys, int64, and in that order the numbers p (F + 1) + k of the entries, int32.
    """
    size, count = keys.shape
    bits = (size * count - 1).bit_length()
    entry = torch.arange(count, device=keys.device) * size + torch.arange(size, device=keys.device)[:, None]
    if keys.device.type == "cpu" and bound << bits <= 2**63:
        # This is several times faster than sorting keys together with their places.
        packed = (keys << bits).bitwise_or_(entry).flatten()
        packed.numpy().sort()
        return packed >> bits, packed.bitwise_and_((1 << bits) - 1).int()
    ordered, order = keys.flatten().sort()
    return ordered, entry.flatten()[order].int()


def _axis_neighbors(vertices: Tensor, step: int) -> Tensor:
    """Find the rows to sum for the blur along an axis.

    Args:
        vertices: (M,) keys, ascending.
        step: From a key to that of the next vertex along the axis.

    Returns:
        (3 (M + 1),) int32: for each vertex its own row, the next one's and the previous one's. Row M stands for
        vertices that are not there; its neighbors are row M, too.
    """
    count = len(vertices)
    wanted = vertices + step
    if vertices.device.type == "cpu":
        place = torch.from_numpy(np.searchsorted(vertices.numpy(), wanted.numpy()))  # fast where `wanted` ascends
    else:
        place = torch.searchsorted(vertices, wanted)
    place.clamp_(max=count - 1)
    place.masked_fill_(vertices.index_select(0, place) != wanted, count)
    rows = torch.full((count + 1, 3), count, dtype=torch.int32, device=vertices.device)
    rows[:-1, 0] = torch.arange(count, dtype=torch.int32, device=vertices.device)
    rows[:-1, 1] = place
    rows[:, 2].scatter_(0, place, rows[:-1, 0])
    rows[-1] = count
    return rows.flatten()


def _run_starts(count: int, length: int, device: torch.device) -> Tensor:
    """(count,) int32, the beginnings of `count` runs of equal length."""
    return torch.arange(0, count * length, length, dtype=torch.int32, device=device)
