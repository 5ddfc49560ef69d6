"""What tags, counts and lists tell of a data set before any image is opened: the check that training runs first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from afa.config import Config, DataConfig
from afa.data.layout import Layout
from afa.data.voc import ScoredImages, TaggedImages
from afa.errors import AfaError

Severity = Literal["error", "warning", "note"]

FEW_IMAGES: Final = 20
"""A class with fewer training images is hardly learned."""

NEAR_EMPTY: Final = 5
"""A class with fewer training images is as good as absent."""

FEW_APART: Final = 3
"""Two classes of which one stands without the other in fewer training images cannot be told apart."""

_SHARE_APART: Final = 0.1  # A rare class with two such images of four is not meant.
_SHOWN: Final = 8


@dataclass(frozen=True)
class Problem:
    """Something to know of a data set.

    Attributes:
        severity: `error`: training fails; `warning`: the result suffers; `note`: good to know.
        message: One line: the file or class, what was found, what to do.
    """

    severity: Severity
    message: str


@dataclass(frozen=True)
class OpenedData:
    """The images that a run would use, opened but not read.

    Attributes:
        layout: Where they are from.
        train: Images to train on; None where there are none.
        validation: Images that the run is scored on, else those set aside by their tags; None where there are none.
        train_tags: (N, C), none of them without a tag.
        validation_tags: (M, C), all False where an image has no entry.
        problems: What was wrong while opening.
    """

    layout: Layout
    train: TaggedImages | None
    validation: TaggedImages | None
    train_tags: NDArray[np.bool_]
    validation_tags: NDArray[np.bool_]
    problems: tuple[Problem, ...]


def check_fast(layout: Layout, config: Config) -> list[Problem]:
    """Check lists, tags and counts; no image is opened.

    Args:
        layout: What `find_layout` found.
        config: Settings; of `data` those that the layout was found with.

    Returns:
        Errors first. With none of them, the data is fit for training as far as tags tell.
    """
    opened = open_data(layout, config)
    return by_severity([*opened.problems, *check_tags(opened, config)])


def by_severity(problems: Sequence[Problem]) -> list[Problem]:
    """Sort problems: errors, warnings, notes; otherwise as they come."""
    order = ("error", "warning", "note")
    return sorted(problems, key=lambda problem: order.index(problem.severity))


def open_data(layout: Layout, config: Config) -> OpenedData:
    """Open the images to train on and those for validation.

    Args:
        layout: What `find_layout` found.
        config: Settings.

    Returns:
        What could be opened, and what could not in words.
    """
    problems = []
    train: TaggedImages | None = None
    validation: TaggedImages | None = None
    try:
        train = layout.training()
    except AfaError as error:
        problems.append(Problem("error", str(error)))
    # The rule of the training loop: without a word on the list, missing masks only mean that nothing is scored.
    asked = config.data.val_list and config.data.val_list != DataConfig().val_list
    try:
        if asked or (config.data.val_list and layout.has_validation and layout.has_masks):
            validation = layout.scored()
    except AfaError as error:
        problems.append(Problem("error", str(error)))
    if validation is None and not problems:
        problems.append(_unscored(layout))
        try:
            validation = layout.validation() if layout.has_validation else None
        except AfaError as error:
            problems.append(Problem("note", f"the images for validation are left alone: {error}"))
    num_classes = len(layout.classes)
    return OpenedData(
        layout,
        train,
        validation,
        _tag_matrix(train, num_classes),
        _tag_matrix(validation, num_classes),
        tuple(problems),
    )


def together(tags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count the images of each pair of classes.

    Args:
        tags: (N, C).

    Returns:
        (C, C): images that have both classes; on the diagonal, images of the class.

    >>> together(np.array([[1, 1], [1, 0]], dtype=bool)).tolist()
    [[2, 1], [1, 1]]
    """
    counts = tags.astype(np.float32)  # exact up to 16 million images, and far faster than integers
    pairs: NDArray[np.int64] = (counts.T @ counts).astype(np.int64)
    return pairs


def check_tags(opened: OpenedData, config: Config) -> list[Problem]:
    """Check what tags and counts tell.

    Args:
        opened: The images.
        config: Settings.

    Returns:
        What was found.
    """
    problems: list[Problem] = []
    layout, train = opened.layout, opened.train
    if train is not None:
        problems += _check_counts(layout.classes, opened.train_tags)
        problems += _check_pairs(layout.classes, opened.train_tags)
        if len(train) < config.schedule.batch_size:
            problems.append(
                Problem(
                    "note",
                    f"schedule.batch_size is {config.schedule.batch_size}, with {len(train)} training images: each is "
                    "in a step several times; lower it",
                )
            )
    if train is not None and opened.validation is not None:
        problems += _check_sides(train, opened.validation)
        absent = opened.train_tags.any(axis=0) & ~opened.validation_tags.any(axis=0)
        if opened.validation_tags.any() and absent.any():
            names = [layout.classes[i] for i in np.flatnonzero(absent).tolist()]
            problems.append(
                Problem("note", f"no image for validation has {_some(names)}: nothing tells how well it is learned")
            )
    if layout.untagged:
        count, used = len(layout.untagged), 0 if train is None else len(train)
        problems.append(
            Problem(
                "warning" if count > used else "note",
                f"{count:,} image{_s(count)} without tags left out ({_some(layout.untagged, 3)}); tag them to use them",
            )
        )
    return problems


def _unscored(layout: Layout) -> Problem:
    missing = "no masks, so only tags" if layout.has_validation else "no images for validation, so nothing"
    return Problem("note", f"{layout.root}: {missing} will be scored; docs/data.md says how to add them")


def _check_counts(classes: Sequence[str], tags: NDArray[np.bool_]) -> list[Problem]:
    """Classes with too few images or too many, and images that tell nothing."""
    problems: list[Problem] = []
    counts = tags.sum(axis=0)
    if (tags == tags[0]).all():
        names = ", ".join(classes[i] for i in np.flatnonzero(tags[0]).tolist())
        return [
            Problem(
                "warning",
                f"all {len(tags)} training images have the same tags ({names}): nothing can be learned without images "
                "that lack a class; add such images",
            )
        ]

    def listed(chosen: NDArray[np.bool_]) -> str:
        return _some([f"{classes[i]} {counts[i]}" for i in np.flatnonzero(chosen).tolist()])

    empty, rare, few = counts == 0, (counts > 0) & (counts < NEAR_EMPTY), (counts >= NEAR_EMPTY) & (counts < FEW_IMAGES)
    leave_out = "tag more images, or leave out classes by data.class_subset"
    if empty.any():
        names = _some([classes[i] for i in np.flatnonzero(empty).tolist()])
        problems.append(Problem("warning", f"no training image has {names}: never learned; {leave_out}"))
    if rare.any():
        problems.append(
            Problem("warning", f"fewer than {NEAR_EMPTY} training images: {listed(rare)}: not learned; {leave_out}")
        )
    if few.any():
        problems.append(
            Problem("warning", f"fewer than {FEW_IMAGES} training images: {listed(few)}: hardly learned; {leave_out}")
        )
    for index in np.flatnonzero(counts == len(tags)).tolist():
        problems.append(
            Problem(
                "warning",
                f"all {len(tags)} training images have class {classes[index]!r}: nothing shows what an image without "
                "it looks like; add such images, or leave the class out by data.class_subset",
            )
        )
    full = int(tags.all(axis=1).sum())
    if full and len(classes) > 2:
        message = f"training images with all {len(classes)} classes: {full:,}; these tell little, check their tags"
        problems.append(Problem("note", message))
    return problems


def _check_pairs(classes: Sequence[str], tags: NDArray[np.bool_]) -> list[Problem]:
    """Classes that the tags cannot tell apart."""
    both = together(tags)
    counts = np.diagonal(both)
    apart = counts[:, None] - both  # images of the row's class without the column's
    known = (counts >= NEAR_EMPTY) & (counts < len(tags))
    close = known[:, None] & (both > 0) & (counts < len(tags)) & (apart < FEW_APART)
    close &= apart <= _SHARE_APART * counts[:, None]
    problems: list[Problem] = []
    for one, other in np.argwhere(close).tolist():
        # Of two that hardly stand apart either way, once: the one that does so least.
        if one == other or (close[other, one] and (apart[other, one], other) < (apart[one, other], one)):
            continue
        name, partner, count, alone = classes[one], classes[other], int(counts[one]), int(apart[one, other])
        if alone == apart[other, one] == 0:
            what = f"classes {name!r} and {partner!r} are in the same {count} training images"
            remedy = "add images with one of them only, or make them one class"
        else:
            without = f"is without {partner!r} in only {alone} of its {count} training images"
            what = f"class {name!r} " + (without if alone else f"never appears without {partner!r} ({count} images)")
            remedy = f"add images with {name!r} and without {partner!r}"
        problems.append(Problem("warning", f"{what}: these two cannot be told apart from tags; {remedy}"))
    return problems


def _check_sides(train: TaggedImages, validation: TaggedImages) -> list[Problem]:
    both = sorted(set(train.names) & set(validation.names))
    if not both:
        return []
    return [
        Problem(
            "warning",
            f"{len(both)} image{_s(len(both))} to train on and for validation alike ({_some(both, 3)}): scores will be "
            "too high; take them off one of the lists",
        )
    ]


def _tag_matrix(images: TaggedImages | None, num_classes: int) -> NDArray[np.bool_]:
    matrix = np.zeros((0 if images is None else len(images), num_classes), dtype=bool)
    for index in range(len(matrix)):
        assert images is not None
        if not isinstance(images, ScoredImages) or images.has_tags(index):
            matrix[index] = images.tags(index) > 0
    return matrix


def path_below(path: Path, root: Path) -> str:
    """A path as messages show it: below the data set's folder, where it is."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _some(names: Sequence[str], count: int = _SHOWN) -> str:
    left = len(names) - count
    return ", ".join(names[:count]) + (f" and {left:,} more" if left > 0 else "")


def _s(count: int) -> str:
    return "" if count == 1 else "s"
