"""The commands as functions: train, evaluate, predict, pseudo labels, check. `afa.train` is `afa.api.train`.

The command line calls these and prints what they return, so that nothing is done there that Python cannot do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from afa.check import collect
from afa.config import Config, DataConfig, config_to_dict, load_config
from afa.data.open import DataSet, open_data
from afa.data.readers.tag_files import read_tags
from afa.errors import AfaError
from afa.evaluation import evaluate as evaluation
from afa.evaluation.evaluate import EvaluationResult, first_images
from afa.evaluation.protocols import CRF
from afa.evaluation.tags import TagResult, evaluate_tags
from afa.formats.write import mask_items, parse_formats, write_format
from afa.inference import files as prediction
from afa.inference.masks import PredictSummary
from afa.inference.predictor import Predictor
from afa.recipe import train_and_report
from afa.runs.auto import choose_defaults
from afa.runs.build import load_run, read_classes
from afa.runtime import pick_device, process_group, say


def train(
    source: str | Path | Config, out: str | Path, *, resume: bool = False, progress: bool = True, **overrides: Any
) -> Predictor:
    """Train from tags, score, and write the run folder with its report, as `afa train`.

    Args:
        source: Folder of a data set, for settings that are chosen by data and device; a TOML file; or a configuration.
        out: Run folder.
        resume: Go on with the run that the folder holds.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win, `**{"schedule.max_steps": 1000}`.

    Returns:
        The trained network, ready for images.

    Raises:
        AfaError: As `training_config` and `afa.recipe.train_and_report`.
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
            run=Path(out) if resume else None,
        )
        for line in choices if progress else ():
            say(line)
    train_and_report(config, Path(out), data=data, resume=resume, progress=progress)
    return Predictor.from_run(out, device=config.train.device, precision=config.train.precision)


def training_config(
    folder: str | Path | None = None,
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    run: Path | None = None,
) -> tuple[Config, tuple[str, ...], DataSet | None]:
    """Resolve the settings of a training.

    With a folder and neither file nor preset they are chosen by data and device, or are those of the run to go on with.

    Args:
        folder: Folder of the data set.
        file: TOML file.
        preset: Name that wins over the file's.
        overrides: Dotted keys that win.
        run: Run folder to go on with.

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
        stored = run / "config.toml" if run is not None else None
        if file is None and preset is None and stored is not None and stored.is_file():
            return load_config(stored, keys), (), None
    config = load_config(file, keys, preset=preset)
    if not config.data.root:
        raise AfaError("data.root is not set; pass the folder of the data set")
    if folder is None or file is not None or preset is not None:
        return config, (), None
    data = open_data(config.data)
    return *choose_defaults(data, pick_device(config.train.device), keys), data


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
        overrides: Keys of the run's configuration to change, `**{"train.device": "cpu"}`.

    Returns:
        Scores in percent; of the tags alone where there are no masks and the segmentation was asked for.

    Raises:
        AfaError: As `afa.evaluation.evaluate.evaluate`; not a run folder; the data set is missing or broken.
    """
    run = Path(run)
    protocols = {} if protocol is None else {"evaluation.protocol": protocol}
    config = run_config(run, overrides | protocols, data=data)
    device = pick_device(config.train.device)
    with process_group(device) as processes:
        loaded = load_run(run, device)
        layout = open_data(config.data)
        if labels == "seg" and not layout.has_masks and config.data.mask_dir == DataConfig().mask_dir:
            if processes.is_main:
                say(f"{layout.root}: no masks, so nothing tells the mIoU; the tags are scored")
            return evaluate_tags(
                loaded.network,
                first_images(layout.validation(list_file=list_file), limit),
                config,
                processes=processes,
                progress=progress,
            )
        return evaluation.evaluate(
            loaded.network,
            first_images(layout.masked(list_file=list_file), limit),
            config,
            labels=labels,
            refine=refine,
            boundary=boundary,
            processes=processes,
            progress=progress,
        )


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
    progress: bool = True,
    **overrides: Any,
) -> PredictSummary:
    """Segment image files into a folder, as `afa predict`; `Predictor` segments images in memory.

    Args:
        run: Run folder.
        images: Image files and folders that are walked.
        out: Folder of the results.
        tags: File of tags of the images: only tagged classes are predicted.
        scores: Also write class scores.
        crf: Refine the masks by the dense CRF, whatever the run's protocol.
        overlay: Also write the colored masks over the images.
        formats: Formats of other tools to write as well, names separated by commas.
        resume: Go on with the masks that are in `out` already.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change.

    Returns:
        What was written and what failed.

    Raises:
        AfaError: As `afa.inference.files.predict_files` and `afa.formats.write.write_format`; not a run folder.
    """
    names = parse_formats(formats) if formats else ()
    run, out = Path(run), Path(out)
    paths = [Path(images)] if isinstance(images, str | Path) else [Path(path) for path in images]
    config = run_config(run, overrides)
    loaded = load_run(run, pick_device(config.train.device))
    if crf:
        refined = cast(Any, config.evaluation.protocol.removesuffix(CRF) + CRF)
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, protocol=refined))
    predictor = Predictor(loaded.network, loaded.classes, config=config)
    summary = prediction.predict_files(
        predictor,
        paths,
        out,
        tags=read_tags(Path(tags), predictor.classes) if tags is not None else None,
        scores=scores,
        overlay=overlay,
        resume=resume,
        progress=progress,
    )
    if not names:
        return summary
    items = mask_items(prediction.output_names(paths, out).items(), out)
    written = tuple(write_format(name, items, predictor.classes, out, progress=progress) for name in names)
    return dataclasses.replace(summary, formats=written)


def pseudo_labels(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "refined",
    list_file: str | None = None,
    formats: str = "",
    progress: bool = True,
    **overrides: Any,
) -> PredictSummary:
    """Write pseudo labels of tagged images, as `afa pseudo`.

    Args:
        run: Run folder.
        data: Folder of the data set.
        out: Folder of the labels; those that are there already are left as they are.
        kind: `refined`, `initial`, `propagated` or `cam`.
        list_file: Names of the images, one a line; None is what the data has to train on.
        formats: Formats of other tools to write as well, names separated by commas.
        progress: Show progress on standard error.
        overrides: Keys of the run's configuration to change.

    Returns:
        What was written and what failed.

    Raises:
        AfaError: As `afa.inference.files.pseudo_files` and `afa.formats.write.write_format`; not a run folder; the
            data set is missing or broken.
    """
    names = parse_formats(formats) if formats else ()
    run, out = Path(run), Path(out)
    config = run_config(run, overrides, data=data)
    device = pick_device(config.train.device)
    loaded = load_run(run, device)
    images = open_data(config.data).train(list_file=list_file)
    summary = prediction.pseudo_files(
        loaded.network,
        images,
        out,
        config=config,
        kind=kind,
        progress=progress,
    )
    items = mask_items(((name, images.image_path(index)) for index, name in enumerate(images.names)), out)
    written = tuple(write_format(name, items, images.classes, out, progress=progress) for name in names)
    return dataclasses.replace(summary, formats=written)


def check_data(
    data: str | Path | Config,
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    fast: bool = False,
    limit: int | None = None,
    progress: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Look a data set over before a training, as `afa check`.

    Args:
        data: Folder of the data set, or the configuration of the training to come.
        file: TOML configuration of that training. With neither file nor preset it is the one that `train` would
            choose for the folder.
        preset: Name that wins over the file's.
        fast: Tags and counts only: read no image, try no training step.
        limit: Read only so many images, evenly spread.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win.

    Returns:
        Figures and problems, as `afa.check.collect.check_data` says.

    Raises:
        AfaError: No such folder; an unknown key or a value out of range; a device that is not there.
    """
    opened = None
    if isinstance(data, Config):
        config = _changed(data, overrides)
    else:
        keys = {"data.root": str(data)} | overrides
        config = load_config(file, keys, preset=preset)
        if file is None and preset is None:
            with contextlib.suppress(AfaError):  # what is wrong with the data set is the check's to tell
                device = pick_device(config.train.device)
                opened = open_data(config.data)
                config, _ = choose_defaults(opened, device, keys, need_weights=False)
    return collect.check_data(config, opened, fast=fast, limit=limit, progress=progress)


def run_config(run: Path, overrides: Mapping[str, Any], *, data: str | Path | None = None) -> Config:
    """The configuration of a run under other keys, with its own classes.

    Args:
        run: Run folder.
        overrides: Dotted keys that win.
        data: Folder of the data set to read instead of the run's.

    Raises:
        AfaError: Not a run folder; as `load_config`.
    """
    keys: dict[str, Any] = {"data.class_subset": read_classes(run)}
    if data is not None:
        keys["data.root"] = str(data)
    return load_config(run / "config.toml", keys | dict(overrides))


def _changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    tree = config_to_dict(config)
    stored = {f"{s}.{key}": value for s, part in tree.items() if isinstance(part, dict) for key, value in part.items()}
    return load_config(None, stored | dict(overrides), preset=config.preset)
