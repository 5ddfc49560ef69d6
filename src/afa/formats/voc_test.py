"""The archive that the PASCAL VOC test server scores: written from masks, and checked before anyone sends it."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from afa.data.classes import VOC_CLASSES
from afa.data.images import IMAGE_SUFFIXES, read_size
from afa.data.palette import index_png, voc_palette
from afa.errors import AfaError, first_line
from afa.formats.job import Job
from afa.runtime import image_progress
from afa.types import IGNORE_INDEX

FOLDER: Final = "results/VOC2012/Segmentation/comp5_test_cls"
"""Where the masks are in the archive: competition 5, in which networks learn from VOC's data alone."""

MAX_PROBLEMS: Final = 10
"""At most this many problems of a kind are listed; the others are counted."""


@dataclass(frozen=True)
class SubmissionCheck:
    """What is wrong with an archive.

    Attributes:
        path: The archive.
        num_masks: Masks in it.
        problems: One line each; empty if all is well.
        unchecked: What could not be checked without a list or without images.
    """

    path: Path
    num_masks: int
    problems: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the user, and one a problem."""
        masks = f"{self.path}: {self.num_masks} masks"
        if self.problems:
            return "\n".join([f"{masks}, not ready for the server:", *(f"  {line}" for line in self.problems)])
        return f"{masks}, ready for the server" + (
            f"; not compared with {' and '.join(self.unchecked)}" if self.unchecked else ""
        )


def write_voc_test(job: Job) -> None:
    """Write the archive; masks get the values of VOC's 20 classes, which are found by name.

    The same masks give the same bytes.
    """
    values = np.zeros(256, dtype=np.uint8)
    for value, name in enumerate(job.classes, start=1):
        if name not in VOC_CLASSES:
            raise AfaError(f"class {name!r} is not one of PASCAL VOC's, and voc_test is for these; leave it out")
        values[value] = 1 + VOC_CLASSES.index(name)
    with (
        job.partial.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0, compresslevel=1) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for item, label in job.masks:
            if "/" in item.name:
                raise AfaError(f"name {item.name!r} has a folder, voc_test none; predict a single folder of images")
            if (label == IGNORE_INDEX).any():
                raise AfaError(f"{item.mask_path}: has ignored pixels (255), which voc_test cannot hold; use predict")
            encoded = index_png(values[label])
            entry = tarfile.TarInfo(f"{FOLDER}/{item.name}.png")
            entry.size = len(encoded)
            archive.addfile(entry, io.BytesIO(encoded))


def check_voc_test(path: Path, *, names: Sequence[str] | None = None, images: Path | None = None) -> SubmissionCheck:
    """Look for everything that the server would refuse or score as nothing.

    The masks must be in `FOLDER`, one for each name and no other. They must be index PNGs with VOC's palette and values
    0..20, and have the size of their image. The archive is read once, one mask at a time.

    Args:
        path: The archive, `.tgz` or any other tar.
        names: Names of the test list; None: names are not compared.
        images: Folder of the images; None: sizes are not compared.

    Raises:
        AfaError: The file is no archive, or an image cannot be read.
    """
    found: set[str] = set()
    problems: dict[str, list[str]] = {}

    def blame(kind: str, what: str) -> None:
        problems.setdefault(kind, []).append(what)

    total = None if names is None else len(names)
    with image_progress("checking masks", total=total, unit="masks") as advance:
        for entry, content in _entries(path):
            advance(1)
            mask = PurePosixPath(entry)
            if str(mask.parent) != FOLDER or mask.suffix != ".png":
                blame(f"not a PNG in {FOLDER}", entry)
                continue
            if mask.stem in found:
                blame("twice in the archive", mask.name)
            found.add(mask.stem)
            if fault := _mask_fault(content, _image_size(mask.stem, images)):
                blame(fault[0], mask.name + fault[1])
    if names is not None:
        wanted = set(names)
        for name in sorted(wanted - found):
            blame("missing", f"{name}.png")
        for name in sorted(found - wanted):
            blame("not in the list", f"{name}.png")
    if not found:
        blame("empty", f"no mask in {FOLDER}")
    lines = [
        f"{kind}: {', '.join(each[:MAX_PROBLEMS])}"
        + (f" and {len(each) - MAX_PROBLEMS} more" if len(each) > MAX_PROBLEMS else "")
        for kind, each in problems.items()
    ]
    unchecked = [what for what, given in (("a list", names), ("images", images)) if given is None]
    return SubmissionCheck(path, len(found), tuple(lines), tuple(unchecked))


def _entries(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each file of an archive."""
    try:
        with tarfile.open(path) as archive:
            for entry in archive:
                if not entry.isdir():
                    content = archive.extractfile(entry) if entry.isfile() else None
                    # Read here, where errors of the archive are told from those of a mask.
                    yield entry.name.removeprefix("./"), io.BytesIO(content.read() if content else b"")
    except FileNotFoundError:
        raise AfaError(f"{path}: no such archive; write it with afa predict ... --format voc_test") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = first_line(error).rstrip(":")  # tarfile gives a line to each compression that it tried
        raise AfaError(f"{path}: cannot be read as a tar archive ({reason}); write it again") from None


def _mask_fault(content: IO[bytes], size: tuple[int, int] | None) -> tuple[str, str] | None:
    """What is wrong with a mask: the kind, and the details; None if nothing is."""
    try:
        with Image.open(content) as image:
            if image.format != "PNG" or image.mode != "P":
                return "not an index PNG", f" ({image.format}, mode {image.mode})"
            palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
            label = np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return "not a readable PNG", f" ({' '.join(str(error).split())[:60]})"
    highest = int(label.max())
    if highest > len(VOC_CLASSES):
        return f"values above {len(VOC_CLASSES)}", f" ({highest})"
    if not np.array_equal(palette[: highest + 1], voc_palette()[: highest + 1]):
        return "another palette than VOC's", ""
    if size is not None and label.shape != size:
        return "not of the image's size", f" ({label.shape[1]}x{label.shape[0]}, image {size[1]}x{size[0]})"
    return None


def _image_size(name: str, images: Path | None) -> tuple[int, int] | None:
    """Height and width of an image; None if it is not known."""
    if images is None:
        return None
    candidates = (images / f"{name}{suffix}" for suffix in (".jpg", *sorted(IMAGE_SUFFIXES)))
    file = next((path for path in candidates if path.is_file()), None)
    return None if file is None else read_size(file)
