"""Speed of the training input alone: images decoded and augmented per second, against what a training step consumes.

    python bench/input.py [--data FOLDER] [--step-images-per-second 40] [--workers -1] [--device auto]
    python bench/input.py --rss

Without a folder of images, the script generates JPEGs of 500x375 pixels. It makes batches as training does and discards
them. Rows: the worker threads scale and crop, or the device does so if there is a GPU (or with `--device cpu`).
Columns: every image is decoded each time, or all images are in the cache. The ratios in the end divide the lowest row
by the images that a step consumes per second.

`--rss` instead watches the memory of 500 steps over a list of 20,000 images, and fails if it grows.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from afa.config import AugmentConfig, Config, DataConfig, ScheduleConfig
from afa.data.dataset import TaggedImages
from afa.data.files import find_images
from afa.data.loader import resolve_workers, train_batches
from afa.data.pixel_cache import PixelCache
from afa.runtime import pick_device
from afa.types import Batch

CACHE_BYTES = 4 * 2**30
RSS_IMAGES, RSS_STEPS, RSS_FILES = 20_000, 500, 200
RSS_CACHE_BYTES = 4 * 2**20
RSS_WARM_UP = 100
RSS_LIMIT_MIB = 16.0


def write_jpegs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write seeded pictures, smooth with some grain; their files are about as large as photographs of that size."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.jpg" for index in range(count)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-20, 21, (size[1], size[0], 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


def list_images(paths: list[Path]) -> TaggedImages:
    names = tuple(str(index) for index in range(len(paths)))
    return TaggedImages(classes=("thing",), names=names, paths=paths, tags=np.ones((len(paths), 1), dtype=bool))


def make_batches(
    images: TaggedImages, arguments: argparse.Namespace, *, steps: int, cache: PixelCache | None, device: bool
) -> Iterator[Batch]:
    return train_batches(
        images,
        Config(
            data=DataConfig(workers=arguments.workers),
            augment=AugmentConfig(crop_size=arguments.crop),
            schedule=ScheduleConfig(max_steps=steps, batch_size=arguments.batch),
        ),
        cache=cache,
        device=arguments.device if device else None,
    )


def measure(images: TaggedImages, arguments: argparse.Namespace, *, cached: bool, device: bool) -> float:
    """Images per second over two epochs; a first epoch starts threads and device, and fills the cache."""
    epoch = -(-len(images) // arguments.batch)
    cache = PixelCache(len(images), CACHE_BYTES) if cached else None
    start = 0.0
    for step, _ in enumerate(make_batches(images, arguments, steps=3 * epoch, cache=cache, device=device), start=1):
        if step == epoch:
            synchronize(arguments.device)
            start = time.perf_counter()
    synchronize(arguments.device)
    count: int = 2 * epoch * arguments.batch
    return count / (time.perf_counter() - start)


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_mib() -> float:
    """Resident memory of this process, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch_memory(images: TaggedImages, arguments: argparse.Namespace) -> float:
    """Print the memory during the steps; returns its growth after the warm-up, MiB."""
    cache = PixelCache(len(images), RSS_CACHE_BYTES)
    device = arguments.device is not None
    after_warm_up = 0.0
    stream = make_batches(images, arguments, steps=RSS_STEPS, cache=cache, device=device)
    for step, _ in enumerate(stream, start=1):
        if step % 100 == 0:
            print(f"step {step}: {resident_mib():.1f} MiB, {cache.used_bytes / 2**20:.1f} MiB of them images")
        if step == RSS_WARM_UP:
            after_warm_up = resident_mib()
    return resident_mib() - after_warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images to read (default: generated JPEGs)")
    parser.add_argument("--images", type=int, default=160, help="images to use (default 160)")
    parser.add_argument("--crop", type=int, default=512, help="side of the crop, pixels (default 512)")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default 8)")
    parser.add_argument("--workers", type=int, default=-1, help="worker threads; -1 picks by cores (default)")
    parser.add_argument("--device", default="auto", help="auto = a GPU if there is one, cpu, cuda (default auto)")
    parser.add_argument("--step-images-per-second", type=float, help="what training consumes, for the ratio")
    parser.add_argument("--rss", action="store_true", help="watch the memory instead")
    arguments = parser.parse_args()
    is_auto = arguments.device == "auto"
    arguments.device = pick_device("cuda" if is_auto and torch.cuda.is_available() else arguments.device)
    if is_auto and arguments.device.type != "cuda":
        arguments.device = None
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rss:
            arguments.crop = min(arguments.crop, 96)
            paths = write_jpegs(Path(folder), RSS_FILES, (160, 120))
            growth = watch_memory(list_images((paths * (RSS_IMAGES // RSS_FILES))[:RSS_IMAGES]), arguments)
            print(f"{growth:+.1f} MiB from step {RSS_WARM_UP} to step {RSS_STEPS}, list of {RSS_IMAGES:,} images")
            if growth > RSS_LIMIT_MIB:
                raise SystemExit(f"memory grew by more than {RSS_LIMIT_MIB:.0f} MiB")
            return
        if arguments.data is None:
            paths = write_jpegs(Path(folder), arguments.images, (500, 375))
        else:
            paths = find_images([arguments.data])[: arguments.images]
        images = list_images(paths)
        where = "generated" if arguments.data is None else str(arguments.data)
        print(
            f"{len(images)} images ({where}), crops of {arguments.crop} px, batches of {arguments.batch}, "
            f"{resolve_workers(arguments.workers)} workers, {os.cpu_count()} cores"
        )
        print(f"{'images/s':<10}{'decoded':>10}{'cached':>10}")
        for on_device in (False, True) if arguments.device is not None else (False,):
            rates = [measure(images, arguments, cached=cached, device=on_device) for cached in (False, True)]
            name = str(arguments.device) if on_device else "workers"
            print(f"{name:<10}" + "".join(f"{rate:10.0f}" for rate in rates), flush=True)
    if arguments.step_images_per_second:
        decoded, cached = (rate / arguments.step_images_per_second for rate in rates)
        print(f"decoded {decoded:.1f}x, cached {cached:.1f}x")


if __name__ == "__main__":
    main()
