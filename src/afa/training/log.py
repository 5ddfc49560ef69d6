"""metrics.jsonl and TensorBoard: one line of figures at a time, safe against a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa.training.checkpoint import write_atomically


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


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
