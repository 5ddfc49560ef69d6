"""Training batches as a function of the step: the same on any number of workers, processes and restarts.

Which images a step takes, and how each is augmented, follows from the seed, the step and the position in
the global batch alone; so a resumed run continues exactly, and N processes see what one would.

Workers are threads: decoding and resampling are Pillow's work, which runs beside Python, and threads share the cache
of decoded images as it is. On a GPU the workers only decode; the GPU scales, flips and crops.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.config import AugmentConfig
from afa.data.pixel_cache import PixelCache
from afa.data.transforms import CropPlan, draw_crop, fit_whole, pack_plans, resample_batch, resample_image
from afa.data.voc import TaggedImages
from afa.errors import AfaError
from afa.types import Batch

_ORDER, _AUGMENT = 0, 1  # Spawn keys: the two uses of the seed never share a random stream.
_PADDING: Final = 64  # Source pixels are padded to multiples of this, so that few different shapes reach the device.

_T = TypeVar("_T")

FeatureFunction = Callable[[int, Sequence[int], Sequence[bool]], tuple[Tensor, ...]]
"""(step, images, which of them are mirrored) -> what the feature cache has of them, arrays of as many rows."""


def step_indices(num_images: int, *, step: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """Images of one step: consecutive pieces of one seeded permutation after another.

    Each epoch visits every image once; a batch may end one epoch and begin the next.

    Args:
        num_images: Number of images, at least 1.
        step: Step, from 0.
        batch_size: Images per step, over all processes.
        seed: Seed of the order.

    Returns:
        (batch_size,) int64 indices in 0..num_images-1: the global batch of that step.

    >>> two_steps = [step_indices(6, step=step, batch_size=3, seed=0) for step in (0, 1)]
    >>> sorted(np.concatenate(two_steps).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_images)
    indices = [_permutation(num_images, seed, e)[p] for e, p in zip(epoch.tolist(), place.tolist(), strict=True)]
    return np.array(indices, dtype=np.int64)


def step_plan(size: tuple[int, int], augment: AugmentConfig, *, step: int, row: int, seed: int) -> CropPlan:
    """Crop of one image of a step.

    Args:
        size: Height and width of the image, pixels.
        augment: Augmentation settings.
        step: Step, from 0.
        row: Place of the image in the global batch.
        seed: Seed of the augmentation.
    """
    return draw_crop(size, augment, _generator(seed, _AUGMENT, step, row))


def resolve_workers(workers: int, *, processes: int = 1) -> int:
    """Turn the setting `data.workers` into a number of worker threads.

    Args:
        workers: The number itself, or -1: one for each core that training leaves free, at least 1 and at most 8.
        processes: Training processes that share this machine's cores.

    Returns:
        Worker threads for each training process; 0 = decode in the training thread.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1))


def train_batches(
    images: TaggedImages,
    *,
    augment: AugmentConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    max_steps: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    cache: PixelCache | None = None,
    features: FeatureFunction | None = None,
    device: torch.device | None = None,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Yield the training batches of steps `start_step` to `max_steps` - 1.

    Args:
        images: Images with tags.
        augment: Augmentation settings; the crop size is the batch's height and width.
        batch_size: Images per step, over all processes.
        seed: Seed of the order and of the augmentation.
        start_step: First step, from 0.
        max_steps: Step to end before.
        rank: This process, 0..world_size-1: it gets its contiguous share of each global batch.
        world_size: Number of training processes.
        workers: Threads that prepare batches ahead; 0 prepares them here. The batches are the same.
        cache: Where decoded images stay, for `images` alone; None decodes each time.
        features: Reads what the batches' `frozen` hold, in the workers; None leaves it empty.
        device: Where to scale, flip and crop, one batch ahead of the one in use; None does it in the workers. The
            crops are the same, the pixels as equal as `resample_batch` says.
        pin_memory: Hand CPU tensors over in page-locked memory, for fast transfers to a GPU.

    Returns:
        Iterator of batches with batch_size / world_size images each, on the CPU; with a device, image and valid box
        are there, and tags, which a training step counts before it copies them, still on the CPU. Closing it ends its
        threads.

    Raises:
        AfaError: `batch_size` is not a multiple of `world_size`; during iteration, an image cannot be read.
    """
    if batch_size % world_size:
        raise AfaError(f"schedule.batch_size is {batch_size}; use a multiple of the number of processes ({world_size})")
    share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
    source = _Source(
        images,
        augment,
        batch_size,
        seed,
        share,
        cache,
        features,
        pin_memory or (device is not None and device.type == "cuda"),
    )
    steps = range(start_step, max_steps)
    if device is None:
        return _in_order(source.batch, steps, workers=workers)
    return _resampled(_in_order(source.decoded, steps, workers=workers), device, augment.crop_size)


def whole_views(
    images: TaggedImages,
    *,
    crop_size: int,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    cache: PixelCache | None = None,
) -> Iterator[Tensor]:
    """Yield every image as `augment.whole_images` shows it, unflipped, in the order of the list.

    Args:
        images: Images.
        crop_size: S, side of the canvas, pixels.
        batch_size: Images that come together; the last ones may be fewer.
        start: First image.
        workers: As for `train_batches`.
        cache: As for `train_batches`.

    Returns:
        Iterator of (B, 3, S, S) uint8.

    Raises:
        AfaError: During iteration, an image cannot be read.
    """

    def prepare(first: int) -> Tensor:
        indices = range(first, min(first + batch_size, len(images)))
        canvas = np.zeros((len(indices), 3, crop_size, crop_size), dtype=np.uint8)
        for row, index in enumerate(indices):
            pixels = images.image(index) if cache is None else cache.image(index, images.image)
            resample_image(pixels, fit_whole(pixels.shape[:2], crop_size, flip=False), canvas[row])
        return torch.from_numpy(canvas)

    return _in_order(prepare, range(start, len(images), batch_size), workers=workers)


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = _generator(seed, _ORDER, epoch).permutation(num_images)
    order.flags.writeable = False
    return order


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class _Decoded:
    """A batch before its augmentation: `pixels` (B, H, W, 3), `plans` as `resample_batch` takes them."""

    pixels: Tensor
    plans: Tensor
    tags: Tensor
    valid_box: Tensor
    names: tuple[str, ...]
    frozen: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Source:
    """Step to batch, in any thread."""

    images: TaggedImages
    augment: AugmentConfig
    batch_size: int
    seed: int
    share: slice
    cache: PixelCache | None
    features: FeatureFunction | None
    pin_memory: bool

    def batch(self, step: int) -> Batch:
        """The augmented batch. NumPy does what PyTorch could: each thread would get its own pool of PyTorch's."""
        indices, size = self._indices(step), self.augment.crop_size
        canvas = np.zeros((len(indices), 3, size, size), dtype=np.uint8)
        plans = []
        for row, index in enumerate(indices):
            pixels = self._pixels(index)
            plan = self._plan(pixels.shape[:2], step, row)
            resample_image(pixels, plan, canvas[row])
            plans.append(plan)
        batch = Batch(
            image=torch.from_numpy(canvas),
            tags=self._tags(indices),
            valid_box=torch.tensor([plan.valid_box for plan in plans]),
            names=self._names(indices),
            frozen=self._frozen(step, indices, plans),
        )
        return batch.pin_memory() if self.pin_memory else batch

    def decoded(self, step: int) -> _Decoded:
        """The batch's pixels, no more of each image than its crop reads, and its plans."""
        indices = self._indices(step)
        windows, plans = [], []
        for row, index in enumerate(indices):
            pixels = self._pixels(index)
            plan = self._plan(pixels.shape[:2], step, row)
            (top, bottom), (left, right) = plan.rows.window, plan.columns.window
            windows.append(pixels[top:bottom, left:right])
            plans.append(plan)
        height, width = (-(-max(w.shape[axis] for w in windows) // _PADDING) * _PADDING for axis in (0, 1))
        padded = torch.empty((len(indices), height, width, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        for place, window in zip(padded.numpy(), windows, strict=True):
            place[: window.shape[0], : window.shape[1]] = window
        boxes = torch.tensor([plan.valid_box for plan in plans])
        rest = pack_plans(plans), self._tags(indices), boxes, *self._frozen(step, indices, plans)
        packed, tags, boxes, *frozen = (tensor.pin_memory() for tensor in rest) if self.pin_memory else rest
        return _Decoded(padded, packed, tags, boxes, self._names(indices), tuple(frozen))

    def _indices(self, step: int) -> list[int]:
        indices = step_indices(len(self.images), step=step, batch_size=self.batch_size, seed=self.seed)[self.share]
        return [int(index) for index in indices]

    def _plan(self, size: tuple[int, int], step: int, row: int) -> CropPlan:
        return step_plan(size, self.augment, step=step, row=self.share.start + row, seed=self.seed)

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        return self.images.image(index) if self.cache is None else self.cache.image(index, self.images.image)

    def _frozen(self, step: int, indices: list[int], plans: list[CropPlan]) -> tuple[Tensor, ...]:
        return () if self.features is None else self.features(step, indices, [plan.flip for plan in plans])

    def _tags(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.images.tags(index) for index in indices]))

    def _names(self, indices: list[int]) -> tuple[str, ...]:
        return tuple(self.images.names[index] for index in indices)


def _in_order(prepare: Callable[[int], _T], steps: range, *, workers: int) -> Generator[_T, None, None]:
    """Yield `prepare` of each step, in order. Workers prepare different steps at the same time, two each ahead."""
    if workers == 0:
        yield from map(prepare, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="afa-train")
    ahead: deque[Future[_T]] = deque()
    try:
        for step in steps:
            ahead.append(pool.submit(prepare, step))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _resampled(
    decoded: Generator[_Decoded, None, None], device: torch.device, crop_size: int
) -> Generator[Batch, None, None]:
    """Copy batches to the device and augment them there, each while the one before is being used."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def launch(batch: _Decoded) -> tuple[Batch, torch.cuda.Event | None]:
        with torch.cuda.stream(side):  # None changes nothing
            pixels = batch.pixels.to(device, non_blocking=True)
            plans = batch.plans.to(device, non_blocking=True)
            image = resample_batch(pixels.permute(0, 3, 1, 2), plans, crop_size)
            valid_box = batch.valid_box.to(device, non_blocking=True)
            frozen = tuple(part.to(device, non_blocking=True) for part in batch.frozen)
            moved = Batch(image, batch.tags, valid_box, names=batch.names, frozen=frozen)
            return moved, side.record_event() if side else None

    def hand_over(batch: Batch, done: torch.cuda.Event | None) -> Batch:
        if done is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for tensor in (batch.image, batch.valid_box, *batch.frozen):
                tensor.record_stream(current)  # else its memory could be reused while this stream still reads it
        return batch

    with contextlib.closing(decoded):
        previous = None
        for batch in decoded:
            launched = launch(batch)
            if previous is not None:
                yield hand_over(*previous)
            previous = launched
        if previous is not None:
            yield hand_over(*previous)
