"""Latency of `Predictor` on one image against the bare network.

    python bench/predict.py [--size 512] [--backbone mit_b1] [--device cpu] [--repeats 7] [--threads 1]

The bare network is `network.segment` of a normalized tensor that is already on the device: logits at a quarter of the
size. The predictor takes a uint8 array and returns the class map in memory: transfer, normalization, the same network,
enlargement to full size, the best class of each pixel, and transfer back. Weights are random, which costs the same
time. The command checks that the class map is the argmax of the enlarged logits, times both in turn, and prints the
ratio of the medians last. It also times scores, which are computed only on demand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import interpolate

from afa.config import ModelConfig
from afa.evaluation.protocols import image_tensor
from afa.inference.predictor import Predictor
from afa.runs.network import build_network
from afa.types import normalize_image

NUM_CLASSES = 20


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the image, pixels (default 512)")
    parser.add_argument("--backbone", default="mit_b1", help="encoder (default mit_b1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of each (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    network = build_network(ModelConfig(backbone=arguments.backbone, weights=""), NUM_CLASSES).eval().to(device)
    predictor = Predictor(network, [f"class {i}" for i in range(NUM_CLASSES)])
    size = (arguments.size, arguments.size)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    print(f"{size[0]}x{size[1]} px, {arguments.backbone}, {arguments.device}, torch {torch.__version__}")

    with torch.inference_mode():
        normalized = normalize_image(image_tensor(image, device=device))
        # The check also warms up both sides.
        expected = interpolate(network.segment(normalized), size=size, mode="bilinear", align_corners=False)[0]
        same = (predictor(image).label == expected.argmax(0).cpu().numpy()).mean()
        print(f"{100 * same:.3f} % of the labels are equal")
        if same < 0.9999:
            raise SystemExit("the predictor's labels are not those of the network: no timing")
        runs: dict[str, Callable[[], object]] = {
            "network": lambda: network.segment(normalized),
            "predictor": lambda: predictor(image),
            "predictor, scores": lambda: predictor(image).scores,
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                seconds[name].append(seconds_of(run, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<18} {1000 * median:8.2f} ms (median of {arguments.repeats})")
    print(f"{medians['predictor'] / medians['network']:.2f}x")


if __name__ == "__main__":
    main()
