"""Training as a command: from data to a run with scores and a report; and which settings it has."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa.api.settings import at_work, changed, file_config, rooted
from afa.check.cost import measure_pace
from afa.check.tags import check_fast
from afa.config import Config, load_config
from afa.data.dataset import MaskedImages
from afa.data.images import level_warning, sample_peaks
from afa.data.open import DataSet, open_data
from afa.demo.shapes import DEFAULT_STYLE, NEGATIVES_STYLE, SHAPE_CLASSES
from afa.demo.write import MARKER_NAME, write_shapes
from afa.elastic import is_main, is_restarted
from afa.errors import AfaError
from afa.evaluation import evaluate as evaluation
from afa.evaluation.tags import evaluate_tags
from afa.evaluation.worth import measure_worth
from afa.inference.predictor import Predictor
from afa.model.network import AfaNetwork
from afa.report.collect import rank_images
from afa.report.page import write_report
from afa.report.pictures import write_examples, write_ranked, write_worth
from afa.runs.auto import choose_defaults
from afa.runs.run import Run
from afa.runtime import Processes, pick_device, process_group, say, showing_progress
from afa.training import loop
from afa.training.log import MetricsLog
from afa.training.trackers import check_trackers

SCORED_LABELS = ("seg", "cam", "propagated")
"""Kinds of labels that a finished run is scored by."""

_LIVE_EXAMPLES = 4
"""Examples at most that an evaluation during a training draws: each takes as long as scoring several images."""

_DEMO_IMAGE_SIZE = 128

_SMOKE: dict[str, Any] = {"schedule.max_steps": 40, "schedule.cls_steps": 15, "schedule.refined_steps": 25}


def train(
    source: str | Path | Config,
    out: str | Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> Predictor:
    """Train from tags, score, and write the run folder with its report, as `afa train`.

    Args:
        source: Folder of a data set, for settings that are chosen by data and device; a TOML file; or a configuration.
        out: Run folder.
        minutes: What everything may take, for a folder.
        resume: Continue the run in the folder.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win, `**{"schedule.max_steps": 1000}`.

    Returns:
        The trained network, ready for images.

    Raises:
        AfaError: As `training_config` and `train_and_report`.
    """
    data = None
    if isinstance(source, Config):
        config = changed(source, overrides)
    else:
        is_file = Path(source).suffix == ".toml" and not Path(source).is_dir()
        config, choices, data = training_config(
            None if is_file else source,
            file=source if is_file else None,
            overrides=overrides,
            run=Path(out) if resume or is_restarted() else None,
            minutes=minutes,
        )
        for line in choices if progress and is_main() else ():
            say(line)
    train_and_report(config, out, data=data, resume=resume, progress=progress)
    return Predictor.from_run(out, device=config.train.device, precision=config.train.precision)


def train_and_report(
    config: Config, run: str | Path, *, data: DataSet | None = None, resume: bool = False, progress: bool = True
) -> None:
    """Check the data, train, score segmentation, CAM and propagated CAM, and write the report.

    Scores the validation images that have masks; if none has a mask, scores the tags of all of them.

    Args:
        config: Settings.
        run: Run folder.
        data: The data set, if it is open already.
        resume: Continue the run in the folder, as a process does that torchrun starts again.
        progress: Show progress on standard error.

    Raises:
        AfaError: The data is not fit for training; as `afa.training.loop.train` and
            `afa.evaluation.evaluate.evaluate`.
    """
    run = Path(run)
    check_trackers(config.train.trackers)
    data, resume = data or open_data(config.data), resume or is_restarted()
    with at_work(config, progress) as (device, processes):
        data.leave_out_broken()
        warnings = _check(config, data)
        for warning in warnings if processes.is_main else ():
            say(f"warning: {warning}")

        def show(network: AfaNetwork, scored: MaskedImages | None) -> Path | None:
            return _show_running(config, data, scored, run, network)

        result = loop.train(config, data, run, device=device, processes=processes, resume=resume, show=show)
        with result.log or contextlib.nullcontext() as log:
            if processes.is_main:
                write_report(run, running=True)
            if result.scored is None:
                _score_tags(config, data, run, result.network, log, processes)
            else:
                _score_masks(config, result.scored, run, result.network, log, processes)
        if processes.is_main:
            page = write_report(run)
            say(f"run folder {run}; open {page}")


def _show_running(
    config: Config, data: DataSet, scored: MaskedImages | None, run: Path, network: AfaNetwork
) -> Path | None:
    """Draw the examples of a running training and write its page; returns the sheet. What fails there ends nothing."""
    sheet = None
    try:
        if config.train.example_images and config.data.val_list and data.has_validation:
            images = scored or data.validation()
            count = min(_LIVE_EXAMPLES, config.train.example_images)
            with showing_progress(False):
                sheet = write_examples(network, images, run, config=config, count=count)
        write_report(run, running=True)
    except AfaError as error:
        say(f"warning: the page of the running training is as it was: {error}")
    return sheet


def _score_masks(
    config: Config, scored: MaskedImages, run: Path, network: AfaNetwork, log: MetricsLog | None, processes: Processes
) -> None:
    """Score segmentation, CAM and propagated CAM, and draw examples, the worst and the best images."""
    tagged = all(scored.has_tags(index) for index in range(len(scored)))
    if not tagged and processes.is_main:
        say("some validation images have no tags: CAM and propagated CAM, which need them, are not scored")
    labels = SCORED_LABELS if tagged else SCORED_LABELS[:1]
    scores = evaluation.evaluate_each(network, scored, config, labels, processes=processes)
    if log is None:
        return
    sheet, figures = None, {each.labels: each.to_json() for each in scores}
    for each in scores:
        Run(run).write_scores(each.labels, figures[each.labels])
        score = "none, as no mask has a class," if math.isnan(each.miou) else f"{each.miou:.2f}"
        say(f"{each.labels}: mIoU {score} on {each.num_images} images")
        log.track(figures[each.labels], "final", config.schedule.max_steps)
    if count := config.train.example_images:
        sheet = write_examples(network, scored, run, config=config, count=count)
        ranked = [each["image"] for each in rank_images(figures["seg"]["images"])] if tagged else []
        write_ranked(network, scored, run, ranked, config=config, count=count)
    log.show(config.schedule.max_steps, sheet=sheet, result=scores[0])


def _check(config: Config, data: DataSet) -> list[str]:
    """The warnings of the fast check; its errors are one error."""
    problems = check_fast(data, config)
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if len(errors) > 1:
        raise AfaError(f"{errors[0]} (and {len(errors) - 1} more; afa check {config.data.root} lists them)")
    if errors:
        raise AfaError(errors[0])
    warnings = [problem.message for problem in problems if problem.severity == "warning"]
    images = data.train()
    peaks = sample_peaks(len(images), images.image_path)
    return warnings + list(filter(None, [level_warning(peaks, config.data.white_level)]))


def _score_tags(
    config: Config, data: DataSet, run: Path, network: AfaNetwork, log: MetricsLog | None, processes: Processes
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
    figures = evaluate_tags(network, images, config, processes=processes)
    if log is not None:
        Run(run).write_scores("tags", figures.to_json())
        log.track(figures.to_json(), "final", config.schedule.max_steps)
        score = "none" if figures.tag_f1 is None else f"{figures.tag_f1:.2f}"
        say(f"tags: F1 {score} on {figures.num_images} images; there are no masks to tell the mIoU by")
        worth = measure_worth(network, images, config)
        Run(run).write_worth(worth.to_json())
        for line in worth.failures():
            say(f"warning: {line}")
        if count := config.train.example_images:
            sheet = write_examples(network, images, run, config=config, count=count)
            log.show(config.schedule.max_steps, sheet=sheet)
            write_worth(network, images, run, worth, config=config)


def run_demo(
    run: str | Path,
    *,
    smoke: bool = False,
    one_class: bool = False,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Generate `shapes`, train on its tags, and report.

    An earlier demo run in the folder is replaced: the same command makes it again.

    Args:
        run: Run folder; the data set is written to its `data` folder.
        smoke: A few steps on a few images, to see that everything runs.
        one_class: Images of one class, half of them without it.
        resume: Continue the run in the folder.
        overrides: Dotted configuration keys that win over the demo's.

    Raises:
        AfaError: The folder holds something that is not a demo run.
    """
    began, run = time.perf_counter(), Path(run)
    num_train, num_val = (64, 16) if smoke else (1600, 200)
    data = Run(run).data
    config = load_config(None, {"data.root": str(data)} | (_SMOKE if smoke else {}) | (overrides or {}), preset="demo")
    if not resume and run.exists() and any(run.iterdir()):
        if not (data / MARKER_NAME).is_file():
            raise AfaError(f"{run}: holds something that is not a demo run; pass another --out")
        shutil.rmtree(run)
    say(f"writing {num_train} training and {num_val} validation images to {data}")
    classes, style = (SHAPE_CLASSES[:1], NEGATIVES_STYLE) if one_class else (SHAPE_CLASSES, DEFAULT_STYLE)
    sizes = {"num_train": num_train, "num_val": num_val, "image_size": _DEMO_IMAGE_SIZE}
    write_shapes(data, **sizes, classes=classes, style=style)
    train_and_report(config, run, resume=resume)
    figures = Run(run).report()
    say(
        f"demo done in {time.perf_counter() - began:.0f} s: segmentation mIoU {figures['miou']:.1f}, "
        f"CAM {figures['cam_miou']:.1f}, propagated CAM {figures['propagated_miou']:.1f}"
    )
    say(f"look at it: open {Run(run).page}, or ask about each pixel with: afa explore {run}")


def training_config(
    folder: str | Path | None = None,
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    minutes: float | None = None,
) -> tuple[Config, tuple[str, ...], DataSet | None]:
    """Resolve the settings of a training.

    With a folder and neither file nor preset they are chosen by data and device, or are those of the run to go on with.

    Args:
        folder: Folder of the data set.
        file: TOML file.
        preset: Name that wins over the file's.
        overrides: Dotted keys that win.
        run: Run folder to go on with.
        minutes: What everything may take, where the settings are chosen.

    Returns:
        The configuration; what was chosen and why, a line each; and the data set that it was chosen by. No line and no
        data set where nothing was chosen.

    Raises:
        AfaError: As `load_config` and `choose_defaults`; no data set is named, or two are.
    """
    keys = dict(overrides or {})
    if folder is not None:
        keys = rooted(folder, keys)
        if file is None and preset is None and run is not None and Run(run).exists:
            return Run(run).config(keys), (), None
    config = file_config(file, keys, preset)
    if not config.data.root:
        raise AfaError("data.root is not set; pass the folder of the data set")
    if folder is None or file is not None or preset is not None:
        if minutes is not None:
            raise AfaError(f"--minutes is {minutes:g}, but a file or preset states the steps; leave one of them out")
        return config, (), None
    data = open_data(config.data)
    device = pick_device(config.train.device)
    with process_group(device) as processes:  # each would measure another pace
        chosen = processes.from_main(lambda: choose_defaults(data, device, keys, minutes=minutes, measure=measure_pace))
    return *chosen, data
