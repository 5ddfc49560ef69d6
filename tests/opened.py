"""Which files a piece of code opens, and what an object holds: for tests that training has no way to a mask."""

from __future__ import annotations

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

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.paths is not None and event in ("open", "os.listdir", "os.scandir"):
            cls.paths.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, Path)) else "")

    @classmethod
    @contextmanager
    def recorded(cls) -> Iterator[list[str]]:
        if not cls.installed:
            sys.addaudithook(cls.hook)
            cls.installed = True
        cls.paths = []
        try:
            yield cls.paths
        finally:
            cls.paths = None


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
