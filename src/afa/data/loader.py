"""Training batches as a function of the step: the same on any number of workers, processes and restarts.

Which images a step takes, and how each is cropped, is up to `afa.data.order`.

Workers are threads: decoding and resampling are Pillow's work, which runs beside Python, and threads share the cache
of decoded images as it is. On a GPU the workers only decode; the GPU scales, flips and crops.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.config import Config
from afa.data.dataset import TaggedImages
from afa.data.order import Order, step_plan
from afa.data.pixel_cache import PixelCache
from afa.data.transforms import CropPlan, fit_whole, pack_plans, resample_batch, resample_image
from afa.errors import AfaError
from afa.runtime import ALONE, Processes, read_ahead
from afa.types import Batch

_PADDING: Final = 64  # Source pixels are padded to multiples of this, so that few different shapes reach the device.

_T = TypeVar("_T")


class Features(Protocol):
    """What a batch takes of the feature cache."""

    patch: int
    """Views of the images have sides that are multiples of this, pixels."""

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, ...]:
        """(images, which of them are mirrored) -> what the cache has of them, arrays of as many rows."""


def resolve_workers(workers: int, *, processes: int = 1) -> int:
    """Turn the setting `data.workers` into a number of worker threads.

    Args:
        workers: The number itself, or -1: one for each core that training leaves free, at least 1 and at most 8.
        processes: Training processes that share this machine's cores: each gets that number. 0 = it decodes itself.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1))


def train_batches(
    images: TaggedImages,
    config: Config,
    *,
    start: int = 0,
    processes: Processes = ALONE,
    cache: PixelCache | None = None,
    features: Features | None = None,
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Yield the training batches of the steps from `start` to the last one.

    Args:
        images: Images with tags.
        config: Augmentation, steps, images per step, seed, and `data.workers`, by which the batches do not differ.
        start: First step, from 0.
        processes: Processes that train together; this one gets its contiguous share of each global batch.
        cache: Where decoded images stay, for `images` alone; None decodes each time.
        features: Says what the batches' `frozen` hold, in the workers; None leaves it empty.
        device: Where to scale, flip and crop, one batch ahead of the one in use; None does it in the workers. The
            crops are the same, the pixels as equal as `resample_batch` says.

    Returns:
        Iterator of this process's shares of the batches, on the CPU; with a device, image and valid box are there, and
        tags, which a training step counts before it copies them, still on the CPU. Closing it ends its threads.

    Raises:
        AfaError: `schedule.batch_size` is not a multiple of the number of processes; during iteration, an image cannot
            be read.
    """
    batch_size, count = config.schedule.batch_size, processes.count
    if batch_size % count:
        raise AfaError(f"schedule.batch_size is {batch_size}; use a multiple of the number of processes ({count})")
    share = slice(processes.rank * batch_size // count, (processes.rank + 1) * batch_size // count)
    pinned = device is not None and device.type == "cuda"
    source = _Source(images, config, share, Order(images, config), cache, features, pinned)
    steps = range(start, config.schedule.max_steps)
    workers = resolve_workers(config.data.workers, processes=count)
    if device is None:
        return _in_order(source.batch, steps, workers=workers)
    return _resampled(_in_order(source.decoded, steps, workers=workers), device, config.augment.crop_size)


def whole_views(
    images: TaggedImages,
    config: Config,
    multiple: int,
    indices: Sequence[int],
    *,
    batch_size: int,
    processes: Processes = ALONE,
    cache: PixelCache | None = None,
) -> Iterator[list[Tensor]]:
    """Yield lists of images as the feature cache sees them, (3, H, W) uint8, unflipped.

    Args:
        images: Images; an `AfaError` comes during iteration if one cannot be read.
        config: Crop size and `data.workers`.
        multiple: Sides are multiples of this, pixels.
        indices: Which images, in this order.
        batch_size: Images that come together; the last ones may be fewer.
        processes: Processes that share this machine's cores.
        cache: As for `train_batches`.
    """
    size = config.augment.crop_size

    def prepare(first: int) -> list[Tensor]:
        views = []
        for index in indices[first : first + batch_size]:
            pixels = _read(images, index, cache)
            plan = fit_whole(pixels.shape[:2], size, flip=False, multiple=multiple)
            canvas = np.zeros((3, plan.rows.end, plan.columns.end), dtype=np.uint8)
            resample_image(pixels, plan, canvas)
            views.append(torch.from_numpy(canvas))
        return views

    workers = resolve_workers(config.data.workers, processes=processes.count)
    return _in_order(prepare, range(0, len(indices), batch_size), workers=workers)


def _read(images: TaggedImages, index: int, cache: PixelCache | None) -> NDArray[np.uint8]:
    return images.image(index) if cache is None else cache.image(index, images.image)


@dataclass(frozen=True)
class _Source:
    """Step to batch, in any thread."""

    images: TaggedImages
    config: Config
    share: slice
    order: Order
    cache: PixelCache | None
    features: Features | None
    pinned: bool

    def batch(self, step: int) -> Batch:
        """The augmented batch. NumPy does what PyTorch could: each thread would get its own pool of PyTorch's."""
        pairs, size = self.order.pairs(step, self.share), self.config.augment.crop_size
        canvas = np.zeros((len(pairs), 3, size, size), dtype=np.uint8)
        plans = []
        for row, (place, index) in enumerate(pairs):
            pixels, plan = self._planned(step, place, index)
            resample_image(pixels, plan, canvas[row])
            plans.append(plan)
        return self._batch(pairs, plans, torch.from_numpy(canvas))

    def decoded(self, step: int) -> tuple[Batch, Tensor]:
        """The batch with (B, H, W, 3) pixels, no more of each image than its crop reads, and `pack_plans`."""
        pairs = self.order.pairs(step, self.share)
        windows, plans = [], []
        for place, index in pairs:
            pixels, plan = self._planned(step, place, index)
            (top, bottom), (left, right) = plan.rows.window, plan.columns.window
            windows.append(pixels[top:bottom, left:right])
            plans.append(plan)
        height, width = (-(-max(w.shape[axis] for w in windows) // _PADDING) * _PADDING for axis in (0, 1))
        padded = torch.empty((len(pairs), height, width, 3), dtype=torch.uint8, pin_memory=self.pinned)
        for row, window in zip(padded.numpy(), windows, strict=True):
            row[: window.shape[0], : window.shape[1]] = window
        batch, packed = self._batch(pairs, plans, padded), pack_plans(plans)
        return (batch.map(_pinned), packed.pin_memory()) if self.pinned else (batch, packed)

    def _planned(self, step: int, place: int, index: int) -> tuple[NDArray[np.uint8], CropPlan]:
        pixels = _read(self.images, index, self.cache)
        config = self.config
        multiple = self.features.patch if self.features else 1
        seed = config.train.seed
        return pixels, step_plan(pixels.shape[:2], config.augment, step=step, row=place, seed=seed, multiple=multiple)

    def _batch(self, pairs: list[tuple[int, int]], plans: list[CropPlan], image: Tensor) -> Batch:
        indices = [index for _, index in pairs]
        return Batch(
            image=image,
            tags=torch.from_numpy(np.stack([self.images.targets(index) for index in indices])),
            valid_box=torch.tensor([plan.valid_box for plan in plans]),
            names=tuple(self.images.names[index] for index in indices),
            frozen=self.features.read(indices, [plan.flip for plan in plans]) if self.features else (),
            num_negatives=int(self.order.negative[indices].sum()),
        )


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def _in_order(prepare: Callable[[int], _T], steps: range, *, workers: int) -> Generator[_T, None, None]:
    """Yield `prepare` of each step, in order. Workers prepare different steps at the same time, two each ahead."""
    if workers == 0:
        yield from map(prepare, steps)
        return
    with contextlib.closing(read_ahead(prepare, steps, workers=workers, ahead=2 * workers)) as readings:
        for _, reading in readings:
            yield reading.result()


def _resampled(
    decoded: Generator[tuple[Batch, Tensor], None, None], device: torch.device, crop_size: int
) -> Generator[Batch, None, None]:
    """Copy batches to the device and augment them there, each while the one before is being used."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def launch(batch: Batch, plans: Tensor) -> tuple[Batch, torch.cuda.Event | None]:
        with torch.cuda.stream(side):  # None changes nothing
            moved = replace(batch.to(device, non_blocking=True), tags=batch.tags)
            pixels = moved.image.permute(0, 3, 1, 2)  # (B, 3, H, W)
            image = resample_batch(pixels, plans.to(device, non_blocking=True), crop_size)  # (B, 3, S, S)
            return replace(moved, image=image), side.record_event() if side else None

    def hand_over(batch: Batch, done: torch.cuda.Event | None) -> Batch:
        if done is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for tensor in (batch.image, batch.valid_box, *batch.frozen):
                tensor.record_stream(current)  # otherwise its memory could be reused while this stream still reads it
        return batch

    with contextlib.closing(decoded):
        previous = None
        for batch in decoded:
            launched = launch(*batch)
            if previous is not None:
                yield hand_over(*previous)
            previous = launched
        if previous is not None:
            yield hand_over(*previous)
