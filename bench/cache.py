"""Speed of training from the feature cache, over training from pixels on the same views.

    python bench/cache.py --weights CLIP --text EMBEDDINGS [--crop 384] [--phase refined]

The script writes a small data set of generated photographs (500 x 375 pixels), makes its feature cache, and takes whole
training steps on both sides in turn, input included: reading, decoded images from memory, transfer, labels, losses,
backward, optimizer. Both sides start from the same weights and see the same whole images, plain or mirrored. The rows
are the phases. The last line is the ratio of the medians of the last phase, such as `5.1x`; with `--phase all` this is
the refined phase. Here the rows of the cache come from the system's memory; a cache larger than that waits for the
disk.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image

from afa.config import Config, load_config
from afa.data.dataset import TaggedImages
from afa.data.loader import train_batches
from afa.data.pixel_cache import PixelCache
from afa.model.families import TOKEN_SIZES
from afa.runs.network import build_network
from afa.runtime import pick_device
from afa.training.engine import TrainingEngine
from afa.training.feature_cache import FeatureReader, prepare_features
from afa.training.feature_store import format_gib
from afa.types import Batch

STEPS: Final = {"initial": 0, "refined": 20_000}
"""First step of each phase."""

CLASSES: Final = ("bird", "cat", "cow", "dog", "sheep")


def write_images(folder: Path, count: int) -> TaggedImages:
    """Smooth pictures with some grain, one to three tags each."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.jpg" for index in range(count)]
    tags = np.zeros((count, len(CLASSES)), dtype=bool)
    for index, path in enumerate(paths):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-20, 21, (375, 500, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=85)
        tags[index, rng.permutation(len(CLASSES))[: 1 + index % 3]] = True
    return TaggedImages(classes=CLASSES, names=tuple(path.stem for path in paths), paths=paths, tags=tags)


def bench_config(arguments: argparse.Namespace) -> Config:
    return load_config(
        None,
        {
            # On a CPU, a worker that reads ahead for one side would slow down the step of the other side.
            "data.workers": -1 if arguments.device.type == "cuda" else 0,
            "model.backbone": arguments.backbone,
            "model.weights": arguments.weights,
            "model.text_embeddings": arguments.text,
            "model.freeze_blocks": TOKEN_SIZES[arguments.backbone].depth,
            "model.feature_levels": arguments.levels,
            "augment.crop_size": arguments.crop,
            "schedule.max_steps": 30_000,
            "schedule.batch_size": arguments.batch,
            "schedule.refined_steps": STEPS["refined"] - 1,
            "train.precision": arguments.precision,
            "train.feature_cache_gib": 1000.0,
        },
        preset="frozen",
    )


class Side:
    """Training with its own network, from the cache or from pixels."""

    def __init__(self, engine: TrainingEngine, images: TaggedImages, cache: PixelCache) -> None:
        self.engine = engine
        self.images = images
        self.cache = cache

    def batches(self, start: int) -> Iterator[Batch]:
        config, device = self.engine.config, self.engine.device
        return train_batches(
            self.images,
            config,
            start=start,
            cache=self.cache,
            features=self.engine.features,
            device=device if device.type == "cuda" else None,
        )

    def steps(self, start: int) -> Iterator[float]:
        """Take steps of a phase; yields the seconds of each."""
        batches = self.batches(start)
        for step in itertools.count(start):
            began = time.perf_counter()
            self.engine.take_step(step, next(batches))
            if self.engine.device.type == "cuda":
                torch.cuda.synchronize(self.engine.device)
            yield time.perf_counter() - began


def measure(sides: list[Side], start: int, *, rounds: int) -> list[float]:
    """Median seconds of a step of each side, taken in turn."""
    streams = [side.steps(start) for side in sides]
    warm_up = 4 if sides[0].engine.records else 1
    seconds = [[next(stream) for stream in streams] for _ in range(warm_up + rounds)][warm_up:]
    return [statistics.median(each) for each in zip(*seconds, strict=True)]


def make_sides(
    arguments: argparse.Namespace, config: Config, images: TaggedImages, folder: Path
) -> tuple[list[Side], FeatureReader]:
    """The side that starts from pixels, and the one that starts from the cache."""
    device = arguments.device
    torch.manual_seed(0)
    network = build_network(config.model, len(CLASSES), words=[(name,) for name in CLASSES]).to(device).train()
    cache = PixelCache(len(images), 2**30)
    reader = prepare_features(network, images, config, folder, cache=cache)
    engines = [TrainingEngine(each, config, device=device) for each in (network, copy.deepcopy(network))]
    engines[1].features = reader
    return [Side(engine, images, cache) for engine in engines], reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="clip_b16", help="default clip_b16")
    parser.add_argument("--weights", default="", help="folder of the encoder's weights (default: random ones)")
    parser.add_argument("--text", default="", help="folder of text embeddings (default: the encoder's text encoder)")
    parser.add_argument("--levels", type=int, default=4, help="feature levels (default 4)")
    parser.add_argument("--crop", type=int, default=384, help="side of the crop, pixels (default 384)")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default 8)")
    parser.add_argument("--images", type=int, default=16, help="images of the data set (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side and phase (default 5)")
    parser.add_argument("--phase", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    config = bench_config(arguments)
    ratio = 0.0
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), arguments.images)
        sides, reader = make_sides(arguments, config, images, Path(folder))
        print(
            f"{arguments.backbone}, {arguments.crop} px, batches of "
            f"{arguments.batch}, {arguments.precision}, {arguments.device.type} ({platform.processor() or 'CPU'}), "
            f"{torch.get_num_threads()} threads; {format_gib(reader.store.num_bytes // len(images) * 1000)} of cache "
            "for 1,000 images"
        )
        print(f"{'images/s':<10}{'pixels':>10}{'cache':>10}{'ratio':>10}")
        for name in STEPS if arguments.phase == "all" else [arguments.phase]:
            seconds = measure(sides, STEPS[name], rounds=arguments.rounds)
            rates = [arguments.batch / each for each in seconds]
            ratio = rates[1] / rates[0]
            print(f"{name:<10}{rates[0]:10.2f}{rates[1]:10.2f}{ratio:9.1f}x", flush=True)
    print(f"{ratio:.1f}x")


if __name__ == "__main__":
    main()
