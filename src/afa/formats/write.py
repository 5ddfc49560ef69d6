"""Turns a folder of masks into the files of another tool: the table of formats, and one call to write any.

A conversion reads one mask at a time, gives the same files for the same masks, and replaces an earlier result
only when it is complete. `afa.formats.job` has what the formats share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.data.images import read_mask
from afa.data.palette import voc_palette
from afa.errors import AfaError
from afa.formats.coco import PANOPTIC_BACKGROUND, write_coco, write_panoptic
from afa.formats.job import Job, MaskItem, Tally, replacing
from afa.formats.labelstudio import write_labelstudio
from afa.formats.png import write_cvat, write_hf, write_mmseg, write_voc
from afa.formats.polygons import MIN_AREA, write_labelme, write_yolo
from afa.formats.voc_test import write_voc_test
from afa.runtime import image_progress
from afa.types import IGNORE_INDEX


@dataclass(frozen=True)
class FormatInfo:
    """A format that masks can be written in.

    Attributes:
        description: One line.
        output: File, if it has a suffix, or folder that is written in the folder of the output.
        write: What does it.
    """

    description: str
    output: str
    write: Callable[[Job], None]


FORMATS: Final[Mapping[str, FormatInfo]] = MappingProxyType(
    {
        "coco": FormatInfo("COCO instances JSON, masks as RLE", "coco.json", write_coco),
        "cvat": FormatInfo('CVAT "Segmentation mask 1.1"', "cvat.zip", write_cvat),
        "hf": FormatInfo("Hugging Face datasets, image and mask columns", "hf", write_hf),
        "labelme": FormatInfo("LabelMe JSON, polygons", "labelme", write_labelme),
        "labelstudio": FormatInfo("Label Studio predictions, brush labels", "labelstudio", write_labelstudio),
        "mmseg": FormatInfo("MMSegmentation img_dir and ann_dir", "mmseg", write_mmseg),
        "panoptic": FormatInfo("COCO panoptic JSON and PNGs", "panoptic", write_panoptic),
        "voc": FormatInfo("PASCAL VOC folders, index PNG and labelmap", "voc", write_voc),
        "voc_test": FormatInfo("Archive for PASCAL VOC's test server", "voc_test.tgz", write_voc_test),
        "yolo": FormatInfo("YOLO segmentation, polygons", "yolo", write_yolo),
    }
)
"""Formats by name."""


@dataclass(kw_only=True)
class FormatResult(Tally):
    """What a conversion wrote, and what the format could not keep.

    Attributes:
        format: Name of the format.
        path: File or folder written.
        num_images: Images in it.
        seconds: Wall time.
    """

    format: str
    path: Path
    num_images: int
    seconds: float

    @property
    def losses(self) -> tuple[str, ...]:
        """What was lost, a phrase for each kind; empty if nothing was."""
        found = []
        if self.ignored_pixels:
            became = "became background" if self.format == "cvat" else "are in no annotation"
            found.append(f"{self.ignored_pixels:,} ignored pixels {became}")
        if self.filled_holes:
            found.append(f"{self.filled_holes:,} holes are filled, as polygons have none")
        if self.dropped_regions:
            found.append(f"{self.dropped_regions:,} specks under {MIN_AREA:g} pixels are left out")
        return tuple(found)

    def __str__(self) -> str:
        """One line for the user."""
        return "; ".join([f"{self.num_images} images written as {self.format} to {self.path}", *self.losses])


def parse_formats(text: str) -> tuple[str, ...]:
    """Read names of formats that are separated by commas.

    Returns:
        The names, each once, in their order.

    Raises:
        AfaError: A name is not one of `FORMATS`.

    >>> parse_formats("coco, cvat")
    ('coco', 'cvat')
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        _check_format(name)
    return names


def mask_path(out_dir: Path, name: str) -> Path:
    """The mask of an image in the output of `afa predict`: OUT/masks/NAME.tif if there is one, else NAME.png."""
    tiff = out_dir / "masks" / f"{name}.tif"
    # Not Path.is_file, which fails where a name is too long.
    return tiff if os.path.isfile(tiff) else out_dir / "masks" / f"{name}.png"


def mask_items(images: Iterable[tuple[str, Path]], out_dir: Path) -> list[MaskItem]:
    """Pair images, by name and file, with the masks that `afa predict` and `afa pseudo` wrote to OUT.

    The images that have a mask come in their order.
    """
    items = (MaskItem(name, path, mask_path(out_dir, name)) for name, path in images)
    return [item for item in items if os.path.isfile(item.mask_path)]


def write_format(
    format: str,
    items: Iterable[MaskItem],
    classes: Sequence[str],
    out_dir: Path,
    *,
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> FormatResult:
    """Convert masks to a format, as OUT/`FORMATS[format].output`.

    An earlier result is replaced when the new one is complete; if anything fails, it stays and nothing new does.

    Args:
        format: One of `FORMATS`.
        items: Images and masks in the order of the result; walked once.
        classes: The C class names; `classes[i]` has mask value i + 1.
        out_dir: Made if missing.
        colors: C RGB colors of the classes, 0..255; None = those of VOC.

    Raises:
        AfaError: Unknown format; colors that cannot be told apart; a name, class name or mask that the format
            cannot hold; no item; a mask or image is missing; something cannot be written.
    """
    _check_format(format)
    info = FORMATS[format]
    started = time.monotonic()
    palette = _palette(classes, colors)
    target = out_dir / info.output
    tally = Tally()
    num_images = 0

    def masks() -> Iterator[tuple[MaskItem, NDArray[np.uint8]]]:
        nonlocal num_images
        total = len(items) if isinstance(items, Sized) else None
        with image_progress(f"write {format}", total=total) as advance:
            for item in items:
                _check_name(item)
                yield item, _read(item, len(classes))
                num_images += 1
                advance(1)
        if not num_images:
            raise AfaError(f"{target}: there is no mask to write as {format}; predict some images first")

    with replacing(target, format=format) as partial:
        info.write(Job(masks(), tuple(classes), palette, target, partial, tally))
    seconds = time.monotonic() - started
    return FormatResult(format=format, path=target, num_images=num_images, seconds=seconds, **vars(tally))


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise AfaError(f"unknown format {name!r}; use one of {', '.join(FORMATS)}")


def _check_name(item: MaskItem) -> None:
    """Names become lines of lists and paths below the output."""
    path = PurePosixPath(item.name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise AfaError(f"name {item.name!r} leads out of the output; name images by their path below a folder")
    is_line = item.name.splitlines() == [item.name] and "\0" not in item.name
    if not is_line or any("\ud800" <= character <= "\udfff" for character in item.name):
        raise AfaError(f"name {item.name!r} has a line break or is not UTF-8; rename the image and its mask")


def _palette(classes: Sequence[str], colors: Sequence[tuple[int, int, int]] | None) -> NDArray[np.uint8]:
    """Colors by mask value."""
    palette = voc_palette()
    if colors is None:
        return palette
    assert len(colors) == len(classes), (len(colors), len(classes))
    taken = {(0, 0, 0): "the background", PANOPTIC_BACKGROUND: "the background"}
    for name, color in zip(classes, map(tuple, colors), strict=True):
        if len(color) != 3 or not all(0 <= part <= 255 for part in color):
            raise AfaError(f"class {name!r} has color {color}; give red, green, blue, 0 to 255 each")
        if color in taken:
            raise AfaError(f"class {name!r} has color {color}, as has {taken[color]}; give each its own")
        taken[color] = f"class {name!r}"
    palette[1 : 1 + len(classes)] = colors
    return palette


def _read(item: MaskItem, num_classes: int) -> NDArray[np.uint8]:
    label = read_mask(item.mask_path)
    beyond = label[(label > num_classes) & (label != IGNORE_INDEX)]
    if beyond.size:
        raise AfaError(
            f"{item.mask_path}: the mask has value {beyond[0]}, and there are {num_classes} classes; "
            "write the masks and their formats with the same classes"
        )
    return label
