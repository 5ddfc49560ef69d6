"""Background and presence: which classes compete in an image, and their scores.

Only the classes of an image's tags take part in its labels. Every image gets the same number of slots, however many
tags it has, so that a whole batch is one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PresentClasses:
    """The classes that compete in each image: the background, then the tagged classes in rising order.

    Attributes:
        index: (B, P) int64 class indices in 0..C; slot 0 is the background.
        valid: (B, P) bool, False for slots that an image with fewer tags leaves empty.
    """

    index: Tensor
    valid: Tensor

    def gather(self, scores: Tensor) -> Tensor:
        """Pick the slots' channels: (B, K, H, W) -> (B, P, H, W)."""
        index = self.index[:, :, None, None].expand(-1, -1, *scores.shape[2:])  # (B, P, H, W)
        return scores.gather(1, index)  # (B, P, H, W)

    @property
    def foreground(self) -> PresentClasses:
        """The slots after the background, as channels of a CAM: indices in 0..C-1."""
        return PresentClasses(self.index[:, 1:] - 1, self.valid[:, 1:])

    def scatter(self, scores: Tensor, num_channels: int) -> Tensor:
        """Put the slots' channels back, with 0 in all other channels: (B, P, H, W) -> (B, num_channels, H, W)."""
        index = self.index[:, :, None, None].expand(-1, -1, *scores.shape[2:])  # (B, P, H, W)
        full = scores.new_zeros(len(scores), num_channels, *scores.shape[2:])  # (B, num_channels, H, W)
        return full.scatter_add_(1, index, scores * self.valid[:, :, None, None])  # (B, num_channels, H, W)

    def to_class(self, slot: Tensor) -> Tensor:
        """Turn slot numbers into class indices: (B, H, W) int64 -> (B, H, W) int64."""
        return self.index.gather(1, slot.flatten(1)).view_as(slot)  # (B, HW) -> (B, H, W)


def present_classes(tags: Tensor, *, num_slots: int | None = None) -> PresentClasses:
    """List the classes that compete in each image.

    Args:
        tags: (B, C), above 0 where present.
        num_slots: P, at least 2 and at least 1 + the largest number of tags of an image; None counts the tags, which
            synchronizes the GPU.
    """
    present = tags > 0
    if num_slots is None:
        num_slots = 1 + max(1, int(present.sum(1).max()))
    order = torch.argsort((~present).to(torch.uint8), dim=1, stable=True)[:, : num_slots - 1]  # (B, P - 1)
    background = torch.zeros_like(order[:, :1])
    valid = torch.cat([torch.ones_like(background, dtype=torch.bool), present.gather(1, order)], 1)  # (B, P)
    return PresentClasses(torch.cat([background, order + 1], 1), valid)


def with_background(cam: Tensor, background: float) -> Tensor:
    """Put a constant background score before the classes: (B, C, H, W) -> (B, K, H, W)."""
    return torch.cat([torch.full_like(cam[:, :1], background), cam], 1)  # (B, K, H, W)


def best_slot(scores: Tensor) -> Tensor:
    """Find the channel of the largest score, the first of equal ones: (B, P, H, W) -> (B, H, W) int64.

    For the few channels of present classes this is many times faster than `argmax` over a strided dimension.
    """
    best = scores[:, 0]  # (B, H, W)
    slot = torch.zeros_like(best, dtype=torch.int64)  # (B, H, W)
    for channel in range(1, scores.shape[1]):
        better = scores[:, channel] > best
        slot.masked_fill_(better, channel)
        best = torch.where(better, scores[:, channel], best)
    return slot


def mask_scores(scores: Tensor, valid: Tensor, *, softmax: bool) -> Tensor:
    """Let only the (B, P) valid channels of (B, P, H, W) scores compete; the others become 0.

    `softmax` is over the valid channels; off, their scores stay as they are.
    """
    absent = ~valid[:, :, None, None]  # (B, P, 1, 1)
    if softmax:
        return scores.masked_fill(absent, -torch.inf).softmax(1)
    return scores.masked_fill(absent, 0.0)


def present_scores(scores: Tensor, tags: Tensor, *, softmax: bool) -> Tensor:
    """Let background and tagged classes compete, in all K channels, background first: (B, K, H, W) -> (B, K, H, W).

    Absent classes, those of (B, C) tags not above 0, become 0; `softmax` as of `mask_scores`.
    """
    return mask_scores(scores, valid_channels(tags), softmax=softmax)


def valid_channels(tags: Tensor) -> Tensor:
    """Mark the background and the tagged classes: (B, C) -> (B, K) bool."""
    return torch.cat([torch.ones_like(tags[:, :1], dtype=torch.bool), tags > 0], 1)  # (B, K)


def class_shares(propagated: Tensor) -> Tensor:
    """(1 + C, h, w) walked scores -> (C, h, w) share of each class.

    The walk weakens all scores of an isolated token alike; the label depends only on the class that they favor.
    """
    return (propagated / propagated.sum(0, keepdim=True).clamp(min=1e-12))[1:]
