"""Images within shards as paths, so that whatever reads an image file reads them too; columns of millions of rows."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

if sys.platform == "win32":
    from pathlib import WindowsPath as _SystemPath
else:
    from pathlib import PosixPath as _SystemPath

_T = TypeVar("_T")


class Archive(Protocol):
    """What members are read from."""

    @property
    def state(self) -> int:
        """A number that is another one when the archive changes."""

    def read(self, start: int, size: int, where: str) -> bytes:
        """Some bytes of it; `where` is what messages begin with."""


class MemberPath(_SystemPath):
    """The path of a file within a shard: it can be read, and nothing else. Built by `of`."""

    __slots__ = ("_archive", "_size", "_start", "_text")

    _archive: Archive
    _text: str
    _start: int
    _size: int

    @classmethod
    def of(cls, archive: Archive, text: str, start: int, size: int) -> MemberPath:
        """The path of `size` bytes from `start` on of an archive; `text` is what it is called."""
        path = cls(text)
        path._archive, path._text, path._start, path._size = archive, text, start, size
        return path

    def __str__(self) -> str:
        return getattr(self, "_text", "") or super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    def is_file(self, **_: Any) -> bool:
        """Always."""
        return True

    def resolve(self, strict: bool = False) -> MemberPath:
        """The same path."""
        return self

    def stat(self, **_: Any) -> os.stat_result:
        """Size, and as time of change a number that stands for the state of the shard."""
        state = self._archive.state
        values = (stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, self._size, *[state // 10**9] * 3)
        return os.stat_result(values, {f"st_{kind}time_ns": state for kind in "amc"})

    def read_bytes(self) -> bytes:
        """The contents; an `AfaError` if the shard is cut short or cannot be fetched."""
        return self._archive.read(self._start, self._size, str(self))

    def open(self, *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        """The contents as a binary file to read."""
        return io.BytesIO(self.read_bytes())


class Column(Sequence[_T], Generic[_T]):
    """Values of rows that are made when they are asked for: it holds 8 bytes of each row.

    Args:
        value: Makes the value of a row.
        rows: (N,) rows in their order.
    """

    def __init__(self, value: Callable[[int], _T], rows: NDArray[np.int64]) -> None:
        self._value, self._rows = value, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[_T]:
        return map(self._value, (int(row) for row in self._rows))

    @overload
    def __getitem__(self, index: int) -> _T: ...

    @overload
    def __getitem__(self, index: slice) -> Column[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | Column[_T]:
        if isinstance(index, slice):
            return Column(self._value, self._rows[index])
        return self._value(int(self._rows[index]))


def take(values: Sequence[_T], rows: NDArray[np.int64]) -> Sequence[_T]:
    """Some of the values: a column of a column, else a tuple."""
    if isinstance(values, Column):
        return Column(values._value, values._rows[rows])
    return tuple([values[row] for row in rows.tolist()])


def member_or_below(folder: Path, path: str | Path) -> Path:
    """The path of a member as it is, another one below a folder."""
    return path if isinstance(path, MemberPath) else folder / path
