"""Images a second of `afa predict` on two processes against one, each process on a core of its own.

    python bench/processes.py [--images 300] [--size 256] [--backbone mit_b1] [--repeats 3]

It writes random images and a run of random weights, and runs the command on one process and on two in turn: their
starts are left out, by the time that the command itself prints. Where other programs use the cores, the processor time
tells more: with w seconds of it for the images on one process and v on two together, two cores of their own would be
2 w / v times as fast. Starts are taken off by a call with two images. The last line is that ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from afa.config import config_to_toml, load_config
from afa.runs.network import build_network


def write_inputs(root: Path, *, images: int, size: int, backbone: str) -> None:
    config = load_config(None, {"model.backbone": backbone, "model.weights": "", "train.device": "cpu"})
    torch.manual_seed(0)
    for folder in ("run", "photos", "few"):
        (root / folder).mkdir()
    (root / "run" / "config.toml").write_text(config_to_toml(config))
    (root / "run" / "classes.txt").write_text("".join(f"class {number}\n" for number in range(20)))
    save_file(build_network(config.model, 20, pretrained=False).state_dict(), root / "run" / "model.safetensors")
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        for folder in ("photos", "few")[: 1 + (number < 2)]:
            picture.save(root / folder / f"{number}.jpg", quality=90)


def predict(root: Path, photos: str, count: int) -> tuple[float, float]:
    """(seconds that the command states, seconds of processor time) of a call on `count` processes."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = sorted(os.sched_getaffinity(0))
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        call = [sys.executable, "-m", "afa", "predict", root / "run", root / photos, "--out", out]
        started.append(
            subprocess.Popen(
                ["taskset", "-c", str(cores[rank % len(cores)]), *map(str, call)],
                env=os.environ | own | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    texts = [process.communicate()[0] for process in started]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r" in ([\d.]+) s", texts[0])
    if found is None or any(process.returncode for process in started):
        raise SystemExit("the command failed")
    return float(found[1]), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="images (default 300)")
    parser.add_argument("--size", type=int, default=256, help="side of an image, pixels (default 256)")
    parser.add_argument("--backbone", default="mit_b1", help="encoder (default mit_b1)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each (default 3)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_inputs(root, images=arguments.images, size=arguments.size, backbone=arguments.backbone)
        starts = {count: predict(root, "few", count)[1] for count in (1, 2)}
        walls: dict[int, list[float]] = {1: [], 2: []}
        work: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(arguments.repeats):
            for count in (1, 2):
                wall, processor = predict(root, "photos", count)
                walls[count].append(wall)
                work[count].append(processor - starts[count])
    for count in (1, 2):
        rate, seconds = arguments.images / statistics.median(walls[count]), statistics.median(work[count])
        print(
            f"{count} processes: {rate:6.2f} images/s, {1000 * seconds / arguments.images:.1f} ms of processor an image"
        )
    ratios = [one / two for one, two in zip(walls[1], walls[2], strict=True)]
    print(f"wall clock: {statistics.median(ratios):.2f}x (median of {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    print(f"{2 * statistics.median(work[1]) / statistics.median(work[2]):.2f}x")


if __name__ == "__main__":
    main()
