"""The confusion matrix against scikit-learn's, and the classes that its mean leaves out."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from afa.evaluation.confusion import ConfusionMatrix


def random_maps(seed: int, *, num_classes: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, shape).astype(np.uint8)
    label[rng.random(shape) < 0.2] = 255
    return label, rng.integers(0, num_classes, shape).astype(np.uint8)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_equals_scikit_learn_over_several_updates(as_tensor: bool) -> None:
    confusion = ConfusionMatrix(21)
    labels, predictions = [], []
    for seed, shape in enumerate([(40, 31), (2, 17, 9), (100,)]):
        label, prediction = random_maps(seed, num_classes=21, shape=shape)
        if as_tensor:
            confusion.update(torch.from_numpy(label).long(), torch.from_numpy(prediction).int())
        else:
            confusion.update(label, prediction)
        labels.append(label.ravel())
        predictions.append(prediction.ravel())
    label, prediction = np.concatenate(labels), np.concatenate(predictions)
    counted = label != 255
    expected = confusion_matrix(label[counted], prediction[counted], labels=range(21))
    assert confusion.matrix.dtype == torch.int64
    np.testing.assert_array_equal(confusion.matrix.numpy(), expected)
    ious = jaccard_score(label[counted], prediction[counted], labels=range(21), average=None)
    np.testing.assert_allclose(confusion.per_class_iou(), ious, rtol=0, atol=1e-12)
    assert confusion.miou() == pytest.approx(ious.mean(), abs=1e-12)


def test_classes_absent_from_the_ground_truth_are_left_out_of_the_mean() -> None:
    confusion = ConfusionMatrix(4)
    # Class 2 is predicted but never true: it costs class 1 a pixel and has no score of its own.
    confusion.update(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert confusion.per_class_iou() == [1.0, 0.5, None, None]
    assert confusion.miou() == 0.75


def test_predictions_under_ignored_labels_are_not_looked_at() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(np.array([255, 1]), np.array([255, 1]))
    assert confusion.matrix.tolist() == [[0, 0], [0, 1]]


def test_background_alone_gives_nan() -> None:
    """A figure of the background alone would look like a result."""
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([0, 0, 255]), np.array([0, 1, 2]))
    assert confusion.per_class_iou() == [0.5, None, None]
    assert math.isnan(confusion.miou())


def test_no_pixels_give_nan() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(np.full((3, 3), 255), np.zeros((3, 3)))
    assert math.isnan(confusion.miou())
    assert confusion.per_class_iou() == [None, None]


@pytest.mark.parametrize(
    ("label", "prediction", "message"),
    [(0, 3, "prediction outside 0..2"), (0, -1, "prediction outside 0..2"), (3, 0, "label outside 0..2")],
)
def test_values_outside_the_classes_are_refused(label: int, prediction: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        ConfusionMatrix(3).update(np.array([label]), np.array([prediction]))


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError):
        ConfusionMatrix(3).update(np.zeros((2, 3), dtype=int), np.zeros((3, 2), dtype=int))


def test_counting_never_looks_at_the_values() -> None:
    """Tensors without values stand in for those of a GPU, which would have to be waited for."""
    confusion = ConfusionMatrix(3, device="meta")
    confusion.update(np.zeros((4, 5), dtype=np.uint8), torch.zeros(4, 5, dtype=torch.uint8, device="meta"))
    assert confusion.matrix.is_meta
    assert confusion.matrix.shape == (3, 3)
