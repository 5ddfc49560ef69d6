"""metrics.jsonl and TensorBoard: one line of figures at a time, safe against a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from afa.config import Config
from afa.training.checkpoint import write_atomically

LOSSES: Final = ("cls_loss", "seg_loss", "aff_loss", "reg_loss")
"""Keys of the losses in metrics.jsonl, beside their weighted sum."""

_UNLEARNT_AFFINITY: Final = 0.47
"""Balanced affinity loss from which on an affinity counts as unlearnt: 0.5 is that of any constant one."""


class MetricsLog:
    """Append-only log of a run.

    Args:
        run: Run folder; the log is its metrics.jsonl.
        resume_step: Lines of later steps, which a resumed run will write again, are dropped.
        tensorboard: Also write TensorBoard events, if the package is installed.
    """

    def __init__(self, run: Path, *, resume_step: int, tensorboard: bool) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._writer = _tensorboard_writer(run / "tensorboard") if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it has `kind` and `step`. Numbers that are not finite, which JSON lacks, become null."""
        line = {key: None if _is_not_finite(value) else value for key, value in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for key, value in line.items():
                if key not in ("step", "kind") and isinstance(value, (int, float)):
                    name = f"{line['kind']}/{line['labels']}_{key}" if "labels" in line else f"{line['kind']}/{key}"
                    self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl.

    Args:
        path: The file; a missing one is empty, and an unfinished last line, which a kill leaves behind, is left out.

    Returns:
        One dictionary a line, with at least `kind` and `step`; figures that are not finite are None.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text, parse_constant=lambda _: None)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line:
            lines.append(line)
    return lines


def describe(line: Mapping[str, Any]) -> str:
    """The phase and the losses of a line, for the progress bar."""
    parts = [f"{name[:-5]} {line[name]:.3f}" for name in LOSSES if line[name] is not None]
    return f"{line['phase']}: " + ", ".join(parts)


def affinity_warning(line: Mapping[str, Any], config: Config) -> str | None:
    """What to say of an affinity that labels are made from before it has learnt anything, if a line shows one."""
    walks = line["phase"] == "refined" and config.pseudo.propagation == "affinity"
    known = walks and config.loss.affinity_form == "balanced" and line["aff_loss"] is not None
    if not known or line["aff_loss"] < _UNLEARNT_AFFINITY:
        return None
    remedy = "" if config.model.attention_scaling else "--model.attention_scaling true or "
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
