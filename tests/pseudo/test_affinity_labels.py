"""Pair labels of tokens."""

from __future__ import annotations

import pytest
import torch

import naive
from afa.kernels.walk import window_mask
from afa.pseudo.affinity import affinity_label, token_label
from tensors import assert_images_agree


@pytest.mark.parametrize(("size", "radius"), [((4, 6), 2), ((5, 3), 1), ((1, 7), 3), ((3, 3), 8)])
def test_pair_labels_agree_with_naive(size: tuple[int, int], radius: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    choices = torch.tensor([0, 1, 2, 255])
    label = choices[torch.randint(4, (2, *size), generator=generator)]
    pairs = affinity_label(label, radius=radius)
    assert pairs.dtype == torch.uint8
    assert_images_agree(pairs, naive.affinity_label, label, radius=radius)


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((33, 17), (3, 2)), ((7, 9), (7, 9)), ((5, 5), (2, 3))])
def test_token_label_agrees_with_naive(size: tuple[int, int], grid: tuple[int, int]) -> None:
    label = torch.randint(5, (2, *size), generator=torch.Generator().manual_seed(0))
    label[0, 0, 0] = 255
    tokens = token_label(label, grid)
    assert tokens.dtype == label.dtype
    assert_images_agree(tokens, naive.nearest, label, size=grid)


def test_pair_labels_are_symmetric_and_know_no_names_of_classes() -> None:
    label = torch.randint(3, (2, 5, 6), generator=torch.Generator().manual_seed(3))
    pairs = affinity_label(label, radius=2)
    assert torch.equal(pairs, pairs.transpose(1, 2))
    assert set(pairs.unique().tolist()) == {0, 1, 255}
    assert torch.equal(affinity_label(torch.tensor([7, 0, 2])[label], radius=2), pairs)


@pytest.mark.parametrize(("everywhere", "expected"), [(255, 255), (0, 1)])
def test_pairs_of_ignored_tokens_and_of_background(everywhere: int, expected: int) -> None:
    assert (affinity_label(torch.full((1, 3, 4), everywhere), radius=8) == expected).all()


def test_window_is_a_square_cut_by_the_border() -> None:
    mask = window_mask(20, 30, 8).view(20, 30, 20, 30)
    assert mask[10, 15].sum() == 17 * 17
    assert mask[0, 0].sum() == 9 * 9
    assert mask[10, 15, 18, 23]
    assert not mask[10, 15, 19, 15]
