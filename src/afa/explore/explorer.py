"""What the page of the explorer does, without the page: runs, their images, settings, photographs, files to save.

An `Explorer` holds one or two runs and the last images that were encoded. One call at a time may use a network.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from afa.config import Config, config_to_dict
from afa.config.load import config_from_dict
from afa.data.dataset import MaskedImages, TaggedImages
from afa.data.images import decode_image
from afa.data.open import DataSet, open_data
from afa.data.palette import write_index_png
from afa.errors import AfaError
from afa.evaluation.worth import MOST_IMAGES, spread_evenly
from afa.explore.encoded import EncodedImage, Pixels, Stages, at_size, make_stages
from afa.explore.scores import ImageScores, score_image
from afa.formats.job import MaskItem
from afa.formats.write import FORMATS, write_format
from afa.model.network import AfaNetwork
from afa.model.text import embed_words
from afa.runs.network import load_run
from afa.runs.run import Run
from afa.runtime import showing_progress

if TYPE_CHECKING:
    from afa.model.language import TextClassifier

_KEPT: Final = 4
_PHOTOS: Final = 8
_RESTS_SECONDS: Final = 3.0


@dataclass(frozen=True)
class ExploredRun:
    """A run and the images that it is looked at by.

    Attributes:
        path: Its folder.
        config: Its settings.
        classes: C names.
        network: In eval mode.
        images: Validation images, with masks where there are some; None where there is no data set.
        note: Why there is none, or empty.
    """

    path: Path
    config: Config
    classes: tuple[str, ...]
    network: AfaNetwork
    images: TaggedImages | None
    note: str

    @classmethod
    def open(cls, path: str | Path, data: str | None, device: torch.device) -> ExploredRun:
        """Load a run.

        Args:
            path: Run folder.
            data: Folder of the data set; None is that of the run, which may be gone.
            device: Where the network goes.

        Raises:
            AfaError: As `load_run`; `data` is given and is no data set of these classes.
        """
        run = Run(path)
        keys: dict[str, Any] = {"data.class_subset": run.classes()} | ({} if data is None else {"data.root": data})
        config, loaded = run.config(keys), load_run(Path(path), device)
        try:
            images, note = _validation(open_data(config.data)), ""
        except AfaError as error:
            if data is not None:
                raise
            images, note = None, f"There is no data set to choose from ({error}). Drop a photo, or pass --data DIR."
        return cls(Path(path), config, loaded.classes, loaded.network, images, note)

    @property
    def has_masks(self) -> bool:
        """Whether there are masks to judge by."""
        return isinstance(self.images, MaskedImages)

    @property
    def learned_affinity(self) -> bool:
        """Whether the training of the run had an affinity loss."""
        return self.config.loss.affinity_weight > 0 and self.config.train.supervision == "tags"

    def encode(self, index: int, network: AfaNetwork | None = None) -> EncodedImage:
        """Read an image and run the encoder; an `AfaError` if image or mask cannot be read."""
        images = self.images
        assert images is not None
        known = not isinstance(images, MaskedImages) or images.has_tags(index)
        tags = images.tags(index) if known else None
        truth = images.mask(index) if isinstance(images, MaskedImages) else None
        return EncodedImage(network or self.network, self.config, images.image(index), tags, truth)


def _validation(data: DataSet) -> TaggedImages:
    """Images for validation, with masks where they have some; else all that have tags."""
    if data.has_masks:
        return data.masked()
    return data.validation() if data.has_validation else data.tagged()


def change_settings(config: Config, keys: Mapping[str, Any]) -> Config:
    """Settings with some keys changed.

    Args:
        config: Settings.
        keys: Values by SECTION.KEY; `crf` switches the dense CRF of prediction and pseudo label.

    Raises:
        AfaError: A value is out of range, or contradicts another.
    """
    tree = config_to_dict(config)
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if name:
            tree[section][name] = value
    changed = config_from_dict(tree, origin="settings")
    if "crf" not in keys:
        return changed
    on = bool(keys["crf"])
    of_labels = on and changed.pseudo.label_rule == "two_pass"
    return replace(
        changed,
        evaluation=changed.evaluation.with_crf(on),
        pseudo=replace(changed.pseudo, crf=of_labels),
    )


class Ranking:
    """Scores of the validation images, made in a thread of its own that rests while somebody uses the page.

    Args:
        run: The run.
        busy: Seconds since the page was last used.
    """

    def __init__(self, run: ExploredRun, busy: Callable[[], float]) -> None:
        self.scores: dict[str, ImageScores] = {}
        self.done = run.images is None
        self._run, self._busy = run, busy
        self._picks = spread_evenly(len(run.images), MOST_IMAGES) if run.images is not None else []

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        if not self.done:
            threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        """Score all images."""
        torch.set_num_threads(1)  # of this thread: the page has the others
        images = self._run.images
        assert images is not None
        # A network of its own: the modules of one record what a single pass does.
        network = load_run(self._run.path, next(self._run.network.parameters()).device).network
        config = replace(
            change_settings(self._run.config, {"crf": False}),
            pseudo=replace(self._run.config.pseudo, scales=(1.0,), mirror=False, propagation="none", refinement="none"),
        )
        quick = replace(self._run, config=config)
        for index in self._picks:
            while self._busy() < _RESTS_SECONDS:
                time.sleep(0.2)
            try:
                seen = quick.encode(index, network)
                stages = make_stages(seen, config, seen.tags)
            except AfaError:
                continue  # whoever chooses the image is told
            self.scores[images.names[index]] = score_image(seen, stages, len(self._run.classes))
        self.done = True

    def order(self, by: str) -> list[tuple[str, float]]:
        """Names and figures of the images that have the figure `by`, the smallest first."""
        known = [(name, getattr(each, by)) for name, each in self.scores.items()]
        return sorted([pair for pair in known if pair[1] is not None], key=lambda pair: pair[1])

    def __str__(self) -> str:
        """How far it is, for the page."""
        count, total = len(self.scores), len(self._picks)
        return f"{total} images ranked" if self.done else f"ranking images: {count} of {total}"


class Explorer:
    """One or two runs, their images, and the photographs that were dropped.

    Args:
        run: The run.
        other: Another run to compare with.
    """

    def __init__(self, run: ExploredRun, other: ExploredRun | None = None) -> None:
        self.run, self.other = run, other
        self.lock = threading.Lock()
        self._used = time.monotonic() - _RESTS_SECONDS
        self._encoded: OrderedDict[tuple[bool, str], EncodedImage] = OrderedDict()
        self._photos: OrderedDict[str, Pixels] = OrderedDict()
        self._words: tuple[str, TextClassifier | None] = ("", None)
        self.ranking = Ranking(run, lambda: time.monotonic() - self._used)

    @property
    def names(self) -> Sequence[str]:
        """Names of the validation images."""
        return () if self.run.images is None else self.run.images.names

    def used(self) -> None:
        """Let the ranking rest for a while."""
        self._used = time.monotonic()

    def add_photo(self, name: str, content: bytes) -> str:
        """Take a photograph in memory.

        Args:
            name: Name of its file.
            content: Bytes of its file.

        Returns:
            The key that `encoded` takes.

        Raises:
            AfaError: As `decode_image`.
        """
        pixels = decode_image(content, name, white_level=self.run.config.data.white_level)
        key = f"photo:{hashlib.sha256(content).hexdigest()[:12]}:{name}"
        self._photos[key] = pixels
        while len(self._photos) > _PHOTOS:
            self._photos.popitem(last=False)
        return key

    def encoded(self, key: str, *, other: bool = False) -> EncodedImage:
        """The image of a name or photograph, encoded now or before.

        Args:
            key: Name of a validation image, or what `add_photo` returned.
            other: By the other run.

        Raises:
            AfaError: There is no such image; it cannot be read.
        """
        place = (other, key)
        if place not in self._encoded:
            self._encoded[place] = self._encode(key, other)
        self._encoded.move_to_end(place)
        while len(self._encoded) > _KEPT:
            self._encoded.popitem(last=False)
        return self._encoded[place]

    def _encode(self, key: str, other: bool) -> EncodedImage:
        run = self.other if other else self.run
        assert run is not None
        if key in self._photos:
            return EncodedImage(run.network, run.config, self._photos[key])
        if key.startswith("photo:"):
            raise AfaError("the photo is no longer in memory; drop it again")
        if run.images is None or key not in run.images.names:
            raise AfaError(f"{key}: no such image; choose one of the list or drop a photo")
        return run.encode(run.images.names.index(key))

    def text(self, words: str) -> TextClassifier | None:
        """What finds other words in place of the classes; None for no words.

        Args:
            words: Separated by commas; ways to say one, by |.

        Raises:
            AfaError: The encoder has no text encoder; as `embed_words`.
        """
        if words != self._words[0]:
            self._words = (words, self._classifier(words) if word_names(words) else None)
        return self._words[1]

    def _classifier(self, words: str) -> TextClassifier:
        from afa.model.language import TextClassifier

        model, old = self.run.config.model, self.run.network.text
        if old is None:
            raise AfaError("this run learned its classes and has no text encoder; words need model.classifier = text")
        vectors = embed_words(
            _ways(words),
            model.background_words,
            backbone=model.backbone,
            weights=model.weights,
            embeddings=model.text_embeddings,
            templates=model.text_templates,
            remedy="type words that it has",
        )
        device = old.classes.device
        made = TextClassifier(vectors.classes, vectors.background, sharpness=model.text_sharpness)
        return made.to(device)


def word_names(words: str) -> tuple[str, ...]:
    """The names of words as `Explorer.text` takes them: the first way to say each.

    >>> word_names("dog, cat | kitten,")
    ('dog', 'cat')
    """
    return tuple(first for first, *_ in _ways(words))


def _ways(words: str) -> list[list[str]]:
    """The ways to say each word."""
    ways = ([way.strip() for way in word.split("|") if way.strip()] for word in words.split(","))
    return [each for each in ways if each]


def save_mask(
    seen: EncodedImage, stages: Stages, name: str, classes: Sequence[str], *, kind: str, form: str
) -> tuple[str, bytes]:
    """Write a label in a format of other tools, in memory.

    Args:
        seen: The image.
        stages: Its maps.
        name: Of the image.
        classes: C names.
        kind: `prediction` or `pseudo`.
        form: One of `FORMATS`, or `png` for the index PNG alone.

    Returns:
        Name and content of the file: a PNG, or an archive.

    Raises:
        AfaError: As `write_format`.
    """
    label = stages.prediction if kind == "prediction" else stages.pseudo
    if label is None:
        raise AfaError("there is no prediction under other words; save the pseudo label")
    pixels: NDArray[np.uint8] = at_size(label, seen.size)
    stem = Path(name.rpartition(":")[2]).with_suffix("").name if name.startswith("photo:") else name
    flat = stem.replace("/", "_")
    with TemporaryDirectory(prefix="afa-") as folder:
        root = Path(folder)
        item = MaskItem(stem, root / "in" / f"{flat}.png", root / "in" / f"{flat}.mask.png")
        write_index_png(item.mask_path, pixels)
        if form == "png":
            return f"{flat}.png", item.mask_path.read_bytes()
        Image.fromarray(seen.pixels).resize(seen.size[::-1]).save(item.image_path)
        with showing_progress(False):
            written = write_format(form, [item], classes, root / "out")
        if written.path.is_file():
            return f"{flat}.{written.path.name}", written.path.read_bytes()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(written.path.rglob("*")):
                packed.write(path, path.relative_to(root / "out"))
        return f"{flat}.{form}.zip", archive.getvalue()


FORMS: Final = ("png", *FORMATS)
"""What a mask can be saved as."""
