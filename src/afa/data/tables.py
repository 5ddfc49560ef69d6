"""Tags from tables: CSV, TSV, JSON and JSON Lines, as people and other tools write them.

A table names an image per row, in a column such as `file` or `image`. Its tags stand in a column such as `tags`
(several, separated) or `label` (one), or every class has a column of zeros and ones. Which file on disk a row means
is left to `afa.data.layout`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from afa.data.json_stream import iterate_json
from afa.errors import AfaError

IMAGE_COLUMNS: Final = (
    "file_name", "filename", "file", "image", "image_name", "image_path", "img", "path", "filepath", "file_path",
    "name", "image_id", "id",
)  # fmt: skip
"""Columns, or keys of JSON objects, that name the image; the first that exists counts."""

TAG_COLUMNS: Final = ("tags", "labels", "classes", "categories")
"""Columns that hold several tags of an image."""

SINGLE_TAG_COLUMNS: Final = ("tag", "label", "class", "category", "class_name")
"""Columns that hold one tag, which may have spaces; an image with several has several rows."""

SPLIT_COLUMNS: Final = ("split", "subset", "set")
"""Columns that say which images train and which are for validation."""

_MAX_LINE: Final = 1_000_000  # characters; the longest row of 254 classes is far below
_TRUE: Final = frozenset(("1", "1.0", "true", "yes"))
_FALSE: Final = frozenset(("", "0", "0.0", "false", "no", "-1"))


class TagEntry(NamedTuple):
    """What a file of tags says of one image.

    Attributes:
        where: File and line, for messages.
        image: The image as the file writes it.
        tags: Its tags as the file writes them.
        split: Where it belongs, as the file writes it; empty where it does not say.
    """

    where: str
    image: str
    tags: tuple[str, ...]
    split: str = ""


class Row(NamedTuple):
    """A row of a table: where it stands, and its values by column."""

    where: str
    values: Mapping[str, Any]


def read_table(path: Path, classes: Sequence[str] = ()) -> tuple[tuple[str, ...], list[TagEntry]]:
    """Read a CSV, TSV, JSON or JSON Lines table.

    Args:
        path: The file; its suffix says the format, any but .tsv, .json, .jsonl and .ndjson being CSV.
        classes: The class names where they are known: a text that is one of them is one tag, spaces and all.

    Returns:
        The class names in the order of the one-hot columns, none without such columns; and the entries.

    Raises:
        AfaError: The file cannot be read, is malformed, or has no column of images or of tags.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return (), _entries(path, _json_rows(path), classes)
        if suffix in (".jsonl", ".ndjson"):
            return (), _entries(path, _json_line_rows(path), classes)
        return _read_csv(path, classes)
    except UnicodeDecodeError as error:
        kind = "JSON Lines" if suffix in (".jsonl", ".ndjson") else "CSV"
        advice = "as text" if kind != "CSV" else "as text with the header image,tags"
        raise AfaError(f"{path}: not a {kind} in UTF-8 ({error}); save it {advice}") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None


def shown(text: object) -> str:
    """A value as messages show it: one line, cut where it is long."""
    quoted = repr(text)
    return quoted if len(quoted) <= 120 else f"{quoted[:100]}... ({len(quoted)} characters)"


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, none of them boundless."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise AfaError(f"{path}, line {number}: longer than {_MAX_LINE:,} characters; write one image a line")
            if "\0" in line:
                raise AfaError(f"{path}, line {number}: holds a NUL byte; save the file as plain text in UTF-8")
            yield line


def _read_csv(path: Path, known_classes: Sequence[str]) -> tuple[tuple[str, ...], list[TagEntry]]:
    lines = _lines(path)
    first = next(lines, "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else next((c for c in ",;\t" if c in first), ",")
    try:
        table = csv.reader(_chain(first, lines), delimiter=delimiter, skipinitialspace=True, strict=True)
        header = [cell.strip() for cell in next(table, [])]
        columns = {name.lower(): name for name in header}
        image_column = _first(IMAGE_COLUMNS, columns)
        tag_column = _first(TAG_COLUMNS + SINGLE_TAG_COLUMNS, columns)
        if image_column is None or len(header) < 2:
            raise AfaError(f"{path}: the first line is {shown(','.join(header))}; write the header image,tags")
        if len(columns) != len(header):
            raise AfaError(f"{path}: two columns have the same name; name each differently")
        rows = _csv_rows(path, table, header)
        if tag_column is not None:
            return (), _entries(path, rows, known_classes)
        others = {image_column, _first(SPLIT_COLUMNS, columns)}
        classes = tuple(name for name in header if name and name not in others)
        return classes, list(_one_hot_entries(rows, classes, image_column, _first(SPLIT_COLUMNS, columns)))
    except csv.Error as error:
        raise AfaError(f"{path}: not a CSV in UTF-8 ({error}); save it as text with the header image,tags") from None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _csv_rows(path: Path, table: Any, header: Sequence[str]) -> Iterator[Row]:
    for cells in table:
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        where = f"{path}, line {table.line_num}"
        if len(cells) != len(header):
            advice = (
                "write image,tags with spaces between the tags"
                if header == ["image", "tags"]
                else f"the header has {len(header)}; quote cells that hold the separator"
            )
            raise AfaError(f"{where}: {len(cells)} columns; {advice}")
        yield Row(where, dict(zip(header, cells, strict=True)))


def _one_hot_entries(
    rows: Iterable[Row], classes: Sequence[str], image_column: str, split_column: str | None
) -> Iterator[TagEntry]:
    for where, values in rows:
        tags = _one_hot(((name, values[name]) for name in classes), where)
        yield TagEntry(where, values[image_column].strip(), tags, values.get(split_column or "", "").strip())


def _one_hot(values: Iterable[tuple[str, Any]], where: str) -> tuple[str, ...]:
    """The classes whose value is true."""
    tags = []
    for name, value in values:
        text = str(value).strip().lower()
        if text in _TRUE:
            tags.append(sys.intern(name))
        elif text not in _FALSE:
            raise AfaError(
                f"{where}, column {shown(name)}: the value is {shown(value)}; write 0 or 1, "
                "or put the tags into one column named tags"
            )
    return tuple(tags)


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a list of objects, or of an object from image to tags."""
    for number, (key, value) in enumerate(iterate_json(path), start=1):
        where = f"{path}, entry {number}"
        if key:
            yield Row(where, {"file_name": key} | (value if _has_tags(value) else {"tags": value}))
        elif isinstance(value, dict):
            yield Row(where, value)
        else:
            raise AfaError(f'{where}: is {shown(value)}; write objects such as {{"file": "a.jpg", "tags": ["cat"]}}')


def _has_tags(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in TAG_COLUMNS + SINGLE_TAG_COLUMNS)


def _json_line_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AfaError(f"{where}: not valid JSON ({error}); write one object a line") from None
        if not isinstance(value, dict):
            raise AfaError(f'{where}: is {shown(value)}; write objects such as {{"file": "a.jpg", "tags": ["cat"]}}')
        yield Row(where, value)


def _first(names: Iterable[str], columns: Mapping[str, str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


class _Columns(NamedTuple):
    """Which keys of a row hold what; `single` where the tags are one to a row."""

    image: str | None
    tags: str | None
    split: str | None
    single: bool


def _columns(keys: Iterable[str]) -> _Columns:
    columns = {key.strip().lower(): key for key in keys}
    several = _first(TAG_COLUMNS, columns)
    return _Columns(
        _first(IMAGE_COLUMNS, columns),
        several or _first(SINGLE_TAG_COLUMNS, columns),
        _first(SPLIT_COLUMNS, columns),
        several is None,
    )


def _entries(path: Path, rows: Iterable[Row], classes: Sequence[str]) -> list[TagEntry]:
    """Entries of rows with a column of tags. A row without that column is an image without tags."""
    found: list[tuple[str, str, Any, str, bool]] = []
    columns = _columns(())
    keys: tuple[str, ...] = ()
    for where, values in rows:
        if tuple(values) != keys:
            keys = tuple(values)
            columns = _columns(keys)
        image = values[columns.image] if columns.image is not None else None
        if not isinstance(image, str):
            raise AfaError(f"{where}: no text that names the image; add one of {', '.join(IMAGE_COLUMNS[:4])}")
        tags = values[columns.tags] if columns.tags is not None else None
        split = values[columns.split] if columns.split is not None else ""
        found.append((where, image.strip(), tags, split.strip() if isinstance(split, str) else "", columns.single))
    cells = _Cells([tags for _, _, tags, _, _ in found if isinstance(tags, str)], classes, path)
    places: dict[str, int] = {}
    entries: list[TagEntry] = []
    for where, image, value, split, single in found:
        tags = cells.tags(value, single=single) if isinstance(value, str) else _listed_tags(value, where)
        if single and image in places:
            earlier = entries[places[image]]
            entries[places[image]] = earlier._replace(tags=(*earlier.tags, *tags))
        else:
            places[image] = len(entries)
            entries.append(TagEntry(where, image, tags, split))
    return entries


class _Cells:
    """Splits texts into tags, all texts of a file in the same way."""

    def __init__(self, texts: Iterable[str], classes: Sequence[str], path: Path) -> None:
        plain = {text for text in texts if not text.lstrip().startswith("[")}
        self.separator = next((mark for mark in "|;," if any(mark in text for text in plain)), None)
        self.classes = frozenset(classes)
        self.spaced = next((name for name in classes if len(name.split()) != 1), "")
        self.path = path
        self.known: dict[tuple[str, bool], tuple[str, ...]] = {}  # one tuple for all equal texts

    def tags(self, text: str, *, single: bool) -> tuple[str, ...]:
        if (text, single) not in self.known:
            self.known[text, single] = tuple(
                sys.intern(tag) for part in self._split(text, single) if (tag := part.strip())
            )
        return self.known[text, single]

    def _split(self, text: str, single: bool) -> list[str]:
        whole = text.strip()
        if whole in self.classes:
            return [whole]
        if whole.startswith("[") and whole.endswith("]"):  # a list that was written as text
            return [part.strip().strip("'\"") for part in whole[1:-1].split(",")]
        if single:
            return whole.split(self.separator) if self.separator in ("|", ";") else [whole]
        parts = whole.split(self.separator)
        if self.spaced and self.separator is None and len(parts) > 1:
            raise AfaError(
                f"{self.path}: tags are separated by spaces, and class {self.spaced!r} has one; "
                f"name it {'_'.join(self.spaced.split())} in the class list and here, or separate the tags by ;"
            )
        return parts


def _listed_tags(value: Any, where: str) -> tuple[str, ...]:
    """Tags of a value of JSON that is no text."""
    if value is None:
        return ()
    if isinstance(value, dict):
        return _one_hot(value.items(), where)
    tags = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool):
            item = _number(item, where)
        if not isinstance(item, str):
            raise AfaError(f"{where}: the tag {shown(item)} is no text; write the names of the classes")
        tags.append(sys.intern(item.strip()))
    return tuple(tag for tag in tags if tag)


def _number(value: int, where: str) -> str:
    if abs(value) > 10**9:
        raise AfaError(f"{where}: the tag is a number of many digits; write the names of the classes")
    return str(value)
