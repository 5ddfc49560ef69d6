"""The settings and the processes that a command runs with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from afa.config import Config, config_to_keys, load_config, refuse_unread
from afa.errors import AfaError
from afa.runs.run import Run
from afa.runtime import Processes, pick_device, process_group, showing_progress


@contextlib.contextmanager
def at_work(config: Config, progress: bool) -> Iterator[tuple[torch.device, Processes]]:
    """The device and the processes of a command; inside it, the first process shows progress or not."""
    device = pick_device(config.train.device)
    with process_group(device) as processes, showing_progress(progress and processes.is_main):
        yield device, processes


def run_config(run: Path, overrides: Mapping[str, Any], command: str, *, data: str | Path | None = None) -> Config:
    """The configuration of a run under other keys, with its own classes.

    Args:
        run: Run folder.
        overrides: Dotted keys that win.
        command: What they are for: as of `refuse_unread`.
        data: Folder of the data set to read instead of the run's.

    Raises:
        AfaError: Not a run folder; as `refuse_unread` and `load_config`; `data` and data.root differ.
    """
    keys: dict[str, Any] = {"data.class_subset": Run(run).classes()}
    refuse_unread(command, overrides)
    return Run(run).config(keys | (dict(overrides) if data is None else rooted(data, overrides)))


def rooted(folder: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with the folder of the data set; an `AfaError` if they name another one."""
    keys = {"data.root": str(folder)} | dict(overrides)
    if keys["data.root"] != str(folder):
        raise AfaError(f"{folder} and data.root {keys['data.root']} both name the data set; leave one out")
    return keys


def file_config(file: str | Path | None, overrides: Mapping[str, Any], preset: str | None) -> Config:
    """As `load_config`; the configuration of a run from before some key means what that run did."""
    stored = file is not None and Run.of_config(file) is not None
    return load_config(file, overrides, preset=preset, stored=stored)


def changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A configuration under other keys."""
    return load_config(None, config_to_keys(config) | dict(overrides), preset=config.preset)
