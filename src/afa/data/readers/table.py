"""Tables of tags: CSV, TSV, JSON and JSON Lines, as people and other tools write them.

A table names an image per row, in a column such as `file` or `image`. Its tags are in a column such as `tags`
(several, separated) or `label` (one), or every class has a column of zeros and ones.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from afa.data.encoding import open_guessed
from afa.data.images import image_name
from afa.data.readers.base import Contents, TagEntry, elements
from afa.errors import AfaError, shown

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
_FALSE: Final = frozenset(("", "0", "0.0", "false", "no"))
_NO_TAG: Final = frozenset(("-1", "-1.0", "?", "null", "nan"))  # unless a class list has it
_UNKNOWN: Final = _NO_TAG | {"none", "unknown"}


class _Tags(NamedTuple):
    """What a row says of an image, as in `TagEntry`."""

    present: tuple[str, ...]
    unknown: tuple[str, ...] | None = ()


class _Row(NamedTuple):
    """A row of a table as it is written; `single` if one row has one tag."""

    where: str
    image: str
    tags: Any
    split: str
    single: bool


class _Keys(dict[str, Any]):
    """Keys and values of an object that has no tags: classes, if no object of the file has any."""


class _Columns(NamedTuple):
    """Which columns, or keys of JSON, hold what; `single` where the tags are one to a row."""

    image: str | None
    tags: str | None
    split: str | None
    single: bool


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read a table: the class names in the order of its one-hot columns, none without such columns; and the entries.

    The suffix says the format: any but .tsv, .json, .jsonl and .ndjson is CSV. A text that is a known class is one
    tag, spaces and all.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _entries(path, _object_rows(_json_objects(path, content)), classes)
    try:
        file, guessed = open_guessed(path)
        with file:
            lines = _lines(path, file)
            if suffix in (".jsonl", ".ndjson"):
                found = _entries(path, _object_rows(_line_objects(path, lines)), classes)
            else:
                found = _read_csv(path, lines, classes)
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    if guessed:
        note = f"{path}: is not in UTF-8; read as cp1252 of Windows, as in {shown(guessed)}; if that is wrong, save "
        note += "it in UTF-8"
        found = found._replace(notes=(note, *found.notes))
    return found


def read_objects(where: Path | str, objects: Iterable[tuple[str, Any]], classes: Sequence[str]) -> Contents:
    """As `read`, of pairs of a place for messages and an object with the keys of JSON Lines."""
    return _entries(where, _object_rows(objects), classes)


def stated_tags(values: dict[str, Any]) -> dict[str, Any]:
    """What an object says of tags and split, perhaps nothing: keys of tags or parts, or classes with 0, 1 or null."""
    columns = _columns(values)
    if columns.tags is not None or "objects" in values:
        return {
            key: values[key] for key in (columns.tags, columns.split, "objects") if key is not None and key in values
        }
    usual = {*IMAGE_COLUMNS, *SPLIT_COLUMNS}
    flags = {key: value for key, value in values.items() if key.lower() not in usual}
    if not flags or any(isinstance(value, (list, dict)) or value not in (0, 1, -1, None) for value in flags.values()):
        return {}
    return flags | ({columns.split: values[columns.split]} if columns.split is not None else {})


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines of a text file, with a limit on their length."""
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), ""), start=1):
        if len(line) > _MAX_LINE:
            raise AfaError(f"{path}, line {number}: longer than {_MAX_LINE:,} characters; write one image a line")
        if "\0" in line:
            raise AfaError(f"{path}, line {number}: holds a NUL byte; save the file as plain text in UTF-8")
        yield line.removeprefix("\ufeff") if number == 1 else line


def _read_csv(path: Path, lines: Iterator[str], known_classes: Sequence[str]) -> Contents:
    first = next(lines, "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else next((c for c in ",;\t" if c in first), ",")
    stated_mark = re.fullmatch(r'"?sep=([^\w"])"?', first.rstrip("\r\n"), re.I)  # as Excel writes and wants it
    delimiter = stated_mark[1] if stated_mark else delimiter

    def rows_of(lines: Iterable[str]) -> Any:
        return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)

    try:
        rows = rows_of(chain([first], lines))
        if stated_mark:
            next(rows)
        header = [cell.strip() for cell in next(rows, [])]
        notes: tuple[str, ...] = ()
        if rows.line_num == 1 and (stated := _absent_header(path, header)):
            note = f"{path}: has no header; read as {stated[0]},{stated[1]}, from {shown(first.strip())} on"
            header, rows, notes = stated, rows_of(chain([first], lines)), (note,)
        columns = _columns(header)
        if columns.image is None or len(header) < 2:
            raise AfaError(f"{path}: the first line is {shown(','.join(header))}; write the header image,tags")
        if len({name.lower() for name in header}) != len(header):
            raise AfaError(f"{path}: two columns have the same name; name each differently")
        classes: tuple[str, ...] = ()
        if columns.tags is None:
            classes = tuple(name for name in header if name and name not in (columns.image, columns.split))
        found = _entries(path, _object_rows(_csv_objects(path, rows, header, classes)), known_classes)
        return found._replace(classes=classes, notes=(*notes, *found.notes))
    except csv.Error as error:
        raise AfaError(f"{path}: not a CSV in UTF-8 ({error}); save it as text with the header image,tags") from None


def _absent_header(path: Path, first: Sequence[str]) -> list[str]:
    """The header that a CSV lacks, where its first row shows that: an image and its tags; empty where it has one."""
    images = [image_name(cell) != cell for cell in first]
    if sum(images) != 1 or _columns(first).image is not None:
        return []
    if len(first) != 2 or (other := first[images.index(False)]).replace(".", "").isdecimal() or not other:
        raise AfaError(
            f"{path}: has no header, and what is in {shown(','.join(first))} is not certain; write a header, such as "
            "image,tags, and names of classes instead of numbers"
        )
    return ["image", "tags"] if images[0] else ["tags", "image"]


def _csv_objects(
    path: Path, rows: Any, header: Sequence[str], classes: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV as objects; columns of classes become one of tags: the classes whose value is true."""
    known: dict[tuple[str, ...], _Tags] = {}  # equal rows are read once
    for cells in rows:
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        where = f"{path}, line {rows.line_num}"
        if len(cells) != len(header):
            advice = f"the header has {len(header)}; quote cells that hold the separator"
            if header == ["image", "tags"]:
                advice = "write image,tags with spaces between the tags"
            raise AfaError(f"{where}: {len(cells)} columns; {advice}")
        values: dict[str, Any] = dict(zip(header, cells, strict=True))
        if classes:
            flags = tuple([values.pop(name) for name in classes])
            if flags not in known:
                known[flags] = _one_hot(zip(classes, flags, strict=True), where)
            values["tags"] = known[flags]
        yield where, values


def _json_objects(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """The objects of a list, or the equivalent of an object that maps images to tags."""
    for number, (key, value) in enumerate(elements(content), start=1):
        if key:
            has_tags = isinstance(value, dict) and any(name in value for name in TAG_COLUMNS + SINGLE_TAG_COLUMNS)
            value = {"file_name": key} | (value if has_tags else {"tags": value})
        yield f"{path}, entry {number}", value


def _line_objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AfaError(f"{where}: not valid JSON ({error}); write one object a line") from None
            yield where, value


def _object_rows(objects: Iterable[tuple[str, Any]]) -> Iterator[_Row]:
    """Rows of objects."""
    keys: tuple[str, ...] | None = None
    for where, values in objects:
        if not isinstance(values, dict):
            raise AfaError(f'{where}: is {shown(values)}; write objects such as {{"file": "a.jpg", "tags": ["cat"]}}')
        if tuple(values) != keys:
            keys = tuple(values)
            columns = _columns(keys)
        image = None if columns.image is None else values[columns.image]
        split = None if columns.split is None else values[columns.split]
        if not isinstance(image, str):
            raise AfaError(f"{where}: no text that names the image; add one of {', '.join(IMAGE_COLUMNS[:4])}")
        side = split.strip() if isinstance(split, str) else ""
        yield _Row(where, image.strip(), _stated_tags(values, columns), side, columns.single)


def _stated_tags(values: dict[str, Any], columns: _Columns) -> Any:
    """The tags of an object, perhaps in parts named `objects`, as of the `datasets` library; else the other keys."""
    if columns.tags is not None:
        return values[columns.tags]
    if isinstance(objects := values.get("objects"), (dict, list)):
        parts = objects if isinstance(objects, list) else [objects]
        usual = TAG_COLUMNS + SINGLE_TAG_COLUMNS
        found = [next((part[key] for key in usual if key in part), None) for part in parts if isinstance(part, dict)]
        return [tag for tags in found for tag in (tags if isinstance(tags, list) else [tags])]
    return _Keys((key, value) for key, value in values.items() if key not in (columns.image, columns.split))


def _columns(keys: Iterable[str]) -> _Columns:
    columns = {key.strip().lower(): key for key in keys}

    def first(names: Iterable[str]) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    several = first(TAG_COLUMNS)
    return _Columns(first(IMAGE_COLUMNS), several or first(SINGLE_TAG_COLUMNS), first(SPLIT_COLUMNS), several is None)


def _entries(path: Path | str, rows: Iterable[_Row], classes: Sequence[str]) -> Contents:
    """Entries of rows, with the cells of all of them split in the same way."""
    found, declared = _one_hot_rows(list(rows))
    texts = Counter([(row.tags.strip(), row.single) for row in found if isinstance(row.tags, str)])
    split_cell = _cell_splitter({text for text, _ in texts}, classes, path)
    several = {} if classes else {text: count for (text, single), count in texts.items() if not single}
    notes = tuple(_one_names(several, path))
    places: dict[str, int] = {}
    entries: list[TagEntry] = []
    for where, image, value, split, single in found:
        tags = split_cell(value, single) if isinstance(value, str) else _listed_tags(value, where, classes)
        if single and image in places:
            earlier = entries[places[image]]
            unknown = earlier.unknown
            unknown = None if unknown is None or tags.unknown is None else (*unknown, *tags.unknown)
            entries[places[image]] = earlier._replace(tags=(*earlier.tags, *tags.present), unknown=unknown)
        else:
            places[image] = len(entries)
            entries.append(TagEntry(where, image, tags.present, split, tags.unknown))
    return Contents(declared, entries, notes)


def _one_hot_rows(rows: list[_Row]) -> tuple[list[_Row], tuple[str, ...]]:
    """Rows whose keys are classes, and these classes; where other rows have tags, nothing is known of such rows."""
    keyed = [row.tags for row in rows if isinstance(row.tags, _Keys)]
    if len(keyed) < len(rows):
        return [row._replace(tags=None) if isinstance(row.tags, _Keys) else row for row in rows], ()
    return [row if row.tags else row._replace(tags=None) for row in rows], tuple(dict.fromkeys(chain(*keyed)))


def _one_names(counts: Mapping[str, int], path: Path | str) -> Iterator[str]:
    """A question for each run of words that always come together, in one order: they may be one name.

    `counts` says how often each text occurs. Texts with other separators than spaces raise no question.
    """
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for text, count in counts.items():
        if any(mark in text for mark in "|;,["):
            return
        cell = text.split()
        words.update(dict.fromkeys(cell, count))
        pairs.update(dict.fromkeys(pairwise(cell), count))
    after = {one: other for (one, other), count in pairs.items() if count == words[one] == words[other] > 1}
    for start in sorted(after.keys() - after.values()):
        run = [start]
        while run[-1] in after:
            run.append(after[run[-1]])
        yield (
            f"{path}: {' and '.join(map(shown, run[:9]))} always come together, in this order: is that one name? Then "
            f"write {'_'.join(run)[:200]}, or separate the tags by ;"
        )


def _cell_splitter(texts: Iterable[str], classes: Sequence[str], path: Path | str) -> Callable[[str, bool], _Tags]:
    """What splits texts into tags, all texts of a file in the same way; the flag says that a text is a single tag."""
    plain = {text for text in texts if not text.lstrip().startswith("[")}
    separator = next((mark for mark in "|;," if any(mark in text for text in plain)), None)
    whole_tags = frozenset(classes)
    spaced = next((name for name in classes if len(name.split()) != 1), "")

    def parts_of(text: str, single: bool) -> list[str]:
        if text in whole_tags:
            return [text]
        if text.startswith("[") and text.endswith("]"):  # a list that was written as text
            return [part.strip().strip("'\"") for part in text[1:-1].split(",")]
        if single:
            return text.split(separator) if separator in ("|", ";") else [text]
        parts = text.split(separator)
        if spaced and separator is None and len(parts) > 1:
            raise AfaError(
                f"{path}: tags are separated by spaces, and class {spaced!r} has one; "
                f"name it {'_'.join(spaced.split())} in the class list and here, or separate the tags by ;"
            )
        return parts

    @functools.cache  # one tuple for all equal texts
    def split(text: str, single: bool) -> _Tags:
        return _known_tags(parts_of(text.strip(), single), classes)

    return split


def _known_tags(texts: Iterable[str], classes: Sequence[str]) -> _Tags:
    """Texts without those that say that a tag is unknown: then nothing is known of the other classes."""
    tags = [sys.intern(tag) for text in texts if (tag := text.strip())]
    known = tuple([tag for tag in tags if tag.lower() not in _NO_TAG or tag in classes])
    return _Tags(known, () if len(known) == len(tags) else None)


def _listed_tags(value: Any, where: str, classes: Sequence[str]) -> _Tags:
    """Tags of a value that is no text."""
    if isinstance(value, _Tags):
        return value
    if isinstance(value, dict):
        return _one_hot(value.items(), where)
    tags = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool):
            if abs(item) > 10**9:
                raise AfaError(f"{where}: the tag is a number of many digits; write the names of the classes")
            item = str(item)
        elif item is None or item != item:  # NaN
            item = "?"
        if not isinstance(item, str):
            raise AfaError(f"{where}: the tag {shown(item)} is no text; write the names of the classes")
        tags.append(item)
    return _known_tags(tags, classes)


def _one_hot(values: Iterable[tuple[str, Any]], where: str) -> _Tags:
    """The classes whose value is true, and those whose value is unknown."""
    tags, unknown = [], []
    for name, value in values:
        text = str(value).strip().lower()
        if text in _TRUE:
            tags.append(sys.intern(name))
        elif text in _UNKNOWN:
            unknown.append(sys.intern(name))
        elif text not in _FALSE:
            raise AfaError(
                f"{where}, column {shown(name)}: the value is {shown(value)}; write 0 or 1, ? "
                "for unknown, remove the column, or put the tags into one column named tags"
            )
    return _Tags(tuple(tags), tuple(unknown))
