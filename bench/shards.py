"""Images from shards against images from a folder, and memory by the number of images.

    python bench/shards.py rates [--images 1500] [--threads 2] [--repeats 5] [--dir DIR]
    python bench/shards.py memory [--images 200000] [--dir DIR]
    python bench/shards.py simulate [--images 1000000000]

`rates` reads generated 500 x 375 JPEGs in random order, decoded and as bytes, from a folder and from archives of the
same files, in turn, and prints images a second and the ratio of the medians. `memory` makes archives of tiny images,
opens them, trains a tiny network on them for an epoch of batches without the network's work, and prints the largest
resident memory of the whole process at each point. `simulate` makes the arrays that training keeps of so many images
as far as memory allows, times an order within windows, and prints what they take.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.check.scale import INDEX_BYTES, ORDER_BYTES, SHARD_BYTES
from afa.config import DataConfig, load_config
from afa.data.dataset import TaggedImages, Windows
from afa.data.loader import train_batches
from afa.data.open import open_data
from afa.data.order import visits
from afa.runtime import read_ahead

EACH = 10_000  # images of a shard


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG with smooth colors, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shards(folder: Path, images: Iterator[tuple[str, bytes, str]], each: int) -> None:
    """Archives of image and tag."""
    folder.mkdir(parents=True, exist_ok=True)
    tar: tarfile.TarFile | None = None
    for number, (key, content, tag) in enumerate(images):
        if number % each == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{number // each:05d}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        assert tar is not None
        for suffix, data in (("jpg", content), ("cls", tag.encode())):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if tar is not None:
        tar.close()


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rate(images: TaggedImages, read: Callable[[int], object], threads: int) -> float:
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    began = time.perf_counter()
    for _, reading in read_ahead(read, order, workers=threads):
        reading.result()
    return len(order) / (time.perf_counter() - began)


def rates(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.dir)
    count, each = arguments.images, 500
    for number in range(count):
        path = folder / "files" / f"class{number % 4}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, (500, 375)))
    listed = sorted((folder / "files").rglob("*.jpg"))
    write_shards(folder / "shards", ((p.stem, p.read_bytes(), p.parent.name) for p in listed), each)
    sets = {kind: open_data(DataConfig(root=str(folder / kind), val_list="")).train() for kind in ("files", "shards")}
    for what in ("decoded", "bytes"):
        found: dict[str, list[float]] = {kind: [] for kind in sets}
        for _ in range(arguments.repeats + 1):  # the first one warms up
            for kind, images in sets.items():
                read = images.image if what == "decoded" else lambda i, images=images: images.image_path(i).read_bytes()
                found[kind].append(rate(images, read, arguments.threads))
        medians = {kind: statistics.median(values[1:]) for kind, values in found.items()}
        words = ", ".join(
            f"{kind} {medians[kind]:,.0f} ({min(v[1:]):,.0f} to {max(v[1:]):,.0f})" for kind, v in found.items()
        )
        print(f"{what}: images/s {words}; ratio {medians['shards'] / medians['files']:.2f}x")


def memory(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.dir) / "tiny"
    contents = [picture(seed, (32, 32)) for seed in range(64)]
    if not folder.is_dir():
        made = ((f"{n:09d}", contents[n % 64], f"class{n % 4}") for n in range(arguments.images))
        write_shards(folder, made, EACH)
    print(f"{peak():.0f} MiB before anything is opened")
    began = time.perf_counter()
    keys: dict[str, Any] = {
        "data.root": str(folder),
        "data.val_list": "",
        "augment.crop_size": 32,
        "schedule.batch_size": 100,
    }
    keys |= {"schedule.max_steps": -(-arguments.images // 100), "data.cache_gib": 0.0, "data.workers": 1}
    config = load_config(None, keys | {"schedule.cls_steps": 1, "schedule.refined_steps": 2}, preset="demo")
    images = open_data(config.data).train()
    print(f"{peak():.0f} MiB with {len(images):,} images open, after {time.perf_counter() - began:.0f} s")
    began, seen = time.perf_counter(), 0
    for batch in train_batches(images, config):
        seen += len(batch.names)
        if seen >= len(images):
            break
    print(f"{peak():.0f} MiB after an epoch; {seen / (time.perf_counter() - began):,.0f} images/s of 32 x 32 pixels")


def simulate(arguments: argparse.Namespace) -> None:
    count = arguments.images
    bytes_of = 100_000  # of a photograph
    num_shards = -(-count * bytes_of // SHARD_BYTES)
    print(f"{count:,} images of {bytes_of:,} bytes: {num_shards:,} shards of 1 GiB")
    print(f"index {count * INDEX_BYTES / 2**30:.1f} GiB, orders {count * ORDER_BYTES / 2**30:.1f} GiB")
    made = min(count, 20_000_000)
    each = max(1, SHARD_BYTES // bytes_of)
    shard: NDArray[np.int32] = (np.arange(made) // each).astype(np.int32)
    windows = Windows(shard, 12, int(shard[-1]) + 1)
    began = time.perf_counter()
    first = visits(made, range(64), seed=0, windows=windows)
    seconds = time.perf_counter() - began
    print(f"order of {made:,} images in windows of 12 shards: {seconds:.1f} s an epoch, {peak():.0f} MiB in all; "
          f"{count:,} in proportion: {seconds * count / made:,.0f} s, {peak() * count / made / 1024:,.0f} GiB; "
          f"shards of the first 64 images: {len(set(shard[first].tolist()))}")  # fmt: skip
    epochs = [
        len(set(shard[visits(made, range(s, s + each * 12), seed=0, windows=windows)].tolist())) for s in (0, each * 24)
    ]
    print(f"shards that a window of {each * 12:,} images reads: {epochs}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "memory", "simulate"))
    parser.add_argument("--images", type=int, help="how many images")
    parser.add_argument("--threads", type=int, default=2, help="threads that read (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default 5)")
    parser.add_argument("--dir", help="where the files are made (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    defaults = {"rates": 1500, "memory": 200_000, "simulate": 10**9}
    arguments.images = arguments.images or defaults[arguments.what]
    with TemporaryDirectory() as temporary:
        arguments.dir = arguments.dir or temporary
        {"rates": rates, "memory": memory, "simulate": simulate}[arguments.what](arguments)


if __name__ == "__main__":
    main()
