"""Scores a network on a list of images: mIoU of its segmentation or of its pseudo labels.

Opens no data set and writes no file; both are up to the caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from afa.config import SUPERVISION_NAMES, Config, Precision, PseudoConfig
from afa.data.voc import ScoredImages
from afa.errors import AfaError
from afa.evaluation.boundary import BoundaryConfusion
from afa.evaluation.confusion import ConfusionMatrix
from afa.evaluation.protocols import (
    PROTOCOLS,
    PSEUDO_LABELS,
    check_choice,
    group_sizes,
    host_tensor,
    logit_maps,
    pseudo_labels,
    pseudo_sizes,
)
from afa.model.network import AfaNetwork
from afa.runtime import image_progress, read_ahead
from afa.types import IGNORE_INDEX

LABELS: Final = ("seg", *PSEUDO_LABELS)
"""What can be scored: the segmentation, or one of the pseudo labels made with the true tags."""

GROUPS_AHEAD: Final = 4
"""Full batches' worth of images that may wait for others of their size."""

BATCH_PIXELS: Final = 512 * 512
"""Pixels of the images that a batch size is meant for; of larger ones fewer go into a batch."""

_AUTOMATIC_BATCH_SIZE: Final = {"cuda": 8}  # Elsewhere 1: a CPU gains a few percent at most.

_T = TypeVar("_T")


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one pass over a list.

    Attributes:
        miou: Percent; NaN when no mask has a labeled pixel.
        per_class: IoU by class name, background first, in percent; None for classes that no mask has.
        protocol: Protocol of the segmentation. Pseudo labels have their own scales, those of `pseudo.scales`.
        labels: What was scored.
        num_images: Images scored, over all processes.
        seconds: Wall time.
        matrix: (K, K) int64 pixels; rows are the ground truth.
        extras: Further figures in percent. `tag_f1` (seg): micro-averaged F1 of the tags that the classifier
            finds (logit > 0), None when no image has tags. `coverage` (initial, refined): share of the
            labeled ground truth that the pseudo label decides; what it leaves uncertain is not scored.
            `boundary_iou`: mean boundary IoU, where it was asked for.
        boundary_per_class: As `per_class`, of the boundary IoU; empty unless it was asked for.
        refinement: What cam and propagated labels went through before they were scored: `par` or another of
            `pseudo.refinement`, `crf`, or both with a plus between; empty for none. Initial and refined labels
            name the CRF alone, as the rest is theirs by definition.
        supervision: What the network learned from, in the words of `SUPERVISION_NAMES`.
    """

    miou: float
    per_class: dict[str, float | None]
    protocol: str
    labels: str
    num_images: int
    seconds: float
    matrix: NDArray[np.int64]
    extras: dict[str, float | None] = field(default_factory=dict)
    boundary_per_class: dict[str, float | None] = field(default_factory=dict)
    refinement: str = ""
    supervision: str = SUPERVISION_NAMES["tags"]

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes: everything but the matrix, scores in percent with two decimals."""
        boundary = {name: rounded(iou) for name, iou in self.boundary_per_class.items()}
        return {
            "miou": rounded(self.miou),
            "per_class": {name: rounded(iou) for name, iou in self.per_class.items()},
            "protocol": self.protocol,
            "labels": self.labels,
            "supervision": self.supervision,
            "num_images": self.num_images,
            "seconds": round(self.seconds, 2),
            **({"refinement": self.refinement} if self.refinement else {}),
            **{name: rounded(value) for name, value in self.extras.items()},
            **({"boundary_per_class": boundary} if boundary else {}),
        }


@dataclass(frozen=True)
class _Sample:
    """An image that was read, and the sizes at which the network sees it."""

    index: int
    image: Tensor
    mask: Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


def evaluate(
    network: AfaNetwork,
    images: ScoredImages,
    *,
    config: Config,
    device: torch.device,
    labels: str = "seg",
    protocol: str | None = None,
    refine: bool = False,
    boundary: bool = False,
    precision: Precision = "fp32",
    limit: int | None = None,
    batch_size: int = 0,
    progress: bool = True,
) -> EvaluationResult:
    """Score a network against the masks of a list of images.

    Images are read ahead in threads, and those of one size go through the network together. A GPU is
    synchronized once, at the end. Where torch.distributed is initialized, each process scores its share and all get the
    sum. The network is put in eval mode and back.

    Args:
        network: On `device`, with as many classes as the images have.
        images: What is scored. The segmentation is made without tags; pseudo labels are restricted to the
            true ones.
        config: Its `evaluation` and `pseudo` sections.
        device: Where the network is.
        labels: One of `LABELS`.
        protocol: Protocol of the segmentation; None is `config.evaluation.protocol`.
        refine: Refine cam and propagated labels with `config.pseudo.refinement` before they are scored.
        boundary: Also score the boundary IoU.
        precision: Arithmetic of the network.
        limit: Score only the first `limit` images; None is all.
        batch_size: Images of one size that go through the network together, as `resolve_batch_size` has it.
        progress: Show a progress bar on standard error (on rank 0).

    Returns:
        Scores over all images.

    Raises:
        AfaError: Unknown protocol or labels; no images; class counts differ; an image or mask is broken; an
            image has no tags and pseudo labels are scored.

    Source:
        Paper Tables 2 and 3; docs/method.md, "Evaluation".
    """
    protocol = protocol if protocol is not None else config.evaluation.protocol
    check_choice(labels, LABELS, what="labels")
    check_choice(protocol, PROTOCOLS, what="protocol")
    total = len(images) if limit is None else min(limit, len(images))
    if total < 1:
        raise AfaError("there is no image to evaluate; give a list with at least one name")
    if network.num_classes != len(images.classes):
        raise AfaError(
            f"the network has {network.num_classes} classes and the data set {len(images.classes)}; "
            "evaluate on data with the classes of the run"
        )
    started = time.monotonic()
    rank, world_size = rank_and_world_size()
    batch_size = resolve_batch_size(batch_size, device)
    # On a GPU nothing is read before the end; a copy of each label to the CPU would wait for it.
    counting = device if device.type == "cuda" else torch.device("cpu")
    confusion = ConfusionMatrix(len(images.classes) + 1, device=counting)
    outlines = BoundaryConfusion(len(images.classes) + 1, device=counting) if boundary else None
    tag_counts = torch.zeros(3, dtype=torch.int64, device=counting)  # true positives, predicted, present
    pixel_counts = torch.zeros(2, dtype=torch.int64, device=counting)  # decided by the pseudo label, labeled

    def read(index: int) -> tuple[Tensor, Tensor]:
        return host_tensor(images.image(index), device=device), host_tensor(images.mask(index), device=device)

    def samples() -> Iterator[_Sample]:
        for index, reading in read_ahead(read, range(rank, total, world_size)):
            image, mask = reading.result()
            size = (image.shape[0], image.shape[1])
            if labels == "seg":
                sizes = group_sizes(size, protocol=protocol, config=config.evaluation)
            else:
                sizes = pseudo_sizes(size, config=config.pseudo, short_side=config.evaluation.short_side)
            yield _Sample(index, image, mask, sizes)

    training = network.training
    network.eval()
    try:
        with image_progress(f"evaluate {labels}", total=total, enabled=progress and rank == 0) as advance:
            for group in group_by_size(samples(), sizes=lambda sample: sample.sizes, batch_size=batch_size):
                pixels = [sample.image for sample in group]
                if labels == "seg":
                    maps = logit_maps(network, pixels, protocol=protocol, config=config.evaluation, precision=precision)
                    predictions = [each.label(sample.size) for each, sample in zip(maps, group, strict=True)]
                    tagged = [i for i, sample in enumerate(group) if images.has_tags(sample.index)]
                    if tagged:
                        true_tags = np.stack([images.tags(group[i].index) for i in tagged])
                        tag_counts += _tag_counts(torch.stack([maps[i].image for i in tagged]).to(counting), true_tags)
                else:
                    predictions = pseudo_labels(
                        network,
                        pixels,
                        [images.tags(sample.index) for sample in group],
                        kind=labels,
                        config=config.pseudo,
                        short_side=config.evaluation.short_side,
                        refine=refine,
                        crf_config=config.evaluation,
                        precision=precision,
                    )
                for sample, label in zip(group, predictions, strict=True):
                    prediction = label.to(counting)
                    truth = sample.mask.to(counting, non_blocking=True)
                    if labels != "seg":
                        decided = truth.masked_fill(prediction == IGNORE_INDEX, IGNORE_INDEX)
                        pixel_counts += torch.stack([(decided != IGNORE_INDEX).sum(), (truth != IGNORE_INDEX).sum()])
                        truth = decided
                    confusion.update(truth, prediction)
                    if outlines is not None:
                        outlines.update(truth, prediction)
                    # The bar counts all processes' images at the pace of this one's.
                    advance(min(world_size, total - sample.index))
    finally:
        network.train(training)

    matrices = [confusion] if outlines is None else [confusion, outlines.confusion]
    counts = [tag_counts, pixel_counts, *(each.matrix.flatten() for each in matrices)]
    sums = torch.split(_sum_over_processes(torch.cat(counts), device), [len(each) for each in counts])
    for each, total_counts in zip(matrices, sums[2:], strict=True):
        each.matrix = total_counts.view_as(each.matrix)
    hits, predicted, present = sums[0].tolist()
    decided_pixels, labeled_pixels = sums[1].tolist()
    extras: dict[str, float | None] = {}
    if labels == "seg":
        extras["tag_f1"] = 100 * 2 * hits / (predicted + present) if predicted + present else None
    elif labels in ("initial", "refined"):
        extras["coverage"] = 100 * decided_pixels / labeled_pixels if labeled_pixels else None
    if outlines is not None:
        extras["boundary_iou"] = 100 * outlines.mean()
    return EvaluationResult(
        miou=100 * confusion.miou(),
        per_class=_by_name(confusion.per_class_iou(), images.classes),
        protocol=protocol,
        labels=labels,
        num_images=total,
        seconds=time.monotonic() - started,
        matrix=confusion.matrix.numpy(),
        extras=extras,
        boundary_per_class={} if outlines is None else _by_name(outlines.per_class_iou(), images.classes),
        refinement=_refinement(config.pseudo, labels, refine=refine),
        supervision=SUPERVISION_NAMES[config.train.supervision],
    )


def group_by_size(
    items: Iterable[_T], *, sizes: Callable[[_T], tuple[tuple[int, int], ...]], batch_size: int
) -> Iterator[list[_T]]:
    """Collect images of equal sizes into batches, holding on to few.

    A batch that is full goes at once. When `GROUPS_AHEAD` batches' worth of images wait, the oldest image goes with
    whatever else has its size, so that images of rare sizes neither wait forever nor crowd out the others.

    Args:
        items: Images in any order.
        sizes: Says the (height, width) of each pass of an image; images are batched where all are equal.
        batch_size: Images of `BATCH_PIXELS` pixels, or fewer pixels, in a batch; of larger ones there are fewer.

    Yields:
        Images of equal sizes, at least one.
    """
    groups: dict[tuple[tuple[int, int], ...], list[_T]] = {}  # the group of the oldest image first
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


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where torch.distributed is not initialized."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _full_batch(sizes: tuple[tuple[int, int], ...], batch_size: int) -> int:
    pixels = max(height * width for height, width in sizes)
    return max(1, min(batch_size, batch_size * BATCH_PIXELS // pixels))


def _sum_over_processes(counts: Tensor, device: torch.device) -> Tensor:
    if rank_and_world_size()[1] == 1:
        return counts.cpu()
    # NCCL adds only what is on a GPU; gloo takes either.
    summed = counts.to(device)
    distributed.all_reduce(summed)
    return summed.cpu()


def _tag_counts(image_logits: Tensor, tags: NDArray[np.float32]) -> Tensor:
    """True positives, classes predicted, classes present in (B, C) logits and tags."""
    predicted = image_logits > 0
    present = torch.from_numpy(tags > 0).to(predicted.device, non_blocking=True)
    return torch.stack([(predicted & present).sum(), predicted.sum(), present.sum()])


def _refinement(config: PseudoConfig, labels: str, *, refine: bool) -> str:
    if labels == "seg":
        return ""
    names = [config.refinement] if refine and labels in ("cam", "propagated") else []
    return "+".join([*names, "crf"] if config.crf else names)


def _by_name(ious: Sequence[float | None], classes: Sequence[str]) -> dict[str, float | None]:
    """Scores in percent by class name, background first."""
    percent = (None if iou is None else 100 * iou for iou in ious)
    return dict(zip(("background", *classes), percent, strict=True))


def rounded(percent: float | None) -> float | None:
    """A score as `--json` writes it: two decimals; None where there is none or it is NaN."""
    return None if percent is None or math.isnan(percent) else round(percent, 2)
