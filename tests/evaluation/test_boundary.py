"""Boundary IoU against loops that erode one class at a time, and what must hold for any mask."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from afa.evaluation.boundary import BoundaryConfusion, outline


def eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is left of a mask when pixels with a neighbor, or an edge of the image, outside of it are taken away."""
    height, width = mask.shape
    left = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            left[y, x] = all(0 <= i < height and 0 <= j < width and mask[i, j] for i, j in around)
    return left


def band(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    left = mask
    for _ in range(max(1, round(0.02 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))):
        left = eroded(left)
    return mask & ~left


def blobs(rng: np.random.Generator, size: tuple[int, int], values: list[int]) -> NDArray[np.uint8]:
    coarse = rng.choice(np.array(values, dtype=np.uint8), (size[0] // 14 + 1, size[1] // 14 + 1))
    return np.kron(coarse, np.ones((14, 14), dtype=np.uint8))[: size[0], : size[1]]


@pytest.mark.parametrize("size", [(40, 30), (70, 130), (9, 8)])
def test_equals_erosions_of_each_class(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    confusion = BoundaryConfusion(4)
    overlap, union, present = np.zeros(4), np.zeros(4), np.zeros(4)
    for _ in range(3):
        truth, prediction = blobs(rng, size, [0, 1, 2, 255]), blobs(rng, size, [0, 1, 2, 3])
        confusion.update(torch.from_numpy(truth), torch.from_numpy(prediction))
        known = truth != 255
        for c in range(4):
            one, other = band(truth == c), band((prediction == c) & known)
            overlap[c] += (one & other).sum()
            union[c] += (one | other).sum()
            present[c] += one.sum()
    expected = [overlap[c] / union[c] if present[c] else None for c in range(4)]
    assert expected[3] is None
    assert confusion.per_class_iou() == pytest.approx(expected)
    assert confusion.mean() == pytest.approx(np.mean([iou for iou in expected if iou is not None]))


def test_a_prediction_that_is_right_where_it_counts_scores_one() -> None:
    rng = np.random.default_rng(1)
    truth = blobs(rng, (60, 90), [0, 1, 2, 255])
    prediction = np.where(truth == 255, np.uint8(1), truth)
    confusion = BoundaryConfusion(3)
    confusion.update(torch.from_numpy(truth), torch.from_numpy(prediction))
    assert confusion.per_class_iou() == [1.0, 1.0, 1.0]


def test_a_shift_costs_more_at_the_boundary() -> None:
    truth = torch.zeros(200, 200, dtype=torch.uint8)
    truth[50:150, 50:150] = 1
    confusion = BoundaryConfusion(2)
    confusion.update(truth, truth.roll(4, 0))
    boundary = confusion.per_class_iou()[1]
    assert boundary is not None
    assert boundary < 0.6 < 96 / 104


def test_outline_is_as_wide_as_it_says() -> None:
    label = torch.zeros(300, 400, dtype=torch.uint8)  # diagonal 500, so 10 pixels
    label[100:200, 100:300] = 7
    inner = torch.zeros(300, 400, dtype=torch.bool)
    inner[110:190, 110:290] = True
    inner[10:90, 10:390] = inner[210:290, 10:390] = inner[10:290, 10:90] = inner[10:290, 310:390] = True
    assert torch.equal(outline(label), ~inner)


def test_no_labeled_pixel_is_nan() -> None:
    confusion = BoundaryConfusion(2)
    confusion.update(torch.full((8, 8), 255, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8))
    assert math.isnan(confusion.mean())
