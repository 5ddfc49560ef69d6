"""COCO to the VOC layout: semantic masks, lists and tags from an instances file.

    python -m afa.data.coco INSTANCES.json IMAGES OUT --split train

The masks have the categories by ascending id as 1..C (80 for COCO, so 81 classes with the background), and 255 for
crowds. They serve evaluation only. Tags alone are read by `afa.data.readers.coco`, which drops outlines.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from afa.data.classes import check_classes, check_count
from afa.data.files import ImageFiles, check_paths
from afa.data.palette import write_index_png
from afa.data.readers.base import load_json
from afa.data.readers.coco import CocoFile, Id, id_order, parse
from afa.data.readers.tag_files import read_tags
from afa.errors import AfaError, shown
from afa.runs.files import link_or_copy, write_whole
from afa.runtime import image_progress
from afa.types import IGNORE_INDEX

_FINE: Final = 7  # Polygons are drawn this much larger, and the middle of each block of pixels is taken: an odd number.
_MAX_PIXELS: Final = 100_000_000


class Instance(NamedTuple):
    """An annotated object.

    Attributes:
        category: Id of its category.
        is_crowd: Whether it is a crowd, whose pixels are ignored.
        polygons: Its outline: (P, 2) float32 arrays of x and y, pixels, from the left and upper edge of the image.
        counts: Or its run lengths as COCO writes them: whole numbers or a compressed text.
    """

    category: Id
    is_crowd: bool
    polygons: tuple[NDArray[np.float32], ...] = ()
    counts: tuple[int, ...] | str = ""


@dataclass(frozen=True)
class CocoSummary:
    """What a conversion did.

    Attributes:
        num_images: Images with an annotation: those that the list names.
        num_without: Images without any, which are left out.
        num_written: Masks that were written now; the others were there.
    """

    num_images: int
    num_without: int
    num_written: int

    def __str__(self) -> str:
        return (
            f"{self.num_images:,} images with annotations, {self.num_without:,} without left out; "
            f"{self.num_written:,} masks written, {self.num_images - self.num_written:,} there before"
        )


def convert_coco(instances: Path, images: Path, out: Path, *, split: str) -> CocoSummary:
    """Write a split of COCO as a data set in the VOC layout; call it again for the other split.

    The images stay where they are: OUT/JPEGImages gets a link to their folder, or, where links to folders are not
    allowed, links to the annotated images or copies of them. Masks that are there are left as they
    are, so an interrupted call goes on where it stopped; lists and tags are written last.

    Args:
        instances: Instances JSON.
        images: Folder of the images that it names.
        out: Folder to write, made if missing.
        split: Name of the list, such as train or val.

    Raises:
        AfaError: The file is no instances JSON, or an outline in it is malformed; an image is missing; OUT holds other
            classes or other images; a file cannot be written.
    """
    if not split.isidentifier():
        raise AfaError(f"--split is {shown(split)}; use a word such as train or val")
    if not instances.is_file():
        raise AfaError(f"{instances}: no such file; give the instances JSON of COCO")
    if not images.is_dir():
        raise AfaError(f"{images}: no such folder; give the folder of the images that {instances.name} names")
    found = _read_instances(instances)
    classes = tuple(found.names.values())
    check_classes(classes, str(instances))
    check_count(classes, str(instances))
    try:
        (out / "lists").mkdir(parents=True, exist_ok=True)
        paths = _find_all(images, found, instances)
        names = check_paths(paths.values(), images)
        _write_classes(out / "classes.txt", classes)
        prefix = _link_images(images, out / "JPEGImages", paths.values())
        stems = {number: f"{prefix}/{name}" for number, name in zip(paths, names, strict=True)}
        masks = {number: out / "SegmentationClassAug" / f"{stem}.png" for number, stem in stems.items()}
        missing = [number for number, path in masks.items() if not path.is_file()]
        index = {category: value for value, category in enumerate(found.names, start=1)}
        with image_progress(f"masks of {split}", total=len(missing)) as advance:
            for number in missing:
                image = found.images[number]
                parts = [part["instance"]._replace(category=part["category_id"]) for part in found.annotations[number]]
                where = f"{instances}, image {image['file_name']!r}"
                mask = semantic_mask(parts, index, image["height"], image["width"], where=where)
                write_index_png(masks[number], mask)
                advance(1)
        _write_tags(out / "lists" / "tags.csv", {stem: found.tags(number) for number, stem in stems.items()}, classes)
        write_whole(out / "lists" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems.values()))
    except OSError as error:
        raise AfaError(f"{out}: cannot be written ({error.strerror}); free space or choose another folder") from None
    return CocoSummary(len(stems), len(found.images) - len(stems), len(missing))


def semantic_mask(
    instances: Sequence[Instance], index: Mapping[Id, int], height: int, width: int, *, where: str
) -> NDArray[np.uint8]:
    """Paint the instances of an image of height x width pixels into one mask.

    Crowds lie lowest, then the instances from the largest to the smallest, so that what is in front of or within a
    larger object stays. `index` maps category ids to mask values; messages begin with `where`.

    Returns:
        (height, width) uint8: 0 background, the value of each category, 255 where only crowds are.

    Raises:
        AfaError: An outline is malformed.
    """
    mask = np.zeros((height, width), dtype=np.uint8)
    layers: list[tuple[bool, int, int, NDArray[np.bool_]]] = []
    for instance in instances:
        try:
            shape = fill_polygons(instance.polygons, height, width)
            if instance.counts:
                shape |= decode_runs(instance.counts, height, width)
        except AfaError as error:
            raise AfaError(f"{where}: {error}") from None
        value = IGNORE_INDEX if instance.is_crowd else index[instance.category]
        layers.append((instance.is_crowd, int(shape.sum()), value, shape))
    for *_, value, shape in sorted(layers, key=lambda layer: layer[:2], reverse=True):
        mask[shape] = value
    return mask


def fill_polygons(polygons: Sequence[NDArray[np.float32]], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width), True in the pixels whose middle lies within any of the polygons, (P, 2) arrays of x and y."""
    filled = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        left, top = np.clip(np.floor(polygon.min(axis=0)), 0, (width, height)).astype(int)
        right, bottom = np.clip(np.ceil(polygon.max(axis=0)), 0, (width, height)).astype(int)
        if left >= right or top >= bottom:
            continue
        canvas = Image.new("1", (int(right - left) * _FINE, int(bottom - top) * _FINE))
        far = 4.0 * max(height, width)  # coordinates farther out make no visible difference
        points = (np.clip(polygon, -far, far) - (left, top)) * _FINE - 0.5
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=1)
        filled[top:bottom, left:right] |= np.asarray(canvas)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]
    return filled


def decode_runs(counts: Sequence[int] | str, height: int, width: int) -> NDArray[np.bool_]:
    """Decode run lengths, or their compressed text, to (height, width), True in the runs of ones.

    COCO writes zeros, ones, zeros, ... down the columns, from the left. In the text each character above `0` has five
    bits of a number, lowest first, and a sixth that says whether more follow; from the fourth number on, numbers are
    differences to the one two before.

    Raises:
        AfaError: The text is malformed, or the runs do not fill the mask.

    >>> decode_runs([1, 2, 1], 2, 2).astype(int).tolist()
    [[0, 1], [1, 0]]
    """
    lengths = _uncompress(counts) if isinstance(counts, str) else list(counts)
    if any(n < 0 for n in lengths) or sum(lengths) != height * width:
        raise AfaError(f"run lengths that do not fill a mask of {width}x{height} pixels; export the file anew")
    values = np.arange(len(lengths)) % 2 == 1
    flat: NDArray[np.bool_] = np.repeat(values, lengths)
    return flat.reshape(width, height).T


def _uncompress(text: str) -> list[int]:
    lengths: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise AfaError("compressed run lengths with an unknown character; export the file anew")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                number -= 1 << shift
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number = shift = 0
    if shift:
        raise AfaError("compressed run lengths that end too early; export the file anew")
    return lengths


def _read_instances(path: Path) -> CocoFile:
    """Read the file with its outlines: each annotation has its `Instance` as `instance`."""

    def shrink(part: dict[str, Any]) -> None:
        if "category_id" in part:
            part["instance"] = _instance(part, path)
            part.pop("segmentation", None)

    found = parse(path, load_json(path, shrink))
    for number, image in found.images.items():
        height, width = (_size(image, key, path) for key in ("height", "width"))
        if min(height, width) < 1 or height * width > _MAX_PIXELS:
            raise AfaError(f"{path}: image {shown(number)} has {width}x{height} pixels; correct the images")
    if not found.annotations:
        raise AfaError(f"{path}: no annotations; give a COCO instances file")
    return found


def _instance(part: dict[str, Any], path: Path) -> Instance:
    category, is_crowd = part["category_id"], bool(part.get("iscrowd"))
    where = f"{path}, annotation {shown(part.get('id'))}"
    segmentation = part.get("segmentation")
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            return Instance(category, is_crowd, counts=counts)
        if isinstance(counts, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in counts):
            return Instance(category, is_crowd, counts=tuple(counts))
        raise AfaError(f"{where}: its counts are neither whole numbers nor a text; export the file anew")
    polygons = []
    for polygon in segmentation if isinstance(segmentation, list) else [None]:
        try:
            points = np.array(polygon, dtype=np.float32)
        except (ValueError, TypeError, OverflowError):
            points = np.full(1, np.nan, dtype=np.float32)
        if points.ndim != 1 or points.size % 2 or not np.isfinite(points).all():
            raise AfaError(f"{where}: its segmentation is no list of polygons x,y,x,y,...; give an instances file")
        if points.size >= 6:  # fewer points have no area
            polygons.append(points.reshape(-1, 2))
    return Instance(category, is_crowd, polygons=tuple(polygons))


def _size(image: dict[str, Any], key: str, path: Path) -> int:
    number = image.get(key)
    if not isinstance(number, int) or isinstance(number, bool):
        raise AfaError(f"{path}: {shown(image)} has no whole number as {key}; give a COCO instances file")
    return number


def _find_all(folder: Path, found: CocoFile, path: Path) -> dict[Id, str]:
    """The path below `folder` of each annotated image, by ascending id."""
    numbers = sorted(found.annotations, key=id_order)
    wanted = [(found.images[number]["file_name"], str(path)) for number in numbers]
    paths = ImageFiles(folder).find_all(wanted, "give the folder of this split's images")
    return dict(zip(numbers, filter(None, paths), strict=True))


def _link_images(images: Path, folder: Path, paths: Iterable[str]) -> str:
    """Make the images of some paths visible below JPEGImages; their folder's path there."""
    target = images.resolve()
    if target.is_relative_to(folder.resolve()) and target != folder.resolve():
        return target.relative_to(folder.resolve()).as_posix()
    link = folder / target.name
    if link.is_symlink() or not link.exists():
        if link.exists() and link.resolve() != target:
            raise AfaError(f"{link}: leads to other images than {images}; choose another OUT")
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            link.symlink_to(target, target_is_directory=True)
        if link.exists():
            return target.name
    for path in paths:
        place = link / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            link_or_copy(target / path, place)
        elif place.stat().st_size != (target / path).stat().st_size:
            raise AfaError(f"{place}: another image than {images / path}; choose another OUT")
    return target.name


def _write_classes(path: Path, classes: Sequence[str]) -> None:
    text = "".join(f"{name}\n" for name in classes)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise AfaError(f"{path}: lists other classes; choose another OUT")
    write_whole(path, text)


def _write_tags(path: Path, tags: Mapping[str, tuple[str, ...]], classes: Sequence[str]) -> None:
    """Write the tags, beside those that the other split's call wrote."""
    merged = (read_tags(path, classes) if path.is_file() else {}) | dict(tags)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "tags"))
    table.writerows((name, ";".join(merged[name])) for name in sorted(merged))
    write_whole(path, text.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversion from the command line, or `arguments`; exit status 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m afa.data.coco", description="COCO instances to the VOC layout.")
    parser.add_argument("instances", type=Path, help="instances JSON, such as instances_train2014.json")
    parser.add_argument("images", type=Path, help="folder of its images")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--split", required=True, help="name of the list: train or val")
    parsed = parser.parse_args(arguments)
    try:
        print(convert_coco(parsed.instances, parsed.images, parsed.out, split=parsed.split))
    except AfaError as error:
        print(f"afa: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
