"""The whole check: layout, tags, every image, the cost of training; gathered in one dictionary that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from afa.check.cost import CacheCost, TrainingCost, measure_cache, measure_cost
from afa.check.images import check_images, describe_images, read_images
from afa.check.scale import estimate, measure_prediction
from afa.check.tags import OpenedData, Problem, by_severity, check_tags, open_sides, together
from afa.config import Config
from afa.data.dataset import MaskedImages
from afa.data.loader import resolve_workers
from afa.data.open import DataSet, data_root, open_data
from afa.errors import AfaError
from afa.report.render import gibibytes
from afa.runtime import ALONE, Processes, pick_device, say, shows_progress


def check_data(
    config: Config,
    data: DataSet | None = None,
    *,
    fast: bool = False,
    limit: int | None = None,
    scale: tuple[int, str] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Check a data set for a training with these settings.

    Args:
        config: Settings; `data.root` names the data set.
        data: The data set, if it is open already.
        fast: Open no image and try no training step.
        limit: Read only so many images, evenly spread; None reads all.
        scale: A number of images and a name of `MACHINES` to extrapolate to; None does not.
        processes: Processes that share the reading of images; the report of the first one is whole.

    Returns:
        Values that JSON can hold:

        - `problems`: `severity` (error, warning, note) and `message` of each, errors first; `errors`, `warnings`: how
          many there are.
        - `root`; `layout`: what was found, in words, `kind`: of `DataSet`; both None where nothing was.
        - `num_train`, `num_validation`, `num_untagged`: images; `num_negatives`: how many of the images to train on and
          for validation are known to hold none of the classes; `scored`: whether those for validation have masks.
        - `classes`: `name`, `train`, `validation`: images with that class; `together`: (C, C) training images with
          both classes; `tags_per_image`: mean and most over the training images.
        - `images`: None if fast, else `total`, `read`, `seconds`, `threads`, `bytes` (mean of a file); `broken`,
          `broken_masks`; `width`, `height`, `aspect`
          (each minimum, median, maximum), `gray`, `tiny`; `num_identical`, `num_similar`: images that are copies of
          others; and `identical` and `similar`: groups of `image`, `side`, `tags`, at most a thousand.
        - `training`: None if fast, else `device`, `steps`, `epochs`, `phases`, `seconds`, `decode_seconds`, `memory`,
          `batch_size`, `measured_batch`; `cache`: None if fast, else `needed`, `given`, `free` bytes.
        - `at_scale`: what `afa.check.scale.estimate` says, None without `scale`.

    Raises:
        AfaError: `data.root` is no folder, or the device is absent: a mistake of the call, not of the data.
    """
    report: dict[str, Any] = {"root": str(data_root(config.data)), "layout": None, "kind": None, "images": None}
    report |= {"at_scale": None, "training": None, "cache": None, "classes": [], "together": [], "tags_per_image": None}
    report |= {"num_train": 0, "num_validation": 0, "num_untagged": 0, "num_negatives": 0, "scored": False}
    device = pick_device(config.train.device)
    try:
        opened = open_sides(data or open_data(config.data), config)
        report |= _describe_tags(opened)
    except AfaError as error:
        return report | _listed([Problem("error", str(error))])
    problems = [*opened.problems, *check_tags(opened, config)]
    if not fast and opened.train is not None:
        measured, found = _measure(config, opened, device, limit, processes=processes)
        report |= measured
        problems += found
    if scale is not None:
        report["at_scale"] = _extrapolate(config, report, device, scale)
    return report | _listed(problems)


def _extrapolate(
    config: Config, report: dict[str, Any], device: torch.device, scale: tuple[int, str]
) -> dict[str, Any]:
    num_classes = len(report["classes"])
    images, parameters, rate = report["images"], 0, 0.0
    if images is not None and images["height"]:
        size = (int(images["height"]["median"]), int(images["width"]["median"]))
        parameters, rate = measure_prediction(config, num_classes, size, device)
    crop_size = config.augment.crop_size
    return estimate(*scale, report, predict_rate=rate, parameters=parameters, crop_size=crop_size)


def _listed(problems: Iterable[Problem]) -> dict[str, Any]:
    listed = [problem._asdict() for problem in by_severity(problems)]
    counts = {f"{kind}s": sum(problem["severity"] == kind for problem in listed) for kind in ("error", "warning")}
    return {"problems": listed, **counts}


def _describe_tags(opened: OpenedData) -> dict[str, Any]:
    data, per_image = opened.data, opened.train_tags.sum(axis=1)
    counts = zip(opened.train_tags.sum(axis=0).tolist(), opened.validation_tags.sum(axis=0).tolist(), strict=True)
    return {
        "layout": data.describe(),
        "kind": data.kind,
        "num_train": len(opened.train_tags),
        "num_validation": len(opened.validation_tags),
        "num_untagged": len(data.untagged),
        "num_negatives": sum(
            int(each.negative.sum()) for each in (opened.train, opened.validation) if each is not None
        ),
        "scored": isinstance(opened.validation, MaskedImages),
        "classes": [
            {"name": name, "train": train, "validation": validation}
            for name, (train, validation) in zip(data.classes, counts, strict=True)
        ],
        "together": together(opened.train_tags).tolist(),
        "tags_per_image": {"mean": float(per_image.mean()), "most": int(per_image.max())} if per_image.size else None,
    }


def _measure(
    config: Config, opened: OpenedData, device: torch.device, limit: int | None, *, processes: Processes
) -> tuple[dict[str, Any], list[Problem]]:
    """Take a few training steps and read the images: `images`, `training` and `cache` of the report, and problems."""
    problems: list[Problem] = []
    cost = None
    try:
        if shows_progress() and processes.is_main:
            say(f"trying out a few training steps on {device.type}")
        # Before images are read: on a CPU the memory is the most that this process ever took.
        if processes.is_main:
            cost = measure_cost(config, opened.train_tags, device=device)
    except AfaError as error:
        problems.append(Problem("error", str(error)))
    workers = resolve_workers(config.data.workers, processes=processes.count)
    # This thread only waits.
    table = read_images(opened, limit, threads=workers + 1, processes=processes)
    if table is None:
        return {}, problems
    problems += check_images(table, config)
    report: dict[str, Any] = {"images": describe_images(table)}
    trained = table.scan.sizes[table.train & (table.scan.sizes[:, 0] > 0)]
    if trained.size:
        count = len(opened.train_tags)
        cache = measure_cache(config, trained, count)
        report["cache"] = asdict(cache)
        if cost is not None:
            rate = len(table.shown) / table.scan.seconds / (workers + 1) * max(1, workers)
            report["training"] = _describe_cost(count, cost, cache, rate)
            if device.type == "cpu" and 0 < cache.free < cost.memory:
                message = f"training takes about {gibibytes(cost.memory)} of memory, and {gibibytes(cache.free)} are "
                message += "free; lower schedule.batch_size or augment.crop_size"
                problems.append(Problem("warning", message))
    return report, problems


def _describe_cost(num_images: int, cost: TrainingCost, cache: CacheCost, decoded_per_second: float) -> dict[str, Any]:
    seen = cost.steps * cost.batch_size
    kept = min(1.0, cache.given / max(1, cache.needed))
    decoded = min(seen, num_images * kept) + seen * (1 - kept)
    decode_seconds = decoded / decoded_per_second
    # Images are decoded while the device computes.
    times = {"seconds": max(cost.seconds, decode_seconds), "decode_seconds": decode_seconds}
    return asdict(cost) | {"steps": cost.steps, "epochs": seen / num_images} | times
