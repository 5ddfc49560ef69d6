"""The training loop: evaluate, save, stop?, step, log. All input and output of a run happens here."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa import __version__
from afa.config import SUPERVISION_NAMES, Config, DataConfig, config_to_dict, config_to_toml, load_config
from afa.data.layout import Layout
from afa.data.loader import resolve_workers, train_batches
from afa.data.pixel_cache import PixelCache, resolve_cache
from afa.data.voc import ScoredImages, TaggedImages
from afa.errors import AfaError
from afa.evaluation.evaluate import evaluate
from afa.model.network import AfaNetwork
from afa.runs.build import build_network, read_classes
from afa.runtime import Processes, interrupts, progress_bar, say
from afa.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    write_atomically,
)
from afa.training.engine import TrainingEngine
from afa.training.feature_cache import prepare_features
from afa.training.log import MetricsLog
from afa.training.schedule import learning_rate, phase
from afa.training.step import LossFunction, StepLosses, compute_losses
from afa.types import Batch

_FREE_KEYS = frozenset(
    {"data.root", "data.workers", "data.cache_gib", "data.feature_dir", "evaluation.batch_size"}
    | {"train.device", "train.cuda_graphs", "train.compile", "train.log_steps", "train.eval_steps"}
    | {"train.eval_images", "train.feature_cache_gib", "train.save_steps", "train.example_images", "train.tensorboard"}
)
"""Keys that may differ between a run and its resumption: none of them changes the weights."""


_UNLEARNT_AFFINITY = 0.47
"""Balanced affinity loss from which on an affinity counts as unlearnt: 0.5 is that of any constant one."""

_LOSSES = ("cls_loss", "seg_loss", "aff_loss", "reg_loss")
"""Keys of the losses in metrics.jsonl, beside their weighted sum."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves in memory.

    Attributes:
        network: Trained network, in evaluation mode.
        classes: Names of the C foreground classes.
        seconds: Time spent in training steps, all resumptions added up.
    """

    network: AfaNetwork
    classes: tuple[str, ...]
    seconds: float


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
        result: dict[str, float | None] = {"loss": None, **dict.fromkeys(_LOSSES)}
        for name, value in self.values.items():
            total = float(processes.total(value)) / self.count
            key = "loss" if name == "total" else f"{name}_loss"
            result[key] = total if name in ("seg", "aff") else total / processes.count
        return result


def train(
    config: Config,
    data: Layout,
    run: Path,
    *,
    device: torch.device,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a network and write its run folder, up to the final weights; from tags, or as `train.supervision` says.

    Args:
        config: Settings.
        data: The data set.
        run: Run folder; made if absent.
        device: Where to train.
        processes: Processes that train together.
        resume: Go on from the newest checkpoint of `run`; without one, start.
        progress: Show progress on standard error.

    Returns:
        The trained network.

    Raises:
        AfaError: Bad data, configuration or weights; `run` holds a run already and `resume` is off, or holds one
            with other settings; the disk is full; the loss stays not finite.
    """
    progress = progress and processes.is_main
    images, compute = _open_training(config, data, tell=processes.is_main)
    scored = open_validation(config, data, tell=processes.is_main)
    torch.manual_seed(config.train.seed)
    # Before the run folder is made: weights that cannot be had leave nothing behind.
    network = build_network(config.model, len(images.classes)).to(device)
    if processes.is_main:
        _prepare_run(run, config, images.classes, resume=resume)
    processes.wait()
    engine = TrainingEngine(network, config, device=device, processes=processes, compute=compute)
    start, seconds_before = 0, 0.0
    checkpoint = latest_checkpoint(run) if resume else None
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, network)
        engine.load_state_dict(state)
        start, seconds_before = state["step"], state["seconds"]
        if processes.is_main:
            say(f"resuming {run} after step {start} of {config.schedule.max_steps}")
    workers = resolve_workers(config.data.workers, processes=processes.count)
    cache = PixelCache(len(images), resolve_cache(config.data.cache_gib, processes=processes.count))
    if config.train.feature_cache:
        engine.features = prepare_features(
            network,
            images,
            config,
            run,
            device=device,
            processes=processes,
            workers=workers,
            cache=cache,
            progress=progress,
        )
    log = MetricsLog(run, resume_step=start, tensorboard=config.train.tensorboard) if processes.is_main else None
    trainer = _Trainer(config, run, engine, images, scored, log, workers, cache)
    try:
        seconds = trainer.run_steps(start, seconds_before, progress=progress)
    finally:
        if log is not None:
            log.close()
    network.eval()
    if processes.is_main:
        save_weights(run / "model.safetensors", network)
        _write_environment(run, config, device, processes, network, seconds)
    processes.wait()
    return TrainResult(network, images.classes, seconds)


class _Trainer:
    """The state of a running loop."""

    def __init__(
        self,
        config: Config,
        run: Path,
        engine: TrainingEngine,
        images: TaggedImages,
        scored: ScoredImages | None,
        log: MetricsLog | None,
        workers: int,
        cache: PixelCache,
    ) -> None:
        self.config = config
        self.run = run
        self.engine = engine
        self.device = engine.device
        self.processes = engine.processes
        self.network = engine.network
        self.images = images
        self.scored = scored
        self.log = log
        self.workers = workers
        self.cache = cache

    def run_steps(self, start: int, seconds_before: float, *, progress: bool) -> float:
        """Do steps `start` .. max_steps - 1; returns the seconds of training, earlier ones included."""
        config, schedule = self.config, self.config.schedule
        loaded = train_batches(
            self.images,
            augment=config.augment,
            batch_size=schedule.batch_size,
            seed=config.train.seed,
            start_step=start,
            max_steps=schedule.max_steps,
            rank=self.processes.rank,
            world_size=self.processes.count,
            workers=self.workers,
            cache=self.cache,
            features=None if self.engine.features is None else self.engine.features.read,
            device=self.device if self.device.type == "cuda" else None,
        )
        batches: Iterator[Batch] = loaded
        if config.train.supervision == "masks":
            from afa.training.supervised import with_masks

            assert isinstance(self.images, ScoredImages)
            batches = with_masks(loaded, self.images, config=config, start_step=start, processes=self.processes)
        sums = _Sums()
        began = time.perf_counter()
        line_began, line_step, told = began, start, began
        step, warned = start, False
        bar = progress_bar(enabled=progress, extra="loss")
        self.network.train()
        # An error keeps this frame alive, and with it whatever still prepares batches, unless that is ended here.
        with bar, interrupts() as asked_to_stop, contextlib.closing(loaded):
            task = bar.add_task("training", total=schedule.max_steps, completed=start, rate="", loss="")
            for batch in batches:
                sums.add(self.engine.take_step(step, batch))
                step += 1
                last = step == schedule.max_steps
                now = time.perf_counter()
                if step % config.train.log_steps == 0 or last:
                    rate = (step - line_step) * schedule.batch_size / (now - line_began)
                    self.engine.check(step - 1)
                    line = self._log_line(step, sums, rate, seconds_before + now - began)
                    sums, line_began, line_step = _Sums(), now, step
                    if progress and not warned and (warning := _affinity_warning(line, config)):
                        warned = True
                        say(warning)
                    text = _describe(line)
                    bar.update(task, rate=f"{rate:.1f} images/s", loss=text)
                    if progress and not bar.console.is_terminal and now - told > 10:
                        left = (schedule.max_steps - step) * schedule.batch_size / rate
                        say(f"step {step}/{schedule.max_steps}  {rate:.1f} images/s  {text}  {left:.0f} s left")
                        told = now
                bar.update(task, completed=step)
                # What belongs to a step is logged before it is saved: a resumed run never comes back to it.
                if config.train.eval_steps and step % config.train.eval_steps == 0 and not last:
                    paused = time.perf_counter()
                    self._evaluate(step)
                    # Evaluation is not training: neither the clock nor the rate counts it.
                    gone = time.perf_counter() - paused
                    began, line_began = began + gone, line_began + gone
                stop = self.processes.any(asked_to_stop(), self.device)
                if step % config.train.save_steps == 0 or last or stop:
                    self._save(step, seconds_before + time.perf_counter() - began)
                if stop:
                    raise AfaError(
                        f"stopped after step {step} of {schedule.max_steps}; the same command with --resume goes on"
                    )
        return seconds_before + time.perf_counter() - began

    def _log_line(self, step: int, sums: _Sums, rate: float, seconds: float) -> dict[str, Any]:
        config = self.config
        line: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "phase": phase(step - 1, config.schedule, config.loss, supervision=config.train.supervision).name,
            **sums.means(self.processes),
            "learning_rate": learning_rate(step - 1, config.schedule),
            "images_per_second": rate,
            "seconds": seconds,
        }
        if self.log is not None:
            self.log.write(line)
        return line

    def _save(self, step: int, seconds: float) -> None:
        if self.processes.is_main:
            state = self.engine.state_dict() | {"seconds": seconds}
            save_checkpoint(self.run, step=step, network=self.network, state=state)

    def _evaluate(self, step: int) -> None:
        if self.scored is None:
            return
        self.network.eval()
        result = evaluate(
            self.network,
            self.scored,
            config=self.config,
            labels="seg",
            device=self.device,
            precision=self.config.train.precision,
            limit=self.config.train.eval_images,
            batch_size=self.config.evaluation.batch_size,
            progress=False,
        )
        self.network.train()
        if self.log is not None:
            figures = result.to_json()
            keys = ("labels", "protocol", "miou", "num_images", "seconds")
            self.log.write({"kind": "eval", "step": step} | {key: figures[key] for key in keys})
            say(f"step {step}: segmentation mIoU {figures['miou']:.1f} on {figures['num_images']} images")


def _open_training(config: Config, data: Layout, *, tell: bool) -> tuple[TaggedImages, LossFunction]:
    """What a run learns from, and how; masks are within reach only where the configuration asks for them."""
    if config.train.supervision == "tags":
        return data.training(), compute_losses
    from afa.training.supervised import open_masked, supervised_losses

    if tell:
        say(f"{SUPERVISION_NAMES['masks']}: the segmentation learns from the masks of {config.data.train_list}")
    return open_masked(data, config.data.train_list), supervised_losses


def open_validation(config: Config, data: Layout, *, tell: bool = False) -> ScoredImages | None:
    """Open the images that a run is scored on.

    Args:
        config: Its `data` section applies.
        data: The data set.
        tell: Say so when there are none.

    Returns:
        None when `data.val_list` is empty, or is left at its default and the data set has no such list or no masks.

    Raises:
        AfaError: A list that was asked for, or something in it, is not there.
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
    return data.scored()


def _prepare_run(run: Path, config: Config, classes: tuple[str, ...], *, resume: bool) -> None:
    stored_path = run / "config.toml"
    if stored_path.is_file() and not resume:
        raise AfaError(f"{run}: holds a run already; pass --resume to go on with it, or another --out")
    if stored_path.is_file():
        stored, wanted = _flat(load_config(stored_path)), _flat(config)
        for key, value in wanted.items():
            if key not in _FREE_KEYS and stored[key] != value:
                raise AfaError(
                    f"{run}: was started with {key} = {stored[key]}, not {value}; resume it with the same settings "
                    "or start another --out"
                )
        if (stored_classes := read_classes(run)) != classes:
            raise AfaError(f"{run}: was started with the classes {stored_classes}, not {classes}; check --data.root")
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "classes.txt", "".join(f"{name}\n" for name in classes))
    write_atomically(stored_path, config_to_toml(config))


def _flat(config: Config) -> dict[str, Any]:
    tree = config_to_dict(config)
    return {f"{s}.{key}": value for s, part in tree.items() if isinstance(part, dict) for key, value in part.items()}


def _write_environment(
    run: Path, config: Config, device: torch.device, processes: Processes, network: AfaNetwork, seconds: float
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    environment = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "afa": __version__,
        "seconds_train": round(seconds, 3),
        "steps": config.schedule.max_steps,
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "processes": processes.count,
        "precision": config.train.precision,
        "threads": torch.get_num_threads(),
    }
    write_atomically(run / "environment.json", json.dumps(environment, indent=2) + "\n")


def _affinity_warning(line: dict[str, Any], config: Config) -> str | None:
    """What to say of an affinity that labels are made from before it has learnt anything, if a log line shows one."""
    walks = line["phase"] == "refined" and config.pseudo.propagation == "affinity"
    known = walks and config.loss.affinity_form == "balanced" and line["aff_loss"] is not None
    if not known or line["aff_loss"] < _UNLEARNT_AFFINITY:
        return None
    remedy = "" if config.model.attention_scaling else "--model.attention_scaling true or "
    return (
        f"warning: step {line['step']}: the affinity has learnt nothing (loss {line['aff_loss']:.2f}; one that is the "
        f"same everywhere has 0.50), so refined labels will be poor; try {remedy}another --train.seed"
    )


def _describe(line: dict[str, Any]) -> str:
    parts = [f"{name[:-5]} {line[name]:.3f}" for name in _LOSSES if line[name] is not None]
    return f"{line['phase']}: " + ", ".join(parts)
