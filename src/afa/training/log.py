"""metrics.jsonl and TensorBoard: one line of figures at a time, safe against a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from afa.config import Config
from afa.runs.run import Run

LOSSES: Final = ("cls_loss", "seg_loss", "aff_loss", "reg_loss")
"""Keys of the losses in metrics.jsonl, beside their weighted sum."""

_UNLEARNT_AFFINITY: Final = 0.47
"""From this balanced affinity loss on, the affinity has learned nothing; any constant affinity has 0.5."""


class MetricsLog:
    """Append-only log of a run.

    Args:
        run: Run folder, whose log it is.
        resume_step: Lines of later steps, which a resumed run will write again, are dropped.
        tensorboard: Also write TensorBoard events, if the package is installed.
    """

    def __init__(self, run: Path, *, resume_step: int, tensorboard: bool) -> None:
        self._run = Run(run)
        self._run.write_metrics([line for line in self._run.metrics() if line["step"] <= resume_step])
        self._writer = _tensorboard_writer(self._run.tensorboard) if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it has `kind` and `step`. Numbers that are not finite, which JSON lacks, become null."""
        line = {key: None if _is_not_finite(value) else value for key, value in line.items()}
        self._run.append_metrics(line)
        if self._writer is not None:
            for key, value in line.items():
                if key not in ("step", "kind") and isinstance(value, (int, float)):
                    name = f"{line['kind']}/{line['labels']}_{key}" if "labels" in line else f"{line['kind']}/{key}"
                    self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self._writer is not None:
            self._writer.close()


def describe(line: Mapping[str, Any]) -> str:
    """The phase and the losses of a line, for the progress bar."""
    parts = [f"{name[:-5]} {line[name]:.3f}" for name in LOSSES if line[name] is not None]
    return f"{line['phase']}: " + ", ".join(parts)


def affinity_warning(line: Mapping[str, Any], config: Config) -> str | None:
    """A warning if a line shows that labels are made from an affinity that has not learned anything."""
    walks = line["phase"] == "refined" and config.pseudo.propagation == "affinity"
    known = walks and config.loss.affinity_form == "balanced" and line["aff_loss"] is not None
    if not known or line["aff_loss"] < _UNLEARNT_AFFINITY:
        return None
    remedy = "" if config.model.affinity_init == "calibrated" else "--model.affinity_init calibrated or "
    return (
        f"warning: step {line['step']}: the affinity has learnt nothing (loss {line['aff_loss']:.2f}; one that is the "
        f"same everywhere has 0.50), so refined labels will be poor; try {remedy}another --train.seed"
    )


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
