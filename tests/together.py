"""A function as two processes of a group, each on one thread."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from afa import peers


def together(target: Callable[..., None], folder: Path, *arguments: object) -> list[int | None]:
    """Run a function as two processes of a group; their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    started = [context.Process(target=_join, args=(rank, port, target, str(folder), *arguments)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        assert process.exitcode is not None
    return [process.exitcode for process in started]


def _join(rank: int, port: int, target: Callable[..., None], folder: str, *arguments: object) -> None:
    torch.set_num_threads(1)
    peers._BEAT_SECONDS, peers._SILENCE_SECONDS, peers._GRACE_SECONDS = 0.1, 2.0, 2.0
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(rank, Path(folder), *arguments)
