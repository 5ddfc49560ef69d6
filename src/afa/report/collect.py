"""Reads a run folder into the dictionary that report.json holds. Draws nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from afa.config import SUPERVISION_NAMES, config_to_dict
from afa.runs.run import Run

LABEL_KINDS = ("seg", "propagated", "cam")
"""The labels that are scored: the segmentation, the propagated CAM, the CAM."""

_RANKED: Final = 20
"""Images that report.json lists as the worst, and as many as the best."""

_ENVIRONMENT = ("device", "processes", "precision", "num_parameters", "torch", "python", "afa", "commit")


def collect_report(run: Path, *, running: bool = False) -> dict[str, Any]:
    """Gather the figures of a run, finished or not; what the folder does not contain is None.

    Args:
        run: Run folder; only its config.toml must be there.
        running: Its training goes on.

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
          `run`: the folder's name; `running`: as given; `latest`: the last evaluation during the training.
        - `confusion`: K lists of K pixels, rows the ground truth, background first; `worst`, `best`: at most 20 images
          with their scores, the worst and the best first; all of evaluation/seg.json.

    Raises:
        AfaError: `run` is missing or has no config.toml, or one of its files is broken.
    """
    folder = Run(run)
    config = folder.config()
    environment = folder.environment()
    scores = {kind: folder.scores(kind) for kind in LABEL_KINDS}
    metrics = folder.metrics()
    train = [line for line in metrics if line["kind"] == "train"]
    last = train[-1] if train else {}
    evaluated = [line for line in metrics if line["kind"] == "eval"]
    ranked = rank_images(scores["seg"].get("images", ()))

    seconds = environment.get("seconds_train", last.get("seconds"))
    steps = environment.get("steps", last.get("step"))
    return {
        "miou": scores["seg"].get("miou"),
        "cam_miou": scores["cam"].get("miou"),
        "propagated_miou": scores["propagated"].get("miou"),
        "tag_f1": scores["seg"].get("tag_f1", folder.scores("tags").get("tag_f1")),
        "seconds_train": seconds,
        "steps": steps,
        "supervision": SUPERVISION_NAMES[config.train.supervision],
        "config": config_to_dict(config),
        "classes": list(folder.classes() if folder.has_classes else config.data.class_names),
        "per_class": {kind: scores[kind].get("per_class") for kind in LABEL_KINDS},
        "protocol": scores["seg"].get("protocol"),
        "num_images": scores["seg"].get("num_images"),
        "images_per_second": steps * config.schedule.batch_size / seconds if steps and seconds else None,
        "confusion": scores["seg"].get("confusion"),
        "worst": ranked[:_RANKED],
        "best": ranked[::-1][:_RANKED],
        "latest": evaluated[-1] if evaluated else None,
        "running": running,
        "complete": folder.is_complete,
        "run": run.resolve().name,
        "report_commit": source_commit(),
    } | {key: environment.get(key) for key in _ENVIRONMENT}


def rank_images(images: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images of an evaluation that have a score, the lowest IoU first."""
    return sorted((each for each in images if each["iou"] is not None), key=lambda each: each["iou"])


def source_commit() -> str | None:
    """Git commit of the source tree that afa runs from; None when installed without one."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    # In a virtual environment inside another repository, git would answer with the commit of that repository.
    return lines[1] if Path(lines[0]) / "src" / "afa" == package else None
