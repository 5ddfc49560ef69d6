"""Masks of many images: reads ahead, infers in batches of one size, writes in the background, can be resumed.

Every file appears whole or not at all, and OUT/predict.json says what made the masks, so that no call goes on with
another's. Which images, and what makes their masks, is up to `afa.inference.files`.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

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
from afa.inference.stamp import current_masks, missing_in_all
from afa.runs.files import only_writer, write_whole
from afa.runtime import ALONE, Advance, Processes, image_progress, read_ahead, say, showing_progress

_Image = TypeVar("_Image", bound=PreparedImage)


@dataclass(frozen=True)
class PredictSummary:
    """What a pass over files did.

    Attributes:
        folder: Where the masks are, or their shards.
        written: Masks written.
        skipped: Masks that were there already and left as they are.
        failed: One line for each image that could not be done; empty when all is well.
        broken: One line for each image that cannot be read and was to be left out (`data.skip_broken`).
        seconds: Wall time.
        formats: What was written for other tools, if that was asked for.
    """

    folder: Path | str
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
    written: PredictSummary, images: TaggedImages, out_dir: Path, *, processes: Processes = ALONE
) -> MasksSummary:
    """Read the masks of tagged images again, say how sure they are, and write OUT/masks.json.

    Args:
        written: What was done.
        images: The images; one without a current mask is passed over.
        out_dir: Folder that has the masks.
        processes: Processes that share the reading; the first one writes, and all get the summary.
    """
    finished = set(current_masks(out_dir, images.names))
    indices = [index for index, name in enumerate(images.names) if name in finished]
    missed: dict[int, list[str]] = {}
    covered = total = 0
    share = processes.share(indices)
    with image_progress("summing up masks", total=len(indices), processes=processes) as advance:
        for index, reading in read_ahead(lambda index: _count_values(mask_path(out_dir, images.names[index])), share):
            counts = reading.result()
            places = np.flatnonzero(images.tagged[index] & (counts[1 : 1 + len(images.classes)] == 0))
            if places.size:
                missed[index] = [images.classes[place] for place in places]
            covered, total = covered + int(counts[1:255].sum()), total + int(counts.sum())
            advance(1)
    parts = processes.gather((missed, covered, total))
    missed = {index: tags for part in parts for index, tags in part[0].items()}
    nothing = {images.names[index]: missed[index] for index in sorted(missed)}
    covered, total = sum(part[1] for part in parts), sum(part[2] for part in parts)
    summary = MasksSummary(written, 100 * covered / max(1, total), nothing, len(indices))
    if processes.is_main:
        write_whole(out_dir / "masks.json", json.dumps(summary.to_json(), indent=1) + "\n")
    return summary


def joined_masks(written: PredictSummary, parts: Sequence[MasksSummary]) -> MasksSummary:
    """What was done in parts, as one; the coverage is the mean of the parts by their images."""
    count = sum(part.num_images for part in parts)
    coverage = sum(part.coverage * part.num_images for part in parts) / max(1, count)
    nothing = {name: tags for part in parts for name, tags in part.nothing.items()}
    return MasksSummary(written, coverage, nothing, count)


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
    task: Task[_Image], out_dir: Path, names: Sequence[str], *, resume: bool, processes: Processes = ALONE
) -> PredictSummary:
    """Read in threads, infer here in batches of one size, write in threads.

    A failed read or a name that is too long loses one image; another failed write ends the pass, after the writes
    that are under way.

    Args:
        task: How the masks are made.
        out_dir: Made if missing.
        names: Names of the images.
        resume: Leave masks that are there already as they are. A call that torchrun starts again does so anyway.
        processes: Processes that share the images, and all of which see `out_dir`.

    Raises:
        AfaError: The masks that are there were made with other weights or settings; a file cannot be written; another
            call is writing there.
    """
    stamp = {**task.stamp, "classes": task.classes, "overlay": task.overlay}
    lock = only_writer(out_dir / "masks") if processes.is_main else nullcontext()
    with lock:
        missing = missing_in_all(out_dir, names, stamp, processes, resume=resume, otherwise=task.otherwise)
        started, skipped = time.monotonic(), len(names) - len(missing)
        work = _Work(task, out_dir, processes.share(missing), is_main=processes.is_main)
        try:
            with image_progress(task.title, total=len(missing), processes=processes) as advance:
                work.make(advance)
            with showing_progress(processes.is_main):
                work.make_large()
        except AfaError as error:
            count = f"{skipped + work.done} masks are done and {len(missing) - work.done} missing; "
            raise AfaError(f"{error}; {'' if processes.count > 1 else count}{task.go_on}") from None
        parts = processes.gather((work.written, {"failed": work.failed, "broken": work.broken}))
    places = {name: index for index, name in enumerate(names)}

    def lines(kind: str) -> tuple[str, ...]:
        found = [pair for _, lists in parts for pair in lists[kind]]
        return tuple(line for _, line in sorted(found, key=lambda pair: places[pair[0]]))

    return PredictSummary(
        out_dir / "masks",
        sum(written for written, _ in parts),
        skipped,
        lines("failed"),
        time.monotonic() - started,
        broken=lines("broken"),
    )


class _Work(Generic[_Image]):
    """The images of this process, and what became of them.

    Attributes:
        written: Masks written.
        failed, broken: Name and line of each image that has no mask.
    """

    def __init__(self, task: Task[_Image], out_dir: Path, names: Sequence[str], *, is_main: bool) -> None:
        self.task, self.out_dir, self.names = task, out_dir, names
        self.is_main = is_main
        self.written = 0
        self.failed: list[tuple[str, str]] = []
        self.broken: list[tuple[str, str]] = []
        self._large: list[str] = []
        self._writing: deque[tuple[str, Future[None]]] = deque()

    @property
    def done(self) -> int:
        """Masks that are there after an error."""
        return self.written + sum(future.exception() is None for _, future in self._writing)

    def make(self, advance: Advance) -> None:
        """Make the masks of all images but those in tiles."""
        task = self.task
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="afa-write") as writers,
            closing(_readable(task, self.names, self._leave_out, advance, self._large)) as images,
        ):
            for group in group_by_size(images, sizes=lambda item: item[1].sizes, batch_size=task.batch_size):
                results = task.infer([image for _, image in group])
                # A kill loses the masks that wait for the disk: never more than a batch of them.
                self._finish(task.batch_size - len(group), advance)
                for (name, image), made in zip(group, results, strict=True):
                    self._writing.append((name, writers.submit(task.write, self.out_dir, name, image.pixels, made)))
            self._finish(0, advance)

    def make_large(self) -> None:
        """Make the masks of images in tiles."""
        for name in self._large:
            assert self.task.large is not None
            if name == self._large[0] and self.is_main:
                self.task.large.announce(self._large)
            try:
                self.task.large.write(self.out_dir, name, title=self.task.title, overlay=self.task.overlay)
                self.written += 1
            except (BrokenImageError, LongNameError) as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: AfaError) -> None:
        is_left_out = self.task.skip_broken and isinstance(error, BrokenImageError)
        (self.broken if is_left_out else self.failed).append((name, str(error)))
        say(f"skipped: {error}")

    def _finish(self, waiting: int, advance: Advance) -> None:
        while len(self._writing) > waiting:
            name, future = self._writing.popleft()
            try:
                future.result()
                self.written += 1
            except LongNameError as error:
                self._leave_out(name, error)
            advance(1)


def _readable(
    task: Task[_Image],
    names: Sequence[str],
    leave_out: Callable[[str, AfaError], None],
    advance: Advance,
    large: list[str],
) -> Generator[tuple[str, _Image], None, None]:
    """Names and images in their order, but for those that cannot be read; those made in tiles go to `large`."""

    def read(name: str) -> _Image | None:
        return None if task.large and task.large.has(name) else task.read(name)

    for name, reading in read_ahead(read, names):
        try:
            image = reading.result()
        except AfaError as error:
            leave_out(name, error)
            advance(1)
            continue
        if image is None:
            large.append(name)
            advance(1)
        else:
            yield name, image
