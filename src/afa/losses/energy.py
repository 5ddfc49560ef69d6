"""Dense energy loss (method.md section 6): pixels alike in color and near each other should agree on their classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from afa.filtering.crf import bilateral_features
from afa.filtering.gaussian import FilterMethod, gaussian_filter
from afa.kernels.dispatch import fused
from afa.types import IGNORE_INDEX


def energy_loss(
    seg_logits: Tensor,
    image: Tensor,
    label: Tensor,
    valid_box: Tensor,
    *,
    xy_bandwidth: float = 100.0,
    rgb_bandwidth: float = 15.0,
    factor: float = 1e-7,
    method: FilterMethod = "lattice",
) -> Tensor:
    """Energy of the class probabilities S under the dense CRF of the image, mean over the images.

    E = -factor / B * sum_i gate_i S_i . (K S)_i at half the size of the image, K the unnormalized Gaussian of color and
    position, S 0 outside the valid box. The gate is 1 at pixels without label; at others it is 1 - max_c S_ic inside
    the valid box and 0 outside.

    The gradient is the published one, -2 factor / B * gate_i (K S)_i: gates are constants, and the half of the
    derivative that comes through K S is taken to equal the half that comes through S. That is so where gates are
    equal; elsewhere it lets only the gate of the pixel itself count, not those of its neighbors.

    Args:
        seg_logits: (B, K, h, w), resized to the image first (bilinear) where its size differs.
        image: (B, 3, H, W) RGB in [0, 1].
        label: (B, H, W) int64 that the segmentation learns from, 255 where it has none.
        valid_box: (B, 4) as in `Batch`.
        xy_bandwidth: Bandwidth of positions, pixels of the image (so half as many pixels at half its size).
        rgb_bandwidth: Bandwidth of colors, levels of 0..255.
        factor: Factor of the sum.
        method: As `gaussian_filter`. The published filter is the lattice; on photographs its energy is about 0.6 of
            that of the exact kernel, its gradient points the same way.

    Returns:
        Scalar, at most 0. Averaged over processes its gradient is that of the whole batch.

    Source:
        Tang et al. 2018; gate and settings as in the reference, method.md section 6. As there the image and the label
        are halved by taking every other pixel, the probabilities by the mean of 2 x 2.
    """
    height, width = image.shape[2] // 2, image.shape[3] // 2
    if seg_logits.shape[2:] != image.shape[2:]:
        seg_logits = interpolate(seg_logits, size=image.shape[2:], mode="bilinear", align_corners=False)
    probabilities = avg_pool2d(seg_logits.float().softmax(1), 2)
    with torch.no_grad():
        inside = _inside(valid_box, image.shape[2], image.shape[3])[:, : 2 * height : 2, : 2 * width : 2]
        unlabeled = label[:, : 2 * height : 2, : 2 * width : 2] == IGNORE_INDEX
        gate = (inside.float() - probabilities.amax(1)).clamp_(min=0).masked_fill_(unlabeled, 1)
        features = bilateral_features(
            255 * image[:, :, : 2 * height : 2, : 2 * width : 2], xy=xy_bandwidth / 2, rgb=rgb_bandwidth
        )
        rows = (probabilities * inside[:, None]).flatten(2).transpose(1, 2)
        # Colors and positions are bounded, so the exact filter need not look at them, which would wait for a GPU.
        reach = math.hypot(width / xy_bandwidth, height / xy_bandwidth, math.sqrt(3) * 255 / rgb_bandwidth)
        if method == "exact_half" and fused(image.device):
            gathered = _filter_inside(features, rows, inside.flatten(1), reach)
        else:
            gathered = gaussian_filter(features, rows, method=method, reach=reach)
        pull = gathered.transpose(1, 2).contiguous().view_as(probabilities).mul_((gate * inside)[:, None])
    energy = (probabilities * pull).sum()
    # Twice the gradient at once the value.
    return (2 * energy - energy.detach()) * (-factor / len(image))


def _filter_inside(features: Tensor, rows: Tensor, inside: Tensor, reach: float) -> Tensor:
    """`gaussian_filter` among the points that `inside` (B, N) holds for, 0 at the others, which cost no time.

    Takes the rows (B, N, K) of the others to be 0. Shapes depend on no value, so nothing waits for the device.
    """
    count = inside.sum(1)
    # Where each point goes: those inside to the front, in their order.
    place = torch.where(inside, inside.cumsum(1) - 1, count[:, None] + (~inside).cumsum(1) - 1)[..., None]
    to_features, to_rows = place.expand_as(features), place.expand_as(rows)
    moved = torch.empty_like(features).scatter_(1, to_features, features)
    values = torch.empty_like(rows).scatter_(1, to_rows, rows)
    return gaussian_filter(moved, values, method="exact_half", reach=reach, count=count).gather(1, to_rows)


def _inside(valid_box: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) bool, true in the valid box."""
    top, bottom, left, right = valid_box[:, :, None].unbind(1)
    y, x = torch.arange(height, device=valid_box.device), torch.arange(width, device=valid_box.device)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
