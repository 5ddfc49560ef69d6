"""What tests of tensor functions share: inputs, oracles for whole batches, and a fake encoder pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from afa.types import NetworkOutput, RawAttention

TAGS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
"""Of two images and three classes."""


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def symmetric_affinity(tokens: int, seed: int = 0) -> Tensor:
    """(2, hw, hw) in (0, 1)."""
    half = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(half + half.transpose(1, 2))


def value_and_gradient(loss: Callable[..., Tensor], leaf: Tensor, *given: Any, **settings: Any) -> tuple[float, Tensor]:
    """Value of `loss(leaf, *given, **settings)`, and its gradient by the leaf, which is finite."""
    leaf = leaf.detach().clone().requires_grad_()
    value = loss(leaf, *given, **settings)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.isfinite().all()
    return value.item(), gradient


@contextmanager
def unchanged(*given: Tensor) -> Iterator[None]:
    """Assert that what is called inside changes none of its inputs."""
    before = [value.clone() for value in given]
    yield
    assert all(torch.equal(value, copy) for value, copy in zip(given, before, strict=True))


def assert_images_agree(
    found: Tensor, oracle: Callable[..., Any], *given: Tensor, atol: float = 0.0, **settings: Any
) -> None:
    """Compare each image of a batch with what an oracle of `naive` makes of this image alone."""
    for image, *parts in zip(found, *given, strict=True):
        expected = oracle(*(part.numpy() for part in parts), **settings)
        np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=atol)


def gaussian_pairs(features: Tensor, count: list[int] | None = None) -> Tensor:
    """(B, N, N) float64 exp(-|f_i - f_j|^2 / 2), 0 where one of a pair is not among the first `count` points."""
    features = features.double()
    weights = (-(features[:, :, None] - features[:, None]).square().sum(3) / 2).exp()
    for kernel, present in zip(weights, count or [features.shape[1]] * len(weights), strict=True):
        kernel[max(present, 0) :] = 0
        kernel[:, max(present, 0) :] = 0
    return weights


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest relative error; what should be 0 has to be."""
    assert not found[expected == 0].any()
    return float(((found - expected).abs() / expected.abs().clamp(min=1e-30)).max())


class FakeScore:
    """Encoder pass that averages patches of 8 pixels and mixes their colors; it notes what it was asked."""

    def __init__(self) -> None:
        self.weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
        self.calls: list[tuple[tuple[int, ...], bool]] = []

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        self.calls.append((tuple(image.shape), affinity))
        pooled = adaptive_avg_pool2d(image, (image.shape[2] // 8, image.shape[3] // 8))
        scores = torch.einsum("kc,bchw->bkhw", self.weight, pooled)
        tokens = pooled.flatten(2).transpose(1, 2)
        return NetworkOutput(
            image_logits=scores.amax((2, 3)),
            class_scores=scores,
            affinity=(tokens @ tokens.transpose(1, 2)).sigmoid() if affinity else None,
            attention=RawAttention(tokens[:, None], tokens[:, None]) if affinity else None,
        )

    @property
    def num_images(self) -> int:
        """Images that passed, whole and in parts."""
        return sum(shape[0] for shape, _ in self.calls)
