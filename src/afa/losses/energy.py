"""Dense energy loss (paper Eq. 12): pixels of like color that are near each other should agree on their classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from afa.filtering.crf import bilateral_features
from afa.filtering.gaussian import FilterMethod, gaussian_filter
from afa.types import IGNORE_INDEX, inside_box


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

    E = -factor / B * sum_i gate_i S_i . (K S)_i at half the size of the image. K is the unnormalized Gaussian of color
    and position; S is 0 outside the valid box. The gate is 1 at pixels without label; at others it is 1 - max_c S_ic
    inside the valid box and 0 outside.

    The gradient is the published one, -2 factor / B * gate_i (K S)_i. It treats gates as constants, and takes the half
    of the derivative through K S as equal to the half through S. The halves are equal where gates are equal; elsewhere
    the gate of the pixel itself counts and the gates of its neighbors do not.

    Args:
        seg_logits: (B, K, h, w), resized to the image first (bilinear) where its size differs.
        image: (B, 3, H, W) RGB in [0, 1].
        label: (B, H, W) int64 that the segmentation learns from, 255 where it has none.
        valid_box: (B, 4) as in `Batch`.
        xy_bandwidth: Bandwidth of positions, pixels of the image (so half as many pixels at half its size).
        rgb_bandwidth: Bandwidth of colors, levels of 0..255.
        factor: Factor of the sum.
        method: As `gaussian_filter`. The published filter is the lattice; on photographs it gives about 0.6 of the
            energy of the exact kernel, and a gradient of the same direction.

    Returns:
        Scalar, at most 0. Averaged over processes its gradient is that of the whole batch.

    Source:
        Paper Eq. 12, Tang et al. 2018. Gate, settings and halving are those of the published code: every other pixel of
        the image and of the label, the mean of 2 x 2 probabilities.
    """
    height, width = image.shape[2] // 2, image.shape[3] // 2
    halved = (slice(0, 2 * height, 2), slice(0, 2 * width, 2))
    if seg_logits.shape[2:] != image.shape[2:]:
        seg_logits = interpolate(seg_logits, size=image.shape[2:], mode="bilinear", align_corners=False)  # (B, K, H, W)
    probabilities = avg_pool2d(seg_logits.float().softmax(1), 2)  # (B, K, H/2, W/2)
    with torch.no_grad():
        inside = inside_box(valid_box, image.shape[2], image.shape[3])[:, *halved]  # (B, H/2, W/2)
        unlabeled = label[:, *halved] == IGNORE_INDEX  # (B, H/2, W/2)
        gate = (inside.float() - probabilities.amax(1)).clamp_(min=0).masked_fill_(unlabeled, 1)  # (B, H/2, W/2)
        features = bilateral_features(255 * image[:, :, *halved], xy=xy_bandwidth / 2, rgb=rgb_bandwidth)  # (B, N, 5)
        rows = probabilities.flatten(2).transpose(1, 2)  # (B, N, K), N = H/2 * W/2
        # Colors and positions are bounded, so the exact filter need not measure them, which would synchronize the GPU.
        reach = math.hypot(width / xy_bandwidth, height / xy_bandwidth, math.sqrt(3) * 255 / rgb_bandwidth)
        gathered = gaussian_filter(features, rows, method=method, inside=inside.flatten(1), reach=reach)  # (B, N, K)
        pull = gathered.transpose(1, 2).contiguous().view_as(probabilities).mul_(gate[:, None])  # (B, K, H/2, W/2)
    energy = (probabilities * pull).sum()
    # Twice the gradient at once the value.
    return (2 * energy - energy.detach()) * (-factor / len(image))
