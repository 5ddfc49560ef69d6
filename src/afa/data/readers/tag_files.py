"""Reads the files of tags of a folder, and finds the images of their entries."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from afa.config import DataConfig
from afa.data.classes import NO_TAG, check_classes, folded, is_plain, stated_classes, unknown_class
from afa.data.dataset import TagTable
from afa.data.files import ImageFiles, check_paths, image_folder, images_below, path_below, plain_path
from afa.data.images import image_name
from afa.data.readers.base import Contents, TagEntry, entry_rows
from afa.data.readers.places import READERS, TagFile, find_tag_files, words
from afa.data.split import SIDES, UNSTATED, side_of
from afa.errors import AfaError, shown

_MAX_IMAGE_NAME: Final = 4096  # characters


class FoundTags(NamedTuple):
    """Contents of a file of tags.

    Attributes:
        classes: The class names: as given, as the file declares them in its order, or else sorted.
        declared: Whether they were given or declared, and not merely met.
        entries: Image name, without suffix, to its entry; the tags are among the classes and in their order.
        notes: As of `Contents`.
    """

    classes: tuple[str, ...]
    declared: bool
    entries: dict[str, TagEntry]
    notes: tuple[str, ...]


def read_tags(path: Path, classes: Sequence[str], negatives: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Image name, without suffix, to the classes that it may show: its tags and what the file does not know of it.

    The classes come in the order of `classes`, each once. Of a name that begins elsewhere (as `plain_path` says) the
    last part is taken. `negatives` as of `read_tag_file`.

    Raises:
        AfaError: As `read_tag_file`; two names have the same last part.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in read_tag_file(TagFile(path), classes, negatives).entries.items():
        inside, is_foreign = plain_path(entry.image)
        name = image_name(inside.rpartition("/")[2]) if is_foreign else name
        if name in found:
            raise AfaError(f"{entry.where}: image {shown(name)} is there a second time; keep one entry of it")
        if entry.unknown:
            found[name] = tuple([each for each in classes if each in entry.tags or each in entry.unknown])
        else:
            found[name] = tuple(classes) if entry.unknown is None else entry.tags
    return found


def read_tag_file(
    file: TagFile, classes: Sequence[str] = (), negatives: Sequence[str] = (), known: Container[str] = ()
) -> FoundTags:
    """Read a file of tags of any kind.

    Args:
        file: A table, an export of a tool, a folder of VOC XML, or an `.npy` of one-hot vectors.
        classes: The C class names in index order, or none: the file's own.
        negatives: Tags that say that an image holds none of the classes, as far as they are no classes themselves.
        known: Names of images: such a text is a name, even if it looks like a file, as `b.png` of `b.png.jpg`.

    Raises:
        AfaError: It is missing or malformed; it names an unknown class or an image twice; the classes that it declares
            or uses are no good as such (`check_classes`).
    """
    contents = READERS[file.kind].read(file.path, file.content, classes)
    found = found_tags(contents, classes, negatives, known=known, kind=file.kind)
    if not classes:
        check_classes(found.classes, str(file.path), none=NO_TAG)
    return found


def found_tags(
    contents: Contents,
    classes: Sequence[str],
    negatives: Sequence[str],
    *,
    known: Container[str] = (),
    kind: str = "table",
) -> FoundTags:
    """What a reader found, by image and with tags in class order; arguments and errors as `read_tag_file`."""
    declared, found, notes = contents
    declared, found, doubts = _without(nothing_names(negatives, classes), declared, found)
    chosen = tuple(classes) or declared or tuple(sorted({tag for entry in found for tag in entry.tags}))
    return FoundTags(chosen, bool(classes or declared), _by_name(found, chosen, kind, known), (*notes, *doubts))


def read(root: Path, data: DataConfig) -> TagTable | None:
    """Read the file of tags of a folder, or one for each side of a split, and find the images that they mean.

    Returns:
        A row for each image with an entry; None where nothing looks like a file of tags.

    Raises:
        AfaError: Several files may be the tags; as `read_tag_file`; an image is missing, there twice, or outside.
    """
    files = find_tag_files(root, data)
    if not files:
        return None
    listed = stated_classes(data, root)
    is_metadata = all(file.path.stem.lower() == "metadata" for file in files)
    layout = READERS[files[0].kind].layout
    in_splits = any(file.path.parent != root and file.path.parent.name.lower() in SIDES for file in files)
    folder = image_folder(root, data, at_root=in_splits)
    images = images_below(folder, root, data)
    dotted = (image_name(path) for path in images.paths if path.count(".") > 1)
    known = {name for name in dotted if image_name(name) != name}
    contents = [read_tag_file(file, listed.names, data.negatives, known) for file in files]
    classes, notes = _merged_classes(files, contents)
    contents = [_with_unknown(content, classes) for content in contents]
    entries, sides, missing = _place(files, contents, images, root, data)
    is_hf = layout == "table" and is_metadata
    origin = "Hugging Face metadata" if is_hf else words(files[0].kind)
    if files[0].path != root:
        origin += f" in {' and '.join(path_below(file.path, root) for file in files)}"
    if doubt := files[0].doubt or _class_folders(files[0], images):
        notes.insert(0, f"{root}: taken for {origin}, and could also be {doubt}; if so, set data.layout or data.tags")
    if missing:
        notes.append(f"{folder}: left out tags of missing images: {len(missing):,} (such as {shown(missing[0])})")
    return TagTable(
        kind="hf" if is_hf else layout,
        origin=origin,
        classes=classes,
        tags=entry_rows(list(entries.values()), classes),
        sides=np.array(sides, dtype=np.int8),
        folder=folder,
        paths=tuple(entries),
        names=check_paths(entries, folder),
        colors=listed.colors,
        words=listed.words,
        declared=any(content.declared for content in contents),
        every_path=images.paths,
        remarks=images.passed_over,
        notes=(*notes, *(note for content in contents for note in content.notes)),
    )


def _place(
    files: Sequence[TagFile], contents: Sequence[FoundTags], images: ImageFiles, root: Path, data: DataConfig
) -> tuple[dict[str, TagEntry], list[int], list[str]]:
    """The entry of each path, the side of each, and the images that are missing."""
    entries: dict[str, TagEntry] = {}
    sides: list[int] = []
    missing: list[str] = []
    for file, content in zip(files, contents, strict=True):
        found = content.entries.values()
        for path, entry in zip(_match(file, images, found, root, data), found, strict=True):
            if path is None:
                missing.append(entry.image)
                continue
            if path in entries:
                raise AfaError(
                    f"{entry.where}: image {shown(entry.image)} is {shown(path)}, which {entries[path].where} has too; "
                    "keep one entry of it"
                )
            entries[path] = entry
            sides.append(_entry_side(entry) if file.side == UNSTATED else file.side)
    return entries, sides, missing


def _class_folders(file: TagFile, images: ImageFiles) -> str:
    """What the images are, too, where the name of the file does not say that it holds tags: folders of classes."""
    tops = {path.partition("/")[0] for path in images.paths if "/" in path} if not file.is_usual else set()
    return f"folders of classes ({', '.join(sorted(tops)[:4])})" if len(tops) > 1 and not tops & SIDES.keys() else ""


def _merged_classes(files: Sequence[TagFile], contents: Sequence[FoundTags]) -> tuple[tuple[str, ...], list[str]]:
    """The classes of all files, joined by name: first those of the training images; and what only some files list."""
    order = sorted(range(len(files)), key=lambda place: (files[place].side == UNSTATED, files[place].side))
    lists = [contents[place].classes for place in order]
    if all(classes == lists[0] for classes in lists):
        return lists[0], []
    classes = tuple(dict.fromkeys(itertools.chain(*lists)))
    if not any(content.declared for content in contents):
        classes = tuple(sorted(classes))
    check_classes(classes, " and ".join(str(file.path) for file in files))
    declared = [place for place in order if contents[place].declared]
    notes = []
    for name in classes:
        having = [files[place].path for place in declared if name in contents[place].classes]
        if 0 < len(having) < len(declared):
            notes.append(
                f"{' and '.join(map(str, having))}: class {shown(name)} is only listed here; correct the list, or "
                "leave the class out by data.class_subset"
            )
    return classes, notes


def _with_unknown(content: FoundTags, classes: Sequence[str]) -> FoundTags:
    """The contents with the classes that only other files list as unknown: their objects were not looked for here."""
    lacking = tuple([name for name in classes if name not in content.classes]) if content.declared else ()
    if not lacking:
        return content
    entries = {
        name: entry if entry.unknown is None else entry._replace(unknown=(*entry.unknown, *lacking))
        for name, entry in content.entries.items()
    }
    return content._replace(entries=entries)


def _match(
    file: TagFile, images: ImageFiles, entries: Iterable[TagEntry], root: Path, data: DataConfig
) -> list[str | None]:
    """The path of the image of each entry; None where it is missing, which `data` may allow."""
    folder, parent = images.folder, file.path.parent
    inside = parent.is_relative_to(folder) and parent != folder
    return images.find_all(
        [(entry.image, entry.where) for entry in entries],
        "add them, set data.image_dir, or leave them out by --skip-missing",
        skip=data.skip_missing,
        lacks=f"{parent.relative_to(folder).as_posix()}/" if inside else "",
        drop="" if folder == root else f"{folder.name}/",
        loose=file.kind in ("labelstudio", "labelme", "yolo"),
    )


def _entry_side(entry: TagEntry) -> int:
    """The side that an entry states: a word such as `val`, or nothing."""
    if not entry.split or entry.split.lower() == "default":  # what CVAT writes where there are no subsets
        return UNSTATED
    side = side_of(entry.split)
    if side == UNSTATED:
        raise AfaError(f"{entry.where}: the split is {shown(entry.split)}; write train, val or test")
    return side


def _by_name(
    found: Iterable[TagEntry], classes: Sequence[str], kind: str, known: Container[str]
) -> dict[str, TagEntry]:
    """The entries by image name, with their tags in class order."""
    places = {name: place for place, name in enumerate(classes)}
    entries: dict[str, TagEntry] = {}
    ordered: dict[tuple[str, ...], tuple[str, ...]] = {}
    for entry in found:
        name = entry.image if entry.image in known else image_name(entry.image)
        if not name:
            raise AfaError(f"{entry.where}: no image name; write image,tags")
        if len(name) > _MAX_IMAGE_NAME or not is_plain(name):
            raise AfaError(
                f"{entry.where}: the image name {shown(name)} has control characters or more than "
                f"{_MAX_IMAGE_NAME:,}; rename the image"
            )
        if name in entries:
            unit = READERS[kind].unit
            raise AfaError(f"{entry.where}: image {shown(name)} is there a second time; keep one {unit} of it")
        if entry.tags not in ordered:
            # The file of a VOC annotation names the image already.
            origin = entry.where if kind == "voc_xml" else f"{entry.where}, image {shown(name)}"
            ordered[entry.tags] = _in_class_order(entry.tags, places, origin)
        tags = ordered[entry.tags]
        entries[name] = entry if tags == entry.tags else entry._replace(tags=tags)
    return entries


def nothing_names(negatives: Sequence[str], classes: Sequence[str]) -> frozenset[str]:
    """The folded names that mean "nothing": `data.negatives` without what is a class."""
    return frozenset(map(folded, negatives)).difference(map(folded, classes))


def _without(
    nothing: frozenset[str], declared: tuple[str, ...], found: list[TagEntry]
) -> tuple[tuple[str, ...], list[TagEntry], list[str]]:
    """What a reader found, without the tags that mean "nothing"; and a note if such tags are beside others."""
    used = {tags for entry in found if (tags := entry.tags)}
    if not nothing.intersection(map(folded, {*declared, *(tag for tags in used for tag in tags)})):
        return declared, found, []

    @functools.cache
    def kept(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple([name for name in names if folded(name) not in nothing])

    both = [entry for entry in found if 0 < len(kept(entry.tags)) < len(entry.tags)]
    # Every picture has some background.
    both = [entry for entry in both if not {*map(folded, entry.tags)}.isdisjoint(nothing - {"background"})]
    notes = [
        f"{entry.where}: image {shown(entry.image)} has {shown(' '.join(entry.tags))}, of which one means none of the "
        f"classes; taken as {shown(' '.join(kept(entry.tags)))} ({len(both):,} such images)"
        for entry in both[:1]
    ]
    return kept(declared), [entry._replace(tags=kept(entry.tags)) for entry in found], notes


def _in_class_order(names: Iterable[str], places: Mapping[str, int], origin: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(names), key=places.__getitem__))
    except KeyError:
        unknown = min(set(names).difference(places))
        raise AfaError(
            f"{origin}: unknown tag {shown(unknown)}; {unknown_class(unknown[:100], list(places))}"
        ) from None
