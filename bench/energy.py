"""Time of the energy loss, forward and backward, with each way to filter.

    python bench/energy.py [--device cuda] [--data VOC_DIR] [--methods lattice exact_half]

A batch of crops (8 of 512 pixels, 21 classes): generated images, or with --data photographs of JPEGImages. Logits have
the size of the image, as the cross-entropy of a training step has them already. On a CPU only the lattice is timed
unless told otherwise: the exact filter takes about a minute there.

An estimate, not a measurement, for the exact filter in half precision: 8 x (256 x 256)^2 = 3.4e10 pairs, each with an
exponential and, at a head size of 32, 64 multiply-adds, are some 10 ms of an H100's exponentials (about 4e12 a second)
and as much again of its tensor cores. The backward pass filters nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afa.data.shapes import draw_shapes
from afa.filtering.energy import energy_loss

NUM_CLASSES = 21


def make_images(size: int, batch: int, data: Path | None) -> Tensor:
    """(B, 3, size, size) in [0, 1]."""
    if data is None:
        images = [draw_shapes(np.random.default_rng(i), size).image for i in range(batch)]
    else:
        paths = sorted((data / "JPEGImages").glob("*.jpg"))[:batch]
        images = [np.array(Image.open(path).convert("RGB").resize((size, size))) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--data", type=Path, help="VOC folder (default: generated images)")
    parser.add_argument("--size", type=int, default=512, help="side of the crop, pixels (default 512)")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--methods", nargs="+", choices=["lattice", "exact", "exact_half"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    is_gpu = device.type == "cuda"
    methods = arguments.methods or (["lattice", "exact_half", "exact"] if is_gpu else ["lattice"])

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
        median = statistics.median(seconds[1:])  # the first one warms up
        print(f"energy {loss.item():.4f}: forward+backward {1000 * median:.1f} ms ({method})")


if __name__ == "__main__":
    main()
