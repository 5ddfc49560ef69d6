"""Where images in shards come from, a shard at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.config import DataConfig
from afa.data.readers.shards import holds_shards, names_shards, open_shards
from afa.data.shards import Shard, Shards
from afa.errors import AfaError

Images = Mapping[str, Any]
"""Images by name: their paths, or their rows."""


@dataclass(frozen=True)
class Source:
    """Some of the images of a call, such as those of a shard.

    Attributes:
        name: What the shard of their masks is called.
        state: A text that is another one when they change.
        find: Finds them, and what is wrong with others, a line each; an `AfaError` if that is impossible.
        bring: Brings their pixels to this machine.
        prefix: What their names begin with, and those of their masks in the shard do not.
    """

    name: str
    state: Callable[[], str]
    find: Callable[[], tuple[Images, Sequence[str]]]
    bring: Callable[[], object] = lambda: None
    prefix: str = ""

    def read(self, *, bring: bool = True) -> tuple[Images | None, Sequence[str]]:
        """Find the images, and bring them; None, and a line, where that is impossible."""
        try:
            found = self.find()
            if bring:
                self.bring()
        except AfaError as error:
            return None, (str(error),)
        return found

    @classmethod
    def of(cls, name: str, images: Callable[[], Images]) -> Source:
        """Images with which nothing is wrong."""
        return cls(name, lambda: _digest(images()), lambda: (images(), ()))


def shard_sources(texts: Sequence[str], data: DataConfig) -> list[Source]:
    """The shards that texts name. One in a store is fetched when its images are looked for the first time.

    Raises:
        AfaError: There are none; the store does not answer.
    """

    def find(shard: Shard) -> tuple[Images, Sequence[str]]:
        found = Shards([shard])
        return dict(zip(found.names, found.paths, strict=True)), found.faults

    def source(shard: Shard) -> Source:
        return Source(shard.name, lambda: str(shard.stored.size), lambda: find(shard), shard.local, f"{shard.name}/")

    return [source(shard) for shard in open_shards(texts, data)]


def is_sharded(text: str) -> bool:
    """Whether a text names shards, or a folder of shards."""
    return names_shards(text) or (Path(text).is_dir() and holds_shards(Path(text), only=True))


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()[:16]
