"""Checks every image of a data set, read once: broken files, unsuitable sizes, copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from afa.check.scan import Scan, identical_groups, scan_images, similar_groups
from afa.check.tags import OpenedData, Problem
from afa.config import AugmentConfig, Config
from afa.data.dataset import MaskedImages
from afa.data.files import path_below
from afa.data.images import level_warning
from afa.data.pixels import WHITE_LEVEL
from afa.errors import AfaError, BrokenImageError
from afa.report.render import counted
from afa.runtime import ALONE, Processes, image_progress

TINY_SIDE: Final = 64
"""Images with a shorter side, in pixels, have too little detail."""

LONG_ASPECT: Final = 4.0
"""Square crops cut most off images that are longer than this many times their width."""

LARGE_PIXELS: Final = 4_000_000
"""Images with more pixels take long to decode, and a crop uses only a fraction of them."""

_LISTED: Final = 1000  # names or groups of one kind in the dictionary


@dataclass(frozen=True)
class ImageTable:
    """The images of a run that were read, each file once, and what was found in them.

    Attributes:
        total: How many images there are.
        shown: N paths as messages show them.
        train, validation: (N,) which side they are on.
        tags: N lists of tags.
        scan: What was read of them.
        identical, similar: Groups of copies and of near copies, by index.
        mask_doubt: What `MaskedImages.check_values` says, or nothing.
        mean_bytes: Bytes of an image file, on average.
        threads: That read them.
    """

    total: int
    shown: tuple[str, ...]
    train: NDArray[np.bool_]
    validation: NDArray[np.bool_]
    tags: tuple[tuple[str, ...], ...]
    scan: Scan
    identical: list[list[int]]
    similar: list[list[int]]
    mask_doubt: str = ""
    mean_bytes: float = 0.0
    threads: int = 1


def read_images(
    opened: OpenedData, limit: int | None, *, threads: int, processes: Processes = ALONE
) -> ImageTable | None:
    """Read the images of both sides, each file once, and the masks of those that have one.

    Args:
        opened: The images.
        limit: Read only so many, evenly spread; None reads all.
        threads: How many read at the same time.
        processes: Processes that share the reading; the first one gets the table, others None.
    """
    places: dict[Path, list[int]] = {}  # file -> index on each side, -1 where it is not there
    for side, images in enumerate((opened.train, opened.validation)):
        if images is not None:
            for index in range(len(images)):
                places.setdefault(images.image_path(index), [-1, -1])[side] = index
    paths, total = list(places), len(places)
    if limit is not None and limit < total:
        paths = [paths[i] for i in np.linspace(0, total - 1, limit).astype(np.int64)]
    rows = np.array([places[path] for path in paths], dtype=np.int64)
    scored = opened.validation if isinstance(opened.validation, MaskedImages) else None

    def read_mask(index: int) -> None:
        if scored is not None and rows[index, 1] >= 0:
            scored.mask(int(rows[index, 1]))

    with image_progress("reading images", total=len(paths), processes=processes) as advance:
        scan = scan_images(
            paths,
            threads=threads,
            white_level=opened.train.white_level if opened.train else WHITE_LEVEL,
            read_mask=read_mask,
            tell=lambda: advance(1),
            processes=processes,
        )
    if not processes.is_main:
        return None
    classes = opened.data.classes
    tags = [opened.train_tags[one] if one >= 0 else opened.validation_tags[other] for one, other in rows.tolist()]
    return ImageTable(
        total=total,
        shown=tuple(path_below(path, opened.data.root) for path in paths),
        train=rows[:, 0] >= 0,
        validation=rows[:, 1] >= 0,
        tags=tuple(tuple(classes[c] for c in np.flatnonzero(row).tolist()) for row in tags),
        scan=scan,
        identical=identical_groups(scan),
        similar=similar_groups(scan),
        mask_doubt=_mask_doubt(scored),
        mean_bytes=_mean_bytes(paths),
        threads=threads,
    )


def _mean_bytes(paths: Sequence[Path]) -> float:
    """Mean size of up to a thousand files, evenly spread."""
    chosen = paths[:: max(1, len(paths) // _LISTED)]
    return sum(path.stat().st_size for path in chosen if path.is_file()) / max(1, len(chosen))


def _mask_doubt(scored: MaskedImages | None) -> str:
    try:
        if scored is not None:
            scored.check_values()
    except AfaError as error:
        return str(error)
    return ""


def check_images(table: ImageTable, config: Config) -> Iterator[Problem]:
    """Problems of single images, and copies."""
    scan = table.scan
    failures = [scan.failures[i] for i in sorted(scan.failures)]
    broken = [error for error in failures if config.data.skip_broken and isinstance(error, BrokenImageError)]
    yield from (Problem("error", str(error)) for error in failures if error not in broken)
    yield from (Problem("error", scan.mask_failures[i]) for i in sorted(scan.mask_failures))
    if broken:
        yield Problem("note", f"broken images left out by data.skip_broken: {len(broken):,} (first: {broken[0]})")
    if table.mask_doubt:
        yield Problem("error", table.mask_doubt)
    if words := level_warning(scan.peaks.tolist(), config.data.white_level):
        yield Problem("warning", words)
    if scan.readable.size:
        yield from _check_sizes(table, config.augment)
    yield from _check_groups(table, table.identical, "has the same pixels as", "")
    yield from _check_groups(table, table.similar, "looks the same as", "near ")


def _check_sizes(table: ImageTable, augment: AugmentConfig) -> Iterator[Problem]:
    readable, sizes = table.scan.readable, table.scan.sizes
    short, long = sizes[readable].min(axis=1), sizes[readable].max(axis=1)

    def named(chosen: NDArray[np.int64], what: str) -> str:
        names = [f"{table.shown[i]} {sizes[i, 1]}x{sizes[i, 0]}" for i in chosen[:3]]
        return f"{counted(len(chosen), 'image')} {what} ({', '.join(names)}{', ...' if len(chosen) > 3 else ''})"

    tiny = readable[short < TINY_SIDE]
    if tiny.size:
        message = named(tiny, f"with a side below {TINY_SIDE} pixels")
        yield Problem("warning", f"{message}: too little detail; take larger ones, or leave them out")
    narrow = readable[long > LONG_ASPECT * short]
    if narrow.size:
        message = named(narrow, f"over {LONG_ASPECT:g} times as long as wide")
        yield Problem("note", f"{message}: a crop rarely has what is tagged; cut them up")
    side = augment.short_side or float(np.median(short))
    if side * augment.scale_max < augment.crop_size:
        yield Problem(
            "warning",
            f"augment.crop_size is {augment.crop_size}, and half of the images are at most {side:g} pixels on the "
            f"short side, {side * augment.scale_max:g} at augment.scale_max: crops are mostly empty; lower "
            "augment.crop_size, or set augment.short_side",
        )
    large = readable[np.prod(sizes[readable], axis=1, dtype=np.int64) > LARGE_PIXELS]
    if 2 * large.size > readable.size:
        message = named(large, f"above {LARGE_PIXELS / 1e6:g} megapixels")
        yield Problem("note", f"{message}: decoding them takes long, for small crops; scale copies down")


def _check_groups(table: ImageTable, groups: Sequence[list[int]], same: str, kind: str) -> Iterator[Problem]:
    """Copies that contradict each other, or that are on both sides of the split."""
    conflicts, leaks = [], []
    for group in groups:
        tagged = [i for i in group if table.tags[i]]
        conflicts += [(tagged[0], i) for i in tagged if table.tags[i] != table.tags[tagged[0]]][:1]
        train = next((i for i in group if table.train[i]), None)
        leaks += [(i, train) for i in group if train is not None and table.validation[i] and not table.train[i]]

    def compared(one: int, other: int) -> str:
        return f"{table.shown[one]} {same} {table.shown[other]}"

    for one, other in conflicts[:_LISTED]:
        tags = " and ".join(f"({', '.join(table.tags[i])})" for i in (one, other))
        message = f"{compared(one, other)}, but other tags, {tags}: correct one of them, or keep one image"
        yield Problem("warning", message)
    if leaks:
        message = f"{kind}copies of training images among those for validation: {len(leaks):,} (first: "
        yield Problem("warning", f"{message}{compared(*leaks[0])}): scores will be too high; keep one of each")
    copies = sum(len(group) - 1 for group in groups)
    if copies:
        one, other = groups[0][:2]
        message = f"{kind}copies of other images: {copies:,} (first: {compared(other, one)}): keep one of each"
        yield Problem("note", message)


def describe_images(table: ImageTable) -> dict[str, Any]:
    """The value of `images` that `afa.check.collect.check_data` describes."""
    scan = table.scan
    sizes = scan.sizes[scan.readable].astype(np.float64)
    tiny = scan.readable[sizes.min(axis=1) < TINY_SIDE]

    def spread(values: NDArray[np.float64]) -> dict[str, float] | None:
        if not values.size:
            return None
        return {"minimum": float(values.min()), "median": float(np.median(values)), "maximum": float(values.max())}

    def member(i: int) -> dict[str, Any]:
        side = "train" if table.train[i] else "validation"
        return {"image": table.shown[i], "side": side, "tags": list(table.tags[i])}

    found = {
        "total": table.total,
        "read": len(table.shown),
        "seconds": scan.seconds,
        "bytes": table.mean_bytes,
        "threads": table.threads,
        "broken": [table.shown[i] for i in sorted(scan.failures)],
        "broken_masks": [table.shown[i] for i in sorted(scan.mask_failures)],
        "width": spread(sizes[:, 1]),
        "height": spread(sizes[:, 0]),
        "aspect": spread(sizes[:, 1] / sizes[:, 0]),
        "gray": int(scan.gray.sum()),
        "tiny": [table.shown[i] for i in tiny[:_LISTED]],
    }
    groups = {"identical": table.identical, "similar": table.similar}
    found |= {f"num_{kind}": sum(len(group) - 1 for group in each) for kind, each in groups.items()}
    listed = {kind: [group[:_LISTED] for group in each[:_LISTED]] for kind, each in groups.items()}
    return found | {kind: [[member(i) for i in group] for group in each] for kind, each in listed.items()}
