"""Scores a network on a list of images: mIoU of its segmentation or of its pseudo labels.

Opens no data set and writes no file; both are up to the caller.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from afa.config import Config, Precision
from afa.data.voc import ScoredImages
from afa.errors import AfaError
from afa.evaluation.confusion import ConfusionMatrix
from afa.evaluation.protocols import PROTOCOLS, PSEUDO_LABELS, check_choice, dense_logits, pseudo_label
from afa.model.network import AfaNetwork
from afa.runtime import progress_bar
from afa.types import IGNORE_INDEX

LABELS: Final = ("seg", *PSEUDO_LABELS)
"""What can be scored: the segmentation, or one of the pseudo labels made with the true tags."""

READ_AHEAD: Final = 8
"""Images that are read before the network asks for them."""

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
    """

    miou: float
    per_class: dict[str, float | None]
    protocol: str
    labels: str
    num_images: int
    seconds: float
    matrix: NDArray[np.int64]
    extras: dict[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes: everything but the matrix, scores in percent with two decimals."""
        return {
            "miou": _rounded(self.miou),
            "per_class": {name: _rounded(iou) for name, iou in self.per_class.items()},
            "protocol": self.protocol,
            "labels": self.labels,
            "num_images": self.num_images,
            "seconds": round(self.seconds, 2),
            **{name: _rounded(value) for name, value in self.extras.items()},
        }


def evaluate(
    network: AfaNetwork,
    images: ScoredImages,
    *,
    config: Config,
    device: torch.device,
    labels: str = "seg",
    protocol: str | None = None,
    refine: bool = False,
    precision: Precision = "fp32",
    limit: int | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Score a network against the masks of a list of images.

    Images are read ahead in threads. Where torch.distributed is initialized, each process scores its share
    and all get the sum. The network is put in eval mode and back.

    Args:
        network: On `device`, with as many classes as the images have.
        images: What is scored. The segmentation is made without tags; pseudo labels are restricted to the
            true ones.
        config: Its `evaluation` and `pseudo` sections.
        device: Where the network is.
        labels: One of `LABELS`.
        protocol: Protocol of the segmentation; None is `config.evaluation.protocol`.
        refine: Refine cam and propagated labels with `config.pseudo.refinement` before they are scored.
        precision: Arithmetic of the network.
        limit: Score only the first `limit` images; None is all.
        progress: Show a progress bar on standard error (on rank 0).

    Returns:
        Scores over all images.

    Raises:
        AfaError: Unknown protocol or labels; no images; class counts differ; an image or mask is broken; an
            image has no tags and pseudo labels are scored.

    Source:
        method.md section 8; Tables 2 and 3.
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
    confusion = ConfusionMatrix(len(images.classes) + 1)
    tag_counts = np.zeros(3, dtype=np.int64)  # true positives, predicted, present
    pixel_counts = np.zeros(2, dtype=np.int64)  # decided by the pseudo label, labeled in the ground truth

    def read(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return images.image(index), images.mask(index)

    training = network.training
    network.eval()
    try:
        with image_progress(f"evaluate {labels}", total=total, enabled=progress and rank == 0) as advance:
            for index, reading in read_ahead(read, range(rank, total, world_size)):
                image, mask = reading.result()
                truth = torch.from_numpy(mask).to(device)
                if labels == "seg":
                    logits = dense_logits(
                        network, image, protocol=protocol, config=config.evaluation, precision=precision
                    )
                    prediction = logits.segmentation.argmax(0)
                    if images.has_tags(index):
                        tag_counts += _tag_counts(logits.image, images.tags(index))
                else:
                    prediction = pseudo_label(
                        network,
                        image,
                        images.tags(index),
                        kind=labels,
                        config=config.pseudo,
                        short_side=config.evaluation.short_side,
                        refine=refine,
                        precision=precision,
                    )
                    labeled = truth != IGNORE_INDEX
                    truth = torch.where(prediction == IGNORE_INDEX, IGNORE_INDEX, truth)
                    pixel_counts += (int((truth != IGNORE_INDEX).sum()), int(labeled.sum()))
                confusion.update(truth, prediction)
                # The bar counts all processes' images at the pace of this one's.
                advance(min(world_size, total - index))
    finally:
        network.train(training)

    counts = _sum_over_processes(
        torch.cat([confusion.matrix.flatten(), torch.from_numpy(np.concatenate([tag_counts, pixel_counts]))]),
        device,
    )
    confusion.matrix = counts[:-5].view_as(confusion.matrix)
    hits, predicted, present, decided, labeled_pixels = counts[-5:].tolist()
    extras: dict[str, float | None] = {}
    if labels == "seg":
        extras["tag_f1"] = 100 * 2 * hits / (predicted + present) if predicted + present else None
    elif labels in ("initial", "refined"):
        extras["coverage"] = 100 * decided / labeled_pixels if labeled_pixels else None
    ious = confusion.per_class_iou()
    return EvaluationResult(
        miou=100 * confusion.miou(),
        per_class={
            name: None if iou is None else 100 * iou
            for name, iou in zip(("background", *images.classes), ious, strict=True)
        },
        protocol=protocol,
        labels=labels,
        num_images=total,
        seconds=time.monotonic() - started,
        matrix=confusion.matrix.numpy(),
        extras=extras,
    )


def read_ahead(read: Callable[[int], _T], indices: Iterable[int]) -> Iterator[tuple[int, Future[_T]]]:
    """Call `read` in threads, a few indices ahead of the consumer.

    Args:
        read: Reads one item; what it raises is raised by the `result()` of that item's future.
        indices: Items in the order wanted.

    Yields:
        Index and future, in order.
    """
    executor = ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="afa-read")
    waiting: deque[tuple[int, Future[_T]]] = deque()
    try:
        for index in indices:
            waiting.append((index, executor.submit(read, index)))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def image_progress(description: str, *, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show images done, rate and time left on standard error.

    Args:
        description: What is going on.
        total: Images in all.
        enabled: False shows nothing.

    Yields:
        Function that takes the number of images done since the last call.
    """
    with progress_bar(enabled=enabled) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, advance=count, rate=f"{speed:.1f} images/s" if speed else "")

        yield advance


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where torch.distributed is not initialized."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _sum_over_processes(counts: Tensor, device: torch.device) -> Tensor:
    if rank_and_world_size()[1] == 1:
        return counts
    # NCCL adds only what is on a GPU; gloo takes either.
    summed = counts.to(device)
    distributed.all_reduce(summed)
    return summed.cpu()


def _tag_counts(image_logits: Tensor, tags: NDArray[np.float32]) -> NDArray[np.int64]:
    """True positives, classes predicted, classes present."""
    predicted, present = image_logits.cpu().numpy() > 0, tags > 0
    return np.array([(predicted & present).sum(), predicted.sum(), present.sum()], dtype=np.int64)


def _rounded(percent: float | None) -> float | None:
    return None if percent is None or math.isnan(percent) else round(percent, 2)
