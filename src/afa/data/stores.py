"""Files at any address: of this machine, or of a store that fsspec opens, which is asked again when it fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from afa.errors import AfaError, first_line, shown

_PAUSE: Final = 0.2  # seconds before the second try; each further pause is twice as long
_LONGEST_PAUSE: Final = 30.0
_MOST: Final = 1_000_000  # addresses that braces may stand for
_STATES: Final = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
"""What stores say of a file that changes when its contents do."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Stored:
    """A file.

    Attributes:
        address: Path or address.
        size: Bytes.
        key: 16 letters that are others for another file, or when the file changes.
    """

    address: str
    size: int
    key: str

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return not is_remote(self.address)


def is_remote(text: str) -> bool:
    """Whether a text is the address of a store, such as `s3://bucket/folder`.

    >>> is_remote("s3://bucket/a.tar"), is_remote("C:/a.tar")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def expand(text: str) -> list[str]:
    """The texts that braces stand for, as a shell expands them; a text without braces is itself.

    Raises:
        AfaError: They stand for more than a million texts.

    >>> expand("a-{08..10}.tar"), expand("{train,val}/0.tar")
    (['a-08.tar', 'a-09.tar', 'a-10.tar'], ['train/0.tar', 'val/0.tar'])
    """
    parts: list[list[str]] = []
    for part in re.split(r"(\{\d+\.\.\d+\}|\{[^{}]*,[^{}]*\})", text):
        if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = (int(match[1]), int(match[2]))
            if abs(last - first) >= _MOST:
                raise AfaError(f"{shown(text)}: the braces stand for more than {_MOST:,} addresses; name a folder")
            is_padded = any(len(number) > 1 and number.startswith("0") for number in match.groups())
            width = max(map(len, match.groups())) if is_padded else 0
            steps = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            parts.append([f"{number:0{width}d}" for number in steps])
        else:
            parts.append(part[1:-1].split(",") if part.startswith("{") and part.endswith("}") else [part])
    if (count := math.prod(map(len, parts))) > _MOST:
        raise AfaError(f"{shown(text)}: the braces stand for {count:,} addresses; name a folder")
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def find_files(address: str, suffixes: Collection[str], *, retries: int) -> list[Stored]:
    """The file at an address, or those of a folder and its folders that have one of the suffixes, sorted.

    Raises:
        AfaError: There is nothing; the store does not answer, or fsspec does not know it.
    """
    fs, path = _open(address)

    def find() -> dict[str, Any]:
        fs.invalidate_cache()  # others may have written there since the last look
        info = fs.info(path)
        return {path: info} if info["type"] == "file" else fs.find(path, maxdepth=2, detail=True)

    found = patiently(find, address, retries=retries)
    files = []
    for name, info in sorted(found.items()):
        last = name.rpartition("/")[2]
        if name == path or (os.path.splitext(last)[1].lower() in suffixes and not last.startswith((".", "cache-"))):
            below = name.removeprefix(path.rstrip("/"))
            text = fs.unstrip_protocol(name) if below == name and name != path else address.rstrip("/") + below
            state = next((str(info[key]) for key in _STATES if info.get(key)), "")
            key = hashlib.sha256(repr((name, info.get("size"), state)).encode(errors="replace")).hexdigest()[:16]
            files.append(Stored(text, int(info.get("size") or 0), key))
    return [file for file in files if "/." not in file.address.removeprefix(address)]


def fetch(stored: Stored, target: Path, *, retries: int) -> None:
    """Copy a file of a store to this machine; a copy of another size than the store states counts as a failure.

    Raises:
        AfaError: The store fails, or the disk is full; nothing of the file is left then.
    """
    fs, path = _open(stored.address)

    def get() -> None:
        fs.get_file(path, str(target))
        if stored.size and target.stat().st_size != stored.size:
            raise OSError(f"{target.stat().st_size:,} of {stored.size:,} bytes came")

    try:
        patiently(get, stored.address, retries=retries)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def put(source: Path, address: str, *, retries: int) -> None:
    """Copy a file of this machine into a store; an `AfaError` if the store fails."""
    fs, path = _open(address)

    def copy() -> None:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(source), path)

    patiently(copy, address, retries=retries)


def read_bytes(address: str, *, retries: int) -> bytes | None:
    """The contents of a small file; None where there is none."""
    fs, path = _open(address)

    def read() -> Any:
        with contextlib.suppress(FileNotFoundError):
            return fs.cat_file(path)

    content: bytes | None = patiently(read, address, retries=retries)
    return content


def patiently(call: Callable[[], _T], address: str, *, retries: int) -> _T:
    """Call what may fail at times, again after pauses that double.

    Args:
        call: What to do; files that are missing or forbidden are not tried again.
        address: For messages.
        retries: How often to try again.

    Raises:
        AfaError: The last try failed, too.
    """
    for attempt in itertools.count():
        try:
            return call()
        except AfaError:
            raise
        except FileNotFoundError:
            raise AfaError(f"{address}: no such file or folder; check the address") from None
        except PermissionError as error:
            raise AfaError(f"{address}: the store refuses ({first_line(error)}); check your rights") from None
        except Exception as error:  # each store has exceptions of its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                place = error.filename or "this machine"
                raise AfaError(
                    f"{address}: no room on the disk of {place} ({error.strerror}); free space, lower data.shard_gib, "
                    "or set XDG_CACHE_HOME to another folder"
                ) from None
            if attempt >= retries:
                raise AfaError(
                    f"{address}: the store failed {attempt + 1} times ({first_line(error)}); try again later, or raise "
                    "data.store_retries"
                ) from None
            time.sleep(min(_LONGEST_PAUSE, _PAUSE * 2**attempt))
    raise AssertionError


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise AfaError(f"{address}: {first_line(error)}; pip install 'afa[cloud]' has s3:// and gs://") from None
    return fs, str(path)
