"""The settings and the processes that a command runs with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from afa.config import Config, config_to_keys, load_config
from afa.errors import AfaError
from afa.runs.run import Run
from afa.runtime import Processes, pick_device, process_group, showing_progress

_TRAINED = ("augment", "model", "loss", "schedule")
"""Sections that only training reads."""


@contextlib.contextmanager
def at_work(config: Config, progress: bool) -> Iterator[tuple[torch.device, Processes]]:
    """The device and the processes of a command; inside it, progress is shown or not."""
    device = pick_device(config.train.device)
    with process_group(device) as processes, showing_progress(progress):
        yield device, processes


def run_config(run: Path, overrides: Mapping[str, Any], *, data: str | Path | None = None) -> Config:
    """The configuration of a run under other keys, with its own classes.

    Args:
        run: Run folder.
        overrides: Dotted keys that win.
        data: Folder of the data set to read instead of the run's.

    Raises:
        AfaError: Not a run folder; a key that only training reads; as `load_config`.
    """
    keys: dict[str, Any] = {"data.class_subset": Run(run).classes()}
    if data is not None:
        keys["data.root"] = str(data)
    for key in overrides:
        if key.partition(".")[0] in _TRAINED or key == "train.supervision":
            raise AfaError(f"{key} was fixed when {run} was trained, so it changes nothing now; leave it out")
    return Run(run).config(keys | dict(overrides))


def file_config(file: str | Path | None, overrides: Mapping[str, Any], preset: str | None) -> Config:
    """As `load_config`; the configuration of a run from before some key means what that run did."""
    stored = file is not None and Run.of_config(file) is not None
    return load_config(file, overrides, preset=preset, stored=stored)


def changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A configuration under other keys."""
    return load_config(None, config_to_keys(config) | dict(overrides), preset=config.preset)
