"""Shards of small images, and a store that fails at times: a file system of fsspec's own kind."""

from __future__ import annotations

import io
import json
import resource
import signal
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from afa.data.palette import index_png


class FailingStore(MemoryFileSystem):  # type: ignore[misc]
    """`failing://`: keeps files in memory; the next `failures` calls that move bytes fail, as do all if below 0."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0
    calls = 0
    cut = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        text = path.removeprefix("failing://").strip("/")
        return f"/{text}" if text else ""

    def _stumble(self) -> None:
        cls = type(self)
        cls.calls += 1
        if cls.failures:
            cls.failures -= 1
            raise OSError("503 Slow Down")

    def get_file(self, rpath: str, lpath: str, **named: Any) -> None:
        self._stumble()
        super().get_file(rpath, lpath, **named)
        if self.cut:  # as a connection that breaks off without a word
            type(self).cut -= 1
            Path(lpath).write_bytes(Path(lpath).read_bytes()[:100])

    def put_file(self, lpath: str, rpath: str, **named: Any) -> None:
        self._stumble()
        super().put_file(lpath, rpath, **named)

    def cat_file(self, path: str, *places: Any, **named: Any) -> bytes:
        self._stumble()
        content: bytes = super().cat_file(path, *places, **named)
        return content

    def find(self, path: str, *places: Any, **named: Any) -> Any:
        self._stumble()
        return super().find(path, *places, **named)


@contextmanager
def empty_store() -> Iterator[type[FailingStore]]:
    """`failing://` without files or failures, of the class that the caller knows: doctests import this module, too."""
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    FailingStore.store.clear()
    FailingStore.failures = FailingStore.calls = FailingStore.cut = 0
    yield FailingStore
    FailingStore.store.clear()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond so many bytes of a file, as a full disk does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def jpeg(shade: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture that is bright on one side, so that no two shades are copies."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2] = shade, 255 - shade, (7 * shade) % 256
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar_of(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    """An archive of files by name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def samples(count: int, *, start: int = 0, classes: tuple[str, ...] = ("cat", "dog"), masks: bool = False) -> bytes:
    """A shard of images with one tag each, in turn."""
    members: dict[str, bytes] = {}
    for number in range(start, start + count):
        key = f"{number:05d}"
        members[f"{key}.jpg"] = jpeg(number)
        members[f"{key}.json"] = json.dumps({"tags": [classes[number % len(classes)]], "url": "x"}).encode()
        if masks:
            label = np.full((16, 24), number % len(classes) + 1, dtype=np.uint8)
            label[:, 12:] = 0
            members[f"{key}.mask.png"] = index_png(label)
    return tar_of(members)


def write_shards(folder: Path, num_shards: int = 2, size: int = 6, **named: Any) -> Path:
    """Shards 0000.tar, 0001.tar, ... of `size` images each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_shards):
        (folder / f"{number:04d}.tar").write_bytes(samples(size, start=size * number, **named))
    return folder
