"""The whole check: layout, tags, every image, the cost of training; gathered in one dictionary that JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from afa.check.cost import CacheCost, TrainingCost, measure_cache, measure_cost
from afa.check.fast import OpenedData, Problem, by_severity, check_tags, open_data, path_below, together
from afa.check.scan import Scan, identical_groups, scan_images, similar_groups
from afa.config import Config
from afa.data.layout import Layout, find_layout
from afa.data.loader import resolve_workers
from afa.data.voc import ScoredImages, data_root
from afa.errors import AfaError
from afa.runtime import pick_device, progress_bar, say

TINY_SIDE: Final = 64
"""Images with a shorter side, in pixels, have too little detail."""

LONG_ASPECT: Final = 4.0
"""Images so many times as long as wide lose most of themselves in square crops."""

LARGE_PIXELS: Final = 4_000_000
"""Images of more pixels take long to decode, for a crop of a fraction of them."""

_LISTED: Final = 1000  # names or groups of one kind in the dictionary


@dataclass(frozen=True)
class _Table:
    """The images of a run, each file once.

    Attributes:
        paths: N files.
        shown: N paths as messages show them.
        train, validation: (N,) which side they are on.
        tags: (N, C).
    """

    paths: tuple[Path, ...]
    shown: tuple[str, ...]
    train: NDArray[np.bool_]
    validation: NDArray[np.bool_]
    tags: NDArray[np.bool_]


def check_data(
    config: Config, *, fast: bool = False, limit: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Check a data set for a training with these settings.

    Args:
        config: Settings; `data.root` names the data set.
        fast: Open no image and try no training step.
        limit: Read only so many images, evenly spread; None reads all.
        progress: Show progress on standard error.

    Returns:
        Values that JSON can hold:

        - `problems`: `severity` (error, warning, note) and `message` of each, errors first; `errors`, `warnings`: how
          many there are.
        - `root`; `layout`: what was found, in words, `kind`: of `afa.data.layout`; both None where nothing was.
        - `num_train`, `num_validation`, `num_untagged`: images; `scored`: whether those for validation have masks.
        - `classes`: `name`, `train`, `validation`: images with that class; `together`: (C, C) training images with
          both classes; `tags_per_image`: mean and most over the training images.
        - `images`: None if fast, else `total`, `read`, `seconds`; `broken`, `broken_masks`; `width`, `height`, `aspect`
          (each minimum, median, maximum), `gray`, `tiny`; `num_identical`, `num_similar`: images that are copies of
          others; and `identical` and `similar`: groups of `image`, `side`, `tags`, at most a thousand.
        - `training`: None if fast, else `device`, `steps`, `epochs`, `phases`, `seconds`, `decode_seconds`, `memory`,
          `batch_size`,
          `measured_batch`; `cache`: None if fast, else `needed`, `given`, `free` bytes.

    Raises:
        AfaError: `data.root` is no folder, or the device is absent: a mistake of the call, not of the data.
    """
    root = data_root(config.data)
    device = pick_device(config.train.device)
    report: dict[str, Any] = {"root": str(root), "layout": None, "kind": None, "images": None}
    report |= {"training": None, "cache": None, "classes": [], "together": [], "tags_per_image": None}
    report |= {"num_train": 0, "num_validation": 0, "num_untagged": 0, "scored": False}
    try:
        layout = find_layout(config.data)
        report |= {"layout": layout.describe(), "kind": layout.kind}
    except AfaError as error:
        return _with_problems(report, [Problem("error", str(error))])
    opened = open_data(layout, config)
    problems = [*opened.problems, *check_tags(opened, config)]
    report |= _describe_tags(layout, opened)
    if fast or opened.train is None:
        return _with_problems(report, problems)
    cost = None
    try:
        if progress:
            say(f"trying out a few training steps on {device.type}")
        # Before images are read: on a CPU the memory is the most that this process ever took.
        cost = measure_cost(config, opened.train_tags, device=device)
    except AfaError as error:
        problems.append(Problem("error", str(error)))
    table, scan, threads = _scan(config, opened, limit, progress=progress)
    problems += _check_images(config, table, scan)
    identical, similar = identical_groups(scan), similar_groups(scan)
    problems += _check_groups(table, layout.classes, identical, similar)
    report["images"] = _describe_images(opened, table, scan, layout.classes, identical, similar)
    trained = scan.readable[table.train[scan.readable]]
    if trained.size:
        cache = measure_cache(config, scan.sizes[trained], len(opened.train))
        report["cache"] = {"needed": cache.needed, "given": cache.given, "free": cache.free}
        if cost is not None:
            rate = len(table.paths) / scan.seconds / threads * max(1, resolve_workers(config.data.workers))
            report["training"] = _describe_cost(config, len(opened.train), cost, cache, rate)
            problems += _check_memory(cost, cache, device.type)
    return _with_problems(report, problems)


def _with_problems(report: dict[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    listed = [{"severity": problem.severity, "message": problem.message} for problem in by_severity(problems)]
    counts = {f"{kind}s": sum(problem["severity"] == kind for problem in listed) for kind in ("error", "warning")}
    return report | {"problems": listed} | counts


def _describe_tags(layout: Layout, opened: OpenedData) -> dict[str, Any]:
    train, validation = opened.train_tags.sum(axis=0), opened.validation_tags.sum(axis=0)
    per_image = opened.train_tags.sum(axis=1)
    return {
        "num_train": len(opened.train_tags),
        "num_validation": len(opened.validation_tags),
        "num_untagged": len(layout.untagged),
        "scored": isinstance(opened.validation, ScoredImages),
        "classes": [
            {"name": name, "train": int(train[i]), "validation": int(validation[i])}
            for i, name in enumerate(layout.classes)
        ],
        "together": together(opened.train_tags).tolist(),
        "tags_per_image": {"mean": float(per_image.mean()), "most": int(per_image.max())} if per_image.size else None,
    }


def _scan(config: Config, opened: OpenedData, limit: int | None, *, progress: bool) -> tuple[_Table, Scan, int]:
    """Read the images of both sides, each file once, or `limit` of them; and the masks of those that have one."""
    assert opened.train is not None
    places: dict[Path, list[int]] = {}
    for side, images in enumerate((opened.train, opened.validation)):
        for index in range(0 if images is None else len(images)):
            assert images is not None
            places.setdefault(images.image_path(index), [-1, -1])[side] = index
    rows = np.array(list(places.values()), dtype=np.int64)
    kept = np.arange(len(rows))
    if limit is not None and limit < len(rows):
        kept = np.linspace(0, len(rows) - 1, limit).astype(np.int64)
    every_path, rows = list(places), rows[kept]
    paths = tuple(every_path[i] for i in kept)
    train, validation = rows[:, 0] >= 0, rows[:, 1] >= 0
    tags = np.zeros((len(rows), len(opened.layout.classes)), dtype=bool)
    tags[validation] = opened.validation_tags[rows[validation, 1]]
    tags[train] = opened.train_tags[rows[train, 0]]
    table = _Table(paths, tuple(path_below(path, opened.layout.root) for path in paths), train, validation, tags)
    scored = opened.validation if isinstance(opened.validation, ScoredImages) else None

    def read_mask(index: int) -> None:
        if scored is not None and rows[index, 1] >= 0:
            scored.mask(int(rows[index, 1]))

    threads = resolve_workers(config.data.workers) + 1  # this thread only waits
    with progress_bar(enabled=progress) as bar:
        task = bar.add_task("reading images", total=len(paths), rate="")
        scan = scan_images(paths, threads=threads, read_mask=read_mask, tell=lambda: bar.advance(task))
    return table, scan, threads


def _check_images(config: Config, table: _Table, scan: Scan) -> list[Problem]:
    """What single images tell."""
    broken = [Problem("error", scan.failures[i]) for i in sorted(scan.failures)]
    problems = broken + [Problem("error", scan.mask_failures[i]) for i in sorted(scan.mask_failures)]
    readable = scan.readable
    if not readable.size:
        return problems
    short, long = scan.sizes.min(axis=1), scan.sizes.max(axis=1)

    def first(chosen: NDArray[np.int64]) -> str:
        names = [f"{table.shown[i]} {scan.sizes[i, 1]}x{scan.sizes[i, 0]}" for i in chosen[:3]]
        return ", ".join(names) + (", ..." if len(chosen) > 3 else "")

    tiny = readable[short[readable] < TINY_SIDE]
    if tiny.size:
        message = f"{_count(len(tiny))} with a side below {TINY_SIDE} pixels ({first(tiny)}): too little detail; "
        problems.append(Problem("warning", message + "take larger ones, or leave them out"))
    narrow = readable[long[readable] > LONG_ASPECT * short[readable]]
    if narrow.size:
        message = f"{_count(len(narrow))} over {LONG_ASPECT:g} times as long as wide ({first(narrow)}): "
        problems.append(Problem("note", message + "a crop rarely has what is tagged; cut them up"))
    augment = config.augment
    side = augment.short_side or float(np.median(short[readable]))
    if side * augment.scale_max < augment.crop_size:
        problems.append(
            Problem(
                "warning",
                f"augment.crop_size is {augment.crop_size}, and half of the images are at most {side:g} pixels on the "
                f"short side, {side * augment.scale_max:g} at augment.scale_max: crops are mostly empty; lower "
                "augment.crop_size, or set augment.short_side",
            )
        )
    large = readable[np.prod(scan.sizes[readable], axis=1, dtype=np.int64) > LARGE_PIXELS]
    if 2 * large.size > readable.size:
        message = f"{_count(len(large))} above {LARGE_PIXELS / 1e6:g} megapixels ({first(large)}): decoding them "
        problems.append(Problem("note", message + "takes long, for small crops; scale copies down"))
    return problems


def _check_groups(
    table: _Table, classes: Sequence[str], identical: Sequence[list[int]], similar: Sequence[list[int]]
) -> list[Problem]:
    """What copies do: contradict each other, or stand on both sides."""
    problems: list[Problem] = []
    for groups, same, copy in ((identical, "has the same pixels as", ""), (similar, "looks the same as", "near ")):
        conflicts = []
        leaks = []
        for group in groups:
            tagged = [i for i in group if table.tags[i].any()]
            odd = next((i for i in tagged if (table.tags[i] != table.tags[tagged[0]]).any()), None)
            if odd is not None:
                conflicts.append((tagged[0], odd))
            train = next((i for i in group if table.train[i]), None)
            leaks += [(i, train) for i in group if train is not None and table.validation[i] and not table.train[i]]
        for one, other in conflicts[:_LISTED]:
            tags = " and ".join(
                "(" + ", ".join(classes[c] for c in np.flatnonzero(table.tags[i]).tolist()) + ")" for i in (one, other)
            )
            problems.append(
                Problem(
                    "warning",
                    f"{table.shown[one]} {same} {table.shown[other]}, but other tags, {tags}: correct one of them, or "
                    "keep one image",
                )
            )
        if leaks:
            one, other = leaks[0]
            problems.append(
                Problem(
                    "warning",
                    f"{copy}copies of training images among those for validation: {len(leaks):,} (first: "
                    f"{table.shown[one]} {same} {table.shown[other]}): scores will be too high; keep one of each",
                )
            )
        copies = sum(len(group) - 1 for group in groups)
        if copies:
            one, other = groups[0][:2]
            problems.append(
                Problem(
                    "note",
                    f"{copy}copies of other images: {copies:,} (first: {table.shown[other]} {same} "
                    f"{table.shown[one]}): keep one of each",
                )
            )
    return problems


def _check_memory(cost: TrainingCost, cache: CacheCost, device_type: str) -> list[Problem]:
    if device_type != "cpu" or not cache.free or cost.memory <= cache.free:
        return []
    needed, free = (f"{size / 2**30:.1f} GiB" for size in (cost.memory, cache.free))
    message = f"training takes about {needed} of memory, and {free} are free; lower schedule.batch_size"
    return [Problem("warning", f"{message} or augment.crop_size")]


def _describe_images(
    opened: OpenedData,
    table: _Table,
    scan: Scan,
    classes: Sequence[str],
    identical: Sequence[list[int]],
    similar: Sequence[list[int]],
) -> dict[str, Any]:
    sizes = scan.sizes[scan.readable].astype(np.float64)
    total = len(
        {images.image_path(i) for images in (opened.train, opened.validation) if images for i in range(len(images))}
    )

    def spread(values: NDArray[np.float64]) -> dict[str, float] | None:
        if not values.size:
            return None
        return {"minimum": float(values.min()), "median": float(np.median(values)), "maximum": float(values.max())}

    def members(groups: Sequence[list[int]]) -> list[list[dict[str, Any]]]:
        return [
            [
                {
                    "image": table.shown[i],
                    "side": "train" if table.train[i] else "validation",
                    "tags": [classes[c] for c in np.flatnonzero(table.tags[i]).tolist()],
                }
                for i in group[:_LISTED]
            ]
            for group in groups[:_LISTED]
        ]

    tiny = scan.readable[scan.sizes[scan.readable].min(axis=1) < TINY_SIDE]
    return {
        "total": total,
        "read": len(table.paths),
        "seconds": scan.seconds,
        "broken": [table.shown[i] for i in sorted(scan.failures)],
        "broken_masks": [table.shown[i] for i in sorted(scan.mask_failures)],
        "width": spread(sizes[:, 1]),
        "height": spread(sizes[:, 0]),
        "aspect": spread(sizes[:, 1] / sizes[:, 0]),
        "gray": int(scan.gray.sum()),
        "tiny": [table.shown[i] for i in tiny[:_LISTED]],
        "num_identical": sum(len(group) - 1 for group in identical),
        "num_similar": sum(len(group) - 1 for group in similar),
        "identical": members(identical),
        "similar": members(similar),
    }


def _describe_cost(
    config: Config, num_images: int, cost: TrainingCost, cache: CacheCost, decoded_per_second: float
) -> dict[str, Any]:
    seen = cost.steps * config.schedule.batch_size
    kept = min(1.0, cache.given / max(1, cache.needed))
    decoded = min(seen, num_images * kept) + seen * (1 - kept)
    decode_seconds = decoded / decoded_per_second
    return {
        "device": cost.device,
        "steps": cost.steps,
        "epochs": seen / num_images,
        "phases": [{"name": p.name, "steps": p.steps, "step_seconds": p.step_seconds} for p in cost.phases],
        # Images are decoded while the device computes.
        "seconds": max(cost.seconds, decode_seconds),
        "decode_seconds": decode_seconds,
        "memory": cost.memory,
        "batch_size": config.schedule.batch_size,
        "measured_batch": cost.measured_batch,
    }


def _count(number: int) -> str:
    return f"{number:,} image{'' if number == 1 else 's'}"
