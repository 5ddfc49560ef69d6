"""Random walk of scores over the affinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import naive
from afa.pseudo.affinity import window_mask
from afa.pseudo.scores import with_background
from afa.pseudo.walk import mean_attention_affinity, propagate, spread, take_step, transition

TAGS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def affinities(tokens: int, seed: int = 0) -> Tensor:
    half = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(half + half.transpose(1, 2))


def cams(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("grid", "radius", "power", "epsilon"),
    [((4, 6), 2, 2.0, 0.1), ((5, 3), 1, 2.0, 0.1), ((3, 7), 8, 1.0, 0.0), ((1, 5), 2, 3.0, 0.1)],
)
@pytest.mark.parametrize("background", [0.35, 0.55])
def test_walk_agrees_with_naive(
    grid: tuple[int, int], radius: int, power: float, epsilon: float, background: float
) -> None:
    cam, affinity = cams(grid), affinities(grid[0] * grid[1])
    walked = propagate(
        cam, TAGS, affinity, grid=grid, background=background, radius=radius, power=power, epsilon=epsilon
    )
    for i in range(2):
        expected = naive.propagate(
            cam[i].numpy(),
            TAGS[i].numpy(),
            affinity[i].numpy(),
            background=background,
            radius=radius,
            power=power,
            epsilon=epsilon,
        )
        np.testing.assert_allclose(walked[i].numpy(), expected, atol=1e-6)


def test_cam_is_first_brought_to_the_token_grid() -> None:
    cam, affinity, grid = cams((9, 13)), affinities(12), (3, 4)
    walked = propagate(cam, TAGS, affinity, grid=grid, background=0.35, radius=1)
    for i in range(2):
        small = naive.bilinear(cam[i].numpy(), grid)
        expected = naive.propagate(small, TAGS[i].numpy(), affinity[i].numpy(), background=0.35, radius=1)
        np.testing.assert_allclose(walked[i].numpy(), expected, atol=1e-6)


def test_identity_affinity_leaves_the_cam_unchanged() -> None:
    cam, eye = cams((3, 5)), torch.eye(15).expand(2, 15, 15)
    everything = torch.ones(2, 3)
    walked = propagate(cam, everything, eye, grid=(3, 5), background=0.4, radius=2, epsilon=0.0, softmax=False)
    torch.testing.assert_close(walked, with_background(cam, 0.4), atol=1e-6, rtol=0)


def test_walk_of_a_constant_is_a_constant_where_nothing_is_lost() -> None:
    cam = torch.full((2, 3, 4, 4), 0.7)
    walked = propagate(
        cam, torch.ones(2, 3), affinities(16), grid=(4, 4), background=0.2, radius=2, epsilon=0.0, softmax=False
    )
    torch.testing.assert_close(walked, with_background(cam, 0.2), atol=1e-6, rtol=0)


def test_rows_of_the_transition_sum_to_their_share_of_degree_and_epsilon() -> None:
    affinity, mask = affinities(12), window_mask(3, 4, 1)
    degree = (affinity * mask).square().sum(1)
    walk = transition(affinity, mask, power=2.0, epsilon=0.1)
    torch.testing.assert_close(walk.sum(2), degree / (degree + 0.1))
    assert not walk[:, ~mask].any()


@pytest.mark.parametrize("power", [2.0, 0.5, 0.0])
def test_spread_is_a_step_of_the_walk_within_the_radius(power: float) -> None:
    affinity, scores = affinities(12), cams((3, 4))
    walk = transition(affinity, window_mask(3, 4, 1), power=power, epsilon=0.1)
    assert torch.equal(spread(affinity, scores, radius=1, power=power, epsilon=0.1), take_step(walk, scores))


def test_softmax_sums_to_what_the_epsilon_leaves() -> None:
    affinity = affinities(12)
    walked = propagate(cams((3, 4)), TAGS, affinity, grid=(3, 4), background=0.35, radius=3)
    degree = affinity.square().sum(1)
    torch.testing.assert_close(walked.sum(1).flatten(1), degree / (degree + 0.1))


def test_absent_classes_stay_zero() -> None:
    walked = propagate(cams((3, 4)), TAGS, affinities(12), grid=(3, 4), background=0.35, radius=3)
    assert not walked[0, 2].any()
    assert not walked[1, [1, 3]].any()
    assert (walked[0, [0, 1, 3]] > 0).all()


def test_walk_changes_none_of_its_inputs() -> None:
    inputs = (cams((3, 4)), TAGS.clone(), affinities(12))
    before = [value.clone() for value in inputs]
    propagate(*inputs, grid=(3, 4), background=0.35, radius=3)
    assert all(torch.equal(value, copy) for value, copy in zip(inputs, before, strict=True))


def test_mean_attention_is_a_symmetric_affinity() -> None:
    logits = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3
    affinity = mean_attention_affinity(logits, scale=0.5)
    expected = np.mean([naive.softmax(0.5 * one.double().numpy(), axis=-1) for one in logits[0]], axis=0)
    np.testing.assert_allclose(affinity[0].numpy(), (expected + expected.T) / 2, atol=1e-6)
    assert torch.equal(affinity, affinity.transpose(1, 2))


def test_a_position_without_affinity_gives_no_nan_without_epsilon() -> None:
    affinity = torch.eye(4)[None].clone()
    affinity[0, 2, 2] = 0
    walk = transition(affinity, torch.ones(4, 4, dtype=torch.bool), power=2, epsilon=0)
    assert walk.isfinite().all()
    assert walk[0, 2].eq(0).all()
    assert walk[0, 1, 1] == 1
