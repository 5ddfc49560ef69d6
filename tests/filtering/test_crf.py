"""Mean field against loops over dense kernels and against pydensecrf2, and what must hold for any image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

import naive
from afa.demo.shapes import draw_shapes
from afa.filtering.crf import CrfSettings, bilateral_features, dense_crf
from afa.filtering.lattice import PermutohedralLattice
from tensors import unchanged


def sample(index: int, *, width: int = 64, height: int = 48, classes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Image (1, 3, H, W), its mask (1, H, W), and what a coarse and noisy network might say of it (1, K, H, W)."""
    scene = draw_shapes(np.random.default_rng(index), max(width, height))
    image = torch.from_numpy(scene.image[:height, :width]).permute(2, 0, 1)[None]
    mask = torch.from_numpy(scene.mask[:height, :width].astype(np.int64))[None]
    planes = one_hot(mask, classes).permute(0, 3, 1, 2).float()
    tokens = interpolate(planes, size=(height // 8, width // 8), mode="area")
    tokens = 4 * tokens + torch.randn(tokens.shape, generator=torch.Generator().manual_seed(index))
    return image, mask, interpolate(tokens, size=(height, width), mode="bilinear").softmax(1)


def naive_mean_field(
    kernels: list[tuple[float, NDArray[np.float64]]], probabilities: NDArray[np.float64], iterations: int
) -> NDArray[np.float64]:
    """(K, HW) from weighted (HW, HW) kernels and (K, HW) probabilities, pixel by pixel."""
    unary = np.log(np.maximum(probabilities, 1e-5))
    current = naive.softmax(unary)
    for _ in range(iterations):
        logits = unary.copy()
        for weight, kernel in kernels:
            sums = kernel.sum(axis=1)
            for i in range(kernel.shape[0]):
                for j in range(kernel.shape[0]):
                    logits[:, i] += weight * kernel[i, j] / math.sqrt(sums[i] * sums[j]) * current[:, j]
        current = naive.softmax(logits)
    return current


def lattice_kernel(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, N) from (N, F) points."""
    features, identity = torch.from_numpy(points).float()[None], torch.eye(len(points)).double()[None]
    kernel: NDArray[np.float64] = PermutohedralLattice(features).filter(identity)[0].numpy()
    return kernel


def test_mean_field_agrees_with_naive() -> None:
    height, width = 9, 12
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    probabilities = (2 * torch.randn(1, 4, height, width, generator=generator)).softmax(1)
    settings = CrfSettings(
        iterations=3, gaussian_weight=2.0, gaussian_xy=2.5, bilateral_weight=5.0, bilateral_xy=6.0, bilateral_rgb=40.0
    )
    y, x = np.divmod(np.arange(height * width), width)
    color = image[0].flatten(1).numpy()
    position = np.stack([x, y], 1)
    both = np.concatenate([position / 6.0, color.T / 40.0], 1)
    kernels = [(2.0, lattice_kernel(position / 2.5)), (5.0, lattice_kernel(both))]
    expected = naive_mean_field(kernels, probabilities[0].flatten(1).double().numpy(), 3)
    refined = dense_crf(probabilities, image, settings)
    np.testing.assert_allclose(refined[0].flatten(1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 6, 21])
def test_labels_agree_with_pydensecrf(classes: int) -> None:
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    for index in range(2):
        image, _, probabilities = sample(index, width=120, height=90, classes=max(classes, 6))
        if classes == 2:
            probabilities = torch.stack([probabilities[:, 0], probabilities[:, 1:].sum(1)], 1)
        crf = densecrf.DenseCRF2D(120, 90, classes)
        crf.setUnaryEnergy(-probabilities[0].clamp(min=1e-5).log().flatten(1).numpy())
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(
            sxy=64, srgb=5, rgbim=np.ascontiguousarray(image[0].permute(1, 2, 0).numpy()), compat=4
        )
        expected = np.array(crf.inference(10)).reshape(classes, 90, 120)
        for negligible in (0.0, 0.1):
            refined = dense_crf(probabilities, image, negligible=negligible)[0]
            assert (refined.argmax(0).numpy() == expected.argmax(0)).mean() > 0.995
        assert (probabilities[0].argmax(0).numpy() != expected.argmax(0)).mean() > 0.005, "it does something"


def test_refined_labels_are_nearer_to_the_truth() -> None:
    before, after = [], []
    for index in range(6):
        image, mask, probabilities = sample(index, width=96, height=96)
        refined = dense_crf(probabilities, image)
        torch.testing.assert_close(refined.sum(1), torch.ones(1, 96, 96))
        before.append(naive.miou(mask.numpy(), probabilities.argmax(1).numpy(), 6))
        after.append(naive.miou(mask.numpy(), refined.argmax(1).numpy(), 6))
    assert np.mean(after) > np.mean(before) + 0.02


def test_images_of_a_batch_do_not_meet() -> None:
    samples = [sample(index) for index in range(3)]
    image, probabilities = torch.cat([s[0] for s in samples]), torch.cat([s[2] for s in samples])
    together = dense_crf(probabilities, image, negligible=0.0)
    assert together.shape == probabilities.shape
    for i in range(3):
        alone = dense_crf(probabilities[i : i + 1], image[i : i + 1], negligible=0.0)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


def test_negligible_classes_end_with_nothing_and_change_no_label() -> None:
    image, _, probabilities = sample(1)
    logits = torch.cat([probabilities.log(), torch.full((1, 15, *image.shape[2:]), -9.0)], 1)
    logits += 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    crowded = logits.softmax(1)
    full, reduced = dense_crf(crowded, image, negligible=0.0), dense_crf(crowded, image)
    assert not reduced[:, 6:].any()
    assert full[:, 6:].amax() < 1e-2
    assert (full.argmax(1) == reduced.argmax(1)).float().mean() > 0.999


def test_class_that_is_certain_everywhere_stays() -> None:
    probabilities = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    torch.testing.assert_close(dense_crf(probabilities, torch.zeros(1, 3, 8, 8)), probabilities.contiguous())


def test_heavy_weights_stay_finite() -> None:
    image, _, probabilities = sample(0)
    refined = dense_crf(probabilities, image, CrfSettings(gaussian_weight=1e3, bilateral_weight=1e3))
    torch.testing.assert_close(refined.sum(1), torch.ones(1, 48, 64))


def test_no_iteration_changes_nothing_but_the_least_probability() -> None:
    image, _, probabilities = sample(2)
    with unchanged(image, probabilities):
        refined = dense_crf(probabilities, image, CrfSettings(iterations=0), negligible=0.0)
        first = dense_crf(probabilities, image)
    torch.testing.assert_close(refined, probabilities)
    assert torch.equal(dense_crf(probabilities, image.float()), first)


def test_features_are_position_then_color() -> None:
    image = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4).to(torch.uint8)
    features = bilateral_features(image, xy=2.0, rgb=10.0)
    assert features.shape == (2, 8, 5)
    torch.testing.assert_close(features[1, 6], torch.tensor([1.0, 0.5, 3.0, 3.8, 4.6]))
