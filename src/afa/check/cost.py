"""What training would cost on this machine, from a few real steps of each phase with random weights."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from afa.config import Config
from afa.data.pixel_cache import free_memory, resolve_cache
from afa.data.transforms import whole_size
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.runs.auto import Pace
from afa.runs.network import build_network
from afa.runtime import autocast
from afa.training.engine import TrainingEngine
from afa.training.schedule import phase
from afa.types import Batch

_PROBE_SECONDS: Final = 10.0  # if a step of the whole batch would take longer, it is estimated from smaller steps
_TIMED_STEPS: Final = 3
_TIMED_SECONDS: Final = 3.0  # on a CPU no further step is timed after this
_READING: Final = 1.5
"""On a CPU, images and features are read by the cores that compute: steps of a whole training take longer by this."""

_GPU_WARMUP: Final = 3  # the third step of a kind is recorded, later ones are replayed


@dataclass(frozen=True)
class PhaseCost:
    """Cost of a phase.

    Attributes:
        name: `cls`, `initial` or `refined`.
        steps: How many steps it has.
        step_seconds: About how long one takes.
    """

    name: str
    steps: int
    step_seconds: float


@dataclass(frozen=True)
class TrainingCost:
    """Cost of training, without decoding, evaluation and start-up.

    Attributes:
        device: Where it was measured.
        phases: Its phases, those without steps left out.
        memory: About the most bytes that it takes, of the GPU's memory or of this process's; 0 where not known.
        batch_size: Images in a step.
        measured_batch: Images in the steps that were timed; with fewer than the batch has, the rest is in proportion.
        cache_seconds: About how long the feature cache takes; 0 without one.
    """

    device: str
    phases: list[PhaseCost]
    memory: int
    batch_size: int
    measured_batch: int
    cache_seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(phase.steps for phase in self.phases)

    @property
    def seconds(self) -> float:
        """About how long the steps take, and the feature cache before them."""
        return self.cache_seconds + sum(phase.steps * phase.step_seconds for phase in self.phases)


@dataclass(frozen=True)
class CacheCost:
    """Memory for decoded images.

    Attributes:
        needed: Bytes of all training images.
        given: Bytes that the cache may take, by `data.cache_gib`.
        free: Bytes that are free now; 0 where not known.
    """

    needed: int
    given: int
    free: int


def phase_steps(config: Config) -> list[tuple[int, int]]:
    """First step and number of steps of each phase of a training that has steps.

    >>> phase_steps(Config())
    [(0, 2001), (2001, 4000), (6001, 13999)]
    """
    schedule = config.schedule
    bounds = [0, schedule.cls_steps, schedule.refined_steps + 1, schedule.max_steps]
    bounds = [min(bound, schedule.max_steps) for bound in bounds]
    return [(start, end - start) for start, end in pairwise(bounds) if end > start]


def measure_cost(config: Config, tags: NDArray[np.bool_], *, device: torch.device) -> TrainingCost:
    """Take a few steps of each phase with random weights and pixels, of images with as many tags as (N, C) `tags` have.

    If a step would take long, as on a CPU, it times steps of two images and scales the time up to the batch.

    Raises:
        AfaError: It does not fit into memory; the network cannot be built.
    """
    batch_size = config.schedule.batch_size
    spread = np.linspace(0, len(tags) - 1, max(batch_size, 2)).astype(np.int64)
    chosen = torch.from_numpy(tags[spread].astype(np.float32))
    settings = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False))
    starts = phase_steps(config)
    try:
        network = _random_network(config, tags.shape[1], device)
        engine = TrainingEngine(network, settings, device=device)

        cache_seconds = len(tags) * _time_encoding(network, config, device) if config.train.feature_cache else 0.0

        def run(size: int) -> list[float]:
            batch = _synthetic_batch(chosen[:size], config, network)
            return [_time_steps(engine, step, batch) for step, _ in starts]

        measured = batch_size
        if device.type == "cpu":
            fixed = _memory("VmRSS") + 3 * sum(4 * weight.numel() for weight in engine.parameters)
            measured = min(2, batch_size)
            engine.take_step(0, _synthetic_batch(chosen[:measured], config, network))
            seconds = run(measured)
            if max(seconds) * batch_size / measured <= _PROBE_SECONDS:
                seconds, measured = run(batch_size), batch_size
            share = batch_size / measured
            seconds = [each * share for each in seconds]
            # Weights, gradients and optimizer stay as they are; activations grow with the batch.
            peak = _memory("VmHWM")
            memory = max(peak, int(fixed + (peak - fixed) * share))
        else:
            seconds = run(batch_size)
            memory = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    except (MemoryError, RuntimeError) as error:
        # A step that is being recorded may fail in another way once memory has run out.
        is_memory = any(isinstance(e, torch.OutOfMemoryError | MemoryError) for e in (error, error.__context__))
        if not is_memory and "allocate memory" not in str(error):  # the words of PyTorch's allocator on a CPU
            raise
        raise AfaError(
            f"training does not fit into the memory of {_device_name(device)} with schedule.batch_size {batch_size} "
            f"and augment.crop_size {config.augment.crop_size}; lower one of them"
        ) from None
    phases = [
        PhaseCost(phase(start, config).name, steps, each) for (start, steps), each in zip(starts, seconds, strict=True)
    ]
    return TrainingCost(_device_name(device), phases, memory, batch_size, measured, cache_seconds)


def _random_network(config: Config, num_classes: int, device: torch.device) -> AfaNetwork:
    """A network to be trained by this process alone."""
    network = build_network(config.model, num_classes, pretrained=False).to(device).train()
    network.decoder.norm.alone = True
    return network


def measure_cache(config: Config, sizes: NDArray[np.int32], num_images: int) -> CacheCost:
    """Compare the decoded training images, of which some have the (n, 2) height and width, with the memory for them."""
    mean = float(np.prod(sizes, axis=1, dtype=np.int64).mean()) * 3
    return CacheCost(int(mean * num_images), resolve_cache(config.data.cache_gib), free_memory())


def measure_pace(config: Config, num_classes: int, device: torch.device) -> Pace:
    """Time the encoder and a training step from the feature cache, with random weights; `config` has the cache."""
    network = _random_network(config, num_classes, device)
    engine = TrainingEngine(network, config, device=device)
    tags = torch.eye(num_classes).repeat(config.schedule.batch_size, 1)[: config.schedule.batch_size]
    tags = torch.maximum(tags, tags.roll(1, dims=1))  # two tags an image
    image = _time_encoding(network, config, device)
    last = config.schedule.max_steps - 1
    batch = _synthetic_batch(tags, config, network)
    beside = _READING if device.type == "cpu" else 1.0
    return Pace(image, beside * _time_steps(engine, last, batch))


def _time_encoding(network: AfaNetwork, config: Config, device: torch.device) -> float:
    """Seconds for one image of the feature cache: the shortest of a few."""
    height, width = whole_size((3, 4), config.augment.crop_size, network.backbone.strides[-1])
    image = torch.zeros(1 if device.type == "cpu" else 32, 3, height, width, device=device)
    seconds = []
    for _ in range(_TIMED_STEPS):
        began = time.perf_counter()
        with autocast(device, config.train.precision):
            network.encode(image)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append((time.perf_counter() - began) / len(image))
    return min(seconds)


def _synthetic_batch(tags: torch.Tensor, config: Config, network: AfaNetwork) -> Batch:
    size, side = len(tags), config.augment.crop_size
    generator = torch.Generator().manual_seed(0)
    frozen: tuple[torch.Tensor, ...] = ()
    if config.train.feature_cache:
        grid = side // network.backbone.strides[-1]
        channels = (*network.backbone.channels, network.num_classes)
        frozen = tuple(torch.rand(size, each, grid, grid, generator=generator).half() for each in channels)
    return Batch(
        image=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        tags=tags,
        valid_box=torch.tensor([[0, side, 0, side]]).repeat(size, 1),
        names=("",) * size,
        frozen=frozen,
    )


def _time_steps(engine: TrainingEngine, step: int, batch: Batch) -> float:
    """Seconds of a step: the shortest of a few, as other programs only slow it down."""
    on_cpu = engine.device.type == "cpu"
    seconds: list[float] = []
    while len(seconds) < _TIMED_STEPS + (0 if on_cpu else _GPU_WARMUP) and not (
        on_cpu and sum(seconds) > _TIMED_SECONDS
    ):
        began = time.perf_counter()
        engine.take_step(step, batch)
        if not on_cpu:
            torch.accelerator.synchronize(engine.device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[-_TIMED_STEPS:])


def _memory(field: str) -> int:
    """Bytes of a field in /proc/self/status; 0 where there is none (other than Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'' if threads == 1 else 's'}"
