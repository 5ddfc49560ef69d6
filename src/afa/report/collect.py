"""Reads a run folder into the dictionary that report.json holds. Draws nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from afa.config import SUPERVISION_NAMES, config_to_dict, load_config
from afa.errors import AfaError
from afa.training.log import read_metrics as read_lines

LABEL_KINDS = ("seg", "propagated", "cam")
"""What evaluation scores: the segmentation, the propagated CAM, the CAM."""


def collect_report(run: Path) -> dict[str, Any]:
    """Gather the figures of a run, finished or not; what the folder does not tell is None.

    Args:
        run: Run folder; only its config.toml must be there.

    Returns:
        Values that JSON can hold:

        - `miou`, `cam_miou`, `propagated_miou`: percent; `tag_f1`: of evaluation/seg.json, else tags.json;
          `protocol`, `num_images`: of the segmentation's evaluation.
        - `seconds_train`, `steps`: from environment.json, else as far as metrics.jsonl reaches;
          `images_per_second`: over the whole training and all processes.
        - `device`, `torch`, `python`, `afa`, `num_parameters`, `processes`, `precision`, `commit`: of the
          training, from environment.json; `report_commit`: of the source tree that makes the report.
        - `supervision`: what it learned from, in words; `config`: nested resolved configuration; `classes`: C names;
          `per_class`: label kind -> class -> IoU in percent; `complete`: whether the final weights are written;
          `run`: the folder's name.

    Raises:
        AfaError: `run` is missing or has no config.toml, or one of its files is broken.
    """
    if not run.is_dir():
        raise AfaError(f"{run}: no such run folder; pass the folder given to `afa train --out`")
    if not (run / "config.toml").is_file():
        raise AfaError(f"{run}: not a run folder, it has no config.toml; pass the folder given to `afa train --out`")
    config = load_config(run / "config.toml")
    environment = _read_object(run / "environment.json")
    scores = {kind: _read_object(run / "evaluation" / f"{kind}.json") for kind in LABEL_KINDS}
    train = [line for line in read_metrics(run) if line["kind"] == "train"]
    last = train[-1] if train else {}

    seconds = environment.get("seconds_train", last.get("seconds"))
    steps = environment.get("steps", last.get("step"))
    return {
        "miou": scores["seg"].get("miou"),
        "cam_miou": scores["cam"].get("miou"),
        "propagated_miou": scores["propagated"].get("miou"),
        "tag_f1": scores["seg"].get("tag_f1", _read_object(run / "evaluation" / "tags.json").get("tag_f1")),
        "seconds_train": seconds,
        "steps": steps,
        "device": environment.get("device"),
        "torch": environment.get("torch"),
        "supervision": SUPERVISION_NAMES[config.train.supervision],
        "config": config_to_dict(config),
        "classes": _read_classes(run / "classes.txt") or list(config.data.classes),
        "per_class": {kind: scores[kind].get("per_class") for kind in LABEL_KINDS},
        "protocol": scores["seg"].get("protocol"),
        "num_images": scores["seg"].get("num_images"),
        "images_per_second": steps * config.schedule.batch_size / seconds if steps and seconds else None,
        "num_parameters": environment.get("num_parameters"),
        "processes": environment.get("processes"),
        "precision": environment.get("precision"),
        "python": environment.get("python"),
        "afa": environment.get("afa"),
        "commit": environment.get("commit"),
        "complete": (run / "model.safetensors").is_file(),
        "run": run.resolve().name,
        "report_commit": source_commit(),
    }


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order of their steps.

    A killed run leaves a torn line and, once resumed, repeats the steps since its last checkpoint: lines that
    are not a JSON object with `kind` and `step` are skipped, and the last line of a step is the one kept.

    Args:
        run: Run folder.

    Returns:
        One dictionary a line; empty when there is no metrics.jsonl. Values that are not finite are None.
    """
    kept: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        kept[(line["kind"], line.get("labels", ""), line["step"])] = line
    return sorted(kept.values(), key=lambda line: line["step"])


def source_commit() -> str | None:
    """Git commit of the source tree that afa runs from; None when installed without one."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    # A virtual environment inside somebody else's repository would answer with their commit.
    return lines[1] if Path(lines[0]) / "src" / "afa" == package else None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise AfaError(f"{path}: not valid JSON ({error}); write it again or delete it") from None
    if not isinstance(value, dict):
        raise AfaError(f"{path}: holds {type(value).__name__}, not a JSON object; write it again or delete it")
    return value


def _read_classes(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
