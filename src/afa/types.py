"""The values that the parts of afa pass to each other. Imports nothing of afa.

Shape letters, fixed for the whole project: B batch, C foreground classes, K = C + 1 classes with the
background at 0, H W pixels, h w tokens of the last encoder stage, hw = h * w, n attention maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

import torch
from torch import Tensor

IGNORE_INDEX: Final = 255
"""Label of pixels that no loss and no score counts."""

IMAGE_MEAN: Final = (0.485, 0.456, 0.406)
"""Mean of the ImageNet images per RGB channel, of values in [0, 1]."""

IMAGE_STD: Final = (0.229, 0.224, 0.225)
"""Standard deviation of the ImageNet images per RGB channel, of values in [0, 1]."""


@dataclass(frozen=True)
class Batch:
    """Training images and everything that a weakly-supervised step may know about them.

    There is no field for pixel masks: a training step cannot read what it is not given.

    Attributes:
        image: (B, 3, H, W) uint8 RGB, 0 outside the valid box.
        tags: (B, C) float32, 1 where the class is tagged as present, -1 where it is unknown.
        valid_box: (B, 4) int64, (top, bottom, left, right) of the part of each image that holds the photograph,
            half open: rows top..bottom-1.
        names: B image names, for messages.
        frozen: Arrays of B rows that the feature cache has of these images; none where training starts from pixels.
        num_negatives: How many of the images, the last ones, are known to hold none of the classes.
    """

    image: Tensor
    tags: Tensor
    valid_box: Tensor
    names: tuple[str, ...]
    frozen: tuple[Tensor, ...] = ()
    num_negatives: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same batch with every tensor, of any shape, changed, as by `torch.clone`."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(changed(part) for part in value)
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{each.name: changed(getattr(self, each.name)) for each in fields(self)})

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Copy the tensors to `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the tensors to page-locked memory, for fast transfers to a GPU."""
        return self.map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class RawAttention:
    """Queries and keys of the blocks whose attention is read.

    The products of all heads together are far larger than their factors, and neither the affinity nor training
    needs them one by one: they are made only when `logits` is called.

    Attributes:
        query: (B, n, hw, d).
        key: (B, n, hw, d).
    """

    query: Tensor
    key: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, n, hw, hw) Q K^T, unscaled, before softmax, with gradient."""
        return self.query @ self.key.transpose(2, 3)


@dataclass(frozen=True)
class NetworkOutput:
    """Output of the network for a batch; parts that were not asked for are None.

    Attributes:
        image_logits: (B, C) class logits of the whole image.
        class_scores: (B, C, h, w) classifier weight applied to the last stage: the raw CAM, any sign.
        seg_logits: (B, K, H/4, W/4) segmentation logits.
        affinity: (B, hw, hw) in (0, 1), symmetric.
        attention: Queries and keys of the last blocks.
        attention_scale: Factor that the encoder applies to the attention logits before its softmax, 1 / sqrt(d).
    """

    image_logits: Tensor
    class_scores: Tensor
    seg_logits: Tensor | None = None
    affinity: Tensor | None = None
    attention: RawAttention | None = None
    attention_scale: float = 1.0

    @property
    def attention_logits(self) -> Tensor | None:
        """(B, n, hw, hw) Q K^T of the last blocks, unscaled, before softmax."""
        return None if self.attention is None else self.attention.logits


def inside_box(valid_box: Tensor, height: int, width: int) -> Tensor:
    """Mark the pixels of each valid box: (B, 4) -> (B, H, W) bool."""
    top, bottom, left, right = valid_box[:, :, None].unbind(1)  # (B, 1) each
    y, x = torch.arange(height, device=valid_box.device), torch.arange(width, device=valid_box.device)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]  # (B, H, W)


def normalize_image(image: Tensor) -> Tensor:
    """(image - IMAGE_MEAN) / IMAGE_STD of RGB in [0, 1]: (B, 3, H, W) -> (B, 3, H, W)."""
    mean, std = _channel_statistics(image.dtype, image.device)
    return (image - mean) / std


def truncate_levels(image: Tensor) -> Tensor:
    """Take the levels of pixels as the published code gets them back from its normalized image.

    It truncates them. Those that rounding left just below a whole number lose a level: red 1, 6, 61 and 62, green 56,
    blue 42 and 45.

    Args:
        image: (B, 3, H, W) float32 RGB in [0, 1]; what lies between the levels of 8 bits stays as it is.

    Returns:
        (B, 3, H, W).
    """
    mean, std = _channel_statistics(image.dtype, image.device, 255)
    # In place, as fresh memory takes longer than the arithmetic.
    levels = image * 255
    whole = levels.round()
    is_whole = levels.sub_(whole).abs_().lt_(1e-3)  # 0 or 1
    back = whole.sub(mean).div_(std).mul_(std).add_(mean).trunc_()
    return back.sub_(whole).mul_(is_whole).div_(255).add_(image)


@functools.lru_cache(maxsize=16)
def _channel_statistics(dtype: torch.dtype, device: torch.device, white: int = 1) -> tuple[Tensor, Tensor]:
    """(1, 3, 1, 1) mean and standard deviation of images whose white is 1 or 255, sent to a device once."""
    with torch.inference_mode(False):
        mean = torch.tensor([white * each for each in IMAGE_MEAN], dtype=dtype, device=device).view(1, 3, 1, 1)
        std = torch.tensor([white * each for each in IMAGE_STD], dtype=dtype, device=device).view(1, 3, 1, 1)
    return mean, std
