"""Class activation maps over several scales and flips (paper Eq. 2).

CAMs come from the raw class scores of encoder passes; the caller chooses the network that gives the scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afa.kernels.resize import resize
from afa.types import NetworkOutput, normalize_image

ScoreFunction = Callable[[Tensor, bool], NetworkOutput]
"""(normalized image (B, 3, H, W), whether the affinity is wanted) -> class scores and perhaps affinity."""


class ViewScore(ABC):
    """An encoder pass that has the views of its images at hand.

    Multi-scale CAMs ask it for a scale instead of passing it pixels. Subclasses may be called like any `ScoreFunction`.
    """

    @abstractmethod
    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        """Score pixels of a (B, 3, H, W) normalized image."""

    @abstractmethod
    def view(self, scale: float, flips: Sequence[bool], affinity: bool) -> NetworkOutput:
        """Score views of the batch.

        Args:
            scale: Which scale.
            flips: False for the images, True for the mirrored images; they follow one another in the batch.
            affinity: Whether the affinity is wanted; only with one element of `flips`.
        """


class _ImageViews(ViewScore):
    """Views of a batch of images, made on demand."""

    def __init__(self, score: ScoreFunction, image: Tensor) -> None:
        self.score = score
        self.normalized = normalize_image(image)
        self.scaled = (1.0, self.normalized)

    def __call__(self, image: Tensor, affinity: bool) -> NetworkOutput:
        return self.score(image, affinity)

    def view(self, scale: float, flips: Sequence[bool], affinity: bool) -> NetworkOutput:
        if scale != self.scaled[0]:
            self.scaled = (scale, scale_view(self.normalized, scale))
        sides = [self.scaled[1].flip(-1) if flip else self.scaled[1] for flip in flips]  # (B, 3, H, W) each
        return self.score(sides[0] if len(sides) == 1 else torch.cat(sides), affinity)


def scale_view(image: Tensor, scale: float) -> Tensor:
    """Rescale images for a pass of the multi-scale CAM: (B, 3, H, W) -> (B, 3, H * scale, W * scale), rounded down."""
    if scale == 1.0:
        return image
    size = (int(image.shape[2] * scale), int(image.shape[3] * scale))
    return resize(image, size)  # (B, 3, H * scale, W * scale)


@dataclass(frozen=True)
class CamResult:
    """Multi-scale CAM and what the random walk needs.

    Attributes:
        cam: (B, C, H, W) in [0, 1], each class and image scaled to its own range; the channels that were picked.
        grid: (h, w) tokens of the pass at the largest scale, or of `walk`.
        walk: Output of the unflipped pass whose affinity CAMs walk on, if it was asked for: that at the largest scale.
    """

    cam: Tensor
    grid: tuple[int, int]
    walk: NetworkOutput | None = None


def fuse_scores(
    scores: Sequence[Tensor], size: tuple[int, int], *, mirrored: bool = True, limits: Tensor | None = None
) -> Tensor:
    """Fuse raw class scores of several scales into one CAM.

    The scores of each scale are enlarged. The larger score of an image and its mirror image counts, if positive.
    The sum over the scales is scaled to [0, 1] for each class.

    Args:
        scores: Of each scale (2B, C, h, w) raw class scores: B of the plain images, then B of the flipped ones.
        size: (H, W) of the CAM.
        mirrored: Off, there are B of the plain images alone.
        limits: As of `normalize_cam`.

    Returns:
        (B, C, H, W) in [0, 1].

    Source:
        Paper Eq. 2, fused over scales and flips as in the published code.
    """
    total: Tensor | None = None
    for score in scores:
        if mirrored:
            plain, flipped = score.chunk(2)  # (B, C, h, w) each
            plain, flipped = resize(torch.cat([plain, flipped.flip(-1)]), size).chunk(2)  # (B, C, H, W) each
            positive = torch.maximum(plain, flipped).relu()  # (B, C, H, W)
        else:
            positive = resize(score, size).relu()  # (B, C, H, W)
        total = positive if total is None else total + positive
    assert total is not None
    return normalize_cam(total, limits)


def normalize_cam(cam: Tensor, limits: Tensor | None = None) -> Tensor:
    """Scale each class of each image to [0, 1] over its positions.

    Args:
        cam: (B, C, H, W) any range.
        limits: (2, B, C, 1, 1), smallest and largest value of the image that `cam` is a tile of; None are its own.

    Returns:
        (B, C, H, W): cam minus its spatial minimum, divided by the spatial maximum of that difference + 1e-5.
    """
    low = cam.amin((2, 3), keepdim=True) if limits is None else limits[0]  # (B, C, 1, 1)
    shifted = cam - low
    span = shifted.amax((2, 3), keepdim=True) if limits is None else limits[1] - low  # (B, C, 1, 1)
    return shifted / (span + 1e-5)


@torch.no_grad()
def multi_scale_cam(
    score: ScoreFunction,
    image: Tensor,
    *,
    scales: Sequence[float],
    mirrored: bool = True,
    affinity: bool = False,
    plain_scores: Tensor | None = None,
    pick: Callable[[Tensor], Tensor] | None = None,
    limits: Tensor | None = None,
) -> CamResult:
    """Run the encoder over all scales and flips and fuse the class scores.

    Args:
        score: Encoder pass; a `ViewScore` gives its own views of the images.
        image: (B, 3, H, W) RGB in [0, 1].
        scales: Input scales.
        mirrored: Also run the mirror image at each scale.
        affinity: Also return the affinity and attention of the unflipped pass at the largest scale.
        plain_scores: (B, C, h, w) class scores of the unflipped image at scale 1, if a pass made them already.
        pick: (B, C, h, w) -> (B, P, h, w), picks the channels that are wanted before any is enlarged. Each channel is
            fused and scaled on its own, so it does not depend on the others. None: all C.
        limits: (2, B, C, 1, 1), as of `normalize_cam`, of all C.

    Returns:
        CAM at the size of the image.
    """
    views = score if isinstance(score, ViewScore) else _ImageViews(score, image)
    scores: list[Tensor] = []
    grid = (0, 0)
    walk: NetworkOutput | None = None
    for scale in scales:
        wanted = affinity and scale == max(scales)
        if wanted:
            # The walk takes the affinity of the plain half alone, so only this half computes it.
            walk = views.view(scale, (False,), True)
            sides = [walk.class_scores]  # (B, C, h, w) each
        elif scale == 1.0 and plain_scores is not None:
            sides = [plain_scores]
        else:
            flips = (False, True) if mirrored else (False,)
            sides = list(torch.chunk(views.view(scale, flips, False).class_scores, len(flips)))
        if mirrored and len(sides) == 1:
            sides.append(views.view(scale, (True,), False).class_scores)
        plain = sides[0]
        if scale == max(scales):
            grid = (plain.shape[2], plain.shape[3])
        scores.append(torch.cat(sides if pick is None else [pick(side) for side in sides]))  # (B or 2B, P, h, w)
    size = (image.shape[2], image.shape[3])
    if limits is not None and pick is not None:
        limits = torch.stack([pick(each) for each in limits])  # (2, B, P, 1, 1)
    return CamResult(cam=fuse_scores(scores, size, mirrored=mirrored, limits=limits), grid=grid, walk=walk)
