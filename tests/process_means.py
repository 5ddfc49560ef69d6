"""A step of a tiny network in each of several processes that torchrun starts: `tests/process_means.py FILE`."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from afa.config import load_config
from afa.runs.network import build_network
from afa.runtime import ALONE, Processes, process_group
from afa.training.schedule import phase
from afa.training.step import compute_losses
from afa.types import Batch

STEP = 10_000
KEYS = {"model.backbone": "mit_tiny", "model.weights": "", "model.decoder_width": 8, "model.drop_path": 0.0}
KEYS |= {"model.decoder_dropout": 0.0, "loss.energy_weight": 0.0, "pseudo.affinity_radius": 1}


def gradients(images: slice, reduction: str, processes: Processes = ALONE) -> dict[str, Tensor]:
    """Gradient of each weight after one step on some of two images, and the losses `seg` and `aff`."""
    config = load_config(None, KEYS | {"loss.reduction": reduction}, preset="paper")
    torch.manual_seed(0)
    network = build_network(config.model, 2)
    network.decoder.norm.eval()  # in training its statistics are of all processes
    # In the box of the second image lies a third of what lies in that of the first.
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    image[:, :, 16:48, 16:48] //= 4
    box = torch.tensor([[0, 64, 0, 64], [0, 48, 8, 40]])
    batch = Batch(image[images], torch.tensor([[1.0, 0.0], [0.0, 1.0]])[images], box[images], ())
    module = network if processes is ALONE else DistributedDataParallel(network, find_unused_parameters=True)
    losses = compute_losses(
        lambda view, segmentation, affinity: module(view, segmentation=segmentation, affinity=affinity),
        network.score,
        batch,
        config=config,
        phase=phase(STEP, config),
        processes=processes,
    )
    losses.total.backward()  # type: ignore[no-untyped-call]
    found = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    assert losses.seg is not None
    assert losses.aff is not None
    return found | {"seg": processes.total(losses.seg), "aff": processes.total(losses.aff)}


if __name__ == "__main__":
    with process_group(torch.device("cpu")) as group:
        own = slice(group.rank, group.rank + 1)
        made = {each: gradients(own, each, group) for each in ("process", "batch")}
        if group.is_main:
            torch.save(made, sys.argv[1])
