"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from afa.errors import AfaError, LongNameError

_LONG_NAME: Final = 200
"""Bytes from which a name may be too long for a disk if something is added to it."""


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
    name = os.fsencode(path.name)
    short = path.name if len(name) < _LONG_NAME else hashlib.sha256(name).hexdigest()
    partial = path.with_name(f".{short}.{os.getpid()}.partial")
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
        raise unwritable(path, error, remedy) from None


def unwritable(path: Path, error: OSError, remedy: str = "free space or choose another folder") -> AfaError:
    """What to raise where a file or folder cannot be written."""
    words = f"{path}: cannot be written ({error.strerror or error}); "
    if error.errno == errno.ENAMETOOLONG:
        return LongNameError(words + "give the image a shorter name")
    return AfaError(words + remedy)
