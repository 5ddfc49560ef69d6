"""Training batches as a function of the step: the same on any number of workers, processes and restarts.

Which images a step takes, and how each is augmented, follows from the seed, the step and the position in
the global batch alone; so a resumed run continues exactly, and N processes see what one would.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from afa.config import AugmentConfig
from afa.data.transforms import augment as augment_image
from afa.data.voc import TaggedImages
from afa.errors import AfaError
from afa.types import Batch

_ORDER, _AUGMENT = 0, 1  # Spawn keys: the two uses of the seed never share a random stream.


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


def resolve_workers(workers: int, *, processes: int = 1) -> int:
    """Turn the setting `data.workers` into a number of worker processes.

    Args:
        workers: The number itself, or -1: one for each core that training leaves free, at most 8.
        processes: Training processes that share this machine's cores.

    Returns:
        Worker processes for each training process; 0 = decode in the training process.
    """
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // processes - 1))


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
    pin_memory: bool = False,
) -> Iterator[Batch]:
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
        workers: Processes that prepare batches ahead; 0 prepares them here. The batches are the same.
        pin_memory: Hand the tensors over in page-locked memory, for fast transfers to a GPU.

    Returns:
        Iterator of CPU batches with batch_size / world_size images each.

    Raises:
        AfaError: `batch_size` is not a multiple of `world_size`; during iteration, an image cannot be read.
    """
    if batch_size % world_size:
        raise AfaError(f"schedule.batch_size is {batch_size}; use a multiple of the number of processes ({world_size})")
    share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
    batches = _Batches(images, augment, batch_size=batch_size, seed=seed, share=share)
    return _iterate(batches, range(start_step, max_steps), workers=workers, pin_memory=pin_memory)


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = _generator(seed, _ORDER, epoch).permutation(num_images)
    order.flags.writeable = False
    return order


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class _Batches(Dataset[Batch | AfaError]):
    """Step to batch. A user's mistake is returned, not raised: workers would bury it in a traceback."""

    images: TaggedImages
    augment: AugmentConfig
    batch_size: int
    seed: int
    share: slice

    def __getitem__(self, step: int) -> Batch | AfaError:
        try:
            return self._batch(step)
        except AfaError as error:
            return error

    def _batch(self, step: int) -> Batch:
        indices = step_indices(len(self.images), step=step, batch_size=self.batch_size, seed=self.seed)[self.share]
        crops = [
            augment_image(self.images.image(index), self.augment, _generator(self.seed, _AUGMENT, step, position))
            for position, index in enumerate(indices.tolist(), start=self.share.start)
        ]
        return Batch(
            image=torch.from_numpy(np.stack([canvas for canvas, _ in crops])).permute(0, 3, 1, 2).contiguous(),
            tags=torch.from_numpy(np.stack([self.images.tags(index) for index in indices])),
            valid_box=torch.tensor([box for _, box in crops], dtype=torch.int64),
            names=tuple(self.images.names[index] for index in indices),
        )


def _iterate(batches: _Batches, steps: range, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    # One sample of the loader is a whole batch: workers prepare different steps at the same time.
    with warnings.catch_warnings():
        # Forking beside torch's idle threads is what its loader does on Linux; workers run single-threaded.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run differs
        )
        prepared = iter(loader)
    try:
        for batch in prepared:
            if isinstance(batch, AfaError):
                raise batch
            yield batch
    finally:
        del prepared  # ends the workers now; an error's traceback would keep this frame, and them, alive


def _as_is(batch: Any) -> Any:
    return batch
