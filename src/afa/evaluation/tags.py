"""Scores the tags that a network finds, where there are no masks to score its segmentation by.

Opens no data set and writes no file; both are up to the caller.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.config import Config, Precision
from afa.data.voc import TaggedImages
from afa.errors import AfaError
from afa.evaluation.evaluate import group_by_size, resolve_batch_size, rounded
from afa.evaluation.protocols import CRF, PROTOCOLS, check_choice, host_tensor, logit_maps, view_sizes
from afa.model.network import AfaNetwork
from afa.runtime import ALONE, Processes, image_progress, read_ahead


@dataclass(frozen=True)
class TagResult:
    """Scores of the tags of one pass over a list.

    Attributes:
        tag_f1: Micro-averaged F1 of the tags found (logit > 0), percent; None where no tag is true or found.
        per_class: F1 by class name, percent; None for classes that are neither tagged nor found.
        protocol: Protocol of the passes.
        num_images: Images scored, over all processes.
        seconds: Wall time.
    """

    tag_f1: float | None
    per_class: dict[str, float | None]
    protocol: str
    num_images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes, scores in percent with two decimals; `miou` is null: no mask was there to tell."""
        return {
            "miou": None,
            "tag_f1": rounded(self.tag_f1),
            "per_class": {name: rounded(f1) for name, f1 in self.per_class.items()},
            "protocol": self.protocol,
            "labels": "tags",
            "num_images": self.num_images,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class _Sample:
    index: int
    image: Tensor
    sizes: tuple[tuple[int, int], ...]


def evaluate_tags(
    network: AfaNetwork,
    images: TaggedImages,
    *,
    config: Config,
    device: torch.device,
    protocol: str | None = None,
    precision: Precision = "fp32",
    limit: int | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> TagResult:
    """Compare the tags that the classifier finds with those of a list of images.

    Each process scores its share and all get the sum. The network is put in eval mode and back.

    Args:
        network: On `device`, with as many classes as the images have.
        images: What is scored.
        config: Its `evaluation` section.
        device: Where the network is.
        protocol: Protocol of the passes; None is `config.evaluation.protocol`.
        precision: Arithmetic of the network.
        limit: Score only the first `limit` images; None is all.
        processes: Processes that share the work.
        progress: Show a progress bar on standard error (of the first process).

    Returns:
        Scores over all images.

    Raises:
        AfaError: Unknown protocol; class counts differ; an image is broken.
    """
    protocol = protocol if protocol is not None else config.evaluation.protocol
    check_choice(protocol, PROTOCOLS, what="protocol")
    protocol = protocol.removesuffix(CRF)  # refines masks, not tags
    if network.num_classes != len(images.classes):
        raise AfaError(
            f"the network has {network.num_classes} classes and the data set {len(images.classes)}; "
            "evaluate on data with the classes of the run"
        )
    started = time.monotonic()
    total = len(images) if limit is None else min(limit, len(images))
    counts = torch.zeros(3, network.num_classes, dtype=torch.int64, device=device)  # hits, found, true

    def samples() -> Iterator[_Sample]:
        shares = range(processes.rank, total, processes.count)
        for index, reading in read_ahead(lambda i: host_tensor(images.image(i), device=device), shares):
            image = reading.result()
            size = (image.shape[0], image.shape[1])
            yield _Sample(index, image, view_sizes(size, protocol=protocol, config=config.evaluation))

    training = network.training
    network.eval()
    batch_size = resolve_batch_size(config.evaluation.batch_size, device)
    try:
        with image_progress("evaluate tags", total=total, enabled=progress and processes.is_main) as advance:
            for group in group_by_size(samples(), sizes=lambda sample: sample.sizes, batch_size=batch_size):
                pixels = [sample.image for sample in group]
                maps = logit_maps(network, pixels, protocol=protocol, config=config.evaluation, precision=precision)
                found = torch.stack([each.image for each in maps]) > 0
                tags = torch.stack([torch.from_numpy(images.tags(sample.index)) for sample in group])
                true = tags.to(found.device) > 0
                counts += torch.stack([(found & true).sum(0), found.sum(0), true.sum(0)]).to(device)
                advance(min(processes.count * len(group), total - group[0].index))
    finally:
        network.train(training)
    counts = processes.total(counts)
    hits, either = counts[0], counts[1] + counts[2]
    return TagResult(
        tag_f1=_f1(int(hits.sum()), int(either.sum())),
        per_class={
            name: _f1(hit, count)
            for name, hit, count in zip(images.classes, hits.tolist(), either.tolist(), strict=True)
        },
        protocol=protocol,
        num_images=total,
        seconds=time.monotonic() - started,
    )


def _f1(hits: int, either: int) -> float | None:
    return 100 * 2 * hits / either if either else None
