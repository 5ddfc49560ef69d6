"""Data sets in shards, on this machine or in a store: tar archives as of WebDataset, and Parquet or Arrow files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from afa.config import DataConfig
from afa.data.classes import NO_TAG, check_classes, stated_classes
from afa.data.dataset import TagTable, Windows
from afa.data.files import is_litter, path_below
from afa.data.images import IMAGE_SUFFIXES
from afa.data.readers.base import Contents, TagEntry, entry_rows
from afa.data.readers.datasets import tag_entry
from afa.data.readers.table import SINGLE_TAG_COLUMNS, TAG_COLUMNS, read_objects
from afa.data.readers.tag_files import found_tags
from afa.data.shards import SUFFIXES, TAR, Index, Shard, ShardCache, Shards
from afa.data.split import SIDES, side_of
from afa.data.stores import expand, find_files, is_remote, read_bytes
from afa.elastic import rank_and_count
from afa.errors import AfaError, shown
from afa.runs.files import write_whole
from afa.runtime import image_progress, read_ahead

_PLACES: Final = frozenset(("data", "default", *SIDES))
_CLASSES: Final = "classes.txt"
_TAGS: Final = frozenset(TAG_COLUMNS + SINGLE_TAG_COLUMNS)


def names_shards(text: str) -> bool:
    """Whether a text names shards by itself: an address, a pattern with braces, or a file."""
    path = Path(text)
    if is_remote(text):
        return True
    if path.suffix.lower() in SUFFIXES:
        return not path.is_dir()
    return not path.exists() and any(Path(each).suffix.lower() in SUFFIXES for each in expand(text)[:1])


def holds_shards(folder: Path, suffixes: Collection[str] = SUFFIXES, *, only: bool = False) -> bool:
    """Whether a folder or its folders of a split have shards, with `only` beside nothing else that could be images."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries if not is_litter(entry.name)]
    has_shards = False
    for name, is_folder in found:
        suffix = os.path.splitext(name)[1].lower()
        if is_folder and name.lower() in _PLACES:
            has_shards |= any(os.path.splitext(each)[1].lower() in suffixes for each in os.listdir(folder / name))
        elif only and (is_folder or suffix in IMAGE_SUFFIXES or suffix == ".csv"):
            return False
        else:
            has_shards |= suffix in suffixes
    return has_shards


def home(text: str) -> Path:
    """The folder that lists and classes of shards lie in: theirs, or for those of a store one of this machine."""
    if not is_remote(text):
        path = Path(expand(text)[0])
        return path if path.is_dir() else path.parent
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return ShardCache(DataConfig()).folder / "stores" / key


def open_shards(texts: Sequence[str], data: DataConfig) -> list[Shard]:
    """The shards that files, folders, patterns with braces and addresses name, in their order, each once.

    Raises:
        AfaError: There are none; the store does not answer.
    """
    found: dict[str, Shard] = {}
    cache, names = ShardCache(data), set[str]()
    for text in texts:
        for each in [text] if Path(text).exists() else expand(text):
            stored = find_files(each, SUFFIXES, retries=data.store_retries)
            if not stored:
                raise AfaError(f"{each}: no shard here; looked for {', '.join(sorted(SUFFIXES))}")
            for file in stored:
                below = file.address.removeprefix(each).lstrip("/") or file.address.rpartition("/")[2]
                name = os.path.splitext(below if is_remote(each) or Path(each).is_dir() else Path(each).name)[0]
                if file.address in found:
                    continue
                if name in names:  # of another folder
                    name = "/".join([*Path(file.address).parts[-2:-1], name])
                if name in names:
                    raise AfaError(f"{file.address}: another shard is named {shown(name)}, too; rename one of them")
                names.add(name)
                found[file.address] = Shard(file, name, cache)
    return list(found.values())


def read_indices(shards: Sequence[Shard]) -> dict[Shard, AfaError]:
    """Make the indices of shards that have none, several at a time, and return what failed.

    Each of several processes begins at another shard.
    """
    failed: dict[Shard, AfaError] = {}
    rank, count = rank_and_count()
    turn = len(shards) * rank // count
    missing = [shard for shard in (*shards[turn:], *shards[:turn]) if not shard.has_index]
    if missing:
        with image_progress("index of shards", total=len(missing), enabled=not rank, unit="shards") as tell:
            for shard, reading in read_ahead(Shard.index, missing):
                try:
                    reading.result()
                except AfaError as error:
                    failed[shard] = error
                tell(1)
    return failed


class _Tags:
    """The tags of shards, collected one shard at a time: equal ones are kept once."""

    def __init__(self, data: DataConfig, names: Sequence[str]) -> None:
        self._data, self._names = data, names
        self._codes: dict[tuple[tuple[str, ...], tuple[str, ...] | None], int] = {}
        self.chosen: list[NDArray[np.int64]] = []
        self.sides: list[NDArray[np.int8]] = []
        self.declared: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def add(self, shard: Shard, index: Index) -> None:
        """Take the tags of a shard."""
        labels = index.labels or list(self._names) or None
        pairs = zip(index.keys, index.tags, strict=True)
        wheres = (f"{shard}, row {int(key)}: the tag" if shard.is_repacked else f"{shard}, {key}" for key in index.keys)
        objects = ((w, _table_object(key, tags, labels, w)) for w, (key, tags) in zip(wheres, pairs, strict=True))
        contents: Contents = read_objects(str(shard), objects, self._names)
        contents = contents._replace(classes=(*index.labels, *contents.classes))
        found = found_tags(contents, self._names, self._data.negatives, known=frozenset(index.keys))
        self.declared |= dict.fromkeys(found.classes if found.declared else ())
        self.notes |= dict.fromkeys(found.notes)
        entries = found.entries.values()
        codes = [self._codes.setdefault((each.tags, each.unknown), len(self._codes)) for each in entries]
        self.chosen.append(np.array(codes, dtype=np.int64))
        side = _side(shard.name)
        sides = [side_of(each.split) if each.split else side for each in entries]
        self.sides.append(np.array(sides, dtype=np.int8))

    def rows(self, classes: Sequence[str]) -> NDArray[np.int8]:
        """(N, C) as of `entry_rows`."""
        kinds = [TagEntry("", "", tags, unknown=unknown) for tags, unknown in self._codes]
        return entry_rows(kinds, classes)[np.concatenate(self.chosen)]

    @property
    def met(self) -> list[str]:
        """The tags, sorted."""
        return sorted({tag for tags, _ in self._codes for tag in tags})


def read(root: Path, data: DataConfig) -> TagTable:
    """Read the tags of shards, and where their images lie.

    Args:
        root: Folder of lists and classes; `home` of shards that `data.root` names.
        data: Where the shards are.

    Raises:
        AfaError: There are none; one cannot be read or fetched, unless `data.skip_broken` says so; an unknown class.
    """
    shards = open_shards([data.root], data)
    if is_remote(data.root):
        _fetch_classes(root, data)
    listed = stated_classes(data, root)
    tags = _Tags(data, listed.names)
    failed = read_indices(shards)
    if failed and (not data.skip_broken or len(failed) == len(shards)):
        raise next(iter(failed.values()))
    found = Shards([shard for shard in shards if shard not in failed], tags.add)
    classes = listed.names or tuple(tags.declared) or tuple(tags.met)
    if not listed.names:
        classes = (*classes, *(name for name in tags.met if name not in classes))
        check_classes(classes, str(shards[0]), none=NO_TAG)
    is_hf = not any(str(shard).lower().endswith(TAR) for shard in shards)
    first = shards[0].stored.address
    more = f" and {len(shards) - 1:,} more" if len(shards) > 1 else ""
    kind = "Hugging Face images in " if is_hf else "shards "
    place = path_below(Path(first), root) if not is_remote(first) else first
    repacked = "" if shards[0].is_local else f", kept in {ShardCache(data).folder}"
    faults = [*map(str, failed.values()), *found.faults]
    notes = [*faults[:20], *([f"and {len(faults) - 20:,} more faults of shards"] if len(faults) > 20 else [])]
    return TagTable(
        kind="hf" if is_hf else "shards",
        origin=f"{kind}{place}{more}{repacked}",
        classes=classes,
        tags=tags.rows(classes),
        sides=np.concatenate(tags.sides),
        folder=root,
        paths=found.paths,
        names=found.names,
        colors=listed.colors,
        words=listed.words,
        declared=bool(listed.names or tags.declared),
        notes=(*notes, *tags.notes),
        mask_of=found.mask if found.has_masks else None,
        windows=_windows(found, data),
    )


def _fetch_classes(root: Path, data: DataConfig) -> None:
    """Copy the list of classes that lies beside shards of a store."""
    folder = data.root.rpartition("/")[0] if names_file(data.root) else data.root.rstrip("/")
    content = read_bytes(f"{folder}/{_CLASSES}", retries=data.store_retries)
    if content is not None:
        write_whole(root / _CLASSES, content)
    elif (root / _CLASSES).is_file():
        (root / _CLASSES).unlink()
    root.mkdir(parents=True, exist_ok=True)


def names_file(address: str) -> bool:
    """Whether an address ends as that of a shard does."""
    return os.path.splitext(address)[1].lower() in SUFFIXES


def _windows(found: Shards, data: DataConfig) -> Windows | None:
    """What training may shuffle over where shards are fetched and do not all stay here."""
    sizes = [shard.stored.size for shard in found.shards if not shard.is_local]
    limit = data.shard_gib * 2**30
    if sum(sizes) <= limit / 2:
        return None
    shard = np.repeat(np.arange(len(found.shards), dtype=np.int32), np.diff(found.first))
    return Windows(shard, max(1, int(limit / 4 / (sum(sizes) / len(sizes)))), len(found.shards))


def _side(name: str) -> int:
    """The side that the folder or the name of a shard says."""
    folder, _, last = name.rpartition("/")
    return SIDES.get(folder.rpartition("/")[2].lower(), side_of(last))


def _named(value: Any, labels: Sequence[str] | None, where: str) -> Any:
    """A value of a column of tags, with the names of classes in place of numbers where these are known."""
    items = value if isinstance(value, list) else [value]
    if labels is None or not items or not all(type(item) is int for item in items):
        return value
    entry = tag_entry(value, labels, where)
    return None if entry.unknown is None else list(entry.tags)


def _table_object(key: str, tags: Any, labels: Sequence[str] | None, where: str) -> dict[str, Any]:
    """What a shard says of an image, as an object of a table."""
    if isinstance(tags, dict):
        stated = {name: _named(tags[name], labels, where) for name in tags if name.lower() in _TAGS}
        return {"file_name": key, **tags, **stated}
    if isinstance(tags, str):
        return {"file_name": key, "tags": tags}
    entry = tag_entry(tags, labels, where)
    return {"file_name": key, "tags": None if entry.unknown is None else list(entry.tags)}
