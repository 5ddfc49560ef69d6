"""The training loop: evaluate, save, stop?, step, log. All input and output of a run happens here."""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa import __version__
from afa.config import SUPERVISION_NAMES, Config, DataConfig, config_to_keys
from afa.data.dataset import MaskedImages, TaggedImages
from afa.data.large import LargeImages
from afa.data.loader import train_batches
from afa.data.open import DataSet
from afa.data.pixel_cache import PixelCache, resolve_cache
from afa.errors import AfaError
from afa.evaluation.evaluate import evaluate, first_images
from afa.model.network import AfaNetwork
from afa.runs.network import build_network
from afa.runs.run import Run
from afa.runtime import ALONE, Processes, image_progress, interrupts, say, showing_progress, shows_progress
from afa.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from afa.training.engine import TrainingEngine
from afa.training.feature_cache import prepare_features
from afa.training.log import LOSSES, MetricsLog, affinity_warning, describe
from afa.training.schedule import learning_rate, phase
from afa.training.step import LossFunction, StepLosses, compute_losses
from afa.training.trackers import Trackers
from afa.types import Batch

_FREE_KEYS = frozenset(
    {"data.root", "data.workers", "data.cache_gib", "data.feature_dir", "evaluation.batch_size"}
    | {"train.device", "train.cuda_graphs", "train.compile", "train.log_steps", "train.eval_steps"}
    | {"train.eval_images", "train.feature_cache_gib", "train.save_steps", "train.example_images", "train.tensorboard"}
    | {"train.trackers", "train.shard"}
)
"""Keys that may differ between a run and its resumption, because they do not change the weights."""


ShowFunction = Callable[[AfaNetwork, MaskedImages | None], Path | None]
"""(network, what it is scored on) -> a sheet of examples, if one was drawn."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished run, in memory.

    Attributes:
        network: Trained network, in evaluation mode.
        classes: Names of the C foreground classes.
        seconds: Time spent in training steps, all resumptions added up.
        scored: What the run is scored on; None as of `open_validation`.
        log: What the run is told to, for what comes after; the caller closes it. None but in the main process.
    """

    network: AfaNetwork
    classes: tuple[str, ...]
    seconds: float
    scored: MaskedImages | None = None
    log: MetricsLog | None = None


@dataclass
class _Sums:
    """Sums of the losses since the last log line, on the device, so that logging does not wait for it."""

    count: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, losses: StepLosses) -> None:
        self.count += 1
        for name in ("total", "cls", "seg", "aff", "reg"):
            value = getattr(losses, name)
            if value is not None:
                self.values[name] = self.values.get(name, torch.zeros_like(value)) + value

    def means(self, processes: Processes) -> dict[str, float | None]:
        """Mean of each loss over steps; seg and aff are sums of the processes' shares, the others means over them."""
        result: dict[str, float | None] = {"loss": None, **dict.fromkeys(LOSSES)}
        for name, value in self.values.items():
            total = float(processes.total(value)) / self.count
            key = "loss" if name == "total" else f"{name}_loss"
            result[key] = total if name in ("seg", "aff") else total / processes.count
        return result


def train(
    config: Config,
    data: DataSet,
    run: Path,
    *,
    device: torch.device,
    processes: Processes = ALONE,
    resume: bool = False,
    show: ShowFunction | None = None,
) -> TrainResult:
    """Train a network and write its run folder, up to the final weights; from tags, or as `train.supervision` says.

    Args:
        config: Settings.
        data: The data set.
        run: Run folder; made if absent.
        device: Where to train.
        processes: Processes that train together.
        resume: Go on from the newest checkpoint of `run`; without one, start.
        show: Called by the main process at each evaluation, to draw what is there; returns a sheet of examples.

    Raises:
        AfaError: Bad data, configuration or weights; `run` holds a run already and `resume` is off, or holds one
            with other settings; a tracker does not start; the disk is full; the loss stays not finite.
    """
    images, compute = _open_training(config, data, tell=processes.is_main)
    scored = open_validation(config, data, tell=processes.is_main)
    torch.manual_seed(config.train.seed)
    # This comes before the run folder is made, so that missing weights leave nothing behind.
    network = build_network(config.model, len(images.classes), words=data.words).to(device)
    if processes.is_main:
        _prepare_run(run, config, images.classes, resume=resume)
    processes.wait()
    engine = TrainingEngine(network, config, device=device, processes=processes, compute=compute)
    start, seconds = _restore(run, engine) if resume else (0, 0.0)
    log = None
    if processes.is_main:
        log = MetricsLog(run, resume_step=start, trackers=Trackers(Run(run), config, resumed=start > 0))
    with showing_progress(processes.is_main), contextlib.ExitStack() as unfinished:
        if log is not None:
            unfinished.enter_context(log)
        large = LargeImages(images, Run(run).pixels, int(config.data.large_gib * 2**30))
        cache = PixelCache(len(images), resolve_cache(config.data.cache_gib, processes=processes.count), large=large)
        if config.train.feature_cache:
            engine.features = prepare_features(network, images, config, run, processes=processes, cache=cache)
        loop = _Loop(run, engine, scored, log, start, seconds, show=show)
        seconds = loop.run(_batches(engine, images, start, cache))
        engine.collect()
        network.eval()
        if processes.is_main:
            shutil.rmtree(Run(run).pixels, ignore_errors=True)
            save_weights(Run(run).weights, network)
            _write_environment(run, engine, seconds)
        processes.wait()
        unfinished.pop_all()
    return TrainResult(network, images.classes, seconds, scored, log)


def _restore(run: Path, engine: TrainingEngine) -> tuple[int, float]:
    """Go on from the newest checkpoint, if there is one: the steps done and the seconds that they took."""
    checkpoint = Run(run).latest_checkpoint()
    if checkpoint is None:
        if engine.processes.is_main:
            say(f"{run}: has no checkpoint to resume; the training starts with its first step")
        return 0, 0.0
    state = load_checkpoint(checkpoint, engine.network)
    engine.load_state_dict(state)
    if engine.processes.is_main:
        say(f"resuming {run} after step {state['step']} of {engine.config.schedule.max_steps}")
    return state["step"], state["seconds"]


def _batches(
    engine: TrainingEngine, images: TaggedImages, start: int, cache: PixelCache
) -> Generator[Batch, None, None]:
    """Batches from a step on, with masks where the run learns from them."""
    config, processes = engine.config, engine.processes
    batches = train_batches(
        images,
        config,
        start=start,
        processes=processes,
        cache=cache,
        features=engine.features,
        device=engine.device if engine.device.type == "cuda" else None,
    )
    if config.train.supervision == "tags":
        return batches
    from afa.training.supervised import with_masks

    assert isinstance(images, MaskedImages)
    return with_masks(batches, images, config, start=start, processes=processes)


class _Loop:
    """The loop of a run, and what it needs from step to step.

    Attributes:
        step: Steps done.
        seconds: Time spent in them, all resumptions added up; evaluations do not count.
    """

    def __init__(
        self,
        run: Path,
        engine: TrainingEngine,
        scored: MaskedImages | None,
        log: MetricsLog | None,
        step: int,
        seconds: float,
        *,
        show: ShowFunction | None,
    ) -> None:
        self.show = show
        self.run_folder = run
        self.engine = engine
        self.config = engine.config
        self.scored = scored
        self.log = log
        self.step = step
        self.sums = _Sums()
        self.warned = False
        self.rate, self.words = 0.0, ""
        self._began = time.perf_counter() - seconds
        self._line = step, seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def run(self, batches: Generator[Batch, None, None]) -> float:
        """Take the steps that are left; returns `seconds`."""
        train, processes = self.config.train, self.engine.processes
        total, batch_size = self.config.schedule.max_steps, self.config.schedule.batch_size
        self.engine.module.train()
        bar = image_progress("step", total=total, done=self.step, images=batch_size)
        # An error keeps this frame alive, and with it the threads that prepare batches, unless they are stopped here.
        with bar as advance, interrupts() as asked_to_stop, contextlib.closing(batches):
            for batch in batches:
                self.sums.add(self.engine.take_step(self.step, batch))
                self.step += 1
                last = self.step == total
                if self.step % train.log_steps == 0 or last:
                    self._log()
                advance(1, self.rate or None, self.words)
                # A step is logged before it is saved, because a resumed run does not repeat it.
                if train.eval_steps and self.step % train.eval_steps == 0 and not last:
                    self._evaluate()
                stop = processes.any(asked_to_stop(), self.engine.device)
                if self.step % train.save_steps == 0 or last or stop:
                    self._save()
                if stop:
                    raise AfaError(f"stopped after step {self.step} of {total}; the same command with --resume goes on")
        return self.seconds

    def _log(self) -> None:
        config, step = self.config, self.step
        self.engine.check(step - 1)
        means = self.sums.means(self.engine.processes)
        seconds = self.seconds
        line_step, line_seconds = self._line
        self.rate = (step - line_step) * config.schedule.batch_size / (seconds - line_seconds)
        self._line, self.sums = (step, seconds), _Sums()
        line: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "phase": phase(step - 1, config).name,
            **means,
            "learning_rate": learning_rate(step - 1, config.schedule),
            "images_per_second": self.rate,
            "seconds": seconds,
        }
        self.words = describe(line)
        if self.log is not None:
            self.log.write(line)
        if shows_progress() and not self.warned and (warning := affinity_warning(line, config)):
            self.warned = True
            say(warning)

    def _save(self) -> None:
        self.engine.collect()
        state = self.engine.state_dict() | {"seconds": self.seconds}
        if self.engine.processes.is_main:
            save_checkpoint(self.run_folder, step=self.step, network=self.engine.network, state=state)

    def _evaluate(self) -> None:
        paused, network, result = time.perf_counter(), self.engine.network, None
        self.engine.collect()
        if self.scored is not None:
            images = first_images(self.scored, self.config.train.eval_images)
            result = evaluate(network, images, self.config, processes=self.engine.processes)
        if self.log is not None and result is not None:
            figures = result.to_json()
            keys = ("labels", "protocol", "miou", "num_images", "seconds")
            self.log.write({"kind": "eval", "step": self.step} | {key: figures[key] for key in keys})
            say(f"step {self.step}: segmentation mIoU {result.miou:.1f} on {result.num_images} images")
        if self.log is not None:
            self.log.show(self.step, sheet=self.show(network, self.scored) if self.show else None, result=result)
        # Neither the training time nor the rate includes evaluation.
        self._began += time.perf_counter() - paused


def _open_training(config: Config, data: DataSet, *, tell: bool) -> tuple[TaggedImages, LossFunction]:
    """What a run learns from, and how; masks can be read only if the configuration asks for them."""
    if config.train.supervision == "tags":
        return data.train(), compute_losses
    from afa.training.supervised import open_masked, supervised_losses

    if tell:
        say(f"{SUPERVISION_NAMES['masks']}: the segmentation learns from the masks of {config.data.train_list}")
    return open_masked(data, config.data.train_list), supervised_losses


def open_validation(config: Config, data: DataSet, *, tell: bool = False) -> MaskedImages | None:
    """Open the images that a run is scored on; `tell` prints a line when there are none.

    Returns:
        None when `data.val_list` is empty, or is left at its default and the data set has no such list or no masks.

    Raises:
        AfaError: A list that was asked for, or something in it, is not there; as `MaskedImages.check_values`.
    """
    val_list = config.data.val_list
    if not val_list:
        return None
    if val_list == DataConfig().val_list and not (data.has_validation and data.has_masks):
        if tell:
            root = Path(config.data.root)
            words = f"masks in {root}: only tags" if data.has_validation else f"{root / val_list}: nothing"
            say(f"no {words} will be scored")
        return None
    scored = data.masked()
    scored.check_values()
    return scored


def _prepare_run(run: Path, config: Config, classes: tuple[str, ...], *, resume: bool) -> None:
    folder = Run(run)
    # What a wrong setting ended before its first step is no run.
    began = folder.exists and (folder.is_complete or bool(folder.metrics()) or folder.latest_checkpoint() is not None)
    if began and not resume:
        raise AfaError(f"{run}: holds a run already; pass --resume to go on with it, or another --out")
    if began:
        stored, wanted = config_to_keys(folder.config()), config_to_keys(config)
        for key, value in wanted.items():
            if key not in _FREE_KEYS and stored[key] != value:
                raise AfaError(
                    f"{run}: was started with {key} = {stored[key]}, not {value}; resume it with the same settings "
                    "or start another --out"
                )
        if (stored_classes := folder.classes()) != classes:
            raise AfaError(f"{run}: was started with the classes {stored_classes}, not {classes}; check --data.root")
    folder.start(config, classes)


def _write_environment(run: Path, engine: TrainingEngine, seconds: float) -> None:
    device = engine.device
    environment = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "afa": __version__,
        "seconds_train": round(seconds, 3),
        "steps": engine.config.schedule.max_steps,
        "num_parameters": sum(parameter.numel() for parameter in engine.network.parameters()),
        "processes": engine.processes.count,
        "precision": engine.config.train.precision,
        "threads": torch.get_num_threads(),
    }
    Run(run).write_environment(environment)
