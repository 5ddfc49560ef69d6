"""Masks of many images: reads ahead, infers in batches of one size, writes in the background, can be resumed.

Every file appears whole or not at all, and OUT/predict.json says what made the masks, so that no call goes on with
another's. Which images, and what makes their masks, is up to `afa.inference.files`.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.data.dataset import TaggedImages
from afa.data.images import read_mask
from afa.data.palette import overlay as lay_over
from afa.data.palette import write_index_png
from afa.data.rows import Rows
from afa.data.tiff import TILE
from afa.errors import AfaError, BrokenImageError, LongNameError
from afa.evaluation.evaluate import group_by_size
from afa.evaluation.protocols import LogitMaps
from afa.formats.write import FormatResult, mask_path
from afa.inference.big import Large
from afa.inference.predictor import PreparedImage
from afa.runs.files import write_whole
from afa.runtime import Advance, image_progress, read_ahead, say

_DIGESTS: Final = ("weights", "tags")
"""Keys of the stamp whose values are hashes, or None."""

STAMP: Final = "predict.json"
"""File beside the masks that says what made them: the weights and all settings."""

_WRITE_BEHIND = 4
"""Number of results that may wait to be written, beside those of the last batch."""

_Image = TypeVar("_Image", bound=PreparedImage)


@dataclass(frozen=True)
class PredictSummary:
    """What a pass over files did.

    Attributes:
        folder: Where the masks are.
        written: Masks written.
        skipped: Masks that were there already and left as they are.
        failed: One line for each image that could not be done; empty when all is well.
        broken: One line for each image that cannot be read and was to be left out (`data.skip_broken`).
        seconds: Wall time.
        formats: What was written for other tools, if that was asked for.
    """

    folder: Path
    written: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float
    formats: tuple[FormatResult, ...] = ()
    broken: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the user."""
        parts = [f"{self.written} masks written to {self.folder} in {self.seconds:.1f} s"]
        if self.skipped:
            parts.append(f"{self.skipped} were there already and left as they are (delete them to redo)")
        if self.broken:
            parts.append(f"{len(self.broken)} broken image{'s' * (len(self.broken) > 1)} left out")
        if self.failed:
            parts.append(f"{len(self.failed)} images failed")
        return "; ".join(parts)


@dataclass(frozen=True)
class MasksSummary:
    """What `afa masks` did, and how sure it is.

    Attributes:
        written: What was written and what failed.
        coverage: Percent of all pixels that have a class.
        nothing: Image -> its tags that no pixel has.
        num_images: Images with a mask.
    """

    written: PredictSummary
    coverage: float
    nothing: Mapping[str, Sequence[str]]
    num_images: int

    def __str__(self) -> str:
        """Lines for the user."""
        lines = [str(self.written), f"{self.coverage:.1f} % of the pixels have a class"]
        if self.nothing:
            name, tags = next(iter(self.nothing.items()))
            lines.append(
                f"{len(self.nothing)} of {self.num_images} images have a tag that no pixel got, such as {name} "
                f"({', '.join(tags)}): masks.json lists them; look at these first"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """What masks.json holds."""
        return {
            "num_images": self.num_images,
            "coverage": round(self.coverage, 2),
            "nothing": {name: list(tags) for name, tags in self.nothing.items()},
            "failed": list(self.written.failed),
            "broken": list(self.written.broken),
        }


def summarize_masks(
    written: PredictSummary, images: TaggedImages, out_dir: Path, *, progress: bool = True
) -> MasksSummary:
    """Read the masks of tagged images again, say how sure they are, and write OUT/masks.json.

    Args:
        written: What was done.
        images: The images; one without a current mask is passed over.
        out_dir: Folder that has the masks.
        progress: Show progress on standard error.
    """
    finished = set(current_masks(out_dir, images.names))
    indices = [index for index, name in enumerate(images.names) if name in finished]
    nothing: dict[str, list[str]] = {}
    covered = total = 0
    with image_progress("summing up masks", total=len(indices), enabled=progress) as advance:
        for index, reading in read_ahead(lambda index: _count_values(mask_path(out_dir, images.names[index])), indices):
            counts = reading.result()
            missed = np.flatnonzero(images.tagged[index] & (counts[1 : 1 + len(images.classes)] == 0))
            if missed.size:
                nothing[images.names[index]] = [images.classes[place] for place in missed]
            covered, total = covered + int(counts[1:255].sum()), total + int(counts.sum())
            advance(1)
    summary = MasksSummary(written, 100 * covered / max(1, total), nothing, len(indices))
    write_whole(out_dir / "masks.json", json.dumps(summary.to_json(), indent=1) + "\n")
    return summary


def _count_values(path: Path) -> NDArray[np.int64]:
    """(256,) how many pixels of a mask have each value."""
    if path.suffix == ".png":
        return np.bincount(read_mask(path).reshape(-1), minlength=256)
    counts = np.zeros(256, np.int64)
    with Rows(path, max_pixels=0, convert=np.asarray) as rows:
        while (band := rows.take(TILE)).size:
            counts += np.bincount(band.reshape(-1), minlength=256)
    return counts


class Made:
    """A mask on its way to the CPU; only the code that needs it waits for it.

    Args:
        label: (H, W) class indices.
        maps: The logits that it was made from, if their softmax is to be written too.
    """

    def __init__(self, label: Tensor, maps: LogitMaps | None = None) -> None:
        self.maps = maps
        self._arrived: torch.cuda.Event | None = None
        if label.device.type == "cuda":
            self._label = label.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(label.device))
        else:
            self._label = label.cpu()

    def label(self) -> NDArray[np.uint8]:
        """(H, W) class indices."""
        if self._arrived is not None:
            self._arrived.synchronize()
        label: NDArray[np.uint8] = self._label.numpy()
        return label


@dataclass(frozen=True)
class Task(Generic[_Image]):
    """How the masks of a call are made.

    Attributes:
        title: What is made.
        stamp: Settings and weights that make them: what `STAMP` holds, beside classes and overlay.
        read: Reads the image of a name; any thread may call it.
        infer: Makes the masks of images of one size.
        batch_size: How many of these go together.
        classes: C names.
        overlay: Whether to write the colored masks over the images too.
        skip_broken: Whether images that cannot be read are no failure.
        otherwise: What to do about masks that something else made.
        go_on: How to go on after a failure.
        large: For images that are made in tiles, and then not read by `read`.
    """

    title: str
    stamp: Mapping[str, Any]
    read: Callable[[str], _Image]
    infer: Callable[[Sequence[_Image]], list[Made]]
    batch_size: int
    classes: Sequence[str]
    overlay: bool
    skip_broken: bool
    otherwise: str
    go_on: str
    large: Large | None = None

    def write(self, out_dir: Path, name: str, pixels: NDArray[np.uint8], made: Made) -> None:
        """Write a mask and what belongs to it."""
        label = made.label()
        if made.maps is not None:
            half = made.maps.scores(label.shape).cpu().numpy().astype(np.float16)
            classes = np.array(["background", *self.classes])
            path = out_dir / "scores" / f"{name}.npz"
            write_whole(path, lambda file: np.savez_compressed(file, scores=half, classes=classes))
        if self.overlay:
            picture = Image.fromarray(lay_over(pixels, label))
            path = out_dir / "overlays" / f"{name}.jpg"
            write_whole(path, lambda file: picture.save(file, format="JPEG", quality=90))
        # The mask comes last: if it exists, everything else exists.
        write_index_png(out_dir / "masks" / f"{name}.png", label)
        (out_dir / "masks" / f"{name}.tif").unlink(missing_ok=True)  # of an earlier call, in tiles


def write_masks(
    task: Task[_Image], out_dir: Path, names: Sequence[str], *, resume: bool, progress: bool
) -> PredictSummary:
    """Read in threads, infer here in batches of one size, write in threads.

    A failed read or a name that is too long loses one image; another failed write ends the pass, after the writes
    that are under way.

    Args:
        task: How the masks are made.
        out_dir: Made if missing.
        names: Names of the images.
        resume: Leave masks that are there already as they are.
        progress: Show a progress bar on standard error.

    Returns:
        What was done and what failed.

    Raises:
        AfaError: The masks that are there were made with other weights or settings; a file cannot be written.
    """
    stamp = {**task.stamp, "classes": task.classes, "overlay": task.overlay}
    missing = _missing(out_dir, names, stamp, resume=resume, otherwise=task.otherwise)
    started, skipped = time.monotonic(), len(names) - len(missing)
    failed: list[str] = []
    broken: list[str] = []
    large: list[str] = []
    writing: deque[Future[None]] = deque()
    written = 0

    def leave_out(error: AfaError) -> None:
        is_left_out = task.skip_broken and isinstance(error, BrokenImageError)
        (broken if is_left_out else failed).append(str(error))
        say(f"skipped: {error}")

    def finish(waiting: int) -> None:
        nonlocal written
        while len(writing) > waiting:
            try:
                writing.popleft().result()
                written += 1
            except LongNameError as error:
                leave_out(error)
            advance(1)

    try:
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="afa-write") as writers,
            image_progress(task.title, total=len(missing), enabled=progress) as advance,
            closing(_readable(task, missing, leave_out, advance, large)) as images,
        ):
            for group in group_by_size(images, sizes=lambda item: item[1].sizes, batch_size=task.batch_size):
                for (name, image), made in zip(group, task.infer([image for _, image in group]), strict=True):
                    writing.append(writers.submit(task.write, out_dir, name, image.pixels, made))
                finish(_WRITE_BEHIND + len(group))
            finish(0)
        for name in large:
            assert task.large is not None
            if name == large[0]:
                task.large.announce(large)
            try:
                task.large.write(out_dir, name, title=task.title, overlay=task.overlay, progress=progress)
                written += 1
            except (BrokenImageError, LongNameError) as error:
                leave_out(error)
    except AfaError as error:
        done = skipped + written + sum(future.exception() is None for future in writing)
        left = len(names) - done
        raise AfaError(f"{error}; {done} masks are done and {left} missing; {task.go_on}") from None
    seconds = time.monotonic() - started
    return PredictSummary(out_dir / "masks", written, skipped, tuple(failed), seconds, broken=tuple(broken))


def _readable(
    task: Task[_Image], names: Sequence[str], leave_out: Callable[[AfaError], None], advance: Advance, large: list[str]
) -> Generator[tuple[str, _Image], None, None]:
    """Names and images in their order, but for those that cannot be read; those made in tiles go to `large`."""

    def read(name: str) -> _Image | None:
        return None if task.large and task.large.has(name) else task.read(name)

    for name, reading in read_ahead(read, names):
        try:
            image = reading.result()
        except AfaError as error:
            leave_out(error)
            advance(1)
            continue
        if image is None:
            large.append(name)
            advance(1)
        else:
            yield name, image


def _missing(
    out_dir: Path, names: Sequence[str], stamp: Mapping[str, Any], *, resume: bool, otherwise: str
) -> Sequence[str]:
    """Make OUT/masks, stamp OUT, and list the masks that are still to be made."""
    masks, path = out_dir / "masks", out_dir / STAMP
    try:
        masks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AfaError(f"{masks}: cannot be made ({error.strerror}); choose another folder") from None
    now = json.loads(json.dumps(stamp))
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
    write_whole(path, json.dumps(now, indent=1) + "\n")
    return names


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
