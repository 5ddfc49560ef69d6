"""Checks as commands: of a data set before training, and of an archive for a test server."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from afa.api.settings import at_work, changed, file_config, rooted
from afa.check import collect
from afa.check.scale import parse_count
from afa.config import Config
from afa.data.classes import read_lines
from afa.data.open import open_data
from afa.errors import AfaError
from afa.formats.voc_test import SubmissionCheck, check_voc_test
from afa.runs.auto import choose_defaults
from afa.runtime import pick_device


def check_data(
    data: str | Path | Config,
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    fast: bool = False,
    limit: int | None = None,
    at_scale: str = "",
    machine: str = "",
    progress: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Check a data set before training, as `afa check`.

    Args:
        data: Folder of the data set, or the configuration of the training to come.
        file: TOML configuration of that training. With neither file nor preset it is the one that `train` would
            choose for the folder.
        preset: Name that wins over the file's.
        fast: Tags and counts only: read no image, try no training step.
        limit: Read only so many images, evenly spread.
        at_scale: Number of images, such as 100M, to say the cost of; empty says none.
        machine: One of `afa.check.scale.MACHINES` that it is said of; empty: this one.
        progress: Show progress on standard error.
        overrides: Keys of the configuration that win.

    Returns:
        Figures and problems, as `afa.check.collect.check_data` says.

    Raises:
        AfaError: No such folder; an unknown key or a value out of range; a device that is not there.
    """
    opened, scale = None, (parse_count(at_scale), machine or "this machine") if at_scale else None
    if isinstance(data, Config):
        config = changed(data, overrides)
    else:
        keys = rooted(data, overrides)
        config = file_config(file, keys, preset)
        if file is None and preset is None:
            with contextlib.suppress(AfaError):  # what is wrong with the data set is the check's to tell
                device = pick_device(config.train.device)
                opened = open_data(config.data)
                config, _ = choose_defaults(opened, device, keys, need_weights=False)
    with at_work(config, progress) as (_, processes):
        return collect.check_data(config, opened, fast=fast, limit=limit, scale=scale, processes=processes)


def check_voc(
    archive: str | Path, *, list_file: str | Path | None = None, images: str | Path | None = None
) -> SubmissionCheck:
    """Check an archive for PASCAL VOC's test server, as `afa check-voc`.

    Args:
        archive: The archive.
        list_file: Names of the test images, one a line.
        images: Folder of the test images, for their sizes.

    Raises:
        AfaError: As `afa.formats.voc_test.check_voc_test`; no such list.
    """
    names = read_lines(Path(list_file)) if list_file is not None else None
    return check_voc_test(Path(archive), names=names, images=Path(images) if images is not None else None)
