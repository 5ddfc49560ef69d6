"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from afa.errors import AfaError


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into another place too: as a hard link, or as a copy where links are not possible.

    Raises:
        OSError: Neither is possible, or `target` is there already and cannot be replaced by a copy.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_whole(
    path: Path,
    contents: str | bytes | Callable[[BinaryIO], object],
    *,
    durable: bool = False,
    remedy: str = "free space or choose another folder",
) -> None:
    """Write a file under another name in the same folder and rename it, so that it is never seen half written.

    Args:
        path: File to write or replace; missing folders are made.
        contents: Text (UTF-8), bytes, or a function that writes them into the open file.
        durable: Wait until the disk has the contents, so that the file survives a power cut too.
        remedy: What the user can do about a disk that refuses.

    Raises:
        AfaError: The file cannot be written; nothing of it is left, and what `path` held before stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            if callable(contents):
                contents(file)
            else:
                file.write(contents.encode() if isinstance(contents, str) else contents)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        raise AfaError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from None
