"""Shards: archives of many images, here or in a store, each with an index that says where in it each image lies.

An index is made once, by one pass over a shard, and kept in the machine's cache. With it, any image is read by itself:
which images a training step takes stays a function of the step, and what is not asked for takes no memory. Shards of
stores are fetched whole, into that cache, and given up when it is full; Parquet files are repacked there.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from afa.config import DataConfig
from afa.data.classes import is_plain
from afa.data.files import is_litter
from afa.data.images import IMAGE_SUFFIXES
from afa.data.members import Column, MemberPath
from afa.data.readers.parquet import write_tar
from afa.data.readers.table import stated_tags
from afa.data.stores import Stored, fetch
from afa.errors import AfaError, BrokenImageError, shown
from afa.runs.files import only_writer, write_whole

TAR: Final = ".tar"
SUFFIXES: Final = frozenset((TAR, ".parquet", ".arrow"))
"""Suffixes of shards."""

MASK: Final = ".mask"
"""What the name of a mask has behind the key of its image: KEY.mask.png."""

_VERSION: Final = 1
_TEXTS: Final = (".json", ".cls", ".txt")
_MAX_TEXT: Final = 2**20  # bytes
_MAX_FAULTS: Final = 1000
_GIB: Final = 2**30
_REMEDY: Final = "free space, or set XDG_CACHE_HOME to another folder"


class Index(msgspec.Struct):
    """Where the N samples of a shard are.

    Attributes:
        keys: Their names.
        suffixes: Those of the images.
        starts, sizes: Place and length of the images, bytes.
        mask_starts, mask_sizes: The same of the masks; length 0 where there is none.
        tags: What the shard says of each: an object of a table, a text, a number of a class, a list, or nothing.
        labels: The names of the classes, where tags are their numbers and the shard knows them.
        faults: What is wrong with the shard or a sample that was left out, a line each.
    """

    keys: list[str] = []
    suffixes: list[str] = []
    starts: list[int] = []
    sizes: list[int] = []
    mask_starts: list[int] = []
    mask_sizes: list[int] = []
    tags: list[Any] = []
    labels: list[str] = []
    faults: list[str] = []


class ShardCache:
    """The folder of the machine's cache that has indices, fetched shards, and repacked ones.

    Args:
        data: `shard_gib` and `store_retries`.
    """

    def __init__(self, data: DataConfig) -> None:
        self.folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afa" / "shards"
        self.retries, self.limit = data.store_retries, int(data.shard_gib * _GIB)

    def make_room(self, size: int) -> None:
        """Delete the archives that were not read for the longest time, as far as the limit asks for it."""
        archives = []
        for path in self.folder.glob(f"*{TAR}"):
            with contextlib.suppress(OSError):  # another process was faster
                archives.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = size + sum(each for _, each, _ in archives)
        for _, each, path in sorted(archives):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= each


class Shard:
    """One shard.

    Args:
        stored: The file.
        name: What the names of its images begin with.
        cache: Where its index lies.
    """

    def __init__(self, stored: Stored, name: str, cache: ShardCache) -> None:
        self.stored, self.name, self._cache = stored, name, cache

    def __str__(self) -> str:
        return self.stored.address

    @cached_property
    def is_local(self) -> bool:
        """Whether it is read where it lies."""
        return self.stored.is_local and self.stored.address.lower().endswith(TAR)

    @property
    def state(self) -> int:
        """As of `Archive`."""
        return int(self.stored.key, 16) // 16

    @property
    def has_index(self) -> bool:
        """Whether the index was made."""
        return self._path(".index").is_file()

    def index(self) -> Index:
        """Read the index, or make it.

        Raises:
            AfaError: The shard cannot be read or fetched, or is none; the cache cannot be written.
        """
        path = self._path(".index")
        index = _load_index(path)
        if index is None:
            with only_writer(self._path(".lock"), wait=True):
                index = _load_index(path) or self._make_index()
        return index

    def local(self) -> str | Path:
        """The archive on this machine, which another shard may replace at any time unless it is local; errors alike."""
        if self.is_local:
            return self.stored.address
        path = self._path(TAR)
        try:
            os.utime(path)
        except OSError:
            with only_writer(self._path(".lock"), wait=True):
                if not path.is_file():
                    self._bring(path)
        return path

    def read(self, start: int, size: int, where: str) -> bytes:
        """Some bytes of the archive; a `BrokenImageError` that begins with `where` if it ends before."""
        while True:
            try:
                with open(self.local(), "rb", buffering=0) as file:
                    file.seek(start)
                    content = file.read(size)
                break
            except FileNotFoundError:
                if self.is_local:
                    raise AfaError(f"{self}: is gone; put it back") from None
            except OSError as error:
                raise BrokenImageError(f"{where}: cannot be read ({error.strerror}); copy the shard anew") from None
        if len(content) < size:
            raise BrokenImageError(f"{where}: the shard ends before it; copy the shard anew")
        return content

    def _path(self, suffix: str) -> Path:
        return self._cache.folder / f"{self.stored.key}{suffix}"

    def _make_index(self) -> Index:
        path = Path(self.stored.address) if self.is_local else self._path(TAR)
        tags: list[Any] | None = None
        labels: list[str] = []
        if not self.is_local and (self.is_repacked or not path.is_file()):
            tags, labels = self._bring(path)
        index = index_tar(path, str(self))
        if tags is not None:
            index.tags, index.labels = tags, labels
        write_whole(self._path(".index"), msgspec.msgpack.encode((_VERSION, index)), remedy=_REMEDY)
        return index

    @property
    def is_repacked(self) -> bool:
        """Whether it is no archive, so that its images are named by their rows."""
        return not self.stored.address.lower().endswith(TAR)

    def _bring(self, path: Path) -> tuple[list[Any] | None, list[str]]:
        """Fetch the shard, and repack it if it is no archive: what `write_tar` returns then. The lock is held."""
        self._cache.make_room(self.stored.size)
        source = Path(self.stored.address)
        if not self.stored.is_local:
            source = self._path(f".fetched-{source.suffix.lower()[1:]}")
            fetch(self.stored, source, retries=self._cache.retries)
        if not self.is_repacked:
            source.replace(path)
            return None, []
        found: list[tuple[list[Any], list[str]]] = []
        try:
            write_whole(path, lambda file: found.append(write_tar(source, file, str(self))), remedy=_REMEDY)
        finally:
            if not self.stored.is_local:
                source.unlink(missing_ok=True)
        return found[0]


def _load_index(path: Path) -> Index | None:
    try:
        version, content = msgspec.msgpack.decode(path.read_bytes(), type=tuple[int, Index])
    except (OSError, msgspec.MsgspecError):
        return None
    return content if version == _VERSION else None


class Shards:
    """The images of some shards: some 30 bytes of memory for each, beside its key.

    Attributes:
        shards: The S shards.
        first: (S + 1,) first row of each shard, and the number of rows.
        faults: As of `Index`, of all shards.
    """

    def __init__(self, shards: Sequence[Shard], look: Callable[[Shard, Index], object] = lambda *_: None) -> None:
        """Read the indices; `look` sees each, in the order of the shards.

        Raises:
            AfaError: As `Shard.index`.
        """
        self.shards = tuple(shards)
        self.faults: list[str] = []
        self._keys: list[tuple[bytes, NDArray[np.int32]]] = []
        self._suffixes: list[str] = []
        places, kinds, counts = [], [], [0]
        for shard in self.shards:
            index = shard.index()
            look(shard, index)
            self.faults += index.faults
            texts = [key.encode() for key in index.keys]
            self._keys.append((b"".join(texts), np.cumsum([0, *map(len, texts)], dtype=np.int32)))
            self._suffixes += [each for each in dict.fromkeys(index.suffixes) if each not in self._suffixes]
            kinds.append(np.array([self._suffixes.index(each) for each in index.suffixes], dtype=np.int8))
            columns = (index.starts, index.sizes, index.mask_starts, index.mask_sizes)
            places.append(np.array(columns, dtype=np.int64)[: 4 if any(index.mask_sizes) else 2])
            counts.append(len(texts))
        self._places, self._kinds = places, kinds
        self.first = np.cumsum(counts)
        self._first: list[int] = self.first.tolist()

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def names(self) -> Column[str]:
        """Name of each image: that of its shard, and its key."""
        return Column(self._name, np.arange(len(self)))

    @cached_property
    def paths(self) -> Column[MemberPath]:
        """Path of each image."""
        return Column(self._path, np.arange(len(self)))

    def mask(self, row: int) -> MemberPath | None:
        """Path of the mask of an image, if there is one."""
        shard, place = self._locate(row)
        places = self._places[shard]
        if len(places) == 2 or not places[3, place]:
            return None
        return self._member(shard, place, f"{MASK}.png", places[2:])

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask."""
        return any(len(places) == 4 for places in self._places)

    def _path(self, row: int) -> MemberPath:
        shard, place = self._locate(row)
        return self._member(shard, place, self._suffixes[self._kinds[shard][place]], self._places[shard])

    def _member(self, shard: int, place: int, suffix: str, places: NDArray[np.int64]) -> MemberPath:
        archive = self.shards[shard]
        start, size = places[:2, place].tolist()
        return MemberPath.of(archive, f"{archive}/{self._key(shard, place)}{suffix}", start, size)

    def _locate(self, row: int) -> tuple[int, int]:
        shard = bisect_right(self._first, row) - 1
        return shard, row - self._first[shard]

    def _key(self, shard: int, place: int) -> str:
        text, ends = self._keys[shard]
        return text[ends[place] : ends[place + 1]].decode()

    def _name(self, row: int) -> str:
        shard, place = self._locate(row)
        return f"{self.shards[shard].name}/{self._key(shard, place)}"


def index_tar(path: Path, address: str) -> Index:
    """Look through an archive: KEY.jpg or another image, KEY.json, KEY.cls or KEY.txt, and KEY.mask.png are a sample.

    What cannot be read, or would be written to another place than below the output, is left out and listed as a fault.
    Messages call the archive `address`.

    Raises:
        AfaError: It is no archive, or is compressed.
    """
    samples: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for name, start, size, content in _members(path, address, faults):
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        is_mask = stem.endswith(MASK) and suffix == ".png"
        if suffix not in IMAGE_SUFFIXES and suffix not in _TEXTS:
            continue
        key, part = (stem.removesuffix(MASK), "mask") if is_mask else (stem, suffix)
        if is_litter(key.rpartition("/")[2]):
            continue
        if not is_plain(key) or {"", ".", ".."} & set(key.split("/")) or "\\" in key:
            faults.append(f"{address}: the name {shown(name)} leads elsewhere or has control characters; rename it")
            continue
        sample = samples.setdefault(key, {})
        part = "image" if part in IMAGE_SUFFIXES else part
        if part in sample:
            faults.append(f"{address}: {shown(name)} is there a second time; keep one of them")
            continue
        sample[part] = (start, size, suffix) if content is None else content
    index = Index(faults=faults[:_MAX_FAULTS])
    for key, sample in samples.items():
        if "image" in sample:
            _add(index, key, sample, address)
    return index


def _add(index: Index, key: str, sample: dict[str, Any], address: str) -> None:
    start, size, suffix = sample["image"]
    mask_start, mask_size, _ = sample.get("mask", (0, 0, ""))
    index.keys.append(key)
    index.suffixes.append(suffix)
    index.starts.append(start)
    index.sizes.append(size)
    index.mask_starts.append(mask_start)
    index.mask_sizes.append(mask_size)
    try:
        index.tags.append(_tags(sample))
    except ValueError as error:
        index.tags.append(None)
        index.faults.append(f"{address}, {key}: its tags cannot be read ({error}); taken as unknown")


def _tags(sample: dict[str, Any]) -> Any:
    """What the texts of a sample say of its tags; a `ValueError` if that is no JSON or not UTF-8."""
    texts = {suffix: sample[suffix].decode("utf-8-sig").strip() for suffix in _TEXTS if suffix in sample}
    if ".json" in texts:
        content = json.loads(texts[".json"])
        if isinstance(content, dict) and (stated := stated_tags(content)):
            return stated
        if isinstance(content, list):
            return content
    if ".cls" in texts:
        text = texts[".cls"]
        return int(text) if text.lstrip("-").isdecimal() else [text]
    return texts[".txt"].replace("\n", ";") if ".txt" in texts else None


def _members(path: Path, address: str, faults: list[str]) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Name, start, length and, of texts, contents of the files of an archive."""
    length, end = path.stat().st_size, 0
    try:
        with path.open("rb") as file, tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all
                end = tar.offset
                if not member.isreg() or member.offset_data + member.size > length:
                    continue
                content = None
                if member.name.lower().endswith(_TEXTS):
                    file.seek(member.offset_data)
                    content = file.read(min(member.size, _MAX_TEXT))
                yield member.name.removeprefix("./"), member.offset_data, member.size, content
            file.seek(end)
            if not end or file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                faults.append(f"{address}: is cut short or broken at byte {min(end, length):,}; copy it anew")
    except tarfile.TarError as error:
        if not end:
            raise AfaError(f"{address}: is no tar archive without compression ({error}); pack it anew") from None
        faults.append(f"{address}: is cut short or broken at byte {min(end, length):,}; copy it anew")
    except OSError as error:
        raise AfaError(f"{address}: cannot be read ({error.strerror}); copy it anew") from None
