"""Scores the tags that a network predicts, for data without masks to score its segmentation.

Opens no data set and writes no file; the caller does both.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from afa.config import Config
from afa.data.dataset import TaggedImages
from afa.evaluation.evaluate import image_batches
from afa.evaluation.protocols import PROTOCOLS, check_choice, logit_maps
from afa.evaluation.scores import rounded
from afa.model.network import AfaNetwork
from afa.runtime import ALONE, Processes


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


def evaluate_tags(
    network: AfaNetwork, images: TaggedImages, config: Config, *, processes: Processes = ALONE
) -> TagResult:
    """Compare the tags that the classifier finds with those of a list of images.

    Each process scores its share and all get the sum. The network is put in eval mode and back.

    Args:
        network: With as many classes as the images have; its parameters say the device.
        images: What is scored.
        config: Its `evaluation` section, without the CRF, which refines masks, and `train.precision`.
        processes: Processes that share the work.

    Raises:
        AfaError: Unknown protocol; class counts differ; an image is broken.
    """
    check_choice(config.evaluation.protocol, PROTOCOLS, what="protocol")
    config = replace(config, evaluation=config.evaluation.with_crf(False))
    started = time.monotonic()
    device = next(network.parameters()).device
    counts = torch.zeros(3, network.num_classes, dtype=torch.int64, device=device)  # hits, found, true
    with closing(image_batches(network, images, config, ("tags",), processes=processes)) as batches:
        for batch in batches:
            maps = logit_maps(network, [sample.image for sample in batch], config)
            found = torch.stack([each.image for each in maps]) > 0  # (B, C)
            tags = torch.stack([torch.from_numpy(images.targets(sample.index)) for sample in batch]).to(
                device
            )  # (B, C)
            found, true = found & (tags >= 0), tags > 0
            counts += torch.stack([(found & true).sum(0), found.sum(0), true.sum(0)])  # (3, C)
    counts = processes.total(counts)
    hits, either = counts[0], counts[1] + counts[2]
    return TagResult(
        tag_f1=_f1(int(hits.sum()), int(either.sum())),
        per_class={
            name: _f1(hit, count)
            for name, hit, count in zip(images.classes, hits.tolist(), either.tolist(), strict=True)
        },
        protocol=config.evaluation.protocol,
        num_images=len(images),
        seconds=time.monotonic() - started,
    )


def _f1(hits: int, either: int) -> float | None:
    return 100 * 2 * hits / either if either else None
