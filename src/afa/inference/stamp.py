"""OUT/predict.json beside masks: what made them, and which it speaks of, so that no call goes on with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from afa.elastic import is_restarted
from afa.errors import AfaError
from afa.formats.write import mask_path
from afa.runs.files import write_whole
from afa.runtime import Processes, say

STAMP: Final = "predict.json"
"""File beside the masks that says what made them: the weights and all settings."""

_DIGESTS: Final = ("weights", "tags")
"""Keys of the stamp whose values are hashes, or None."""


def missing_in_all(
    out_dir: Path,
    names: Sequence[str],
    stamp: Mapping[str, Any],
    processes: Processes,
    *,
    resume: bool,
    otherwise: str,
) -> Sequence[str]:
    """Stamp OUT, and list the masks that are still to be made, as the first process finds them.

    Others could see masks that are made meanwhile. With `resume`, masks that are there already stay; `otherwise` says
    what to do about those that something else than `stamp` made.

    Raises:
        AfaError: They were made with other weights or settings; a process sees other images than the first one.
    """
    if processes.count == 1:
        return _missing(out_dir, names, stamp, resume=resume, otherwise=otherwise)
    digest = hashlib.sha256(json.dumps([list(names), stamp]).encode(errors="surrogatepass")).digest()

    def find() -> tuple[bytes, bytes]:
        missing = set(_missing(out_dir, names, stamp, resume=resume, otherwise=otherwise))
        return digest, np.packbits([name in missing for name in names]).tobytes()

    wanted, packed = processes.from_main(find)
    if wanted != digest:
        raise AfaError(
            f"process {processes.rank} of {processes.count} sees other images, weights or settings than the first "
            "one; give all machines the same files"
        )
    is_missing = np.unpackbits(np.frombuffer(packed, np.uint8), count=len(names))
    return [names[index] for index in np.flatnonzero(is_missing).tolist()]


def _missing(
    out_dir: Path, names: Sequence[str], stamp: Mapping[str, Any], *, resume: bool, otherwise: str
) -> Sequence[str]:
    """Stamp OUT, and list the masks that are still to be made."""
    masks, path = out_dir / "masks", out_dir / STAMP
    now = json.loads(json.dumps(stamp))
    if is_restarted() and path.is_file() and path.read_text(encoding="utf-8") == _stamp_text(now):
        resume = True
    if resume and path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in now | before if now.get(key) != before.get(key)]
        except (ValueError, TypeError):
            raise AfaError(f"{path}: broken; {otherwise} folder") from None
        if differing:
            key = differing[0]
            was, value = before.get(key), now.get(key)
            words = f"{key} was {_short(was)} for the masks that are there and is {_short(value)} now"
            if key in _DIGESTS:
                how = "without" if was is None else "with" if value is None else "with other"
                words = f"the masks that are there were made {how} {key}"
            raise AfaError(f"{path}: {words}; {otherwise} folder")
        finished = set(current_masks(out_dir, names))
        missing = [name for name in names if name not in finished]
        if len(missing) < len(names):
            say(f"{masks}: {len(names) - len(missing)} of {len(names)} masks are there already and left as they are")
        return missing
    if resume and next(masks.rglob("*.png"), None) is not None:
        raise AfaError(f"{path}: missing, so nothing says what made the masks in {masks}; {otherwise} folder")
    write_whole(path, _stamp_text(now))
    return names


def _stamp_text(stamp: Mapping[str, Any]) -> str:
    return json.dumps(stamp, indent=1) + "\n"


def current_masks(out_dir: Path, names: Iterable[str]) -> list[str]:
    """Names of images whose masks `STAMP` speaks of, in their order.

    Masks older than it are of an earlier call, and the image failed in the last one or was not reached by it.
    """
    since = max(0, _modified(out_dir / STAMP))
    return [name for name in names if _modified(mask_path(out_dir, name)) >= since]


def _modified(path: Path) -> int:
    """Time of the last change in ns; -1 if there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
