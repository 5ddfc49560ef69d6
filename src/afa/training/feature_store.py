"""A folder of fp16 rows, one for each image, written once and read in any order.

The rows lie in one file, in the order in which they were written; `index.json` beside it says what they are and whose.
What stands in a row is the caller's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from afa.errors import AfaError
from afa.runs.files import write_whole

_GIB: Final = 2**30
_INDEX, _ROWS, _PART = "index.json", "rows.bin", "part_"


class FeatureStore:
    """Rows on disk, each with a number of its own.

    Rows count as there once `commit` has made them durable: a store whose making was cut off at any point goes on after
    the last one that counts. Threads may read while one writes. Several processes may each write a part of it.

    Attributes:
        folder: Where it lies.
        about: What the rows are, as JSON; written into the index and not looked at here.
        num_done: Rows that are there, without those of parts.
        parts: What other processes wrote, as stores in folders of this one.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], *, numbers: Sequence[int] = (), sizes: Sequence[int] = ()
    ) -> None:
        """Take the numbers of the rows that are there, and how many fp16 values each has."""
        self.folder = folder
        self.about = about
        self.num_done = len(numbers)
        self._numbers = list(numbers)
        self._sizes = list(sizes)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._places = {number: place for place, number in enumerate(numbers)}
        self.parts: list[FeatureStore] = []

    @classmethod
    def open(cls, folder: Path) -> FeatureStore | None:
        """Open the finished part of a store in a folder; None if there is none."""
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            store = cls(folder, index["about"], numbers=index["numbers"], sizes=index["sizes"])
            there = (folder / _ROWS).stat().st_size >= store.num_bytes and len(store._sizes) == store.num_done
            store.parts = [part for each in sorted(folder.glob(f"{_PART}*")) if (part := cls.open(each)) is not None]
            return store if there else None
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    @property
    def num_bytes(self) -> int:
        """Size of the rows that were written."""
        return 2 * self._starts[-1] + sum(part.num_bytes for part in self.parts)

    def part(self, writer: int) -> FeatureStore:
        """The part that a process of this number writes, there or new."""
        folder = self.folder / f"{_PART}{writer}"
        folder.mkdir(exist_ok=True)
        return FeatureStore.open(folder) or FeatureStore(folder, self.about)

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of some rows that are not there, in the order given."""
        left = [number for number in numbers if self._places.get(number, self.num_done) >= self.num_done]
        for part in self.parts:
            left = part.missing(left)
        return left

    def reserve(self, more: int, max_gib: float, *, setting: str, advice: str) -> None:
        """Make sure that more rows fit before anything is written.

        Args:
            more: Bytes of the rows to come.
            max_gib: Most that the store may take, GiB.
            setting: Key that says so, for messages.
            advice: What makes it smaller, for messages.

        Raises:
            AfaError: It does not fit into that, or what is missing does not fit on the disk.
        """
        if self.num_bytes + more > max_gib * _GIB:
            raise AfaError(
                f"the feature cache would take {format_gib(self.num_bytes + more)}, but {setting} is "
                f"{max_gib:g} GiB; raise it, or {advice}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise AfaError(f"{self.folder}: cannot be written to ({error.strerror}); set data.feature_dir") from None
        if more > free:
            raise AfaError(
                f"{self.folder}: the feature cache needs {format_gib(more)}, but the disk has {format_gib(free)} "
                f"free; make room, set data.feature_dir to another disk, or {advice}"
            )

    def write(self, number: int, row: NDArray[np.float16]) -> None:
        """Add a row; it counts from the next `commit` on.

        Args:
            number: Its number, which no other row has.
            row: (size,) fp16.

        Raises:
            AfaError: The disk is full.
        """
        assert row.dtype == np.float16, row.dtype
        assert number not in self._places, number
        path = self.folder / _ROWS
        try:
            # Not through a memory map, which kills the process when the disk is full.
            with path.open("r+b" if path.exists() else "wb") as file:
                file.seek(2 * self._starts[-1])
                file.write(np.ascontiguousarray(row).data)
        except OSError as error:
            raise AfaError(
                f"{path}: cannot be written ({error.strerror}); make room or set data.feature_dir, and use --resume"
            ) from None
        self._places[number] = len(self._numbers)
        self._numbers.append(number)
        self._sizes.append(row.size)
        self._starts.append(self._starts[-1] + row.size)

    def commit(self) -> None:
        """Make the rows durable that were written, then count them.

        Raises:
            AfaError: The disk is full.
        """
        index = {"about": self.about, "numbers": self._numbers, "sizes": self._sizes}
        remedy = "make room or set data.feature_dir, and use --resume"
        try:
            with (self.folder / _ROWS).open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise AfaError(f"{self.folder}: cannot be written ({error.strerror}); {remedy}") from None
        write_whole(self.folder / _INDEX, json.dumps(index), durable=True, remedy=remedy)
        self.num_done = len(self._numbers)

    def row(self, number: int) -> NDArray[np.float16]:
        """The row of a number, read from disk where it is touched.

        It is a memory map of its own: its pages leave the memory of the process with it, and stay with the system as
        long as there is room.

        Returns:
            (size,) fp16, not to be written to.
        """
        place = self._places.get(number, self.num_done)
        if place >= self.num_done:
            part = next((part for part in self.parts if not part.missing([number])), None)
            assert part is not None, number
            return part.row(number)
        row: NDArray[np.float16] = np.memmap(
            self.folder / _ROWS,
            dtype=np.float16,
            mode="r",
            offset=2 * self._starts[place],
            shape=(self._sizes[place],),
        )
        return row


def remove_store(folder: Path) -> None:
    """Delete a store, complete or not; nothing else in the folder."""
    with contextlib.suppress(OSError):
        for part in folder.glob(f"{_PART}*"):
            remove_store(part)
        for name in (_INDEX, _ROWS):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def format_gib(num_bytes: int) -> str:
    """A size in words.

    >>> format_gib(3 * 2**29)
    '1.5 GiB'
    """
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
