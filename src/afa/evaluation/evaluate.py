"""Scores a network on a list of images: mIoU of its segmentation or of its pseudo labels.

Opens no data set and writes no file; the caller does both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor

from afa.config import SUPERVISION_NAMES, Config, PseudoConfig
from afa.data.dataset import MaskedImages, TaggedImages
from afa.errors import AfaError
from afa.evaluation.once import once_per_view
from afa.evaluation.protocols import (
    PROTOCOLS,
    PSEUDO_LABELS,
    check_choice,
    group_sizes,
    host_tensor,
    logit_maps,
    pseudo_labels,
    pseudo_sizes,
    view_sizes,
)
from afa.evaluation.scores import Counts, EvaluationResult
from afa.model.network import AfaNetwork
from afa.runtime import ALONE, Processes, image_progress, read_ahead

LABELS: Final = ("seg", *PSEUDO_LABELS)
"""What can be scored: the segmentation, or one of the pseudo labels made with the true tags."""

GROUPS_AHEAD: Final = 4
"""Number of images, in full batches, that may wait for others of their size."""

BATCH_PIXELS: Final = 512 * 512
"""Pixels of the images that a batch size is meant for; a batch holds fewer of larger images."""

_AUTOMATIC_BATCH_SIZE: Final = {"cuda": 8}  # Elsewhere 1: a CPU gains a few percent at most.

_T = TypeVar("_T")
_Images = TypeVar("_Images", bound=TaggedImages)
Sizes = tuple[tuple[int, int], ...]


def evaluate(
    network: AfaNetwork,
    images: MaskedImages,
    config: Config,
    *,
    labels: str = "seg",
    refine: bool = False,
    boundary: bool = False,
    processes: Processes = ALONE,
) -> EvaluationResult:
    """Score a network against the masks of a list of images.

    Images are read ahead in threads, and those of one size go through the network together. A GPU is synchronized
    once, at the end; with class scores from words also at each pass (`once_per_view`). Each process scores its share
    and all get the sum. The network is put in eval mode and back.

    Args:
        network: With as many classes as the images have; its parameters say the device.
        images: What is scored. The segmentation is made without tags; pseudo labels are restricted to the
            true ones.
        config: Its `evaluation` and `pseudo` sections, and `train.precision`.
        labels: One of `LABELS`.
        refine: Refine cam and propagated labels with `pseudo.refinement` before they are scored.
        boundary: Also score the boundary IoU.
        processes: Processes that share the work.

    Raises:
        AfaError: As `image_batches`; unknown labels; an image has no tags and pseudo labels are scored.

    Source:
        Paper Tables 2 and 3; docs/method.md, "Evaluation".
    """
    wanted = (labels,)
    return evaluate_each(network, images, config, wanted, refine=refine, boundary=boundary, processes=processes)[0]


def evaluate_each(
    network: AfaNetwork,
    images: MaskedImages,
    config: Config,
    labels: Sequence[str],
    *,
    refine: bool = False,
    boundary: bool = False,
    processes: Processes = ALONE,
) -> list[EvaluationResult]:
    """Score several kinds of labels as `evaluate`, with each image read once, and encoded once if it can be kept.

    Args:
        network, images, config, refine, boundary, processes: As of `evaluate`.
        labels: Some of `LABELS`.

    Returns:
        Scores for each of `labels`, all with the time of the whole pass.
    """
    for each in labels:
        check_choice(each, LABELS, what="labels")
    device = next(network.parameters()).device
    counts = [Counts(images, each, device, boundary=boundary) for each in labels]
    passes = once_per_view(network)
    with closing(image_batches(network, images, config, labels, processes=processes)) as batches:
        for batch, count in ((batch, count) for batch in batches for count in counts):
            pixels = [sample.image for sample in batch]
            if count.labels == "seg":
                maps = logit_maps(passes, pixels, config)
                predictions = [each.label(sample.size) for each, sample in zip(maps, batch, strict=True)]
                count.add_tags({sample.index: each.image for sample, each in zip(batch, maps, strict=True)})
            else:
                tags = [images.tags(sample.index) for sample in batch]
                predictions = pseudo_labels(passes, pixels, tags, config, kind=count.labels, refine=refine)
            for sample, prediction in zip(batch, predictions, strict=True):
                assert sample.mask is not None
                count.add(sample.index, sample.mask, prediction)
    for count in counts:
        count.sum_up(processes)
    return [
        EvaluationResult(
            **count.scores(),
            protocol=config.evaluation.protocol,
            labels=count.labels,
            num_images=len(images),
            refinement=_refinement(config.pseudo, count.labels, refine=refine),
            supervision=SUPERVISION_NAMES[config.train.supervision],
        )
        for count in counts
    ]


@dataclass(frozen=True)
class Sample:
    """An image that was read.

    Attributes:
        index: Its place in the list.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8; None where only tags are scored.
        sizes: (height, width) at which the network sees it.
    """

    index: int
    image: Tensor
    mask: Tensor | None
    sizes: Sizes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.image.shape[0], self.image.shape[1]


def image_batches(
    network: AfaNetwork, images: TaggedImages, config: Config, labels: Sequence[str], *, processes: Processes
) -> Generator[list[Sample], None, None]:
    """Read this process's share of a list ahead, and collect images that the network sees at the same sizes.

    Args:
        network: Put in eval mode meanwhile.
        images: Images; with masks unless only their tags are scored.
        config: Its `evaluation` and `pseudo` sections.
        labels: What the sizes are for: some of `LABELS`, and `tags` where no mask is to be read.
        processes: Processes that share the work.

    Raises:
        AfaError: Unknown protocol; no images; the network has other classes; an image or mask is broken.
    """
    check_choice(config.evaluation.protocol, PROTOCOLS, what="protocol")
    total, classes = len(images), len(images.classes)
    if network.num_classes != classes:
        raise AfaError(
            f"the network has {network.num_classes} classes and the data set {classes}; "
            "evaluate on data with the classes of the run"
        )
    if total < 1:
        raise AfaError("there is no image to evaluate; give a list with at least one name")
    sizes = [{"seg": group_sizes, "tags": view_sizes}.get(each, pseudo_sizes) for each in labels]
    device = next(network.parameters()).device

    def read(index: int) -> Sample:
        image = host_tensor(images.image(index), device=device)
        mask = None
        if "tags" not in labels:
            assert isinstance(images, MaskedImages)
            mask = host_tensor(images.mask(index), device=device)
        size = (image.shape[0], image.shape[1])
        return Sample(index, image, mask, tuple(view for each in sizes for view in each(size, config)))

    batch_size = resolve_batch_size(config.evaluation.batch_size, device)
    shown = image_progress(f"evaluate {', '.join(labels)}", total=total, processes=processes)
    readings = read_ahead(read, processes.share(range(total)))
    training = network.training
    network.eval()
    try:
        with shown as advance, closing(readings):
            samples = (reading.result() for _, reading in readings)
            for batch in group_by_size(samples, sizes=lambda sample: sample.sizes, batch_size=batch_size):
                yield batch
                advance(len(batch))
    finally:
        network.train(training)


def first_images(images: _Images, limit: int | None) -> _Images:
    """The first so many images of a list; None is all."""
    few = copy.copy(images)
    few.names = images.names[:limit]
    return few


def group_by_size(items: Iterable[_T], *, sizes: Callable[[_T], Sizes], batch_size: int) -> Iterator[list[_T]]:
    """Collect images of equal sizes into batches, and hold few images at a time.

    A batch that is full goes at once. When `GROUPS_AHEAD` batches' worth of images wait, the oldest image goes with
    whatever else has its size, so that images of rare sizes neither wait forever nor crowd out the others.

    Args:
        items: Images in any order.
        sizes: Says the (height, width) of each pass of an image; images are batched where all are equal.
        batch_size: Images of `BATCH_PIXELS` pixels, or fewer pixels, in a batch; of larger ones there are fewer.
    """
    groups: dict[Sizes, list[_T]] = {}  # the group of the oldest image first
    waiting = 0.0
    for item in items:
        size = sizes(item)
        groups.setdefault(size, []).append(item)
        waiting += 1 / _full_batch(size, batch_size)
        if len(groups[size]) < _full_batch(size, batch_size):
            if waiting < GROUPS_AHEAD:
                continue
            size = next(iter(groups))
        group = groups.pop(size)
        waiting -= len(group) / _full_batch(size, batch_size)
        yield group
    yield from groups.values()


def resolve_batch_size(batch_size: int, device: torch.device) -> int:
    """Turn a batch size of 0 into the one that is best for most: 8 on a GPU, 1 elsewhere."""
    return batch_size or _AUTOMATIC_BATCH_SIZE.get(device.type, 1)


def _full_batch(sizes: Sizes, batch_size: int) -> int:
    pixels = max(height * width for height, width in sizes)
    return max(1, min(batch_size, batch_size * BATCH_PIXELS // pixels))


def _refinement(config: PseudoConfig, labels: str, *, refine: bool) -> str:
    if labels == "seg":
        return ""
    names = [config.refinement] if refine and labels in ("cam", "propagated") else []
    return "+".join([*names, "crf"] if config.crf else names)
