"""Whole jobs: train, evaluate and report in one go, and the demo that does so on generated data."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from afa.check.tags import check_fast
from afa.config import Config, load_config
from afa.data.open import DataSet, open_data
from afa.demo.write import MARKER_NAME, write_shapes
from afa.errors import AfaError
from afa.evaluation.evaluate import evaluate
from afa.evaluation.tags import evaluate_tags
from afa.model.network import AfaNetwork
from afa.report.page import write_report
from afa.report.pictures import write_examples
from afa.runtime import Processes, pick_device, process_group, say
from afa.training.checkpoint import write_atomically
from afa.training.loop import open_validation, train

SCORED_LABELS = ("seg", "cam", "propagated")
"""Kinds of labels that a finished run is scored by."""

_DEMO_IMAGE_SIZE = 128

_SMOKE: dict[str, Any] = {"schedule.max_steps": 40, "schedule.cls_steps": 15, "schedule.refined_steps": 25}


def train_and_report(
    config: Config, run: Path, *, data: DataSet | None = None, resume: bool = False, progress: bool = True
) -> None:
    """Check the data, train, score segmentation, CAM and propagated CAM, and write the report.

    Scored are the images for validation that have masks; where none has, the tags of all of them.

    Args:
        config: Settings.
        run: Run folder.
        data: The data set, if it is open already.
        resume: Go on with the run that the folder holds.
        progress: Show progress on standard error.

    Raises:
        AfaError: The data is not fit for training; as `afa.training.loop.train` and
            `afa.evaluation.evaluate.evaluate`.
    """
    device = pick_device(config.train.device)
    data = data or open_data(config.data)
    warnings = _check(config, data)
    with process_group(device) as processes:
        for warning in warnings if processes.is_main else ():
            say(f"warning: {warning}")
        progress = progress and processes.is_main
        result = train(config, data, run, device=device, processes=processes, resume=resume, progress=progress)
        scored = open_validation(config, data)
        if scored is None:
            _score_tags(config, data, run, result.network, processes=processes, progress=progress)
        else:
            tagged = all(scored.has_tags(index) for index in range(len(scored)))
            if not tagged and processes.is_main:
                say("some validation images have no tags: CAM and propagated CAM, which need them, are not scored")
            for labels in SCORED_LABELS if tagged else SCORED_LABELS[:1]:
                figures = evaluate(
                    result.network,
                    scored,
                    config,
                    labels=labels,
                    processes=processes,
                    progress=progress,
                )
                if processes.is_main:
                    _write_figures(run, labels, figures.to_json())
                    say(f"{labels}: mIoU {figures.miou:.2f} on {figures.num_images} images")
            if processes.is_main and config.train.example_images:
                write_examples(
                    result.network,
                    scored,
                    run,
                    config=config,
                    device=device,
                    count=config.train.example_images,
                )
        if processes.is_main:
            page = write_report(run)
            say(f"run folder {run}; open {page}")


def _check(config: Config, data: DataSet) -> list[str]:
    """The warnings of the fast check; its errors are one error."""
    problems = check_fast(data, config)
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if len(errors) > 1:
        raise AfaError(f"{errors[0]} (and {len(errors) - 1} more; afa check {config.data.root} lists them)")
    if errors:
        raise AfaError(errors[0])
    return [problem.message for problem in problems if problem.severity == "warning"]


def _score_tags(
    config: Config,
    data: DataSet,
    run: Path,
    network: AfaNetwork,
    *,
    processes: Processes,
    progress: bool,
) -> None:
    """Score what can be scored without masks."""
    if not config.data.val_list or not data.has_validation:
        return
    try:
        images = data.validation()
    except AfaError as error:
        if processes.is_main:
            say(f"tags are not scored: {error}")
        return
    figures = evaluate_tags(
        network,
        images,
        config,
        processes=processes,
        progress=progress,
    )
    if processes.is_main:
        _write_figures(run, "tags", figures.to_json())
        score = "none" if figures.tag_f1 is None else f"{figures.tag_f1:.2f}"
        say(f"tags: F1 {score} on {figures.num_images} images; there are no masks to tell the mIoU by")


def _write_figures(run: Path, name: str, figures: dict[str, Any]) -> None:
    path = run / "evaluation" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(figures, indent=2) + "\n")


def run_demo(run: Path, *, smoke: bool = False, resume: bool = False, overrides: dict[str, Any] | None = None) -> None:
    """Generate `shapes`, train on its tags, and report.

    An earlier demo run in the folder is replaced: the same command makes it again.

    Args:
        run: Run folder; the data set is written to its `data` folder.
        smoke: A few steps on a few images, to see that everything runs.
        resume: Go on with the run that the folder holds.
        overrides: Dotted configuration keys that win over the demo's.

    Raises:
        AfaError: The folder holds something that is not a demo run.
    """
    began = time.perf_counter()
    num_train, num_val = (64, 16) if smoke else (1600, 200)
    data = run / "data"
    config = load_config(None, {"data.root": str(data)} | (_SMOKE if smoke else {}) | (overrides or {}), preset="demo")
    if not resume and run.exists() and any(run.iterdir()):
        if not (data / MARKER_NAME).is_file():
            raise AfaError(f"{run}: holds something that is not a demo run; pass another --out")
        shutil.rmtree(run)
    say(f"writing {num_train} training and {num_val} validation images to {data}")
    write_shapes(data, num_train=num_train, num_val=num_val, image_size=_DEMO_IMAGE_SIZE)
    train_and_report(config, run, resume=resume)
    figures = json.loads((run / "report.json").read_text())
    say(
        f"demo done in {time.perf_counter() - began:.0f} s: segmentation mIoU {figures['miou']:.1f}, "
        f"CAM {figures['cam_miou']:.1f}, propagated CAM {figures['propagated_miou']:.1f}"
    )
