"""Full supervision, for comparison (Table 5): the same network trained on true masks instead of from tags.

The one module of the training side that reads masks. Nothing imports it unless `train.supervision` is `masks`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afa.config import Config
from afa.data.dataset import MaskedImages
from afa.data.open import DataSet
from afa.data.order import Order, step_plan
from afa.data.transforms import resample_image
from afa.errors import AfaError
from afa.kernels.resize import resize
from afa.losses.classification import classification_loss
from afa.losses.segmentation import segmentation_loss
from afa.pseudo.cam import ScoreFunction
from afa.pseudo.pipeline import TrainingLabels
from afa.runtime import ALONE, Processes, read_ahead
from afa.training.step import ForwardFunction, StepLosses
from afa.types import IGNORE_INDEX, Batch, normalize_image


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A training batch with the true masks of its crops.

    Attributes:
        mask: (B, H, W) uint8 in 0..C, 255 where ignored and outside the valid box.
    """

    mask: Tensor = field(kw_only=True)


def with_mask(batch: Batch, mask: Tensor) -> MaskedBatch:
    """Put masks (B, H, W) beside the images of a batch."""
    return MaskedBatch(**{each.name: getattr(batch, each.name) for each in fields(Batch)}, mask=mask)


def open_masked(data: DataSet, train_list: str) -> MaskedImages:
    """Open the images of a list with tags and masks, in its order: each has a mask and at least one tag.

    Raises:
        AfaError: There is no such list; an image of it has no mask or no tag.
    """
    path = data.root / train_list
    if not path.is_file():
        raise AfaError(
            f"{path}: no such list; train.supervision = masks learns from the masks of the images that data.train_list "
            "names"
        )
    data.train(list_file=train_list)  # weak supervision's checks of names and tags
    return data.masked(list_file=train_list)


def with_masks(
    batches: Generator[Batch, None, None], images: MaskedImages, config: Config, *, start: int, processes: Processes
) -> Generator[MaskedBatch, None, None]:
    """Put the masks of the same crops beside the images of training batches.

    Args:
        batches: What `train_batches` yields of these images from `start` on.
        images: Images with masks.
        config: Settings that the batches were made with.
        start: First step, from 0.
        processes: Processes that train together; the batches are this one's share.

    Yields:
        The batches, with masks that are read ahead in threads.

    Raises:
        AfaError: During iteration, a mask cannot be read or does not fit its image.
    """
    augment, schedule, seed = config.augment, config.schedule, config.train.seed
    order = Order(images, config)
    size = schedule.batch_size // processes.count
    share = slice(processes.rank * size, (processes.rank + 1) * size)

    def masks(step: int) -> Tensor:
        canvas = np.full((size, augment.crop_size, augment.crop_size), IGNORE_INDEX, dtype=np.uint8)
        for row, (place, index) in enumerate(order.pairs(step, share)):
            mask = images.mask(index)
            plan = step_plan((mask.shape[0], mask.shape[1]), augment, step=step, row=place, seed=seed)
            resample_image(mask, plan, canvas[row], Image.Resampling.NEAREST)
        return torch.from_numpy(canvas)

    with closing(batches), closing(read_ahead(masks, range(start, schedule.max_steps))) as readings:
        for batch, (_, reading) in zip(batches, readings, strict=True):
            mask = reading.result()
            yield with_mask(batch, mask.pin_memory() if batch.image.is_cuda else mask)


def supervised_losses(
    forward: ForwardFunction, score: ScoreFunction, batch: Batch, *, processes: Processes = ALONE, **_: Any
) -> StepLosses:
    """Compute the losses of a fully-supervised step, whatever its phase.

    Args:
        forward: Training pass of the network.
        score: Not used.
        batch: A `MaskedBatch`, on the network's device.
        processes: Processes that train together; the batch is this one's share.

    Returns:
        Losses; `total` = classification + plain cross-entropy of the segmentation, of equal weight.
    """
    assert isinstance(batch, MaskedBatch)
    output = forward(normalize_image(batch.image.float() / 255), True, False)
    assert output.seg_logits is not None
    cls = classification_loss(output.image_logits, batch.tags)
    logits = resize(output.seg_logits, batch.mask.shape[1:])
    seg = segmentation_loss(logits, batch.mask.long(), form="plain", total=processes.total)
    total = cls + processes.count * seg
    return StepLosses(total, cls.detach(), seg.detach(), None, None, TrainingLabels(None, None))
