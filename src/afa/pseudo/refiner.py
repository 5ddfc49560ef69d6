"""Low-level refinement of score maps: where it looks, at which size, and by which method."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import PseudoConfig
from afa.filtering.crf import CrfSettings, dense_crf
from afa.kernels.box import move_box
from afa.kernels.par import refine, refinement_kernel
from afa.kernels.resize import resize
from afa.types import truncate_levels

Size = tuple[int, int]


class Refiner:
    """Low-level refinement of score maps by the images of one batch.

    The kernel is computed when it is first needed, once per batch.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        config: Refinement settings.
    """

    def __init__(self, image: Tensor, config: PseudoConfig) -> None:
        self.image = image
        self.config = config
        self.size = (image.shape[2], image.shape[3])
        self.small_size = self._reduced(self.size)

    def _reduced(self, size: Size) -> Size:
        """Size at which scores of this size are refined."""
        stride = self.config.refinement_stride
        return max(1, size[0] // stride), max(1, size[1] // stride)

    @cached_property
    def seen(self) -> Tensor:
        """(B, 3, H, W) image as PAR sees it; the CRF sees the exact one."""
        return truncate_levels(self.image) if self.config.par_image == "truncated" else self.image

    @cached_property
    def kernel(self) -> Tensor:
        """(B, n, h, w) kernel of the whole canvas, at the size at which scores are refined."""
        return self._kernel(resized(self.seen, self.small_size))

    def on_canvas(self, scores: Tensor, *, num_sets: int = 1) -> Tensor:
        """Refine scores over the whole canvas.

        Args:
            scores: (B, P, h, w), one or more sets of scores side by side.
            num_sets: How many. The CRF lets the scores of a set compete; other refinements take each score alone.

        Returns:
            (B, P, H, W).
        """
        scores = resized(scores, self.small_size)  # (B, P, H/2, W/2) at stride 2
        if self.config.refinement == "crf":
            scores = self._crf(scores, resized(self.image, self.small_size), num_sets)
        elif self.config.refinement != "none":
            scores = self._refine(scores, self.kernel)
        return resized(scores, self.size)  # (B, P, H, W)

    def in_box(self, scores: Tensor, valid_box: Tensor, *, num_sets: int = 1) -> Tensor:
        """Refine scores inside the valid boxes.

        Image and scores are cropped at full size. Then both are brought to the size of refinement, the scores with
        aligned corners, as in the published code.

        Args:
            scores: (B, P, h, w) as in `on_canvas`.
            valid_box: (B, 4) int64 (top, bottom, left, right), half open.
            num_sets: As in `on_canvas`.

        Returns:
            (B, P, H, W), 0 outside the box.
        """
        scores = resized(scores, self.size)  # (B, P, H, W)
        if self.config.refinement == "none":
            return scores
        by_crf = self.config.refinement == "crf"
        if not by_crf and scores.device.type != "cpu":
            return self._refine_boxes(scores, valid_box)
        boxes = valid_box.tolist()
        if not by_crf and all(box == [0, self.size[0], 0, self.size[1]] for box in boxes):
            small = interpolate(scores, size=self.small_size, mode="bilinear", align_corners=True)  # (B, P, H/2, W/2)
            return resized(self._refine(small, self.kernel), self.size)
        refined = torch.zeros_like(scores)
        for index, (top, bottom, left, right) in enumerate(boxes):
            inside = (slice(index, index + 1), slice(None), slice(top, bottom), slice(left, right))
            refined[inside] = self._refine_crop(index, inside, scores[inside], num_sets)
        return refined

    def _refine_boxes(self, scores: Tensor, valid_box: Tensor) -> Tensor:
        """Refine all boxes at once: the small image of each lies in the top left corner of a canvas that fits all."""
        extent = torch.stack([valid_box[:, 1] - valid_box[:, 0], valid_box[:, 3] - valid_box[:, 2]], 1)  # (B, 2)
        extent = (extent // self.config.refinement_stride).clamp(min=1)
        corner = torch.stack([torch.zeros_like(extent), extent], 2).flatten(1)  # (B, 4)
        image = move_box(self.seen, self.small_size, source=valid_box, target=corner, align_corners=False)
        small = move_box(scores, self.small_size, source=valid_box, target=corner, align_corners=True)
        refined = self._refine(small, self._kernel(image, extent), extent)  # (B, P, H/2, W/2)
        return move_box(refined, self.size, source=corner, target=valid_box, align_corners=False)  # (B, P, H, W)

    def _refine_crop(self, index: int, inside: tuple[slice, ...], crop: Tensor, num_sets: int) -> Tensor:
        """Refine (1, P, h, w) scores of one box."""
        size = (crop.shape[2], crop.shape[3])
        small_size = self._reduced(size)
        small = interpolate(crop, size=small_size, mode="bilinear", align_corners=True)  # (1, P, h/2, w/2)
        if self.config.refinement == "crf":
            return resized(self._crf(small, resized(self.image[inside], small_size), num_sets), size)
        if size == self.size:
            kernel = self.kernel[index : index + 1]  # (1, n, h/2, w/2)
        else:
            kernel = self._kernel(resized(self.seen[inside], small_size))  # (1, n, h/2, w/2)
        return resized(self._refine(small, kernel), size)  # (1, P, h, w)

    def _kernel(self, image: Tensor, extent: Tensor | None = None) -> Tensor:
        config = self.config
        assert config.refinement != "none"
        assert config.refinement != "crf"
        return refinement_kernel(
            image,
            dilations=config.dilations,
            rgb_bandwidth=config.rgb_bandwidth,
            pos_bandwidth=config.pos_bandwidth,
            pos_weight=config.pos_weight,
            kind=config.refinement,
            extent=extent,
        )

    def _refine(self, scores: Tensor, kernel: Tensor, extent: Tensor | None = None) -> Tensor:
        config = self.config
        return refine(scores, kernel, dilations=config.dilations, iterations=config.iterations, extent=extent)

    def _crf(self, scores: Tensor, image: Tensor, num_sets: int) -> Tensor:
        """Each set of scores through the dense CRF, whose bandwidths of positions are pixels of the full size."""
        stride = self.config.refinement_stride
        settings = CrfSettings(gaussian_xy=3.0 / stride, bilateral_xy=64.0 / stride)
        return torch.cat([dense_crf(each, 255 * image, settings) for each in scores.chunk(num_sets, 1)], 1)


def resized(maps: Tensor, size: Size) -> Tensor:
    """Resize maps where their size differs: (B, P, h, w) -> (B, P, *size)."""
    return maps if maps.shape[2:] == size else resize(maps, size)
