"""Checks tags, counts and lists of a data set before any image is opened; training runs this check first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from afa.config import Config, DataConfig
from afa.data.classes import folded
from afa.data.dataset import TaggedImages
from afa.data.open import DataSet
from afa.data.order import Order
from afa.errors import AfaError
from afa.report.render import counted

Severity = Literal["error", "warning", "note"]

FEW_IMAGES: Final = 20
"""A class with fewer training images is hardly learned."""

NEAR_EMPTY: Final = 5
"""A class with fewer training images is as good as absent."""

LIKE_NOTHING: Final = re.compile(
    r"normal|good|okay|ok|healthy|clean|empty|nothing|others?|rest|misc|unlabell?ed|(no|not|non|without)[ _-].+"
)
"""Names of classes that may mean that an image holds none of them."""

FEW_APART: Final = 3
"""Two classes cannot be told apart if one appears without the other in fewer training images than this."""

_SHARE_APART: Final = 0.1  # and at most this share of the class, so that 2 of 4 images are enough
_SHOWN: Final = 8
_MANY_NEGATIVES: Final = 0.9
_ADD: Final = "add such images, with an empty cell as their tags or in a folder named background"


class Problem(NamedTuple):
    """A finding about a data set.

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
        data: Where they are from.
        train: Images to train on; None where there are none.
        validation: Images that the run is scored on, else those set aside by their tags; None where there are none.
        train_tags: (N, C); an image without a tag is known to hold none of the classes.
        validation_tags: (M, C), all False where an image has no entry.
        problems: What was wrong while opening.
    """

    data: DataSet
    train: TaggedImages | None
    validation: TaggedImages | None
    train_tags: NDArray[np.bool_]
    validation_tags: NDArray[np.bool_]
    problems: tuple[Problem, ...]


def check_fast(data: DataSet, config: Config) -> list[Problem]:
    """Check lists, tags and counts of a data set that `config.data` opened; no image is opened.

    Errors come first. With none of them, the data is fit for training as far as tags tell.
    """
    opened = open_sides(data, config)
    return by_severity([*opened.problems, *check_tags(opened, config)])


def by_severity(problems: Iterable[Problem]) -> list[Problem]:
    """Sort problems: errors, warnings, notes; otherwise as they come."""
    order = ("error", "warning", "note")
    return sorted(problems, key=lambda problem: order.index(problem.severity))


def open_sides(data: DataSet, config: Config) -> OpenedData:
    """Open the images to train on and those for validation; what cannot be opened becomes a problem."""
    problems = []
    train: TaggedImages | None = None
    validation: TaggedImages | None = None
    try:
        train = data.train()
    except AfaError as error:
        problems.append(Problem("error", str(error)))
    # The rule of the training loop: without a word on the list, missing masks only mean that nothing is scored.
    asked = config.data.val_list and config.data.val_list != DataConfig().val_list
    try:
        if asked or (config.data.val_list and data.has_validation and data.has_masks):
            validation = data.masked()
    except AfaError as error:
        problems.append(Problem("error", str(error)))
    if validation is None and not problems:
        missing = "no masks, so only tags" if data.has_validation else "no images for validation, so nothing"
        message = f"{data.root}: {missing} will be scored; docs/data.md says how to add them"
        problems.append(Problem("note", message))
        try:
            validation = data.validation() if data.has_validation else None
        except AfaError as error:
            problems.append(Problem("note", f"the images for validation are left alone: {error}"))
    none = np.zeros((0, len(data.classes)), dtype=bool)
    train_tags, validation_tags = (none if images is None else images.tagged for images in (train, validation))
    return OpenedData(data, train, validation, train_tags, validation_tags, tuple(problems))


def together(tags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(C, C) images that have both classes, of (N, C) tags; on the diagonal, images of the class.

    >>> together(np.array([[1, 1], [1, 0]], dtype=bool)).tolist()
    [[2, 1], [1, 1]]
    """
    counts = tags.astype(np.float32)  # exact up to 16 million images, and far faster than integers
    pairs: NDArray[np.int64] = (counts.T @ counts).astype(np.int64)
    return pairs


def check_tags(opened: OpenedData, config: Config) -> Iterator[Problem]:
    """Check what tags and counts tell."""
    data, train, batch_size = opened.data, opened.train, config.schedule.batch_size
    yield from (Problem("warning", note) for note in data.notes)
    for name in data.classes:
        if LIKE_NOTHING.fullmatch(folded(name)) and len(data.classes) > 1:
            message = f"class {name!r}: does it mean that an image holds none of the classes? Then add it to "
            yield Problem("warning", message + "data.negatives; else its masks will cover whole images")
    if train is not None:
        yield from _check_counts(data.classes, opened.train_tags, by_words=config.model.classifier == "text")
        yield from _check_pairs(data.classes, opened.train_tags)
        if config.train.max_images and opened.train_tags.any() and (lost := Order(train, config).lost).any():
            message = f"train.max_images is {config.train.max_images}, too few for {_some(_chosen(data.classes, lost))}"
            message += ": no image of them is left, so they are never learned; raise it to "
            yield Problem("warning", message + f"{opened.train_tags.any(axis=0).sum()} or more, or give more --minutes")
        if len(train) < batch_size:
            message = f"schedule.batch_size is {batch_size}, with {len(train)} training images: each is in a step "
            yield Problem("note", message + "several times; lower it")
    if train is not None and opened.validation is not None:
        both = sorted(set(train.names) & set(opened.validation.names))
        if both:
            message = f"{counted(len(both), 'image')} to train on and for validation alike ({_some(both, 3)}): scores "
            yield Problem("warning", message + "will be too high; take them off one of the lists")
        absent = opened.train_tags.any(axis=0) & ~opened.validation_tags.any(axis=0)
        if opened.validation_tags.any() and absent.any():
            names = _some(_chosen(data.classes, absent))
            yield Problem("note", f"no image for validation has {names}: nothing tells how well it is learned")
    for remark in data.remarks:
        yield Problem("warning", f"{data.root}: {remark}; convert what should count, or take it out")
    if data.untagged:
        count, used = len(data.untagged), 0 if train is None else len(train)
        message = f"{counted(count, 'image')} without tags left out ({_some(data.untagged, 3)}); tag them to use them"
        yield Problem("warning" if count > used else "note", message)


def _check_counts(classes: Sequence[str], tags: NDArray[np.bool_], *, by_words: bool) -> Iterator[Problem]:
    """Classes with too few images or too many; with `by_words`, the names tell what classes are."""
    counts = tags.sum(axis=0)
    if not counts.any():
        message = f"all {len(tags)} training images hold none of the classes ({_some(classes)}): "
        yield Problem("error", message + "nothing can be learned; add images that have them")
        return
    if (tags == tags[0]).all():
        names = ", ".join(_chosen(classes, tags[0]))
        message = f"all {len(tags)} training images have the same tags ({names}): nothing can be learned without "
        yield Problem("warning", message + f"images that lack a class; {_ADD}")
        return
    leave_out = "tag more images" + (", or leave out classes by data.class_subset" if len(classes) > 1 else "")
    empty = _chosen(classes, counts == 0)
    if empty:
        yield Problem("warning", f"no training image has {_some(empty)}: never learned; {leave_out}")
    few: Severity = "note" if by_words else "warning"
    results = ("known by its name alone", "mostly by name") if by_words else ("not learned", "hardly learned")
    levels: list[tuple[int, int, Severity]] = [(1, NEAR_EMPTY, "warning"), (NEAR_EMPTY, FEW_IMAGES, few)]
    for (least, most, severity), result in zip(levels, results, strict=True):
        named = [f"{name} {count}" for name, count in zip(classes, counts, strict=True) if least <= count < most]
        if named:
            yield Problem(severity, f"fewer than {most} training images: {_some(named)}: {result}; {leave_out}")
    for name in _chosen(classes, counts == len(tags)):
        message = f"all {len(tags)} training images have class {name!r}: nothing shows what an image without it looks "
        yield Problem("warning", message + f"like; {_ADD}, or leave the class out by data.class_subset")
    if (share := 1 - tags.any(axis=1).mean()) > _MANY_NEGATIVES:
        message = f"{share:.0%} of the training images hold none of the classes; of a batch they are at most "
        yield Problem("note", message + "train.negative_share")
    full = int(tags.all(axis=1).sum())
    if full and len(classes) > 2:
        message = f"training images with all {len(classes)} classes: {full:,}; these tell little, check their tags"
        yield Problem("note", message)


def _check_pairs(classes: Sequence[str], tags: NDArray[np.bool_]) -> Iterator[Problem]:
    """Classes that the tags cannot tell apart."""
    both = together(tags)
    counts = np.diagonal(both)
    apart = counts[:, None] - both  # images of the row's class without the column's
    known = (counts >= NEAR_EMPTY) & (counts < len(tags))
    close = known[:, None] & (both > 0) & (counts < len(tags)) & (apart < FEW_APART)
    close &= apart <= _SHARE_APART * counts[:, None]
    for one, other in np.argwhere(close).tolist():
        # If neither class appears without the other often, report the pair once: from the class that does so least.
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
        yield Problem("warning", f"{what}: these two cannot be told apart from tags; {remedy}")


def _chosen(classes: Sequence[str], chosen: ArrayLike) -> list[str]:
    return [classes[index] for index in np.flatnonzero(chosen).tolist()]


def _some(names: Sequence[str], count: int = _SHOWN) -> str:
    left = len(names) - count
    return ", ".join(names[:count]) + (f" and {left:,} more" if left > 0 else "")
