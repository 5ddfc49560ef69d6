"""Tags from the files of annotation tools: COCO instances, Label Studio, CVAT.

Such files hold more than tags: outlines, boxes, pixel masks. Here the categories of each image are kept and everything
else is dropped as it is read, so that training cannot come to know where an object is. Pixel masks are made from COCO
by `afa.data.coco`, for evaluation.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from afa.data.json_stream import iterate_json
from afa.data.tables import TagEntry, shown
from afa.errors import AfaError

_COCO_KEYS: Final = frozenset(("info", "licenses", "license", "images", "annotations", "categories", "type"))
_TASK_KEYS: Final = frozenset(("annotations", "completions", "predictions"))
_TAG_RESULTS: Final = (
    "choices", "taxonomy", "rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels", "keypointlabels",
    "labels",
)  # fmt: skip
_SHORT_EXPORT: Final = frozenset(("annotator", "annotation_id", "lead_time"))


def json_kind(path: Path) -> str:
    """Tell what a JSON file holds from its first part.

    Returns:
        `coco`, `labelstudio`, or `table`.

    Raises:
        AfaError: The file is not JSON.
    """
    key, value = next(iterate_json(path), ("", None))
    if key in _COCO_KEYS:
        return "coco"
    if not key and isinstance(value, dict):
        if isinstance(value.get("data"), dict) and not _TASK_KEYS.isdisjoint(value):
            return "labelstudio"
        if not _SHORT_EXPORT.isdisjoint(value):
            return "labelstudio"
    return "table"


def read_coco(path: Path) -> tuple[tuple[str, ...], list[TagEntry]]:
    """Read the categories of each image from a COCO instances file.

    Of an annotation only its image and its category are kept; crowds count, since the class is there.

    Args:
        path: JSON with `images`, `annotations` and `categories`.

    Returns:
        The names of the categories by ascending id, whatever gaps the ids have; and an entry for each image, without
        tags where nothing is annotated.

    Raises:
        AfaError: The file is no such JSON; an id is missing, is there twice or is unknown.
    """
    files: dict[Any, str] = {}
    names: dict[int, str] = {}
    present: dict[Any, set[Any]] = {}
    for key, part in iterate_json(path):
        if key not in ("images", "annotations", "categories") or part == []:
            continue
        if key == "images":
            number, file = coco_id(part, "id", path), part.get("file_name")
            if not isinstance(file, str):
                raise AfaError(f"{path}: image {number} has no file_name; give each image one")
            if number in files:
                raise AfaError(f"{path}: image id {number} is there twice; give each image its own")
            files[number] = file
        elif key == "categories":
            number, name = coco_id(part, "id", path), part.get("name")
            if not isinstance(name, str) or not name.strip():
                raise AfaError(f"{path}: category {number} has no name; give each category one")
            if number in names:
                raise AfaError(f"{path}: category id {number} is there twice; give each category its own")
            names[number] = sys.intern(name.strip())
        else:
            present.setdefault(coco_id(part, "image_id", path), set()).add(coco_id(part, "category_id", path))
    if not files or not names:
        raise AfaError(f"{path}: no {'images' if not files else 'categories'}; give a COCO instances file")
    for number, categories in present.items():
        if number not in files:
            raise AfaError(f"{path}: an annotation is of image id {number}, which is not in images; add the image")
        if unknown := categories - names.keys():
            raise AfaError(f"{path}: an annotation has category id {min(unknown)}, which is not in categories; add it")
    kept: dict[frozenset[Any], tuple[str, ...]] = {}
    entries = []
    for number, file in files.items():
        ids = frozenset(present.get(number, ()))
        if ids not in kept:
            kept[ids] = tuple(names[category] for category in sorted(ids))
        entries.append(TagEntry(str(path), file, kept[ids]))
    return tuple(names[number] for number in sorted(names)), entries


def coco_id(part: Any, key: str, path: Path) -> int:
    """The whole number that an image, annotation or category of a COCO file has under `key`.

    Raises:
        AfaError: There is none.
    """
    number = part.get(key) if isinstance(part, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) > 2**63:
        raise AfaError(f"{path}: {shown(part)} has no whole number as {key}; give a COCO instances file")
    return number


def read_label_studio(path: Path) -> tuple[tuple[str, ...], list[TagEntry]]:
    """Read the choices of each task from a Label Studio export, JSON or JSON-MIN.

    Of choices, taxonomies (their last level) and labeled regions only the names are kept. Several annotations of a
    task are joined; canceled ones and predictions do not count.

    Args:
        path: JSON, a list of tasks.

    Returns:
        No class names, as the export has no list of them; and an entry for each task. Addresses of the tool's own
        server become the name of the file.

    Raises:
        AfaError: The file is no such list; a task names no image.
    """
    entries = []
    for number, (key, task) in enumerate(iterate_json(path), start=1):
        where = f"{path}, task {number}"
        if key or not isinstance(task, dict):
            raise AfaError(f"{where}: is no task; export from Label Studio as JSON")
        data = task.get("data", task)
        image = _task_image(data if isinstance(data, dict) else {})
        if image is None:
            raise AfaError(f"{where}: names no image; export a project of images from Label Studio as JSON")
        tags = _task_tags(task) if "data" in task else _short_task_tags(task)
        entries.append(TagEntry(where, image, tuple(dict.fromkeys(tags))))
    return (), entries


def _task_image(data: dict[str, Any]) -> str | None:
    """The file that a task shows: under `image`, else under the first key whose text looks like one."""
    texts = [data.get("image"), data.get("img"), *data.values()]
    found = next((text for text in texts if isinstance(text, str) and re.search(r"\.\w{2,5}$", text.strip())), None)
    if found is None:
        return None
    found = found.strip()
    try:
        address = urlsplit(found)
    except ValueError:
        return found
    if address.path.startswith("/data/local-files"):
        return parse_qs(address.query).get("d", [found])[0]
    if address.scheme in ("http", "https", "s3", "gs", "azure-blob") or address.path.startswith("/data/"):
        return unquote(address.path).rsplit("/", 1)[-1]
    return found


def _task_tags(task: dict[str, Any]) -> Iterator[str]:
    for annotation in _list(task.get("annotations")) or _list(task.get("completions")):
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        for result in _list(annotation.get("result")):
            value = result.get("value") if isinstance(result, dict) else None
            if isinstance(value, dict):
                for kind in _TAG_RESULTS:
                    yield from _names(value.get(kind))


def _short_task_tags(task: dict[str, Any]) -> Iterator[str]:
    """Tags of JSON-MIN: any value that is a choice, choices, or a list of labeled regions."""
    for key, value in task.items():
        if isinstance(value, str) and key in ("choice", "choices", "label", "class", "tag", "tags"):
            yield from _names([value])
        elif isinstance(value, dict):
            yield from _names(value.get("choices"))
        elif isinstance(value, list):
            yield from _names([item for item in value if not isinstance(item, dict)])
            for item in value:
                if isinstance(item, dict):
                    for kind in _TAG_RESULTS:
                        yield from _names(item.get(kind))


def _names(value: Any) -> Iterator[str]:
    """Names in a list of names, or of paths through a taxonomy, of which the last level counts."""
    for item in _list(value):
        name = item[-1] if isinstance(item, list) and item else item
        if isinstance(name, str) and name.strip():
            yield sys.intern(name.strip())


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_cvat(path: Path) -> tuple[tuple[str, ...], list[TagEntry]]:
    """Read the tags of each image from a "CVAT for images 1.1" export.

    The labels of shapes count as tags too; their points are dropped.

    Args:
        path: XML whose outermost element is `annotations`.

    Returns:
        The labels of the project in its order, none where the file does not say; and an entry for each image.

    Raises:
        AfaError: The file is no such XML, or has a document type.
    """
    target = _CvatTarget(path)
    parser = ET.XMLParser(target=target)
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                parser.feed(chunk)
        parser.close()
    except (ET.ParseError, ValueError, LookupError) as error:
        if isinstance(error, AfaError):
            raise
        raise AfaError(f"{path}: not an XML file ({error}); export from CVAT as CVAT for images 1.1") from None
    except OSError as error:
        raise AfaError(f"{path}: cannot be read ({error.strerror})") from None
    return tuple(dict.fromkeys(target.labels)), target.entries


class _CvatTarget:
    """Collects the labels of a CVAT export as the XML goes by; nothing else is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: list[str] = []
        self.entries: list[TagEntry] = []
        self._open: list[str] = []
        self._text = ""
        self._image: dict[str, str] | None = None
        self._tags: list[str] = []

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise AfaError(f"{self.path}: has a document type ({name}); remove the DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._open and tag != "annotations":
            raise AfaError(f"{self.path}: is <{shown(tag)[1:-1]}>, not <annotations>; export CVAT for images 1.1")
        self._open.append(tag)
        self._text = ""
        if self._open == ["annotations", "image"]:
            self._image, self._tags = attributes, []
        elif self._image is not None and len(self._open) == 3 and attributes.get("label", "").strip():
            self._tags.append(sys.intern(attributes["label"].strip()))

    def data(self, text: str) -> None:
        if self._open and self._open[-1] == "name":
            self._text += text

    def end(self, tag: str) -> None:
        if self._open[-3:] == ["labels", "label", "name"] and self._text.strip():
            self.labels.append(sys.intern(self._text.strip()))
        self._open.pop()
        if self._image is not None and len(self._open) == 1:
            name = self._image.get("name", "").strip()
            if not name:
                raise AfaError(f"{self.path}: image {len(self.entries) + 1} has no name; export from CVAT anew")
            tags = tuple(dict.fromkeys(self._tags))
            self.entries.append(TagEntry(f"{self.path}, image {len(self.entries) + 1}", name, tags,
                                         self._image.get("subset", "")))  # fmt: skip
            self._image = None

    def close(self) -> None:
        pass
