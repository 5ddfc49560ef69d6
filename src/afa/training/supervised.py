"""Full supervision, for comparison (Table 5): the same network trained on true masks instead of from tags.

The one module of the training side that reads masks. Nothing imports it unless `train.supervision` is `masks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.config import Config
from afa.data.layout import Layout
from afa.data.loader import step_indices, step_plan
from afa.data.transforms import CropPlan
from afa.data.voc import ScoredImages
from afa.errors import AfaError
from afa.evaluation.evaluate import read_ahead
from afa.kernels.resize import resize
from afa.losses.classification import classification_loss
from afa.losses.count import TotalFunction
from afa.losses.segmentation import segmentation_loss
from afa.pseudo.cam import ScoreFunction
from afa.pseudo.pipeline import TrainingLabels
from afa.runtime import Processes
from afa.training.schedule import Phase
from afa.training.step import ForwardFunction, StepLosses
from afa.types import IGNORE_INDEX, Batch, normalize_image


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A training batch with the true masks of its crops.

    Attributes:
        mask: (B, H, W) uint8 in 0..C, 255 where ignored and outside the valid box.
    """

    mask: Tensor = field(kw_only=True)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> MaskedBatch:
        """Copy the tensors to `device`."""
        moved = super().to(device, non_blocking=non_blocking)
        return with_mask(moved, self.mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskedBatch:
        """Copy the tensors to page-locked memory, for fast transfers to a GPU."""
        return with_mask(super().pin_memory(), self.mask.pin_memory())


def with_mask(batch: Batch, mask: Tensor) -> MaskedBatch:
    """Put masks (B, H, W) beside the images of a batch."""
    return MaskedBatch(**{each.name: getattr(batch, each.name) for each in fields(Batch)}, mask=mask)


def open_masked(data: Layout, train_list: str) -> ScoredImages:
    """Open the images of `data.train_list` with tags and masks.

    Args:
        data: The data set.
        train_list: List of names, relative to the root unless absolute.

    Returns:
        The images in the order of the list, each with a mask and at least one tag.

    Raises:
        AfaError: There is no such list; an image of it has no mask or no tag.
    """
    path = data.root / train_list
    if not path.is_file():
        raise AfaError(
            f"{path}: no such list; train.supervision = masks learns from the masks of the images that data.train_list "
            "names"
        )
    data.training(list_file=train_list)  # weak supervision's checks of names and tags
    return data.scored(list_file=train_list)


def with_masks(
    batches: Iterator[Batch], images: ScoredImages, *, config: Config, start_step: int, processes: Processes
) -> Iterator[MaskedBatch]:
    """Put the masks of the same crops beside the images of training batches.

    Args:
        batches: What `train_batches` yields of these images from `start_step` on.
        images: Images with masks.
        config: Settings that the batches were made with.
        start_step: First step, from 0.
        processes: Processes that train together; the batches are this one's share.

    Yields:
        The batches, with masks that are read ahead in threads.

    Raises:
        AfaError: During iteration, a mask cannot be read or does not fit its image.
    """
    augment, schedule, seed = config.augment, config.schedule, config.train.seed
    share = schedule.batch_size // processes.count
    first = processes.rank * share

    def masks(step: int) -> Tensor:
        indices = step_indices(len(images), step=step, batch_size=schedule.batch_size, seed=seed)
        canvas = np.full((share, augment.crop_size, augment.crop_size), IGNORE_INDEX, dtype=np.uint8)
        for row, index in enumerate(indices[first : first + share].tolist()):
            mask = images.mask(index)
            size = (mask.shape[0], mask.shape[1])
            plan = step_plan(size, augment, step=step, row=first + row, seed=seed)
            resample_mask(mask, plan, canvas[row])
        return torch.from_numpy(canvas)

    readings = read_ahead(masks, range(start_step, schedule.max_steps))
    for batch, (_, reading) in zip(batches, readings, strict=True):
        mask = reading.result()
        yield with_mask(batch, mask.pin_memory() if batch.image.is_cuda else mask)


def resample_mask(mask: NDArray[np.uint8], plan: CropPlan, canvas: NDArray[np.uint8]) -> None:
    """Carry out a plan on a mask: each place takes the value of the pixel that holds its center.

    Args:
        mask: (H, W) uint8, of the plan's size.
        plan: The crop.
        canvas: (S, S) uint8, written inside the plan's valid box.
    """
    rows, columns = plan.rows, plan.columns
    part = Image.fromarray(mask).resize(
        (columns.end - columns.start, rows.end - rows.start),
        Image.Resampling.NEAREST,
        box=(columns.first, rows.first, columns.last, rows.last),
    )
    values = np.asarray(part)
    canvas[rows.start : rows.end, columns.start : columns.end] = values[:, ::-1] if plan.flip else values


def supervised_losses(
    forward: ForwardFunction,
    score: ScoreFunction,
    batch: Batch,
    *,
    config: Config,
    phase: Phase,
    num_slots: int | None = None,
    total: TotalFunction | None = None,
    num_processes: int = 1,
) -> StepLosses:
    """Compute the losses of a fully-supervised step; arguments as `compute_losses`.

    Args:
        forward: Training pass of the network.
        score: Not used.
        batch: A `MaskedBatch`, on the network's device.
        config: Not used: the weights of the losses are those of weak supervision.
        phase: Not used: every step is the same.
        num_slots: Not used.
        total: Adds a count up over all processes.
        num_processes: Number of processes.

    Returns:
        Losses; `total` = classification + plain cross-entropy of the segmentation.
    """
    assert isinstance(batch, MaskedBatch)
    output = forward(normalize_image(batch.image.float() / 255), True, False)
    assert output.seg_logits is not None
    cls = classification_loss(output.image_logits, batch.tags)
    logits = resize(output.seg_logits, batch.mask.shape[1:])
    seg = segmentation_loss(logits, batch.mask.long(), form="plain", total=total)
    return StepLosses(
        total=cls + num_processes * seg,
        cls=cls.detach(),
        seg=seg.detach(),
        aff=None,
        reg=None,
        labels=TrainingLabels(None, None),
    )
