"""Finds the images below a folder, and which of them a text means, in one walk that opens no image."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

from afa.config import DataConfig
from afa.data.classes import folded, is_plain
from afa.data.images import IMAGE_SUFFIXES, image_name
from afa.errors import AfaError, shown

_LITTER: Final = (
    *("__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@synoresource", "#recycle", "#snapshot"),
    *("$recycle.bin", "system volume information", "lost+found", "lost.dir", "__pycache__"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
)
_TEXTS: Final = (
    *("", ".csv", ".htm", ".html", ".json", ".jsonl", ".log", ".md", ".npy", ".npz", ".py", ".rst", ".toml", ".tsv"),
    *(".txt", ".xml", ".yaml", ".yml"),
)
"""Suffixes of files that are beside images for good reason."""


def is_litter(name: str) -> bool:
    """Whether systems, file servers or notebooks leave files or folders of a name, which are never data.

    >>> [name for name in ("._a.jpg", ".ipynb_checkpoints", "@eaDir", "Thumbs.db", "a.jpg") if not is_litter(name)]
    ['a.jpg']
    """
    return name.startswith((".", "~$", "SYNOFILE_THUMB", "SYNOPHOTO_THUMB")) or name.lower() in _LITTER


def walk_files(
    folder: Path,
    suffixes: Collection[str],
    *,
    skip: Callable[[str], bool] | None = None,
    passed: dict[str, Counter[str]] | None = None,
) -> Iterator[str]:
    """Yield the files below a folder, each once, without a look at any but folders and links.

    Folders that are links are entered too, each folder once, so that links in a circle end. Litter is passed over.

    Args:
        folder: Where to begin.
        suffixes: Of the files to yield: lower case, with the dot.
        skip: Whether to pass over a folder, by its path below `folder`.
        passed: Gets, for each folder that was entered, how many files of which other suffix are in it; broken links
            count as such.

    Returns:
        Iterator of paths below `folder`, with slashes, sorted within each folder.

    Raises:
        AfaError: A folder cannot be listed.
    """
    status = os.stat(folder)
    seen = {(status.st_dev, status.st_ino)}
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise AfaError(f"{folder / below}: cannot be listed ({error.strerror}); allow it or take it out") from None
        folders = []
        others: Counter[str] = Counter()
        if passed is not None:
            passed[below.rstrip("/")] = others
        for entry in entries:
            name = entry.name
            if is_litter(name):
                continue
            path = f"{below}{name}"
            if name[name.rfind(".") :].lower() in suffixes and entry.is_file():
                yield path
            elif not entry.is_dir():
                others[PurePosixPath(name).suffix.lower() if entry.is_file() else "broken link"] += 1
            elif skip is None or not skip(path):
                status = os.stat(folder / path)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    folders.append(f"{path}/")
        pending += reversed(folders)


def find_images(paths: Sequence[Path], *, remarks: list[str] | None = None) -> list[Path]:
    """List the images that files, taken whatever their suffix, and folders name.

    Args:
        paths: Files and folders.
        remarks: Gets a line for each kind of file that is passed over in a folder.

    Returns:
        Image files in the order of `paths`, each folder's sorted, each file once.

    Raises:
        AfaError: A path does not exist, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            below = ImageFiles(path)
            if not below.paths:
                words = "; ".join(("no image in this folder", *below.passed_over))
                raise AfaError(f"{path}: {words}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
            found.update(dict.fromkeys(sorted(path / image for image in below.paths)))
            if remarks is not None:
                remarks += [f"{path}: {phrase}" for phrase in below.passed_over]
        elif path.exists():
            found[path] = None
        else:
            raise AfaError(f"{path}: no such image or folder; check the path")
    return list(found)


def path_below(path: Path, root: Path) -> str:
    """A path as messages show it: below the data set's folder, where it is."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def plain_path(text: str) -> tuple[str, bool]:
    r"""The path that a text means, with slashes, and whether it begins elsewhere than in a folder of images.

    Addresses lose server and query (or leave the file that the query names), paths their drive, root and leading `..`.

    >>> plain_path(r"..\a\b.jpg"), plain_path("https://x.y/a%20b.jpg?z=1"), plain_path("c/d.jpg")
    (('a/b.jpg', True), ('a b.jpg', True), ('c/d.jpg', False))
    """
    path, is_foreign = text, False
    before, _, query = text.partition("?")
    if re.match(_SCHEME, text) or text.startswith("/data/") or image_name(before) != before:
        path = unquote(re.sub(_SCHEME + "[^/]*", "/", before))
        is_foreign = path.startswith("/")
        if image_name(path) == path:
            path = next((value for _, value in parse_qsl(query) if image_name(value) != value), path)
    path, has_drive = re.subn(r"^[a-zA-Z]:(?=/)", "", path.replace("\\", "/"))
    is_foreign |= bool(has_drive) or path.startswith("/")
    parts: list[str] = []
    for part in path.split("/"):
        if part != "..":
            parts += [part] if part not in ("", ".") else []
        elif parts:
            parts.pop()
        else:
            is_foreign = True
    return "/".join(parts), is_foreign


class ImageFiles:
    """The images below a folder, which can be found by the names that people write."""

    def __init__(self, folder: Path, *, skip: Callable[[str], bool] | None = None) -> None:
        """Walk the folder; `skip` as of `walk_files`."""
        self.folder = folder
        self.passed: dict[str, Counter[str]] = {}
        self.paths: tuple[str, ...] = tuple(walk_files(folder, IMAGE_SUFFIXES, skip=skip, passed=self.passed))
        self._exact = frozenset(self.paths)
        self._views: dict[Callable[[str], str], dict[str, list[str]]] = {}

    @property
    def passed_over(self) -> tuple[str, ...]:
        """What was passed over, a phrase for each kind of file; texts do not count."""
        total = sum(self.passed.values(), Counter())
        return tuple(
            f"{count:,} {suffix} {'file' if count == 1 else 'files'} passed over".replace("link file", "link")
            for suffix, count in sorted(total.items())
            if suffix not in _TEXTS
        )

    def find(self, text: str, where: str, *, lacks: str = "", drop: str = "", loose: bool = False) -> str | None:
        """The path below the folder of the image that a text means, or None where there is none.

        A path below the folder is taken as it is; else letter case, Unicode form and suffix may differ, and leading
        folders may be missing, as long as exactly one image fits. Of a path that begins elsewhere (as `plain_path`
        says) the last parts count, as many as fit. Nothing is ever opened by the text.

        Args:
            text: Names the image.
            where: File and line, for messages.
            lacks: Prefix, ending in a slash, that the text may lack: its paths begin in that folder.
            drop: Prefix, ending in a slash, that the text may have before the path below the folder.
            loose: Only the last parts of any text count, and without the prefix that Label Studio gives to uploads.

        Raises:
            AfaError: Several images fit.
        """
        if f"{lacks}{text}" in self._exact:
            return f"{lacks}{text}"
        inside, is_foreign = self._inside(text)
        texts = [] if is_foreign else [f"{lacks}{inside}", inside.removeprefix(drop), inside]
        ways = (self._look_up(view, candidate) for view in _VIEWS for candidate in texts)
        found = next(filter(None, ways), [])
        if not found and (is_foreign or loose):
            found = self._closest(inside, lacks)
            if not found and (loose or "/upload/" in f"/{inside}"):
                found = self._closest(re.sub(rf"(^|/){_UPLOAD}-([^/]+)$", r"\1\2", inside), lacks)
        if len(found) > 1:
            raise AfaError(
                f"{where}: image {shown(text)} may be {shown(found[0])} or {shown(found[1])} of {self.folder}; write "
                "its path and suffix"
            )
        return found[0] if found else None

    def find_all(
        self, wanted: Sequence[tuple[str, str]], remedy: str, *, skip: bool = False, **rules: Any
    ) -> list[str | None]:
        """The paths of the images that N pairs of text and `where` mean, by the `rules` of `find`.

        Raises:
            AfaError: As `find`; or an image is missing, with `skip` all of them, and `remedy` says what to do.
        """
        paths = [self.find(text, where, **rules) for text, where in wanted]
        missing = paths.count(None)
        if missing and (not skip or missing == len(paths)):
            text, where = wanted[paths.index(None)]
            count = f"{missing} of {len(paths)} images missing"
            raise AfaError(f"{where}: {self.folder} has no image {shown(text)} ({count}){self._guess(text)}; {remedy}")
        return paths

    def _inside(self, text: str) -> tuple[str, bool]:
        """The text as a path with slashes below the folder, or else of a place elsewhere, as `plain_path` says."""
        inside = text.replace("\\", "/")
        if inside.startswith("/") and "\0" not in inside:
            for start in (self.folder, self.folder.absolute(), self.folder.resolve()):
                if PurePosixPath(inside).is_relative_to(start.as_posix()):
                    return plain_path(PurePosixPath(inside).relative_to(start.as_posix()).as_posix())
        return plain_path(text)

    def _closest(self, text: str, lacks: str) -> list[str]:
        """The paths that end as the text does, in as many parts as any path; those below `lacks` if there are some."""
        *folders, last = text.split("/")

        def fit(path: str) -> tuple[int, bool]:
            pairs = zip(map(folded, folders[::-1]), map(folded, path.split("/")[-2::-1]), strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), path.endswith(last)

        for view in ("last, suffix", "last name", "last"):
            if found := self._look_up(view, last):
                best = max(map(fit, found))
                found = [path for path in found if fit(path) == best]
                return [path for path in found if path.startswith(lacks)] or found
        return []

    def _guess(self, text: str) -> str:
        """Why an image may be missing."""
        if re.match(_SCHEME, text):
            return ", and afa fetches none"
        number = re.fullmatch(r"(\d{1,18})(\.0+)?", image_name(text))
        stems = (image_name(path.rsplit("/", 1)[-1]) for path in self.paths if number)
        same = next((stem for stem in stems if stem.isdecimal() and number and int(stem) == int(number[1])), None)
        if same is None:
            return ""
        return f" but {shown(same)}: a spreadsheet seems to have made numbers of the names; keep that column as text"

    def _look_up(self, view: str, text: str) -> list[str]:
        key, is_name = _VIEWS[view]
        if key not in self._views:
            self._views[key] = {}
            for path in self.paths:
                self._views[key].setdefault(key(path), []).append(path)
        # Of a name nothing is a suffix: the image of b.png may be b.png.jpg.
        found = self._views[key].get(key(f"{text}.jpg" if is_name else text), [])
        if found and view.startswith("last"):
            # The folders that the text does have must fit too.
            end = f"/{folded(text if is_name else image_name(text))}"
            found = [path for path in found if f"/{folded(image_name(path))}".endswith(end)]
        return found


_SCHEME: Final = r"^[a-zA-Z][a-zA-Z0-9+.-]+://"
_UPLOAD: Final = r"[0-9a-f]{5,32}(?:-[0-9a-f]{4}){0,3}(?:-[0-9a-f]{12})?"
"""What Label Studio puts, with a dash, before the name of an uploaded file: the start of a UUID, or all of it."""


def _stem(path: str) -> str:
    return unicodedata.normalize("NFC", image_name(path))


def _last_stem(path: str) -> str:
    return folded(image_name(path.rsplit("/", 1)[-1]))


_VIEWS: Final[dict[str, tuple[Callable[[str], str], bool]]] = {
    "normal path": (lambda path: unicodedata.normalize("NFC", path), False),
    "name": (_stem, True),
    "stem": (_stem, False),
    "any case": (lambda path: folded(image_name(path)), False),
    "last, suffix": (lambda path: folded(path.rsplit("/", 1)[-1]), False),
    "last name": (_last_stem, True),
    "last": (_last_stem, False),
}
"""The parts of a path that must agree, and whether the text is a name without suffix; the strictest rule first."""


def unadorned(names: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """The paths by their names, without what all have before or behind the name of an image, as x_mask.png has.

    Args:
        names: Names of images.
        paths: Of files that belong to images, below their folder.

    Returns:
        Name -> path; names as they are where one is that of an image, or several additions would fit as well.

    >>> unadorned(["a", "b/c"], ["a_mask.png", "b/c_mask.png", "mask.png"])
    {'a': 'a_mask.png', 'b/c': 'b/c_mask.png'}
    """
    found = {image_name(path): path for path in paths}
    known = {name.rpartition("/")[2] for name in names}
    stems = {name: name.rpartition("/")[2] for name in found}
    if not known.isdisjoint(stems.values()):
        return found
    additions: Counter[tuple[str, str]] = Counter()
    for stem in stems.values():
        for match in re.finditer(r"[-_. ]+", stem):
            additions.update([("", stem[match.start() :])] if stem[: match.start()] in known else [])
            additions.update([(stem[: match.end()], "")] if stem[match.end() :] in known else [])
    (best, count), *others = [*additions.most_common(2), (("", ""), 0)]
    if not count or (others and others[0][1] == count):
        return found
    before, behind = best
    plain = {}
    for name, stem in stems.items():
        if stem.startswith(before) and stem.endswith(behind):
            plain[name.removesuffix(stem) + stem.removeprefix(before).removesuffix(behind)] = found[name]
    return plain


def check_paths(paths: Iterable[str], folder: Path) -> tuple[str, ...]:
    """The names of images, their paths below `folder` without suffix: checked to be different files on any system.

    Raises:
        AfaError: Two names are the same, or differ in case or Unicode form only; one has control characters.
    """
    names = []
    seen: dict[str, str] = {}
    for path in paths:
        name = image_name(path)
        if not is_plain(name):
            raise AfaError(f"{folder}: the file name {shown(path)} has control characters; rename the file")
        other = seen.setdefault(folded(name), path)
        if other != path:
            same = "have the same name" if image_name(other) == name else "differ in case or accents only"
            raise AfaError(f"{folder}: {shown(other)} and {shown(path)} {same}; keep or rename one of them")
        names.append(name)
    return tuple(names)


def image_folder(root: Path, data: DataConfig, *, at_root: bool) -> Path:
    """Where the images lie: in the folder that is set; else in the root, or if not `at_root`, where it is usual.

    Raises:
        AfaError: The folder that is set is not there.
    """
    stated = root / data.image_dir
    if data.image_dir == DataConfig().image_dir:
        places = [] if at_root else [stated, root / "images"]
        return next((place for place in places if place.is_dir()), root)
    if not stated.is_dir():
        raise AfaError(f"{stated}: no such folder; set data.image_dir")
    return stated


def images_below(folder: Path, root: Path, data: DataConfig) -> ImageFiles:
    """The images below a folder of a data set; folders of masks are passed over."""

    def holds_masks(path: str) -> bool:
        return is_mask_folder(path) or folder / path == root / data.mask_dir

    return ImageFiles(folder, skip=holds_masks)


def subfolders(root: Path, names: Collection[str]) -> list[Path]:
    """The folders in a folder whose names, in lower case, are among some; sorted."""
    with os.scandir(root) as entries:
        found = [entry.name for entry in entries if entry.name.lower() in names and entry.is_dir()]
    return [root / name for name in sorted(found)]


def files_in(folder: Path, suffix: str, *, but: str = "", deep: bool = False) -> Iterator[Path]:
    """The files in a folder, or `deep` below it, with a suffix, unless the pattern `but` has the whole name."""
    names = walk_files(folder, {suffix}) if deep else sorted(os.listdir(folder))
    fitting = (folder / name for name in names if name.lower().endswith(suffix) and not is_litter(name))
    return (path for path in fitting if not re.fullmatch(but, path.name, re.I) and path.is_file())


def is_mask_folder(path: str) -> bool:
    """Whether a folder holds masks, by the last part of its path: training does not even list it."""
    return re.fullmatch(r"masks|Segmentation(Class|Object)\w*", path.rpartition("/")[2]) is not None
