"""The lattice against a lattice of dictionaries, and what must hold for any points."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.errors import AfaError
from afa.filtering.gaussian import gaussian_filter
from afa.filtering.lattice import PermutohedralLattice, _sorted_entries
from tensors import unchanged, uniform


def points(count: int, dim: int, *, batch: int = 1, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def values(count: int, channels: int, *, batch: int = 1) -> Tensor:
    return uniform(batch, count, channels, seed=9).double()


def basis(dim: int) -> NDArray[np.float64]:
    """(F + 1, F): orthonormal axes of the hyperplane of coordinates that sum to 0."""
    axes = np.zeros((dim + 1, dim))
    for j in range(1, dim + 1):
        axes[:j, j - 1] = 1
        axes[j, j - 1] = -j
        axes[:, j - 1] /= math.sqrt(j * (j + 1))
    return axes


def naive_shares(features: NDArray[np.float64]) -> list[dict[tuple[int, ...], float]]:
    """Weight of each vertex of the simplex around each point."""
    dim = features.shape[1]
    size = dim + 1
    shares: list[dict[tuple[int, ...], float]] = []
    for point in features:
        place = basis(dim) @ (point * size * math.sqrt(2 / 3))
        # The nearest vertex whose coordinates are multiples of size: round, then mend the sum.
        corner = np.round(place / size).astype(int)
        while corner.sum() != 0:
            error = place / size - corner
            if corner.sum() > 0:
                corner[np.argmin(error)] -= 1
            else:
                corner[np.argmax(error)] += 1
        above = place - size * corner
        order = np.argsort(-above)
        share = {}
        for k in range(size):
            vertex = size * corner + k
            vertex[order[size - k :]] -= size
            if k == 0:
                weight = 1 - (above[order[0]] - above[order[-1]]) / size
            else:
                weight = (above[order[size - k - 1]] - above[order[size - k]]) / size
            share[tuple(vertex.tolist())] = weight
        shares.append(share)
    return shares


def naive_lattice(features: NDArray[np.float64], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Splat, blur and slice of one image, point by point, vertices in a dictionary."""
    dim = features.shape[1]
    size = dim + 1
    shares = naive_shares(features)
    table: dict[tuple[int, ...], NDArray[np.float64]] = defaultdict(lambda: np.zeros(inputs.shape[1]))
    for share, row in zip(shares, inputs, strict=True):
        for vertex, weight in share.items():
            table[vertex] = table[vertex] + weight * row
    zero = np.zeros(inputs.shape[1])
    for axis in range(size):
        step = -np.ones(size, dtype=int)
        step[axis] = dim
        blurred = {}
        for vertex in table:
            following = tuple((np.array(vertex) + step).tolist())
            previous = tuple((np.array(vertex) - step).tolist())
            blurred[vertex] = table[vertex] + 0.5 * (table.get(following, zero) + table.get(previous, zero))
        table = defaultdict(lambda: zero, blurred)
    sliced = [sum(weight * table[vertex] for vertex, weight in share.items()) for share in shares]
    return np.array(sliced) / (1 + 2.0**-dim)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_filter_agrees_with_a_lattice_of_dictionaries(dim: int, spread: float) -> None:
    features, inputs = points(120, dim, spread=spread), values(120, 4)
    expected = naive_lattice(features[0].numpy(), inputs[0].numpy())
    lattice = PermutohedralLattice(features)
    np.testing.assert_allclose(lattice.filter(inputs)[0].numpy(), expected, atol=1e-10)
    single = PermutohedralLattice(features.float()).filter(inputs.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single[0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_lattice_shares_vertices() -> None:
    grid = torch.cartesian_prod(torch.arange(40.0), torch.arange(30.0))[None]
    assert PermutohedralLattice(grid / 8).size < 100
    far = 100 * torch.arange(7.0).view(1, 7, 1)
    assert PermutohedralLattice(far).size == 14


@pytest.mark.parametrize("dim", [2, 5])
def test_error_against_the_exact_sum_is_the_known_one(dim: int) -> None:
    """Normalized by what ones become, the lattice is a slightly uneven Gaussian: on smooth values it is near."""
    features = points(3000, dim, spread=1.0)
    inputs = torch.sin(features)[..., :2]
    rows = torch.cat([inputs, torch.ones_like(inputs[..., :1])], 2)
    sums = (gaussian_filter(features, rows, method=method) for method in ("exact", "lattice"))  # type: ignore[arg-type]
    exact, near = (each[..., :2] / each[..., 2:] for each in sums)
    error = near - exact
    assert error.square().mean().sqrt() < 0.06
    assert error.square().mean().sqrt() < 0.15 * (inputs - exact).square().mean().sqrt()


def test_derivative_is_the_transposed_filter() -> None:
    lattice = PermutohedralLattice(points(25, 3, batch=2))
    inputs = values(25, 2, batch=2).requires_grad_()
    assert torch.autograd.gradcheck(lattice.filter, (inputs,))
    assert torch.autograd.gradcheck(lambda rows: lattice.filter(rows, transpose=True), (inputs,))


def test_transposed_filter_is_the_transpose() -> None:
    lattice = PermutohedralLattice(points(60, 4, spread=3.0))
    identity = torch.eye(60, dtype=torch.float64)[None]
    forward, backward = lattice.filter(identity)[0], lattice.filter(identity, transpose=True)[0]
    torch.testing.assert_close(forward, backward.T)
    assert not torch.allclose(forward, forward.T), "these points lack neighbors, so the two differ"


def test_images_of_a_batch_do_not_meet() -> None:
    features, inputs = points(80, 5, batch=3), values(80, 2, batch=3)
    features[2] = features[0]
    together = PermutohedralLattice(features)
    alone = [PermutohedralLattice(features[i : i + 1]) for i in range(3)]
    assert together.size == sum(lattice.size for lattice in alone)
    for i, lattice in enumerate(alone):
        torch.testing.assert_close(together.filter(inputs)[i], lattice.filter(inputs[i : i + 1])[0])


def test_order_of_points_does_not_matter() -> None:
    features, inputs = points(90, 3), values(90, 2)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    filtered = PermutohedralLattice(features).filter(inputs)
    torch.testing.assert_close(PermutohedralLattice(features[:, order]).filter(inputs[:, order]), filtered[:, order])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_vertex_has_a_number_of_its_own(dim: int) -> None:
    """Whatever the extent of the points, on which the numbering depends."""
    for extent in range(2, 10):
        features = extent * torch.rand(1, 300, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vertices = {vertex for share in naive_shares(features[0].numpy()) for vertex in share}
        assert PermutohedralLattice(features).size == len(vertices)


def test_keys_too_large_to_be_packed_are_sorted_all_the_same() -> None:
    keys = torch.randint(2**61, (4, 50), generator=torch.Generator().manual_seed(0))
    keys[1] = keys[0]
    ordered, entries = _sorted_entries(keys, 2**61)
    assert torch.equal(ordered, keys.flatten().sort().values)
    assert torch.equal(keys.t().flatten()[entries], ordered)
    assert torch.equal(entries.sort().values, torch.arange(200, dtype=torch.int32))


def test_scaled_puts_a_diagonal_on_both_sides() -> None:
    lattice, inputs = PermutohedralLattice(points(40, 2, batch=2)), values(40, 3, batch=2)
    scale = values(40, 1, batch=2)
    expected = scale * lattice.filter(scale * inputs)
    torch.testing.assert_close(lattice.scaled(scale[..., 0]).filter(inputs), expected)
    assert not torch.allclose(lattice.filter(inputs), expected), "the original stays as it was"


def test_both_ways_to_splat_agree() -> None:
    lattice, rows = PermutohedralLattice(points(300, 5, batch=2)), values(600, 3)[0]
    torch.testing.assert_close(lattice._splat_by_addition(rows), lattice._splat(rows))


def test_filter_leaves_its_inputs_alone() -> None:
    features, inputs = points(30, 5).float(), values(30, 3).float()
    with unchanged(features, inputs):
        PermutohedralLattice(features).filter(inputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_must_be_finite(bad: float) -> None:
    features = points(10, 3)
    features[0, 4, 1] = bad
    with pytest.raises(AfaError, match=r"features .*not finite"):
        PermutohedralLattice(features)


def test_features_must_not_be_too_far_apart() -> None:
    with pytest.raises(AfaError, match="use larger bandwidths"):
        PermutohedralLattice(points(10, 5, spread=1e6))


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    features, inputs = points(5000, 5, batch=2).float(), values(5000, 7, batch=2).float()
    expected = PermutohedralLattice(features).filter(inputs)
    lattice = PermutohedralLattice(features.cuda())
    torch.testing.assert_close(lattice.filter(inputs.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
