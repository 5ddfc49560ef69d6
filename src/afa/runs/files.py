"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def only_writer(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Make a folder, and keep other calls from writing there until this one is done or killed.

    With `wait` it waits for another call, or thread, that is writing there.

    Raises:
        AfaError: Another call is writing there; the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AfaError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise AfaError(f"{folder}: another call is writing there; wait for it, or choose another folder") from None
        except OSError:
            pass  # a network disk that locks no folders
        yield
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError, remedy: str = "free space or choose another folder") -> AfaError:
    """What to raise where a file or folder cannot be written."""
    words = f"{path}: cannot be written ({error.strerror or error}); "
    if error.errno == errno.ENAMETOOLONG:
        return LongNameError(words + "give the image a shorter name")
    return AfaError(words + remedy)
