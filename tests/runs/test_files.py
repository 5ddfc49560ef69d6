"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from afa.runs.files import write_whole
from mistakes import refused


@pytest.mark.parametrize("contents", ["new ü\n", "new ü\n".encode(), lambda file: file.write("new ü\n".encode())])
def test_text_bytes_and_writers_make_the_same_file(
    tmp_path: Path, contents: str | bytes | Callable[[BinaryIO], object]
) -> None:
    path = tmp_path / "made" / "file"
    write_whole(path, contents)
    assert path.read_text(encoding="utf-8") == "new ü\n"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_contents_stay_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_whole(path, "old\n", durable=True)

    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with refused(path, "No space", "another folder"):
        write_whole(path, "new\n", durable=True)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
