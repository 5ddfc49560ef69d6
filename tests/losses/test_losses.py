"""Losses against the equations, and that no empty set ever makes them NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import naive
from afa.losses.affinity import affinity_loss
from afa.losses.classification import classification_loss
from afa.losses.segmentation import segmentation_loss
from tensors import unchanged, value_and_gradient


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, num_classes: int, seed: int = 0) -> Tensor:
    label = torch.randint(num_classes + 1, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(label == num_classes, 255, label)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 2, 3, 3), (3, 6, 1, 4)])
def test_segmentation_loss_agrees_with_naive(shape: tuple[int, int, int, int]) -> None:
    logits = 3 * random(*shape)
    label = labels(shape[0], *shape[2:], num_classes=shape[1])
    expected = naive.segmentation_loss(logits.numpy(), label.numpy())
    assert segmentation_loss(logits, label).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("present", [[0], [1, 2], [255], [0, 255], [1, 255]])
def test_empty_set_of_pixels_contributes_exactly_zero(present: list[int]) -> None:
    logits = random(2, 3, 4, 5)
    choice = torch.randint(len(present), (2, 4, 5), generator=torch.Generator().manual_seed(0))
    label = torch.tensor(present)[choice]
    loss, _ = value_and_gradient(segmentation_loss, logits, label)
    assert loss == pytest.approx(naive.segmentation_loss(logits.numpy(), label.numpy()), abs=1e-5)


@pytest.mark.parametrize("form", ["balanced", "plain"])
def test_segmentation_loss_of_ignored_labels_is_zero_with_zero_gradient(form: str) -> None:
    ignored = torch.full((2, 4, 5), 255)
    loss, gradient = value_and_gradient(segmentation_loss, random(2, 3, 4, 5), ignored, form=form)
    assert loss == 0
    assert not gradient.any()


def test_plain_segmentation_loss_is_one_mean() -> None:
    logits, label = random(2, 4, 5, 7), labels(2, 5, 7, num_classes=4)
    expected = torch.nn.functional.cross_entropy(logits, label, ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, label, form="plain"), expected)


def test_ignored_pixels_do_not_move_the_segmentation_loss() -> None:
    logits, label = random(1, 3, 4, 4), labels(1, 4, 4, num_classes=3)
    changed = torch.where((label == 255)[:, None], logits + 50, logits)
    assert segmentation_loss(changed, label).item() == segmentation_loss(logits, label).item()


def pair_labels(batch: int = 2, tokens: int = 6) -> Tensor:
    return torch.tensor([0, 1, 255])[labels(batch, tokens, tokens, num_classes=2, seed=4).clamp(max=2)]


def test_affinity_loss_agrees_with_naive() -> None:
    affinity, label = random(2, 6, 6).sigmoid(), pair_labels()
    expected = naive.affinity_loss(affinity.numpy(), label.numpy())
    assert affinity_loss(affinity, label).item() == pytest.approx(expected, abs=1e-6)
    assert affinity_loss(affinity, label.to(torch.uint8)).item() == pytest.approx(expected, abs=1e-6)


def test_affinity_loss_rewards_right_pairs() -> None:
    """Eq. 5 as printed would reward wrong ones."""
    label = pair_labels()
    right = (label == 1).float()
    assert affinity_loss(right, label).item() == 0
    assert affinity_loss(1 - right, label).item() > 0.5


def test_paper_form_has_bare_counts_and_no_halves() -> None:
    affinity, label = random(2, 6, 6).sigmoid(), pair_labels()
    expected = (1 - affinity[label == 1]).mean() + affinity[label == 0].mean()
    torch.testing.assert_close(affinity_loss(affinity, label, form="paper"), expected)


@pytest.mark.parametrize("form", ["balanced", "paper"])
@pytest.mark.parametrize("only", [0, 1, 255])
def test_affinity_loss_stays_finite_without_pairs(only: int, form: str) -> None:
    label = torch.full((1, 4, 4), only)
    loss, _ = value_and_gradient(affinity_loss, random(1, 4, 4).sigmoid(), label, form=form)
    assert (loss == 0) == (only == 255)


def test_classification_loss_agrees_with_naive() -> None:
    logits, tags = 4 * random(3, 5), (random(3, 5, seed=1) > 0).float()
    expected = naive.classification_loss(logits.double().numpy(), tags.numpy())
    assert classification_loss(logits, tags).item() == pytest.approx(expected, abs=1e-6)


def shares(loss: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Sum of the losses of both halves, whose counts are summed over both as an all-reduce would."""
    halves = [[part[:2] for part in given], [part[2:] for part in given]]
    counts: list[list[Tensor]] = [[], []]
    for half, seen in zip(halves, counts, strict=True):
        loss(*half, total=lambda count, seen=seen: seen.append(count) or count)
    sums = [first + second for first, second in zip(*counts, strict=True)]

    def share(half: list[Tensor]) -> Tensor:
        order = iter(sums)
        return loss(*half, total=lambda _: next(order))

    return share(halves[0]) + share(halves[1])


def test_shares_of_two_processes_add_up_to_the_whole_batch() -> None:
    logits, label = random(4, 3, 5, 5), labels(4, 5, 5, num_classes=3)
    label[:2][label[:2] > 0] = 255  # the first process has no foreground at all
    affinity, pairs = random(4, 6, 6).sigmoid(), pair_labels(4)
    torch.testing.assert_close(shares(segmentation_loss, logits, label), segmentation_loss(logits, label))
    torch.testing.assert_close(shares(affinity_loss, affinity, pairs), affinity_loss(affinity, pairs))


def test_losses_change_none_of_their_inputs() -> None:
    inputs = (random(2, 3, 4, 4), labels(2, 4, 4, num_classes=3), random(2, 6, 6).sigmoid(), pair_labels())
    with unchanged(*inputs):
        segmentation_loss(inputs[0], inputs[1])
        affinity_loss(inputs[2], inputs[3])
