"""One training step from batch to losses: pure, without input, output or optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from afa.config import Config
from afa.kernels.resize import resize
from afa.losses.affinity import affinity_loss
from afa.losses.classification import classification_loss
from afa.losses.energy import energy_loss
from afa.losses.segmentation import segmentation_loss
from afa.pseudo.affinity import affinity_label, token_label
from afa.pseudo.cam import ScoreFunction
from afa.pseudo.pipeline import TrainingLabels, training_labels
from afa.runtime import ALONE, Processes, one_cast
from afa.training.schedule import Phase
from afa.types import Batch, NetworkOutput, normalize_image

ForwardFunction = Callable[[Tensor, bool, bool], NetworkOutput]
"""(normalized image, segmentation wanted, affinity wanted) -> network output with gradient."""


@dataclass(frozen=True)
class StepLosses:
    """Losses of a step.

    Attributes:
        total: Scalar to differentiate. Averaged over processes its gradient is that of the whole batch's loss.
        cls: Scalar, detached: mean over this process's images.
        seg: Scalar, detached: this process's share, or None when the phase has no such loss.
        aff: Likewise.
        reg: Scalar, detached: mean over this process's images, or None when the step has no energy loss.
        labels: Pseudo labels that the step learned from.
    """

    total: Tensor
    cls: Tensor
    seg: Tensor | None
    aff: Tensor | None
    reg: Tensor | None
    labels: TrainingLabels


LossFunction = Callable[..., StepLosses]
"""What a step computes: `compute_losses`, or that of full supervision, which takes the same."""


def compute_losses(
    forward: ForwardFunction,
    score: ScoreFunction,
    batch: Batch,
    *,
    config: Config,
    phase: Phase,
    num_slots: int | None = None,
    processes: Processes = ALONE,
) -> StepLosses:
    """Compute everything that a step of this phase needs.

    Args:
        forward: Training pass of the network.
        score: CAM pass of the network.
        batch: Images, tags and valid boxes, on the network's device.
        config: Settings.
        phase: What the step computes.
        num_slots: 1 + the largest number of tags of an image, if known on the host.
        processes: Processes that train together; the batch is this one's share.

    Returns:
        Losses; `total` = cls + lambda_1 seg + lambda_2 aff + lambda_3 reg (paper Eq. 12).
    """
    image = batch.image.float() / 255  # (B, 3, H, W)
    labels = TrainingLabels(None, None)
    with one_cast(image.device):
        # The training pass comes first: autocast's copies of the weights then carry gradients, and all passes use them.
        output = forward(normalize_image(image), phase.segmentation, phase.affinity)
        if phase.labels:
            some = slice(len(image) - batch.num_negatives)
            reused = output.class_scores[some] if config.pseudo.reuse_training_pass else None
            labels = training_labels(
                score,
                image[some],
                batch.tags[some],
                batch.valid_box,
                config=config.pseudo,
                want=phase.labels,
                plain_scores=reused,
                num_slots=num_slots,
            )
    group = processes if config.loss.reduction == "batch" else ALONE  # the processes that a mean is over
    loss = cls = classification_loss(output.image_logits, batch.tags)
    seg = aff = reg = None
    stride = config.loss.segmentation_stride
    target = labels.refined_label if phase.want_refined else labels.initial_label  # (B, H, W)
    if phase.segmentation:
        assert output.seg_logits is not None
        assert target is not None
        seg_target = target[:, stride // 2 :: stride, stride // 2 :: stride]  # (B, H / stride, W / stride)
        logits = resize(output.seg_logits, seg_target.shape[1:])  # (B, K, H/4, W/4) -> (B, K, H / stride, W / stride)
        seg = segmentation_loss(logits, seg_target, form=config.loss.segmentation_form, total=group.total)
        loss = loss + group.count * config.loss.segmentation_weight * seg
        if config.loss.energy_weight > 0:
            # Building a lattice synchronizes the GPU, and on a GPU the sum over all pairs is fast.
            on_host = logits.device.type in ("cpu", "mps")
            reg = energy_loss(logits, image, target, batch.valid_box, method="lattice" if on_host else "exact_half")
            loss = loss + config.loss.energy_weight * reg
    if phase.affinity:
        follows = config.schedule.affinity_target == "segmentation"
        aff = _affinity_loss(output, target if follows else labels.initial_label, config, group)
        loss = loss + group.count * config.loss.affinity_weight * aff
    share = group.count / processes.count
    seg, aff = (None if part is None else share * part.detach() for part in (seg, aff))
    return StepLosses(loss, cls.detach(), seg, aff, None if reg is None else reg.detach(), labels)


def _affinity_loss(output: NetworkOutput, label: Tensor | None, config: Config, group: Processes) -> Tensor:
    assert output.affinity is not None
    assert label is not None
    grid = (output.class_scores.shape[2], output.class_scores.shape[3])
    tokens = token_label(label, grid)  # (B, H, W) -> (B, h, w)
    pairs = affinity_label(tokens, radius=config.pseudo.affinity_radius)  # (B, h, w) -> (B, hw, hw)
    return affinity_loss(output.affinity, pairs, form=config.loss.affinity_form, total=group.total)


def gradient_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Norm of all gradients together, a scalar on the parameters' device; the GPU is not synchronized."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
