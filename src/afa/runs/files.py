"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from afa.errors import AfaError


def write_whole(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name in the same folder and rename it, so that it is never seen half written.

    Args:
        path: File to write or replace; missing folders are made.
        save: Writes the contents into the open file.

    Raises:
        AfaError: The file cannot be written; nothing of it is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            save(file)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = error.strerror or error
        raise AfaError(f"{path}: cannot be written ({reason}); free space or choose another folder") from None
