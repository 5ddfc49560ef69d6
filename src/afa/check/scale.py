"""What the same work would cost on many more images and other machines: arithmetic on rates that were measured."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from afa.config import Config
from afa.errors import AfaError
from afa.report.render import counted, gibibytes
from afa.runs.network import build_network
from afa.runtime import autocast
from afa.types import normalize_image


@dataclass(frozen=True)
class Machine:
    """Rates of a machine for MiT-B1, measured: docs/performance.md.

    Attributes:
        predict: Images a second, predicted at 500 x 375 pixels.
        train: Images a second, trained at 512 x 512 pixels in the refined phase, bf16.
        cores: That decode images.
        source: Which measurement it is, in words.
    """

    predict: float
    train: float
    cores: int
    source: str


MACHINES: Final = {
    "H100": Machine(310.0, 8 / 0.0654, 16, "MiT-B1 on an H100, before fused kernels"),
    "H200": Machine(310.0, 8 / 0.0299, 16, "MiT-B1 on an H200; prediction as on an H100"),
}
"""Machines with one GPU that measurements are known of."""

SHARD_BYTES: Final = 2**30
"""Size of a shard that the number of shards is counted by."""

MASK_BYTES: Final = 0.0156
"""Bytes of an index PNG for each pixel: the mean of 242 photographs of PASCAL VOC."""

INDEX_BYTES: Final = 40
"""Bytes of the index of an image on disk and in memory, with a key of ten letters; tags take a byte a class more."""

ORDER_BYTES: Final = 32
"""Bytes of an image in the orders of two epochs, and in the lists of decoded images."""

_MIT_B1_PARAMETERS: Final = 13.7e6
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_DAY: Final = 86_400
_TIMED: Final = 3
_LEAST_SIDE: Final = 64  # pixels


def parse_count(text: str) -> int:
    """A number of images, perhaps with a unit.

    Raises:
        AfaError: It is none, or below 1.

    >>> parse_count("100M"), parse_count("2.5k")
    (100000000, 2500)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBG]?)", text.strip().replace(",", ""), re.I)
    count = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise AfaError(f"--at-scale is {text!r}; write a number of images, such as 100M")
    return count


def measure_prediction(
    config: Config, num_classes: int, size: tuple[int, int], device: torch.device
) -> tuple[int, float]:
    """Parameters of a network, and images of a (height, width) in pixels that it segments a second, one by one."""
    network = build_network(config.model, num_classes, pretrained=False).to(device).eval()
    height, width = (max(side, _LEAST_SIDE) for side in size)
    image = normalize_image(torch.zeros(1, 3, height, width, device=device))
    seconds = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        with torch.inference_mode(), autocast(device, config.train.precision):
            network.segment(image)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return sum(each.numel() for each in network.parameters()), 1 / min(seconds)


def estimate(
    count: int, machine: str, report: Mapping[str, Any], *, predict_rate: float, parameters: int, crop_size: int
) -> dict[str, Any]:
    """Extrapolate a check to a number of images.

    Args:
        count: Images.
        machine: One of `MACHINES`; any other name is the machine that was measured.
        report: What `check_data` gives, images and training measured.
        predict_rate: Images a second that the measured machine predicts.
        parameters: Of the network.
        crop_size: Side of the training crops, pixels.

    Returns:
        `images`, `machine`, `source`; `predict` and `train_epoch`: each `network` and `decode` in images a second,
        `hours` on one machine, and `machines` that do it in a day; `bytes_in`, `bytes_out`, `shards`, `index_bytes`
        on disk, and `memory_bytes` that training keeps of the images.

    Raises:
        AfaError: The images were not read, or no training step was timed.
    """
    images, training = report["images"], report["training"]
    if images is None or training is None or not images["width"]:
        raise AfaError("--at-scale needs images that were read and steps that were timed; leave out --fast")
    height, width = images["height"]["median"], images["width"]["median"]
    core = images["read"] / max(images["seconds"], 1e-9) / images["threads"]
    known = MACHINES.get(machine.upper())
    if known is None:
        cores, source = images["threads"], f"measured here, {training['device']}"
        busy = sum(phase["steps"] * phase["step_seconds"] for phase in training["phases"])
        train = training["batch_size"] * training["steps"] / max(busy, 1e-9)
        predict = predict_rate
    else:
        cores, source = known.cores, known.source
        lighter = _MIT_B1_PARAMETERS / parameters
        # Small networks and images keep a GPU from its work, so none is taken to be faster than what was measured.
        predict = known.predict * min(1.0, lighter * 500 * 375 / (height * width))
        train = known.train * min(1.0, lighter * 512**2 / crop_size**2)
    num_classes = len(report["classes"])
    bytes_in = count * images["bytes"]

    def cost(network: float) -> dict[str, float | int]:
        seconds = count / min(network, core * cores)
        return {
            "network": network,
            "decode": core * cores,
            "hours": seconds / 3600,
            "machines": math.ceil(seconds / _DAY),
        }

    return {
        "images": count,
        "machine": machine,
        "source": source,
        "predict": cost(predict),
        "train_epoch": cost(train),
        "bytes_in": bytes_in,
        "bytes_out": count * MASK_BYTES * height * width,
        "shards": math.ceil(bytes_in / SHARD_BYTES),
        "index_bytes": count * INDEX_BYTES,
        "memory_bytes": count * (INDEX_BYTES + ORDER_BYTES + num_classes),
    }


def scale_figures(found: Mapping[str, Any]) -> dict[str, str]:
    """The same in words, by name."""

    def words(key: str) -> str:
        cost = found[key]
        slower = "network" if cost["network"] <= cost["decode"] else "decoding"
        machines = counted(cost["machines"], "machine")
        return (
            f"{cost['hours']:,.1f} h on one machine, {machines} for a day (network {cost['network']:,.3g} images/s, "
            f"decoding {cost['decode']:,.3g}: {slower} sets the pace)"
        )

    return {
        f"{found['images']:,} images": f"on {found['machine']}: rates of {found['source']}",
        "prediction": words("predict"),
        "one epoch": words("train_epoch"),
        "bytes in, out": f"{gibibytes(found['bytes_in'])} of images, {gibibytes(found['bytes_out'])} of masks",
        "shards": f"{counted(found['shards'], 'shard')} of 1 GiB; index {gibibytes(found['index_bytes'])}",
        "memory of training": f"{gibibytes(found['memory_bytes'])} for index, tags and orders in each process",
    }
