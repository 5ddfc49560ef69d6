"""Which files a piece of code opens, and what an object holds: for tests that training has no way to a mask."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Opened:
    """Paths that this process opens or lists while `paths` is a list. An audit hook stays for good: there is one."""

    paths: list[str] | None = None
    installed = False
    refused: tuple[str, ...] = ()

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if event in cls.refused:
            raise PermissionError(errno.EPERM, "not allowed")
        if cls.paths is not None and event in ("open", "os.listdir", "os.scandir"):
            cls.paths.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, Path)) else "")

    @classmethod
    def install(cls) -> None:
        if not cls.installed:
            sys.addaudithook(cls.hook)
            cls.installed = True

    @classmethod
    @contextmanager
    def recorded(cls) -> Iterator[list[str]]:
        cls.install()
        cls.paths = []
        try:
            yield cls.paths
        finally:
            cls.paths = None


@contextmanager
def forbidden(*events: str) -> Iterator[None]:
    """The system refuses some calls, named as Python audits them, such as `os.symlink`."""
    Opened.install()
    Opened.refused = events
    try:
        yield
    finally:
        Opened.refused = ()


def reachable(value: object) -> list[object]:
    """All objects that an object leads to, but for modules, classes and functions."""
    found: dict[int, object] = {}
    queue = [value]
    while queue:
        item = queue.pop()
        if id(item) not in found and not isinstance(item, type) and not callable(item):
            found[id(item)] = item
            queue += gc.get_referents(item)
    return list(found.values())
