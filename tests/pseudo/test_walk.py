"""Random walk of scores over the affinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import naive
from afa.config import PseudoConfig
from afa.kernels.walk import spread, transition, window_mask
from afa.pseudo.scores import with_background
from afa.pseudo.walk import mean_attention_affinity, propagate
from tensors import TAGS, assert_images_agree, symmetric_affinity, unchanged, uniform

Size = tuple[int, int]
BARE = PseudoConfig(affinity_radius=2, walk_epsilon=0.0, softmax_scores=False)
"""A walk that neither weakens scores nor lets them compete."""


def cams(size: Size) -> Tensor:
    return uniform(2, 3, *size)


def propagated(radius: int) -> Tensor:
    config = PseudoConfig(affinity_radius=radius)
    return propagate(cams((3, 4)), TAGS, symmetric_affinity(12), grid=(3, 4), background=0.35, config=config)


@pytest.mark.parametrize(
    ("grid", "radius", "power", "epsilon"),
    [((4, 6), 2, 2.0, 0.1), ((5, 3), 1, 2.0, 0.1), ((3, 7), 8, 1.0, 0.0), ((1, 5), 2, 3.0, 0.1)],
)
@pytest.mark.parametrize("background", [0.35, 0.55])
def test_walk_agrees_with_naive(grid: Size, radius: int, power: float, epsilon: float, background: float) -> None:
    given = cams(grid), TAGS, symmetric_affinity(grid[0] * grid[1])
    config = PseudoConfig(affinity_radius=radius, affinity_power=power, walk_epsilon=epsilon)
    walked = propagate(*given, grid=grid, background=background, config=config)
    knobs = {"background": background, "radius": radius, "power": power, "epsilon": epsilon}
    assert_images_agree(walked, naive.propagate, *given, **knobs, atol=1e-6)


def test_cam_is_first_brought_to_the_token_grid() -> None:
    cam, affinity, grid = cams((9, 13)), symmetric_affinity(12), (3, 4)
    walked = propagate(cam, TAGS, affinity, grid=grid, background=0.35, config=PseudoConfig(affinity_radius=1))
    small = torch.stack([torch.from_numpy(naive.bilinear(each.numpy(), grid)) for each in cam])
    assert_images_agree(walked, naive.propagate, small, TAGS, affinity, background=0.35, radius=1, atol=1e-6)


def test_identity_affinity_leaves_the_cam_unchanged() -> None:
    cam, eye = cams((3, 5)), torch.eye(15).expand(2, 15, 15)
    walked = propagate(cam, torch.ones(2, 3), eye, grid=(3, 5), background=0.4, config=BARE)
    torch.testing.assert_close(walked, with_background(cam, 0.4), atol=1e-6, rtol=0)


def test_walk_of_a_constant_is_a_constant_where_nothing_is_lost() -> None:
    cam = torch.full((2, 3, 4, 4), 0.7)
    walked = propagate(cam, torch.ones(2, 3), symmetric_affinity(16), grid=(4, 4), background=0.2, config=BARE)
    torch.testing.assert_close(walked, with_background(cam, 0.2), atol=1e-6, rtol=0)


def test_rows_of_the_transition_sum_to_their_share_of_degree_and_epsilon() -> None:
    affinity, mask = symmetric_affinity(12), window_mask(3, 4, 1)
    degree = (affinity * mask).square().sum(1)
    walk = transition(affinity, mask, power=2.0, epsilon=0.1)
    torch.testing.assert_close(walk.sum(2), degree / (degree + 0.1))
    assert not walk[:, ~mask].any()


@pytest.mark.parametrize("power", [2.0, 0.5, 0.0])
def test_spread_is_a_step_of_the_walk_within_the_radius(power: float) -> None:
    affinity, scores = symmetric_affinity(12), cams((3, 4))
    walk = transition(affinity, window_mask(3, 4, 1), power=power, epsilon=0.1)
    expected = (walk @ scores.flatten(2).mT).mT.reshape(scores.shape)
    torch.testing.assert_close(spread(affinity, scores, radius=1, power=power, epsilon=0.1), expected)


def test_softmax_sums_to_what_the_epsilon_leaves() -> None:
    degree = symmetric_affinity(12).square().sum(1)
    torch.testing.assert_close(propagated(radius=3).sum(1).flatten(1), degree / (degree + 0.1))


def test_absent_classes_stay_zero() -> None:
    walked = propagated(radius=3)
    assert not walked[0, 2].any()
    assert not walked[1, [1, 3]].any()
    assert (walked[0, [0, 1, 3]] > 0).all()


def test_walk_changes_none_of_its_inputs() -> None:
    given = cams((3, 4)), TAGS.clone(), symmetric_affinity(12)
    with unchanged(*given):
        propagate(*given, grid=(3, 4), background=0.35, config=PseudoConfig(affinity_radius=3))


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
