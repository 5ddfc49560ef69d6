"""Learning rate and phase as pure functions of the step (paper section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afa.config import Config, ScheduleConfig

PhaseName = Literal["cls", "initial", "refined", "masks"]


@dataclass(frozen=True)
class Phase:
    """What a step computes; nothing else is computed.

    Attributes:
        name: `cls` learns the tags alone; `initial` learns everything, the segmentation from the initial label;
            `refined` learns the segmentation from the refined label; `masks`, of full supervision, has no labels of
            its own.
        segmentation: The segmentation loss is on.
        affinity: The affinity loss is on.
        want_initial: The initial label is needed.
        want_refined: The refined label is needed.
    """

    name: PhaseName
    segmentation: bool
    affinity: bool
    want_initial: bool
    want_refined: bool

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the pseudo labels that are needed."""
        wanted = {"initial_label": self.want_initial, "refined_label": self.want_refined}
        return tuple(name for name, needed in wanted.items() if needed)


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """Learning rate of a step, from 0, over the full one.

    Linear warm-up from `warmup_ratio`, then polynomial decay over all steps (not offset by the warm-up unless
    `poly_offset` says so).

    >>> learning_rate_factor(10_000, ScheduleConfig())
    0.5
    """
    if step < schedule.warmup_steps:
        return 1 - (1 - step / schedule.warmup_steps) * (1 - schedule.warmup_ratio)
    start = schedule.warmup_steps if schedule.poly_offset else 0
    progress = (step - start) / max(1, schedule.max_steps - start)
    return float(max(0.0, 1 - progress) ** schedule.poly_power)


def learning_rate(step: int, schedule: ScheduleConfig) -> float:
    """Encoder learning rate used at a step, from 0; the other layers use `head_lr_factor` times as much."""
    return schedule.learning_rate * learning_rate_factor(step, schedule)


def phase(step: int, config: Config) -> Phase:
    """Phase of a step.

    Args:
        step: Training step, 0-based.
        config: What the run learns from, when, and weights of the losses: one of weight 0 is never computed.

    Returns:
        `cls` before `cls_steps`, or never if no classifier learns; `initial` up to and including `refined_steps`, then
        `refined`. Under full supervision `masks` from the start.
    """
    schedule, loss = config.schedule, config.loss
    if config.train.supervision == "masks":
        return Phase("masks", True, False, False, False)
    if step < schedule.cls_steps and config.model.classifier == "learned":
        return Phase("cls", False, False, False, False)
    name: PhaseName = "refined" if step > schedule.refined_steps else "initial"
    segmentation, affinity = loss.segmentation_weight > 0, loss.affinity_weight > 0
    refined = name == "refined"
    follows_segmentation = schedule.affinity_target == "segmentation"
    from_initial = (segmentation and not refined) or (affinity and not (refined and follows_segmentation))
    from_refined = refined and (segmentation or (affinity and follows_segmentation))
    return Phase(name, segmentation, affinity, from_initial, from_refined)
