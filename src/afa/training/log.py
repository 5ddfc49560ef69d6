"""metrics.jsonl and trackers: one line of figures at a time, safe against a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from PIL import Image

from afa.config import Config
from afa.evaluation.scores import EvaluationResult
from afa.runs.run import Run
from afa.training.trackers import Trackers

LOSSES: Final = ("cls_loss", "seg_loss", "aff_loss", "reg_loss")
"""Keys of the losses in metrics.jsonl, beside their weighted sum."""

_UNLEARNT_AFFINITY: Final = 0.47
"""From this balanced affinity loss on, the affinity has learned nothing; any constant affinity has 0.5."""


class MetricsLog:
    """Append-only log of a run.

    Args:
        run: Run folder, whose log it is.
        resume_step: Lines of later steps, which a resumed run will write again, are dropped.
        trackers: What else is told of every line.
    """

    def __init__(self, run: Path, *, resume_step: int, trackers: Trackers | None = None) -> None:
        self._run = Run(run)
        self._run.write_metrics([line for line in self._run.metrics() if line["step"] <= resume_step])
        self._trackers = trackers

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it has `kind` and `step`. Numbers that are not finite, which JSON lacks, become null."""
        line = {key: None if _is_not_finite(value) else value for key, value in line.items()}
        self._run.append_metrics(line)
        self.track(line, line["kind"], line["step"])

    def track(self, figures: Mapping[str, Any], kind: str, step: int) -> None:
        """Tell the trackers the numbers among some figures, as `KIND/NAME` or `KIND/LABELS_NAME`."""
        if self._trackers is None:
            return
        prefix = f"{kind}/{figures['labels']}_" if "labels" in figures else f"{kind}/"
        numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float)) and key != "step"}
        self._trackers.tell("scalars", {prefix + key: value for key, value in numbers.items()}, step)

    def show(self, step: int, *, sheet: Path | None = None, result: EvaluationResult | None = None) -> None:
        """Give the trackers a sheet of examples, and of an evaluation the curves of its tags."""
        if self._trackers is None:
            return
        if sheet is not None and sheet.is_file():
            with Image.open(sheet) as picture:
                self._trackers.tell("picture", "examples", picture.convert("RGB"), step)
        if result is not None and result.tags is not None:
            self._trackers.tell("tags", list(result.per_class)[1:], *result.tags, step)

    def close(self, *, failed: bool = False) -> None:
        """Hand over what the trackers hold back; `failed` tells them how the run ended."""
        if self._trackers is not None:
            self._trackers.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


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
