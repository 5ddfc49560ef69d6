"""Scores of single images against a slow count of their pixels, and what JSON says of them."""

import numpy as np
import pytest
import torch

from afa.evaluation.confusion import ConfusionMatrix, image_scores


def naive(label: np.ndarray, prediction: np.ndarray) -> list[float]:
    """IoU, accuracy and share of the most frequent confusion, pixel by pixel."""
    pairs = [(t, p) for t, p in zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True) if t != 255]
    ious = []
    for c in {t for t, _ in pairs}:
        either = [pair for pair in pairs if c in pair]
        ious.append(sum(pair == (c, c) for pair in either) / len(either))
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    most = max((wrong.count(pair) for pair in wrong), default=0)
    return [sum(ious) / len(ious), sum(t == p for t, p in pairs) / len(pairs), most / len(pairs)]


@pytest.mark.parametrize("seed", range(5))
def test_an_image_is_scored_as_if_its_pixels_were_counted_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 0, 1, 3, 255], size=(9, 13)).astype(np.uint8)
    prediction = np.where(rng.random(label.shape) < 0.6, label % 255, rng.integers(0, 4, label.shape)).astype(np.uint8)
    confusion = ConfusionMatrix(4)
    confusion.update(np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8))  # another image changes nothing
    iou, accuracy, place, share = image_scores(confusion.update(label, prediction)).tolist()
    assert [iou, accuracy, share] == pytest.approx(naive(label, prediction))
    truth, taken = divmod(int(place), 4)
    assert ((label == truth) & (prediction == taken)).sum() / (label != 255).sum() == pytest.approx(share)


def test_an_image_without_any_class_is_scored_by_its_background() -> None:
    pixels = torch.tensor([[3, 1], [0, 0]])
    assert image_scores(pixels).tolist() == [0.75, 0.75, 1.0, 0.25]


def test_an_image_of_ignored_pixels_has_no_score() -> None:
    assert image_scores(torch.zeros(3, 3, dtype=torch.int64))[[0, 1, 3]].isnan().all()
