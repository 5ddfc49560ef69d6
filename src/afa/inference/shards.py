"""Masks of images in shards, and shards of masks: one part after another, so that memory does not grow with the images.

A part is made in a folder of its own by what makes folders of masks, packed as a whole, and only then put where it
belongs, and after it a note of what it holds. So a part with a note is complete, and a call that is cut off goes on
within the part that it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from afa.config import DataConfig
from afa.data.dataset import TaggedImages
from afa.data.images import read_mask
from afa.data.shards import MASK, TAR, ShardCache
from afa.data.stores import find_files, is_remote, put, read_bytes
from afa.elastic import is_restarted
from afa.errors import AfaError
from afa.formats.write import mask_path
from afa.inference.masks import PredictSummary
from afa.inference.sources import Images, Source
from afa.inference.stamp import STAMP, current_masks
from afa.runs.files import only_writer, write_whole
from afa.runtime import ALONE, Processes, image_progress, read_ahead, say, showing_progress

DEFAULT_SIZE: Final = 10_000
"""Images of a shard of masks, where nothing else is stated."""

NOTE: Final = ".masks.json"
"""What the name of the note on a shard of masks has in place of `.tar`."""

Make = Callable[..., PredictSummary]
"""Makes the masks of images in a folder, `make(images, folder)`; leaves those that are there as they are."""


def make_parts(
    make: Make,
    sources: Sequence[Source],
    folder: Path,
    *,
    resume: bool,
    processes: Processes = ALONE,
) -> PredictSummary:
    """Make one part after another in the same folder; what cannot be read is a failure.

    `resume` says whether the first one leaves masks of an earlier call; the others leave those of the ones before.
    """
    total = PredictSummary(folder / "masks", 0, 0, (), 0.0)
    shows = processes.is_main and len(sources) > 1
    with image_progress("shards", total=len(sources), enabled=shows, unit="shards") as tell:
        for _, reading in read_ahead(Source.read, sources, workers=1, ahead=1):
            images, faults = reading.result()
            total = _added(total, _left_out(faults, shows=processes.is_main))
            if images:
                total, resume = _added(total, make(images, folder, resume=resume)), True
            tell(1, skipped=not total.written)
    return total


class _Note(msgspec.Struct):
    """On a shard of masks: the state of its source, how many masks it has, and a line for each failure."""

    source: str
    masks: int
    failed: list[str]


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
        make: Make,
        sources: Sequence[Source],
        *,
        resume: bool,
        sized: bool = False,
        processes: Processes = ALONE,
    ) -> PredictSummary:
        """Make and write the shards, each of several processes its own: the number of a shard says whose it is.

        Args:
            make: Makes a part.
            sources: The images.
            resume: Leave shards that are there already as they are, but try again what failed.
            sized: The sources have the stated size already.
            processes: Processes that share the shards.

        Raises:
            AfaError: The shards that are there were made with other weights or settings; something cannot be written;
                another call is writing there; processes see other images.
        """
        total = PredictSummary(self.address, 0, 0, (), 0.0)
        is_cut = bool(self.size) and not sized
        shared = ALONE if is_cut else processes  # all look through shards of another size
        shows = len(sources) > 1
        bar = image_progress("shards", total=len(sources), enabled=shows, unit="shards", processes=shared)
        folder = self._stage("") if is_remote(self.address) else Path(self.address)
        lock = only_writer(folder) if processes.is_main else contextlib.nullcontext()
        with lock, showing_progress(processes.is_main), bar as tell:
            there = self._begin(make, resume=resume, processes=processes)

            def passed() -> None:
                tell(1, skipped=not total.written)

            parts = self._sized(sources, passed, processes, is_all=not there) if is_cut else sources
            own = islice(parts, processes.rank, None, processes.count)
            for source, reading in read_ahead(partial(self._look, there=there or ()), own, workers=1, ahead=1):
                note, images, faults = reading.result()
                if there is None and images is not None:
                    shutil.rmtree(self._stage(source.name), ignore_errors=True)
                total = _added(total, self._write_part(make, source, note, images, faults))
                if not is_cut:
                    passed()
            total, *others = processes.gather(total)
            shutil.rmtree(self._stage(""), ignore_errors=True)
        for other in others:
            total = replace(_added(total, other), seconds=max(total.seconds, other.seconds))
        return total

    def write_images(
        self,
        make: Callable[[TaggedImages, Path], PredictSummary],
        images: TaggedImages,
        processes: Processes = ALONE,
    ) -> PredictSummary:
        """As `write`, of the images of a data set; those that are there already are left as they are."""
        target = replace(self, size=self.size or DEFAULT_SIZE)

        def part(number: int) -> Source:
            rows = range(number * target.size, min((number + 1) * target.size, len(images)))
            return Source.of(f"{number:06d}", lambda: {images.names[row]: row for row in rows})

        parts = [part(number) for number in range(-(-len(images) // target.size))]

        def make_part(part: Images, place: Path) -> PredictSummary:
            return make(images.subset(list(part.values())), place)

        return target.write(make_part, parts, resume=True, sized=True, processes=processes)

    def _begin(self, make: Make, *, resume: bool, processes: Processes) -> Collection[str] | None:
        """Write what makes the masks, after a look at what made those that are there.

        Returns:
            Names of the shards that are there, to go on with; None if all are made anew.
        """
        stage = self._stage(f"{STAMP}.{processes.rank}")
        shutil.rmtree(stage, ignore_errors=True)
        make({}, stage)
        stamp = json.loads((stage / STAMP).read_bytes()) | {"rle": self.rle, "shards": self.size}
        shutil.rmtree(stage, ignore_errors=True)
        now = json.dumps(stamp, indent=1).encode() + b"\n"
        retries = self.data.store_retries

        def begin() -> tuple[bytes, set[str] | None]:
            before = read_bytes(f"{self.address}/{STAMP}", retries=retries)
            files = find_files(self.address, {TAR}, retries=retries) if before is not None else []
            if files and before != now:
                raise AfaError(
                    f"{self.address}: the {len(files)} shards there were made with other weights, settings or sizes; "
                    "delete them, or choose another --out"
                )
            self._put(STAMP, lambda file: file.write(now))
            start = len(self.address) + 1
            there = {file.address[start:].removesuffix(TAR) for file in files}
            return now, there if resume or is_restarted() else None

        wanted, there = processes.from_main(begin)
        if wanted != now:
            raise AfaError(
                f"process {processes.rank} of {processes.count} sees other weights or settings than the first one; "
                "give all machines the same files"
            )
        return there

    def _sized(
        self, sources: Sequence[Source], passed: Callable[[], None], processes: Processes, *, is_all: bool
    ) -> Iterator[Source]:
        """Sources of the stated size made of others, and one for each fault; `is_all` says that all will be read.

        Raises:
            AfaError: At the end: processes found other images.
        """
        faults: list[str] = []
        seen = hashlib.sha256()

        def items() -> Iterator[tuple[str, Any]]:
            read = partial(Source.read, bring=is_all and processes.count == 1)
            for _, reading in read_ahead(read, sources, workers=1, ahead=1):
                images, wrong = reading.result()
                faults.extend(wrong)
                yield from (images or {}).items()
                passed()

        left = items()
        for number in count():
            if not (group := dict(islice(left, self.size))):
                break
            source = Source.of(f"{number:06d}", partial(dict, group))
            seen.update(source.state().encode())
            yield source
        yield from (Source("", str, partial(_refuse, fault)) for fault in faults)
        if len(set(processes.gather(seen.digest()))) > 1:
            raise AfaError(f"{self.address}: some process could not read a shard; the same call with --resume goes on")

    def _look(self, source: Source, *, there: Collection[str]) -> tuple[_Note | None, Images | None, Sequence[str]]:
        """The note on a part that is there; unless all is well with it, also the images of its source, and faults."""
        note = None
        if source.name in there:
            content = read_bytes(f"{self.address}/{source.name}{NOTE}", retries=self.data.store_retries)
            with contextlib.suppress(msgspec.MsgspecError):
                note = msgspec.json.decode(content or b"", type=_Note)
        if note is not None and note.source != source.state():
            note = None
        return (note, None, ()) if note is not None and not note.failed else (note, *source.read())

    def _write_part(
        self, make: Make, source: Source, note: _Note | None, images: Images | None, faults: Sequence[str]
    ) -> PredictSummary:
        """Make what is missing of a part, and put all of it where it belongs."""
        name, stage = source.name, self._stage(source.name)
        if images is None:
            if note is not None and not note.failed:
                shutil.rmtree(stage, ignore_errors=True)  # of a call that was killed just before it did so
                return PredictSummary(self.address, 0, note.masks, (), 0.0)
            return _left_out(faults)
        kept = self._kept(name) if note is not None else {}
        keys = {image: image.removeprefix(source.prefix) for image in images}
        made = make({image: images[image] for image, key in keys.items() if key not in kept}, stage)
        self._put(f"{name}{TAR}", partial(self._pack, keys, stage, kept))
        made = _added(replace(made, skipped=made.skipped + len(kept)), _left_out(faults))
        told = _Note(source.state(), made.written + made.skipped, list(made.failed))
        self._put(f"{name}{NOTE}", lambda file: file.write(msgspec.json.format(msgspec.json.encode(told)) + b"\n"))
        shutil.rmtree(stage, ignore_errors=True)
        return made

    def _kept(self, name: str) -> dict[str, tuple[str, bytes]]:
        """By its key, each mask of a shard that is there: its name and contents."""
        content = read_bytes(f"{self.address}/{name}{TAR}", retries=self.data.store_retries) or b""
        kept = {}
        with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                begin = member.offset_data
                kept[member.name.rpartition(MASK)[0]] = member.name, content[begin : begin + member.size]
        return kept

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
        put(made, f"{self.address}/{name}", retries=self.data.store_retries)
        made.unlink()

    def _pack(
        self, keys: Mapping[str, str], stage: Path, kept: Mapping[str, tuple[str, bytes]], file: BinaryIO
    ) -> None:
        """Write the masks of a part as an archive, the same for the same masks, some of which were kept."""
        made = set(current_masks(stage, keys))
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for image, key in keys.items():
                if key in kept:
                    name, content = kept[key]
                elif image in made:
                    path = mask_path(stage, image)
                    name = f"{key}{MASK}{'.json' if self.rle else path.suffix}"
                    content = _run_lengths(path, self.classes) if self.rle else path.read_bytes()
                else:
                    continue
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _added(one: PredictSummary, other: PredictSummary) -> PredictSummary:
    """Both summaries as one."""
    return replace(
        one,
        written=one.written + other.written,
        skipped=one.skipped + other.skipped,
        failed=(*one.failed, *other.failed),
        broken=(*one.broken, *other.broken),
        seconds=one.seconds + other.seconds,
    )


def _left_out(faults: Sequence[str], *, shows: bool = True) -> PredictSummary:
    for fault in faults if shows else ():
        say(f"skipped: {fault}")
    return PredictSummary("", 0, 0, tuple(faults), 0.0)


def _refuse(fault: str) -> tuple[Images, Sequence[str]]:
    raise AfaError(fault)


def _run_lengths(path: Path, classes: Sequence[str]) -> bytes:
    """Run lengths of each class of a mask as COCO compresses them, and of pixels without label as null."""
    label = read_mask(path)
    found = []
    for value in np.flatnonzero(np.bincount(label.ravel(), minlength=256)[1:]).tolist():
        name = classes[value] if value < len(classes) else None
        runs = coco_mask.encode(np.asfortranarray(label == value + 1))
        found.append({"class": name, "value": value + 1, "counts": runs["counts"].decode()})
    return json.dumps({"size": list(label.shape), "masks": found}).encode()
