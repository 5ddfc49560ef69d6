"""Low-level refinement: kernel and iterations against the equations, and what must hold for any image."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import naive
from afa.pseudo.par import _refine_dense, neighbor_offsets, par, refine, refinement_kernel

Kind = Literal["par", "par_color", "pamr"]
SIZES = [(7, 9), (12, 5), (16, 16), (1, 6), (30, 28)]
DILATIONS = (1, 2, 4)


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(size[0]))


def scores(size: tuple[int, int], channels: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(100 + size[0]))


@pytest.mark.parametrize("kind", ["par", "par_color", "pamr"])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_agrees_with_naive(size: tuple[int, int], kind: Kind) -> None:
    kernel = refinement_kernel(images(size), kind=kind)
    assert kernel.shape == (2, 48, *size)
    for i in range(2):
        expected = naive.refinement_kernel(images(size)[i].numpy(), kind=kind)
        np.testing.assert_allclose(kernel[i].numpy(), expected, atol=2e-6)


def test_kernel_follows_its_bandwidths_and_dilations() -> None:
    settings = {"rgb_bandwidth": 0.7, "pos_bandwidth": 0.5, "pos_weight": 0.2}
    kernel = refinement_kernel(images((6, 8)), dilations=DILATIONS, **settings)
    expected = naive.refinement_kernel(images((6, 8))[0].numpy(), dilations=DILATIONS, **settings)
    np.testing.assert_allclose(kernel[0].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_iterations_agree_with_naive(size: tuple[int, int]) -> None:
    kernel = refinement_kernel(images(size), dilations=DILATIONS)
    refined = refine(scores(size), kernel, dilations=DILATIONS, iterations=3)
    for i in range(2):
        expected = naive.refine(scores(size)[i].numpy(), kernel[i].double().numpy(), dilations=DILATIONS, iterations=3)
        np.testing.assert_allclose(refined[i].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("small", [(3, 4), (11, 2), (8, 10)])
def test_whole_refinement_agrees_with_naive(small: tuple[int, int]) -> None:
    refined = par(images((8, 10)), scores(small), iterations=4)
    for i in range(2):
        expected = naive.par(images((8, 10))[i].numpy(), scores(small)[i].numpy(), iterations=4)
        np.testing.assert_allclose(refined[i].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "total"), [("par", 1.01), ("par_color", 1.0), ("pamr", 1.0)])
def test_weights_are_positive_and_sum_to_their_total(kind: Kind, total: float) -> None:
    kernel = refinement_kernel(images((9, 11)), kind=kind)
    assert (kernel >= 0).all()
    torch.testing.assert_close(kernel.sum(1), torch.full((2, 9, 11), total))


def test_constant_grows_by_a_hundredth_per_iteration() -> None:
    refined = par(images((9, 7)), torch.full((2, 2, 9, 7), 0.4), iterations=10)
    torch.testing.assert_close(refined, torch.full((2, 2, 9, 7), 0.4 * 1.01**10))


def test_flat_image_is_refined_by_position_alone() -> None:
    kernel = refinement_kernel(torch.full((1, 3, 6, 6), 0.3))
    expected = naive.refinement_kernel(np.full((3, 6, 6), 0.3))
    np.testing.assert_allclose(kernel[0].numpy(), expected, atol=1e-6)


def test_scores_do_not_leak_over_an_edge() -> None:
    image = torch.zeros(1, 3, 12, 12)
    image[..., 6:] = 1
    image += 0.01 * torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(1, 1, 12, 12)
    inside[..., 6:] = 1
    refined = par(image, inside, dilations=DILATIONS, iterations=5)
    assert refined[..., :6].max() < 0.1
    assert refined[..., 6:].min() > 0.9


def test_neighbors_leave_out_the_center() -> None:
    offsets = neighbor_offsets((1, 2, 4, 8, 12, 24))
    assert len(set(offsets)) == 48
    assert (0, 0) not in offsets
    assert max(max(offset) for offset in offsets) == 24


def test_images_and_channels_are_refined_independently() -> None:
    size = (10, 12)
    kernel = refinement_kernel(images(size), dilations=DILATIONS)
    together = refine(scores(size, channels=5), kernel, dilations=DILATIONS, iterations=3)
    for i in range(2):
        own = refinement_kernel(images(size)[i : i + 1], dilations=DILATIONS)
        torch.testing.assert_close(own, kernel[i : i + 1], atol=1e-6, rtol=0)
        for c in range(5):
            alone = refine(scores(size, channels=5)[i : i + 1, c : c + 1], own, dilations=DILATIONS, iterations=3)
            torch.testing.assert_close(alone, together[i : i + 1, c : c + 1], atol=1e-6, rtol=0)


def test_refinement_is_linear_in_the_scores() -> None:
    size = (8, 8)
    kernel = refinement_kernel(images(size), dilations=DILATIONS)
    one, two = scores(size), scores(size).flip(2)
    refined = [refine(value, kernel, dilations=DILATIONS, iterations=3) for value in (one, two, one - 2 * two)]
    torch.testing.assert_close(refined[2], refined[0] - 2 * refined[1], atol=1e-5, rtol=0)


def test_no_iteration_changes_nothing() -> None:
    kernel = refinement_kernel(images((5, 6)), dilations=DILATIONS)
    assert torch.equal(refine(scores((5, 6)), kernel, dilations=DILATIONS, iterations=0), scores((5, 6)))


def test_inputs_are_left_alone() -> None:
    image, score = images((8, 9)), scores((4, 5))
    kernel = refinement_kernel(image)
    before = [value.clone() for value in (image, score, kernel)]
    par(image, score, iterations=2)
    refine(scores((8, 9)), kernel, dilations=(1, 2, 4, 8, 12, 24), iterations=2)
    for value, copy in zip((image, score, kernel), before, strict=True):
        assert torch.equal(value, copy)


def test_maps_that_are_not_contiguous_are_refined_the_same() -> None:
    size = (8, 10)
    image, score = images(size), scores(size)
    turned_image = image.transpose(2, 3).contiguous().transpose(2, 3)
    turned_score = score.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    expected = par(image, score, iterations=2)
    torch.testing.assert_close(par(turned_image, turned_score, iterations=2), expected, atol=1e-6, rtol=0)


def test_form_for_other_devices_agrees_with_that_for_a_cpu() -> None:
    kernel = refinement_kernel(images((9, 13)), dilations=DILATIONS)
    expected = refine(scores((9, 13)), kernel, dilations=DILATIONS, iterations=3)
    found = _refine_dense(scores((9, 13)), kernel, DILATIONS, 3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    expected = par(images((30, 28)), scores((15, 14)))
    found = par(images((30, 28)).cuda(), scores((15, 14)).cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    expected = par(images((8, 9)), scores((8, 9)), iterations=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = par(images((8, 9)), scores((8, 9)), iterations=2)
    assert torch.equal(refined, expected)
