"""Label Studio: choices, taxonomies (their last level) and the names of labeled regions are tags.

Several annotations of a task are joined; canceled ones and predictions do not count.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from afa.data.files import plain_path
from afa.data.readers.base import Contents, TagEntry, elements
from afa.errors import AfaError

TASK_KEYS: Final = frozenset(("annotations", "completions", "predictions"))
"""Keys of a task, beside its `data`, in an export as JSON."""

SHORT_KEYS: Final = frozenset(("annotator", "annotation_id", "lead_time"))
"""Keys of a task in an export as JSON-MIN."""

_TAG_RESULTS: Final = (
    "choices", "taxonomy", "rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels", "keypointlabels",
    "labels",
)  # fmt: skip


def read(path: Path, content: Any, classes: Sequence[str]) -> Contents:
    """Read the choices of each task from an export, JSON or JSON-MIN: no class names, and an entry for each task."""
    entries = []
    for number, (key, task) in enumerate(elements(content), start=1):
        where = f"{path}, task {number}"
        if key or not isinstance(task, dict):
            raise AfaError(f"{where}: is no task; export from Label Studio as JSON")
        data = task.get("data", task)
        image = _task_image(data if isinstance(data, dict) else {})
        if image is None:
            raise AfaError(f"{where}: names no image; export a project of images from Label Studio as JSON")
        tags = tuple(dict.fromkeys(_task_tags(task) if "data" in task else _short_task_tags(task)))
        entries.append(TagEntry(where, image, tags, unknown=() if tags or _is_submitted(task) else None))
    return Contents((), entries)


def _task_image(data: dict[str, Any]) -> str | None:
    """The file that a task shows: under `image`, else under the first key whose text looks like one."""
    texts = [data.get("image"), data.get("img"), *data.values()]
    stripped = (text.strip() for text in texts if isinstance(text, str))
    return next((text for text in stripped if re.search(r"\.\w{2,5}$", plain_path(text)[0])), None)


def _is_submitted(task: dict[str, Any]) -> bool:
    """Whether somebody finished the task: without a choice in it, the image holds none of the classes."""
    if "data" not in task:
        return "annotation_id" in task  # of JSON-MIN
    done = _dicts(task.get("annotations")) or _dicts(task.get("completions"))
    return any(not annotation.get("was_cancelled") for annotation in done)


def _task_tags(task: dict[str, Any]) -> Iterator[str]:
    for annotation in _dicts(task.get("annotations")) or _dicts(task.get("completions")):
        if not annotation.get("was_cancelled"):
            for result in _dicts(annotation.get("result")):
                yield from _labels(result.get("value"))


def _short_task_tags(task: dict[str, Any]) -> Iterator[str]:
    """Tags of JSON-MIN: any value that is a choice, choices, or a list of labeled regions."""
    for key, value in task.items():
        if isinstance(value, str) and key in ("choice", "choices", "label", "class", "tag", "tags"):
            yield from _names([value])
        elif isinstance(value, dict):
            yield from _names(value.get("choices"))
        elif isinstance(value, list):
            yield from _names([item for item in value if not isinstance(item, dict)])
            for region in _dicts(value):
                yield from _labels(region)


def _labels(region: Any) -> Iterator[str]:
    if isinstance(region, dict):
        for kind in _TAG_RESULTS:
            yield from _names(region.get(kind))


def _names(value: Any) -> Iterator[str]:
    """Names in a list of names, or of paths through a taxonomy, of which the last level counts."""
    for item in value if isinstance(value, list) else []:
        name = item[-1] if isinstance(item, list) and item else item
        if isinstance(name, str) and name.strip():
            yield sys.intern(name.strip())


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
