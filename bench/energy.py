"""Time of the energy loss, forward and backward, with each way to filter.

    python bench/energy.py [--device cuda] [--data VOC_DIR] [--methods lattice exact_half] [--step mit_b1]

The input is a batch of crops (8 of 512 pixels, 21 classes) of generated images, or with --data of photographs in
JPEGImages. Logits have the size of the image, because the cross-entropy of a training step needs them at that size
anyway. On a CPU the script times only the lattice by default; the exact filter takes about a minute there.

An estimate, not a measurement, for the exact filter in half precision: 8 x (256 x 256)^2 = 3.4e10 pairs, each with an
exponential and, at a head size of 32, 64 multiply-adds, take some 10 ms of an H100's exponentials (about 4e12 a second)
and as much again of its tensor cores. The backward pass filters nothing.

With --step the script also times whole training steps of the refined phase with that encoder on the same images, energy
loss included. The last line is the share of the energy loss: the time of the first method alone over the time of a
step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afa.demo.shapes import draw_shapes
from afa.losses.energy import energy_loss
from afa.runs.network import build_network
from afa.training.schedule import phase
from afa.types import Batch
from step import STEPS, WARMUPS, OurStep, seconds_of, step_config  # type: ignore[import-not-found]

NUM_CLASSES = 21


def make_images(size: int, batch: int, data: Path | None) -> Tensor:
    """(B, 3, size, size) in [0, 1]."""
    if data is None:
        images = [draw_shapes(np.random.default_rng(i), size).image for i in range(batch)]
    else:
        paths = sorted((data / "JPEGImages").glob("*.jpg"))[:batch]
        images = [np.array(Image.open(path).convert("RGB").resize((size, size))) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def step_seconds(backbone: str, image: Tensor, device: torch.device, repeats: int) -> float:
    """Median time of a whole step of the refined phase with the energy loss, on (B, 3, H, H) images in [0, 1]."""
    size = image.shape[2]
    config = step_config(backbone=backbone, crop=size, batch=len(image), keys={"loss.energy_weight": 0.01})
    torch.manual_seed(0)
    step = OurStep(build_network(config.model, NUM_CLASSES - 1), config, device)
    tags = torch.zeros(len(image), NUM_CLASSES - 1)
    for i in range(len(image)):
        tags[i, torch.randperm(NUM_CLASSES - 1)[: 1 + i % 3]] = 1
    boxes = torch.tensor([[0, size, 0, size]] * len(image))
    batch = Batch((255 * image.cpu()).to(torch.uint8), tags, boxes, ("",) * len(image))
    kind = phase(STEPS["refined"], config)
    assert kind.want_refined
    for _ in range(WARMUPS if device.type == "cuda" else 1):
        step(batch, kind, STEPS["refined"])
    times = [seconds_of(lambda: step(batch, kind, STEPS["refined"]), device) for _ in range(repeats)]
    return float(statistics.median(times))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--data", type=Path, help="VOC folder (default: generated images)")
    parser.add_argument("--size", type=int, default=512, help="side of the crop, pixels (default 512)")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--methods", nargs="+", choices=["lattice", "exact", "exact_half"])
    parser.add_argument("--step", metavar="BACKBONE", help="also time training steps with this encoder")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    is_gpu = device.type == "cuda"
    methods = arguments.methods or (["exact_half", "lattice", "exact"] if is_gpu else ["lattice"])

    image = make_images(arguments.size, arguments.batch, arguments.data).to(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(arguments.batch, NUM_CLASSES, arguments.size // 16, arguments.size // 16, generator=generator)
    logits = torch.nn.functional.interpolate(3 * tokens, size=image.shape[2:], mode="bilinear").to(device)
    logits.requires_grad_()
    label = logits.detach().argmax(1)
    label[:, : arguments.size // 4] = 255
    box = torch.tensor([[0, arguments.size, 0, arguments.size]] * arguments.batch, device=device)
    print(
        f"{arguments.batch} crops of {arguments.size} px, {NUM_CLASSES} classes, "
        f"{torch.cuda.get_device_name() if is_gpu else f'{arguments.threads} threads'}, torch {torch.__version__}"
    )
    medians = []
    for method in methods:
        seconds = []
        for _ in range(arguments.repeats + 1):
            logits.grad = None
            if is_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = energy_loss(logits, image, label, box, method=method)
            loss.backward()  # type: ignore[no-untyped-call]
            if is_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds[1:]))  # the first one warms up
        print(f"energy {loss.item():.4f}: forward+backward {1000 * medians[-1]:.1f} ms ({method})")
    if arguments.step:
        whole = step_seconds(arguments.step, image, device, arguments.repeats)
        print(f"training step with {arguments.step}, fp32, refined phase: {1000 * whole:.1f} ms")
        print(f"energy loss ({methods[0]}): {100 * medians[0] / whole:.1f} % of a training step")


if __name__ == "__main__":
    main()
