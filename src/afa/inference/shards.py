"""Masks of images in shards, and shards of masks: one part after another, so that memory does not grow with the images.

A part is made in a folder of its own by what makes folders of masks, packed as a whole, and only then put where it
belongs. So a part that is there is complete, and a call that is cut off goes on within the part that it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
from pycocotools import mask as coco_mask

from afa.config import DataConfig
from afa.data.dataset import TaggedImages
from afa.data.images import read_mask
from afa.data.readers.shards import holds_shards, names_shards, open_shards
from afa.data.shards import MASK, TAR, Shard, ShardCache, Shards
from afa.data.stores import find_files, is_remote, put, read_bytes
from afa.errors import AfaError
from afa.formats.write import mask_path
from afa.inference.masks import PredictSummary
from afa.inference.stamp import STAMP, current_masks
from afa.runs.files import only_writer, write_whole
from afa.runtime import ALONE, Processes, read_ahead, say

DEFAULT_SIZE: Final = 10_000
"""Images of a shard of masks, where nothing else is stated."""

Part = TypeVar("Part", bound=Mapping[str, Any])
Make = Callable[[Part, Path], PredictSummary]
"""Makes the masks of a part, whose keys are names of images, in a folder; leaves those that are there as they are."""


def shard_files(texts: Sequence[str], data: DataConfig) -> Iterator[tuple[str, dict[str, Path] | AfaError]]:
    """The images of shards, one shard at a time, each prepared while the one before is used.

    Yields:
        Name of the shard, and its images by name, or what is wrong with it; then, as an error without images, each
        fault of it.
    """

    def prepare(shard: Shard) -> Shards:
        found = Shards([shard])
        shard.local()
        return found

    for shard, reading in read_ahead(prepare, open_shards(texts, data), workers=1, ahead=1):
        try:
            found = reading.result()
        except AfaError as error:
            yield shard.name, error
            continue
        yield shard.name, dict(zip(found.names, found.paths, strict=True))
        for fault in found.faults:
            yield shard.name, AfaError(fault)


def is_sharded(text: str) -> bool:
    """Whether a text names shards, or a folder of shards."""
    return names_shards(text) or (Path(text).is_dir() and holds_shards(Path(text), only=True))


def make_parts(
    make: Callable[..., PredictSummary],
    parts: Iterable[tuple[str, Part | AfaError]],
    folder: Path,
    *,
    resume: bool,
    processes: Processes = ALONE,
) -> PredictSummary:
    """Make one part after another in the same folder; what cannot be read is a failure.

    `resume` says whether the first one leaves masks of an earlier call; the others leave those of the ones before.
    """
    total = PredictSummary(folder / "masks", 0, 0, (), 0.0)
    for _, part in parts:
        if isinstance(part, AfaError):
            total = added(total, _failed(total, part, is_main=processes.is_main))
        else:
            total, resume = added(total, make(part, folder, resume=resume)), True
    return total


@dataclass(frozen=True)
class ShardFolder:
    """Where shards of masks go: PART.tar with KEY.mask.png, or with `rle` KEY.mask.json, for each image.

    Attributes:
        address: Folder or address.
        size: Images of a shard; 0 leaves them as they come.
        rle: Whether masks are run lengths as of COCO, a JSON with those of each class, in place of index PNGs.
        classes: C names.
        data: Its `store_retries`.
    """

    address: str
    size: int
    rle: bool
    classes: Sequence[str]
    data: DataConfig

    def write(
        self,
        make: Make[Part],
        parts: Iterable[tuple[str, Part | AfaError]],
        empty: Part,
        *,
        resume: bool,
        processes: Processes = ALONE,
    ) -> PredictSummary:
        """Make and write the shards, each of several processes its own: the number of a shard says whose it is.

        Args:
            make: Makes a part.
            parts: The parts and their names.
            empty: A part without images, which tells by what masks are made.
            resume: Leave shards that are there already as they are.
            processes: Processes that share the shards.

        Returns:
            What this process did.

        Raises:
            AfaError: The shards that are there were made with other weights or settings; something cannot be written.
        """
        total = PredictSummary(self.address, 0, 0, (), 0.0)
        is_locked = processes.is_main and not is_remote(self.address)
        with only_writer(Path(self.address)) if is_locked else contextlib.nullcontext():
            there = self._there(make, empty, resume=resume, is_main=processes.is_main)
            for number, (name, part) in enumerate(self._sized(parts)):
                if number % processes.count != processes.rank:
                    continue
                if isinstance(part, AfaError):
                    total = added(total, _failed(total, part))
                elif name in there:
                    total = replace(total, skipped=total.skipped + len(part))
                else:
                    stage = self._stage(name)
                    if not resume:
                        shutil.rmtree(stage, ignore_errors=True)
                    total = added(total, make(part, stage))
                    self._put(f"{name}{TAR}", partial(self._pack, name, part, stage))
                    shutil.rmtree(stage, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process is at its parts
                self._stage("").rmdir()
        return total

    def write_images(
        self, make: Callable[[TaggedImages, Path], PredictSummary], images: TaggedImages, processes: Processes = ALONE
    ) -> PredictSummary:
        """As `write`, of the images of a data set; those that are there already are left as they are."""
        sized = replace(self, size=self.size or DEFAULT_SIZE)
        starts = range(0, len(images), sized.size)
        groups = (range(start, min(start + sized.size, len(images))) for start in starts)
        parts = (("", {images.names[row]: row for row in group}) for group in groups)

        def make_part(part: Mapping[str, int], place: Path) -> PredictSummary:
            return make(images.subset(list(part.values())), place)

        return sized.write(make_part, parts, {}, resume=True, processes=processes)

    def _there(self, make: Make[Part], empty: Part, *, resume: bool, is_main: bool) -> set[str]:
        """The shards to leave; and write what makes the masks, after a look at what made those that are there."""
        stage = self._stage(f"{STAMP}.{os.getpid()}")
        try:
            make(empty, stage)
            now = (stage / STAMP).read_bytes()
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        now = json.dumps(json.loads(now) | {"rle": self.rle, "shards": self.size}, indent=1).encode() + b"\n"
        retries = self.data.store_retries
        before = read_bytes(f"{self.address}/{STAMP}", retries=retries)
        there = self._finished() if before is not None else set()
        if there and before != now:
            raise AfaError(
                f"{self.address}: the {len(there)} shards there were made with other weights, settings or sizes; "
                "delete them, or choose another --out"
            )
        if is_main:
            self._put(STAMP, lambda file: file.write(now))
        if there and resume:
            say(f"{self.address}: {len(there)} shards are there already and left as they are")
        return there if resume else set()

    def _finished(self) -> set[str]:
        files = find_files(self.address, {TAR}, retries=self.data.store_retries)
        start = len(self.address.rstrip("/")) + 1
        return {file.address[start:].removesuffix(TAR) for file in files}

    def _sized(self, parts: Iterable[tuple[str, Part | AfaError]]) -> Iterator[tuple[str, Any]]:
        """The parts, or parts of the stated size made of them; faults come as they are."""
        if not self.size:
            yield from parts
            return
        faults: list[AfaError] = []

        def items() -> Iterator[tuple[str, Any]]:
            for _, part in parts:
                if isinstance(part, AfaError):
                    faults.append(part)
                else:
                    yield from part.items()

        left, number = items(), 0
        while group := dict(islice(left, self.size)):
            yield f"{number:06d}", group
            number += 1
        yield from (("", fault) for fault in faults)

    def _stage(self, name: str) -> Path:
        """The folder in which a part is made."""
        if is_remote(self.address):
            key = hashlib.sha256(self.address.encode()).hexdigest()[:16]
            return ShardCache(self.data).folder / "parts" / key / name
        return Path(self.address) / ".parts" / name

    def _put(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file where it belongs, whole or not at all."""
        if not is_remote(self.address):
            write_whole(Path(self.address) / name, write)
            return
        made = self._stage(f"{name}.made")
        write_whole(made, write)
        put(made, f"{self.address.rstrip('/')}/{name}", retries=self.data.store_retries)
        made.unlink()

    def _pack(self, name: str, part: Iterable[str], stage: Path, file: BinaryIO) -> None:
        """Write the masks of a part as an archive, the same for the same masks."""
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for image in current_masks(stage, part):
                path, key = mask_path(stage, image), image.removeprefix(f"{name}/")
                content = _run_lengths(path, self.classes) if self.rle else path.read_bytes()
                member = tarfile.TarInfo(f"{key}{MASK}{'.json' if self.rle else path.suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def added(one: PredictSummary, other: PredictSummary) -> PredictSummary:
    """Both summaries as one."""
    return replace(
        one,
        written=one.written + other.written,
        skipped=one.skipped + other.skipped,
        failed=(*one.failed, *other.failed),
        broken=(*one.broken, *other.broken),
        seconds=one.seconds + other.seconds,
    )


def whole(summary: PredictSummary, processes: Processes) -> PredictSummary:
    """What all processes did, each its own parts."""
    first, *others = processes.gather(summary)
    for other in others:
        first = replace(added(first, other), seconds=max(first.seconds, other.seconds))
    return first


def _failed(total: PredictSummary, error: AfaError, *, is_main: bool = True) -> PredictSummary:
    if is_main:
        say(f"skipped: {error}")
    return PredictSummary(total.folder, 0, 0, (str(error),), 0.0)


def _run_lengths(path: Path, classes: Sequence[str]) -> bytes:
    """Run lengths of each class of a mask as COCO compresses them, and of pixels without label as null."""
    label = read_mask(path)
    found = []
    for value in np.flatnonzero(np.bincount(label.ravel(), minlength=256)[1:]).tolist():
        name = classes[value] if value < len(classes) else None
        runs = coco_mask.encode(np.asfortranarray(label == value + 1))
        found.append({"class": name, "value": value + 1, "counts": runs["counts"].decode()})
    return json.dumps({"size": list(label.shape), "masks": found}).encode()
