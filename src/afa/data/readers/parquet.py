"""Data sets of the `datasets` library that are stored as Parquet or Arrow files, with the images within.

The images are unpacked once, into a folder of the machine's cache, and read from there like any others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import track

from afa.config import DataConfig
from afa.data.classes import check_classes, folded, stated_classes
from afa.data.dataset import TagTable
from afa.data.files import path_below, subfolders
from afa.data.readers import tag_files
from afa.data.readers.datasets import tag_entry
from afa.data.readers.table import SINGLE_TAG_COLUMNS, TAG_COLUMNS
from afa.data.split import SIDES, UNSTATED, side_of
from afa.errors import AfaError, first_line

_PLACES: Final = frozenset(("data", "default", *SIDES))
_NAMES: Final = "names.json"  # of ClassLabel
_BATCH: Final = 64  # rows that are in memory at once
_SUFFIXES: Final = {b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"II*\0": ".tif", b"MM\0*": ".tif"}


def read(root: Path, data: DataConfig) -> TagTable | None:
    """Unpack the images of the files, unless that is done, and read the tags.

    Returns:
        A row for each image with an entry; None where there is no such file.

    Raises:
        AfaError: A file cannot be read, or has no images or no tags; its classes are numbers without names; the images
            cannot be unpacked; pyarrow is not installed.
    """
    files = _find_files(root)
    if not files:
        return None
    stated = stated_classes(data, root)
    folder = _cache_folder(files, stated.names)
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
            try:
                _unpack(files, partial, stated.names)
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise AfaError(
                f"{folder}: the images of {files[0]} cannot be unpacked there ({error.strerror}); free space, or set "
                "XDG_CACHE_HOME to another folder"
            ) from None
    nothing = tag_files.nothing_names(data.negatives, stated.names)
    names = json.loads((folder / _NAMES).read_bytes())
    classes = data.classes or (*stated.names, *(name for name in names if folded(name) not in nothing))
    if classes:
        check_classes(classes, str(files[0]))
    plain = replace(data, classes=classes, tags="", layout="hf", image_dir=DataConfig().image_dir)
    try:
        table = tag_files.read(folder, plain)
    except AfaError as error:  # of the file that users know
        raise AfaError(str(error).replace(str(folder / "metadata.jsonl"), str(files[0]))) from None
    assert table is not None, folder
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    origin = f"Hugging Face images in {path_below(files[0], root)}{more}, unpacked to {folder}"
    return replace(table, origin=origin, colors=stated.colors, words=stated.words)


def _find_files(root: Path) -> list[Path]:
    folders = (root, *subfolders(root, _PLACES))
    found = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".parquet", ".arrow")]
    return [path for path in found if path.is_file() and not path.name.startswith((".", "cache-"))]


def _cache_folder(files: Sequence[Path], names: Sequence[str]) -> Path:
    """Where the images are unpacked to: another folder for other contents."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([2, states, list(names)]).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "afa" / "unpacked" / key


def _unpack(files: Sequence[Path], folder: Path, names: Sequence[str]) -> None:
    """Write the images, metadata.jsonl, and the names that the files state beside those that are known."""
    stated: dict[str, None] = {}
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as rows:
        console, quiet = Console(stderr=True), not sys.stderr.isatty()
        for file in track(files, "Unpacking images", console=console, disable=quiet):
            side = side_of(file.stem)
            side = SIDES.get(file.parent.name.lower(), UNSTATED) if side == UNSTATED else side
            word = next((name for name, each in SIDES.items() if each == side), "")
            try:
                stated |= dict.fromkeys(_unpack_file(file, folder, word, rows, names))
            except (AfaError, OSError):
                raise
            except Exception as error:  # pyarrow raises nearly anything on a broken file
                raise AfaError(f"{file}: cannot be read ({first_line(error)}); download it anew") from None
    (folder / _NAMES).write_text(json.dumps([name for name in stated if name not in names]), encoding="utf-8")


def _unpack_file(file: Path, folder: Path, side: str, rows: IO[str], names: Sequence[str]) -> Sequence[str]:
    """Write the images and rows of a file; the classes that it states."""
    (folder / (side or "images")).mkdir(exist_ok=True)
    labels: Sequence[str] = ()
    place = 0
    for schema, batch in _batches(file):
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        image = next((name for name in schema.names if _is_image(schema.field(name).type, features.get(name))), None)
        tags = next((name for name in TAG_COLUMNS + SINGLE_TAG_COLUMNS if name in schema.names), None)
        if image is None or tags is None:
            columns, lacks = ", ".join(schema.names), "images" if image is None else "tags, such as label"
            raise AfaError(f"{file}: no column of {lacks} (there are {columns[:200]}); add it, or use a table of tags")
        feature = features.get(tags, {})
        labels = feature.get("names") or feature.get("feature", {}).get("names") or ()
        for value, tag in zip(batch.column(image).to_pylist(), batch.column(tags).to_pylist(), strict=True):
            content = value.get("bytes") if isinstance(value, dict) else value
            if not content:
                raise AfaError(
                    f"{file}, row {place}: holds no image; use the images that it names, and a table of tags"
                )
            name = f"{side or 'images'}/{file.stem}-{place:06d}{_SUFFIXES.get(content[:4], '.jpg')}"
            (folder / name).write_bytes(content)
            found = tag_entry(tag, labels or names or None, f"{file}, row {place}: {tags}")
            known = None if found.unknown is None else found.tags
            rows.write(json.dumps({"file_name": name, "labels": known, "split": side}) + "\n")
            place += 1
    return labels


def _batches(file: Path) -> Iterator[tuple[Any, Any]]:
    """Schema and rows of a file, a few at a time."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise AfaError(f"{file}: to read it, pyarrow is needed; install it: pip install pyarrow") from None
    if file.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=_BATCH):
                yield source.schema_arrow, batch
        return
    with pyarrow.memory_map(str(file)) as stream, pyarrow.ipc.open_stream(stream) as source:
        for batch in source:
            yield source.schema, batch


def _is_image(kind: Any, feature: Any) -> bool:
    """Whether a column holds images: as the library says, else by its type."""
    if isinstance(feature, dict) and "_type" in feature:
        return bool(feature["_type"] == "Image")
    return "bytes: binary" in str(kind) or str(kind) in ("binary", "large_binary")
