"""The commands as functions: train, demo, masks, evaluate, predict, pseudo labels, check, export, report, explorer.

`afa.train` is `afa.api.train`. Only this module composes rooms: a room below it does one thing.

The command line calls these and prints what they return, so that nothing is done there that Python cannot do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from afa.check import collect
from afa.check.cost import measure_pace
from afa.check.scale import parse_count
from afa.check.tags import check_fast
from afa.config import Config, DataConfig, config_to_keys, load_config
from afa.data.classes import read_lines
from afa.data.dataset import MaskedImages
from afa.data.images import level_warning, sample_peaks
from afa.data.open import DataSet, open_data
from afa.data.readers.tag_files import read_tags
from afa.data.split import VALIDATION
from afa.data.stores import is_remote
from afa.demo.shapes import DEFAULT_STYLE, NEGATIVES_STYLE, SHAPE_CLASSES
from afa.demo.write import MARKER_NAME, write_shapes
from afa.elastic import is_main, is_restarted
from afa.errors import AfaError
from afa.evaluation import evaluate as evaluation
from afa.evaluation.evaluate import first_images
from afa.evaluation.scores import EvaluationResult
from afa.evaluation.tags import TagResult, evaluate_tags
from afa.evaluation.worth import measure_worth
from afa.formats.voc_test import SubmissionCheck, check_voc_test
from afa.inference import files as prediction
from afa.inference import shards as sharding
from afa.inference.hub import load_pretrained, save_pretrained
from afa.inference.masks import MasksSummary, PredictSummary, joined_masks, summarize_masks
from afa.inference.onnx import ExportCheck, export_metadata, export_onnx, export_torch, read_check_images
from afa.inference.output import NO_FORMATS, Output
from afa.inference.predictor import Predictor
from afa.model.network import AfaNetwork
from afa.report.collect import rank_images
from afa.report.compare import compare_runs, render_text, write_comparison
from afa.report.figures import write_figures
from afa.report.masks import write_masks_page
from afa.report.page import write_report
from afa.report.pictures import write_examples, write_ranked, write_worth
from afa.runs.auto import choose_defaults
from afa.runs.network import build_network, load_run
from afa.runs.run import Run
from afa.runtime import Processes, pick_device, process_group, say, showing_progress
from afa.training import loop
from afa.training.log import MetricsLog
from afa.training.trackers import check_trackers

SCORED_LABELS = ("seg", "cam", "propagated")
"""Kinds of labels that a finished run is scored by."""

_TRAINED = ("augment", "model", "loss", "schedule")
"""Sections that only training reads."""

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
        config = _changed(source, overrides)
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
    run, device = Path(run), pick_device(config.train.device)
    check_trackers(config.train.trackers)
    data, resume = data or open_data(config.data), resume or is_restarted()
    with process_group(device) as processes, showing_progress(progress and processes.is_main):
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
        if keys.setdefault("data.root", str(folder)) != str(folder):
            raise AfaError(f"{folder} and data.root {keys['data.root']} both name the data set; leave one out")
        if file is None and preset is None and run is not None and Run(run).exists:
            return Run(run).config(keys), (), None
    config = _file_config(file, keys, preset)
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


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    labels: str = "seg",
    protocol: str | None = None,
    refine: bool = False,
    boundary: bool = False,
    list_file: str | None = None,
    limit: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> EvaluationResult | TagResult:
    """Score a run against masks, or against tags where the data set has no masks, as `afa evaluate`.

    Args:
        run: Run folder.
        data: Folder of the data set.
        labels: What is scored: `seg`, or with the images' true tags `cam`, `propagated`, `initial` or `refined`.
        protocol: `single`, `multiscale`, `single+crf` or `multiscale+crf`; None is that of the run.
        refine: Refine `cam` or `propagated` scores by the image first.
        boundary: Also score the boundary IoU.
        list_file: Names of the images, one a line; None is what the data has for validation.
        limit: Only the first so many images.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change, none that only training reads:
            `**{"train.device": "cpu"}`.

    Returns:
        Scores in percent; of the tags alone where there are no masks and the segmentation was asked for.

    Raises:
        AfaError: As `afa.evaluation.evaluate.evaluate`; not a run folder; the data set is missing or broken.
    """
    run = Path(run)
    protocols = {} if protocol is None else {"evaluation.protocol": protocol}
    config = run_config(run, overrides | protocols, data=data)
    with _at_work(config, progress) as (device, processes):
        network, layout = load_run(run, device).network, open_data(config.data)
        with showing_progress(processes.is_main):
            layout.leave_out_broken((VALIDATION,), list_file=list_file)
        if labels == "seg" and not layout.has_masks and config.data.mask_dir == DataConfig().mask_dir:
            if processes.is_main:
                say(f"{layout.root}: no masks, so nothing tells the mIoU; the tags are scored")
            images = first_images(layout.validation(list_file=list_file), limit)
            return evaluate_tags(network, images, config, processes=processes)
        scored = first_images(layout.masked(list_file=list_file), limit)
        scored.check_values()
        options: dict[str, Any] = {"labels": labels, "refine": refine, "boundary": boundary}
        return evaluation.evaluate(network, scored, config, processes=processes, **options)


def predict(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tags: str | Path | None = None,
    scores: bool = False,
    crf: bool = False,
    overlay: bool = True,
    formats: str = "",
    resume: bool = False,
    out_shards: int = 0,
    rle: bool = False,
    tiles: str | int = "off",
    max_pixels: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> PredictSummary:
    """Segment image files into a folder, as `afa predict`; `Predictor` segments images in memory.

    Args:
        run: Run folder.
        images: Image files and folders that are walked; shards, by file, folder, pattern with braces or address.
        out: Folder of the results, or address of a store.
        tags: File of tags of the images: only tagged classes, and those that it does not know, are predicted.
        scores: Also write class scores.
        crf: Refine the masks by the dense CRF, whatever the run's protocol.
        overlay: Also write the colored masks over the images.
        formats: Formats of other tools to write as well, names separated by commas.
        resume: Go on with the masks that are in `out` already.
        out_shards: Images of each shard of masks; 0 writes files, or to a store a shard for each shard that is read.
        rle: In shards, run lengths as of COCO in place of PNGs.
        tiles: As of `Predictor`.
        max_pixels: As of `Predictor`.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change, none that only training reads.

    Returns:
        What was written and what failed.

    Raises:
        AfaError: As `afa.inference.files.predict_files` and `afa.formats.write.write_format`; not a run folder.
    """
    run = Path(run)
    texts = [str(images)] if isinstance(images, str | Path) else [str(path) for path in images]
    sharded = [text for text in texts if sharding.is_sharded(text)]
    paths = [Path(text) for text in texts if text not in sharded]
    size = out_shards or (sharding.DEFAULT_SIZE if paths and is_remote(str(out)) else 0)
    output = Output(out, formats=formats, shard_size=size, rle=rle, scores=scores)
    config = run_config(run, overrides)
    if crf:
        config = dataclasses.replace(config, evaluation=config.evaluation.with_crf(True))
    with _at_work(config, progress) as (device, processes):
        loaded = load_run(run, device)
        predictor = Predictor(loaded.network, loaded.classes, config=config, tiles=tiles, max_pixels=max_pixels)
        known = None if tags is None else read_tags(Path(tags), predictor.classes, config.data.negatives)
        settings: dict[str, Any] = {"tags": known, "scores": scores}
        if not output.in_shards:
            settings |= {"overlay": overlay, "processes": processes}
        if not sharded and not output.in_shards:
            summary = prediction.predict_files(predictor, paths, output.folder, resume=resume, **settings)
            files = prediction.output_names(paths, output.folder) if output.formats and processes.is_main else {}
            return output.convert(summary, files, predictor.classes, processes)
        if output.formats:
            raise AfaError(NO_FORMATS)

        def make(files: Mapping[str, Path], place: Path, *, resume: bool = True) -> PredictSummary:
            return prediction.predict_files(predictor, files, place, resume=resume, **{"overlay": False, **settings})

        parts = sharding.shard_files(sharded, config.data)
        if paths:
            parts = itertools.chain([("images", prediction.output_names(paths, output.folder))], parts)
        if not output.in_shards:
            return sharding.make_parts(make, parts, output.folder, resume=resume, processes=processes)
        shards = output.shards(predictor.classes, config.data)
        return sharding.whole(shards.write(make, parts, {}, resume=resume, processes=processes), processes)


def pseudo_labels(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "refined",
    list_file: str | None = None,
    formats: str = "",
    out_shards: int = 0,
    rle: bool = False,
    tiles: str | int = "off",
    max_pixels: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> PredictSummary:
    """Write pseudo labels of tagged images, as `afa pseudo`.

    Args:
        run: Run folder.
        data: Folder of the data set.
        out: Folder of the labels, or address of a store; those that are there already are left as they are.
        kind: `refined`, `initial`, `propagated` or `cam`.
        list_file: Names of the images, one a line; None is what the data has to train on.
        formats: Formats of other tools to write as well, names separated by commas.
        out_shards: As of `predict`; to a store 10,000 if it is 0.
        rle: As of `predict`.
        tiles: `auto` makes images of more than 1,024 pixels a side in tiles as large as the training crops; a number
            is the side of the tiles, and larger images are tiled; `off` tiles none.
        max_pixels: As of `Predictor`.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change, none that only training reads.

    Returns:
        What was written and what failed.

    Raises:
        AfaError: As `afa.inference.files.pseudo_files` and `afa.formats.write.write_format`; not a run folder; the
            data set is missing or broken.
    """
    run, output = Path(run), Output(out, formats=formats, shard_size=out_shards, rle=rle)
    config = run_config(run, overrides, data=data)
    with _at_work(config, progress) as (device, processes):
        network = load_run(run, device).network
        images = open_data(config.data).train(list_file=list_file)
        tiling = prediction.pseudo_tiling(network, config, tiles, max_pixels=max_pixels)
        return output.write_labels(network, images, config, processes, kind=kind, tiling=tiling)


def masks(
    data: str | Path,
    out: str | Path,
    *,
    file: str | Path | None = None,
    list_file: str | None = None,
    formats: str = "",
    examples: int = 8,
    out_shards: int = 0,
    rle: bool = False,
    tiles: str | int = "off",
    max_pixels: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> MasksSummary:
    """Write masks of tagged images without training, as `afa masks`: from class names and a frozen encoder.

    Args:
        data: Folder of the data set; no mask of it is read.
        out: Folder of the masks, or address of a store; those that are there already are left as they are.
        file: TOML file whose settings win over those of the preset `frozen`.
        list_file: Names of the images, one a line; None is every image with tags.
        formats: Formats of other tools to write as well, names separated by commas.
        examples: How many images the page OUT/masks.html shows; there is none beside shards.
        out_shards: As of `pseudo_labels`.
        rle: As of `predict`.
        tiles: As of `pseudo_labels`.
        max_pixels: As of `Predictor`.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win.

    Returns:
        What was written, what failed, and how sure it is.

    Raises:
        AfaError: As `open_data`, `build_network`, `afa.inference.files.pseudo_files` and
            `afa.formats.write.write_format`; `model.classifier` is not text.
    """
    output = Output(out, formats=formats, shard_size=out_shards, rle=rle)
    config = _file_config(file, {"data.root": str(data)} | overrides, None if file else "frozen")
    if config.model.classifier != "text":
        raise AfaError("model.classifier is learned, and nothing was learned yet; set it to text, or use afa train")
    with _at_work(config, progress) as (device, processes):
        opened = open_data(config.data)
        images = opened.tagged() if list_file is None else opened.train(list_file=list_file)
        torch.manual_seed(config.train.seed)
        network = build_network(config.model, len(images.classes), words=opened.words).to(device).eval()
        tiling = prediction.pseudo_tiling(network, config, tiles, max_pixels=max_pixels)
        parts: list[MasksSummary] = []

        def look(*made: Any) -> None:
            parts.append(summarize_masks(*made))

        how: dict[str, Any] = {"kind": "cam", "refine": True, "tiling": tiling, "overlay": True, "look": look}
        written = output.write_labels(network, images, config, processes, **how)
        if output.in_shards:
            return joined_masks(written, [each for made in processes.gather(parts) for each in made])
        summary = summarize_masks(written, images, output.folder, processes=processes)
        if processes.is_main:
            write_masks_page(network, images, output.folder, summary, config=config, count=examples)
        return summary


def check_data(
    data: str | Path | Config,
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    fast: bool = False,
    limit: int | None = None,
    at_scale: str = "",
    machine: str = "",
    progress: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Check a data set before training, as `afa check`.

    Args:
        data: Folder of the data set, or the configuration of the training to come.
        file: TOML configuration of that training. With neither file nor preset it is the one that `train` would
            choose for the folder.
        preset: Name that wins over the file's.
        fast: Tags and counts only: read no image, try no training step.
        limit: Read only so many images, evenly spread.
        at_scale: Number of images, such as 100M, to say the cost of; empty says none.
        machine: One of `afa.check.scale.MACHINES` that it is said of; empty: this one.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win.

    Returns:
        Figures and problems, as `afa.check.collect.check_data` says.

    Raises:
        AfaError: No such folder; an unknown key or a value out of range; a device that is not there.
    """
    opened, scale = None, (parse_count(at_scale), machine or "this machine") if at_scale else None
    if isinstance(data, Config):
        config = _changed(data, overrides)
    else:
        keys = {"data.root": str(data)} | overrides
        config = _file_config(file, keys, preset)
        if file is None and preset is None:
            with contextlib.suppress(AfaError):  # what is wrong with the data set is the check's to tell
                device = pick_device(config.train.device)
                opened = open_data(config.data)
                config, _ = choose_defaults(opened, device, keys, need_weights=False)
    with _at_work(config, progress) as (_, processes):
        return collect.check_data(config, opened, fast=fast, limit=limit, scale=scale, processes=processes)


def check_voc(
    archive: str | Path, *, list_file: str | Path | None = None, images: str | Path | None = None
) -> SubmissionCheck:
    """Check an archive for PASCAL VOC's test server, as `afa check-voc`.

    Args:
        archive: The archive.
        list_file: Names of the test images, one a line.
        images: Folder of the test images, for their sizes.

    Returns:
        What was found.

    Raises:
        AfaError: As `afa.formats.voc_test.check_voc_test`; no such list.
    """
    names = read_lines(Path(list_file)) if list_file is not None else None
    return check_voc_test(Path(archive), names=names, images=Path(images) if images is not None else None)


def export(
    run: str | Path, out: str | Path, *, format: str, check: str | Path | None = None, opset: int | None = None
) -> Path | ExportCheck:
    """Write the network as a file for other programs, or as a folder to pass on, as `afa export`.

    Args:
        run: Run folder, folder of `save_pretrained`, or hub id.
        out: File .onnx or .pt2, or folder (`hf`).
        format: `onnx`, `torch` or `hf`.
        check: Folder of images to compare with PyTorch on; None compares on generated ones.
        opset: Version of ONNX's operators.

    Returns:
        What was written.

    Raises:
        AfaError: An option that the format does not know; as `save_pretrained`, `export_onnx` and `export_torch`.
    """
    if opset and format != "onnx":
        raise AfaError(f"--opset is {opset}, which --format {format} does not know; leave it out")
    if format == "hf":
        if check:
            raise AfaError("--check compares exported files, --format hf writes none; leave it out")
        return save_pretrained(str(run), out)
    loaded = load_pretrained(str(run), torch.device("cpu"))
    settings: dict[str, Any] = {
        "metadata": export_metadata(loaded.classes, white_level=loaded.config.data.white_level),
        "images": read_check_images(Path(check)) if check else (),
        "short_side": loaded.config.evaluation.short_side,
    }
    if format == "onnx":
        return export_onnx(loaded.network, Path(out), opset=opset, **settings)
    return export_torch(loaded.network, Path(out), **settings)


def report(run: str | Path, *, figures: bool = False, data: str | None = None) -> list[Path]:
    """Write report.html and report.json anew, as `afa report`.

    Args:
        run: Run folder.
        figures: Also draw the paper's figures.
        data: For the figures: folder of the data set; None is that of the run.

    Returns:
        The figures and, last, the page.

    Raises:
        AfaError: As `write_report` and `write_figures`.
    """
    drawn = write_figures(Path(run), data=data) if figures else []
    return [*drawn, write_report(Path(run))]


def explore(
    run: str | Path,
    *,
    data: str | None = None,
    compare: str | Path | None = None,
    port: int | None = None,
    browser: bool = True,
    device: str = "auto",
) -> None:
    """Serve a page on this machine that shows why masks are as they are, until Ctrl-C, as `afa explore`.

    Args:
        run: Run folder.
        data: Folder of the data set; None is that of the run, and if it is gone, photographs can still be dropped.
        compare: Another run folder, whose maps are laid beside.
        port: None takes 7860, where the links of a report lead, or a free one if that is taken; 0 a free one. The first
            line on standard output is the address.
        browser: Open the page in the browser.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        AfaError: Not a run folder; no data set in `data`; gradio is missing; the port is taken.
    """
    from afa.explore.explorer import ExploredRun, Explorer  # transformers would come with it
    from afa.explore.serve import require_gradio, serve

    require_gradio()
    where = pick_device(device)
    other = None if compare is None else ExploredRun.open(compare, data, where)
    serve(Explorer(ExploredRun.open(run, data, where), other), port=port, browser=browser)


def compare(runs: Sequence[str | Path], *, out: str | Path | None = None) -> str:
    """Put runs beside each other and the paper's tables, as `afa report --compare`.

    Args:
        runs: Run folders.
        out: Folder for compare.html and compare.json.

    Returns:
        The tables as text.

    Raises:
        AfaError: As `compare_runs` and `write_comparison`.
    """
    groups = compare_runs([Path(run) for run in runs])
    if out is not None:
        say(str(write_comparison(groups, Path(out))))
    return render_text(groups)


@contextlib.contextmanager
def _at_work(config: Config, progress: bool) -> Iterator[tuple[torch.device, Processes]]:
    """The device and the processes of a command; inside it, progress is shown or not."""
    device = pick_device(config.train.device)
    with process_group(device) as processes, showing_progress(progress):
        yield device, processes


def run_config(run: Path, overrides: Mapping[str, Any], *, data: str | Path | None = None) -> Config:
    """The configuration of a run under other keys, with its own classes.

    Args:
        run: Run folder.
        overrides: Dotted keys that win.
        data: Folder of the data set to read instead of the run's.

    Raises:
        AfaError: Not a run folder; a key that only training reads; as `load_config`.
    """
    keys: dict[str, Any] = {"data.class_subset": Run(run).classes()}
    if data is not None:
        keys["data.root"] = str(data)
    for key in overrides:
        if key.partition(".")[0] in _TRAINED or key == "train.supervision":
            raise AfaError(f"{key} was fixed when {run} was trained, so it changes nothing now; leave it out")
    return Run(run).config(keys | dict(overrides))


def _file_config(file: str | Path | None, overrides: Mapping[str, Any], preset: str | None) -> Config:
    """As `load_config`; the configuration of a run from before some key means what that run did."""
    stored = file is not None and Run.of_config(file) is not None
    return load_config(file, overrides, preset=preset, stored=stored)


def _changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    return load_config(None, config_to_keys(config) | dict(overrides), preset=config.preset)
