"""Low-level refinement: kernel and iterations against the equations, and what must hold for any image."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import naive
from afa.kernels.par import RefinementKind, _refine_dense, neighbor_offsets, refine, refinement_kernel
from tensors import assert_images_agree, unchanged, uniform

Size = tuple[int, int]
SIZES = [(7, 9), (12, 5), (16, 16), (1, 6), (30, 28)]
DILATIONS = (1, 2, 4)


def images(size: Size) -> Tensor:
    return uniform(2, 3, *size, seed=size[0])


def scores(size: Size, channels: int = 3) -> Tensor:
    return uniform(2, channels, *size, seed=100 + size[0])


def par(image: Tensor, scores: Tensor, *, iterations: int = 10, dilations: tuple[int, ...] = naive.DILATIONS) -> Tensor:
    resized = interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=True)
    return refine(resized, refinement_kernel(image, dilations=dilations), dilations=dilations, iterations=iterations)


def refined(scores: Tensor, kernel: Tensor, iterations: int = 3) -> Tensor:
    return refine(scores, kernel, dilations=DILATIONS, iterations=iterations)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        *product(SIZES, ({"kind": kind} for kind in ("par", "par_color", "pamr"))),
        ((6, 8), {"rgb_bandwidth": 0.7, "pos_bandwidth": 0.5, "pos_weight": 0.2, "dilations": DILATIONS}),
    ],
)
def test_kernel_agrees_with_naive(size: Size, settings: dict[str, Any]) -> None:
    kernel = refinement_kernel(images(size), **settings)
    assert kernel.shape == (2, 8 * len(settings.get("dilations", naive.DILATIONS)), *size)
    assert_images_agree(kernel, naive.refinement_kernel, images(size), **settings, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_iterations_agree_with_naive(size: Size) -> None:
    kernel = refinement_kernel(images(size), dilations=DILATIONS)
    found = refined(scores(size), kernel)
    assert_images_agree(found, naive.refine, scores(size), kernel, dilations=DILATIONS, iterations=3, atol=2e-6)


@pytest.mark.parametrize("small", [(3, 4), (11, 2), (8, 10)])
def test_whole_refinement_agrees_with_naive(small: Size) -> None:
    image, score = images((8, 10)), scores(small)
    assert_images_agree(par(image, score, iterations=4), naive.par, image, score, iterations=4, atol=1e-5)


@pytest.mark.parametrize(("kind", "total"), [("par", 1.01), ("par_color", 1.0), ("pamr", 1.0)])
def test_weights_are_positive_and_sum_to_their_total(kind: RefinementKind, total: float) -> None:
    kernel = refinement_kernel(images((9, 11)), kind=kind)
    assert (kernel >= 0).all()
    torch.testing.assert_close(kernel.sum(1), torch.full((2, 9, 11), total))


def test_constant_grows_by_a_hundredth_per_iteration() -> None:
    found = par(images((9, 7)), torch.full((2, 2, 9, 7), 0.4))
    torch.testing.assert_close(found, torch.full((2, 2, 9, 7), 0.4 * 1.01**10))


def test_flat_image_is_refined_by_position_alone() -> None:
    kernel = refinement_kernel(torch.full((1, 3, 6, 6), 0.3))
    np.testing.assert_allclose(kernel[0].numpy(), naive.refinement_kernel(np.full((3, 6, 6), 0.3)), atol=1e-6)


def test_scores_do_not_leak_over_an_edge() -> None:
    inside = torch.zeros(1, 1, 12, 12)
    inside[..., 6:] = 1
    found = par(inside + 0.01 * uniform(1, 3, 12, 12), inside, dilations=DILATIONS, iterations=5)
    assert found[..., :6].max() < 0.1
    assert found[..., 6:].min() > 0.9


def test_neighbors_leave_out_the_center() -> None:
    offsets = neighbor_offsets((1, 2, 4, 8, 12, 24))
    assert len(set(offsets)) == 48
    assert (0, 0) not in offsets
    assert max(max(offset) for offset in offsets) == 24


def test_images_and_channels_are_refined_independently() -> None:
    image, score = images((10, 12)), scores((10, 12), channels=5)
    kernel = refinement_kernel(image, dilations=DILATIONS)
    together = refined(score, kernel)
    for i in range(2):
        own = refinement_kernel(image[i : i + 1], dilations=DILATIONS)
        torch.testing.assert_close(own, kernel[i : i + 1], atol=1e-6, rtol=0)
        for c in range(5):
            alone = refined(score[i : i + 1, c : c + 1], own)
            torch.testing.assert_close(alone, together[i : i + 1, c : c + 1], atol=1e-6, rtol=0)


def test_refinement_is_linear_in_the_scores() -> None:
    kernel = refinement_kernel(images((8, 8)), dilations=DILATIONS)
    one, two = scores((8, 8)), scores((8, 8)).flip(2)
    expected = refined(one, kernel) - 2 * refined(two, kernel)
    torch.testing.assert_close(refined(one - 2 * two, kernel), expected, atol=1e-5, rtol=0)


def test_no_iteration_changes_nothing() -> None:
    kernel = refinement_kernel(images((5, 6)), dilations=DILATIONS)
    assert torch.equal(refined(scores((5, 6)), kernel, iterations=0), scores((5, 6)))


def test_inputs_are_left_alone() -> None:
    image, score = images((8, 9)), scores((8, 9))
    kernel = refinement_kernel(image, dilations=DILATIONS)
    with unchanged(image, score, kernel):
        refinement_kernel(image, dilations=DILATIONS)
        refined(score, kernel)


def test_maps_that_are_not_contiguous_are_refined_the_same() -> None:
    image, score = images((8, 10)), scores((8, 10))
    turned_image = image.transpose(2, 3).contiguous().transpose(2, 3)
    turned_score = score.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    expected = par(image, score, iterations=2)
    torch.testing.assert_close(par(turned_image, turned_score, iterations=2), expected, atol=1e-6, rtol=0)


def test_form_for_other_devices_agrees_with_that_for_a_cpu() -> None:
    score, kernel = scores((9, 13)), refinement_kernel(images((9, 13)), dilations=DILATIONS)
    torch.testing.assert_close(_refine_dense(score, kernel, DILATIONS, 3), refined(score, kernel), atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    image, score = images((30, 28)), scores((15, 14))
    torch.testing.assert_close(par(image.cuda(), score.cuda()).cpu(), par(image, score), atol=1e-5, rtol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    expected = par(images((8, 9)), scores((8, 9)), iterations=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(par(images((8, 9)), scores((8, 9)), iterations=2), expected)
