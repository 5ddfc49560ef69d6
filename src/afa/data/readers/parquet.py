"""Parquet or Arrow files of the `datasets` library, with the images within: repacked as an archive, row by row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from afa.data.readers.table import SINGLE_TAG_COLUMNS, TAG_COLUMNS
from afa.errors import AfaError, first_line

_BATCH: Final = 64  # rows that are in memory at once
_SUFFIXES: Final = {b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"II*\0": ".tif", b"MM\0*": ".tif"}


def write_tar(source: Path, target: BinaryIO, address: str) -> tuple[list[Any], list[str]]:
    """Write the images of a Parquet or Arrow file as an archive, named by their rows; messages call the file `address`.

    Returns:
        What the column of tags holds, a list with a name in place of a single one; and the names of its classes, where
        the file knows them.

    Raises:
        AfaError: The file cannot be read, or has no images or no tags; pyarrow is not installed.
    """
    try:
        return _write_tar(source, target, address)
    except (AfaError, OSError) as error:
        if isinstance(error, AfaError) or error.errno is not None:  # those of pyarrow have no number
            raise
        raise AfaError(f"{address}: cannot be read ({first_line(error)}); download it anew") from None
    except Exception as error:  # pyarrow raises nearly anything on a broken file
        raise AfaError(f"{address}: cannot be read ({first_line(error)}); download it anew") from None


def _write_tar(source: Path, target: BinaryIO, address: str) -> tuple[list[Any], list[str]]:
    values: list[Any] = []
    labels: list[str] = []
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for schema, batch in _batches(source, address):
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
            features = features.get("features", {})
            image = next(
                (name for name in schema.names if _is_image(schema.field(name).type, features.get(name))), None
            )
            tags = next((name for name in TAG_COLUMNS + SINGLE_TAG_COLUMNS if name in schema.names), None)
            if image is None or tags is None:
                columns, lacks = ", ".join(schema.names), "images" if image is None else "tags, such as label"
                raise AfaError(
                    f"{address}: no column of {lacks} (there are {columns[:200]}); add it, or use a table of tags"
                )
            feature = features.get(tags, {})
            labels = list(feature.get("names") or feature.get("feature", {}).get("names") or ())
            for value, tag in zip(batch.column(image).to_pylist(), batch.column(tags).to_pylist(), strict=True):
                content = value.get("bytes") if isinstance(value, dict) else value
                if not content:
                    raise AfaError(
                        f"{address}, row {len(values)}: holds no image; use the images that it names, and a table "
                        "of tags"
                    )
                member = tarfile.TarInfo(f"{len(values):06d}{_SUFFIXES.get(content[:4], '.jpg')}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                values.append([tag] if isinstance(tag, str) else tag)
    return values, labels


def _batches(file: Path, address: str) -> Iterator[tuple[Any, Any]]:
    """Schema and rows of a file, a few at a time."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise AfaError(f"{address}: to read it, pyarrow is needed; install it: pip install pyarrow") from None
    if address.lower().endswith(".parquet"):
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
