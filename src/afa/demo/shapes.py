"""A generated data set: textured objects on textured backgrounds, written as an ordinary VOC-style folder.

A class is a shape *and* a texture: a striped disk, a checkered square, a dotted triangle, a spoked ring, a
zigzag cross. Colors are random and say nothing of the class. Objects cover each other and may be cut by the
border; distractors, which are background, have the shape of a class without its texture or the reverse. The
masks are exact. Each image depends on the seed, its split and its index alone, so the data set is the same
whichever process draws it and in whichever order.

What reads the folder (data/voc.py) does not know that it was generated.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track

from afa.data.palette import write_index_png
from afa.errors import AfaError

FloatArray = npt.NDArray[np.floating[Any]]  # in practice float32, for speed

MARKER_NAME: Final = "shapes.json"
"""File in the data set's folder that holds the parameters it was made with."""

_FORMAT: Final = 1  # raise whenever the same parameters come to give other images
_JPEG_QUALITY: Final = 95
_SPLITS: Final = ("train", "val")


@dataclasses.dataclass(frozen=True)
class ShapesStyle:
    """How hard the images are. Sizes are shares of the image side unless in pixels; colors lie in [0, 1]."""

    num_objects: tuple[int, int] = (1, 3)
    """Fewest and most objects in an image, each of another class."""
    object_size: tuple[float, float] = (0.28, 0.5)
    """Diameter of an object."""
    object_rotation: float = 180.0
    """Largest turn of an object or distractor, degrees to either side."""
    object_margin: float = 0.12
    """Smallest distance of an object's center from the border: the smaller, the more is cut off."""
    min_visible: float = 0.25
    """Share of an object that must stay visible; one that is covered more is left out, and so is its tag."""
    min_visible_pixels: int = 48
    """Pixels of an object that must stay visible."""
    texture_period: tuple[float, float] = (6.0, 9.0)
    """Pixels of one repetition of a texture."""
    texture_rotation: float = 15.0
    """Largest turn of a texture, degrees to either side; it does not follow the object's."""
    texture_contrast: tuple[float, float] = (0.4, 0.6)
    """Difference in brightness between the two shades of a texture."""
    num_distractors: tuple[int, int] = (0, 2)
    """Fewest and most distractors in an image."""
    distractor_size: tuple[float, float] = (0.15, 0.35)
    """Diameter of a distractor."""
    distractor_kinds: tuple[float, float, float] = (0.6, 0.3, 0.1)
    """Probabilities of: a class's shape without texture, one with blotches, a class's texture on a blob."""
    color_distance: float = 0.2
    """Least Euclidean RGB distance between the mean colors of any two of background, objects and distractors,
    as far as a few draws can find such colors."""
    saturation: tuple[float, float] = (0.1, 0.5)
    """Saturation of the mean colors; their hue is anything."""
    brightness: tuple[float, float] = (0.5, 0.75)
    """Brightness of the mean colors."""
    background_contrast: float = 0.15
    """Difference between the two colors that a background changes between."""
    shading: float = 0.1
    """Strength of the slow change of brightness across the image, the same for all that is in it."""
    noise: float = 0.02
    """Standard deviation of the noise on each pixel and channel."""


DEFAULT_STYLE: Final = ShapesStyle()


@dataclasses.dataclass(frozen=True)
class Scene:
    """One generated image and all that is known of it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 0 background, else 1 + position of the class.
        visible: Share of each object, by class, that no other object or distractor covers, in (0, 1].
        num_distractors: Distractors that were drawn; later ones may cover earlier ones.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    visible: dict[str, float]
    num_distractors: int


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Something that covers what was drawn before it."""

    name: str | None  # class; None: a distractor
    coverage: FloatArray  # (H, W) in [0, 1]
    color: FloatArray  # (H, W, 3) in [0, 1]

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        return self.coverage >= 0.5


# Shapes: signed distance to the boundary, negative inside, of points in units of the object's radius.


def _disk(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.hypot(x, y) - np.float32(1)


def _square(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.85)


def _triangle(x: FloatArray, y: FloatArray) -> FloatArray:
    slanted = np.float32(3**0.5 / 2) * np.abs(x) + np.float32(0.5) * y
    return np.maximum(slanted, -y) - np.float32(0.66)


def _ring(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.abs(np.hypot(x, y) - np.float32(0.64)) - np.float32(0.36)


def _cross(x: FloatArray, y: FloatArray) -> FloatArray:
    long, wide = np.float32(1), np.float32(0.36)
    a, b = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(a - long, b - wide), np.maximum(b - long, a - wide))


# Textures: a pattern in [0, 1] of points in pixels from the object's center, with edges about a pixel wide.


@dataclasses.dataclass(frozen=True)
class _Weave:
    """What varies within a texture's family."""

    period: float  # pixels
    phase: tuple[float, float]  # of a repetition, [0, 1)
    radius: float  # of the object, pixels


def _wave(position: FloatArray) -> FloatArray:
    """Sine with one repetition per unit."""
    wave: FloatArray = np.sin(np.float32(2 * np.pi) * position)
    return wave


def _threshold(wave: FloatArray, period: float) -> FloatArray:
    """Turn a wave in [-1, 1] into bands whose edges are a pixel wide."""
    bands: FloatArray = np.clip(np.float32(0.5) + wave * np.float32(period / (2 * np.pi)), 0, 1)
    return bands


def _stripes(x: FloatArray, y: FloatArray, weave: _Weave) -> FloatArray:
    return _threshold(_wave(x / weave.period + weave.phase[0]), weave.period)


def _checkers(x: FloatArray, y: FloatArray, weave: _Weave) -> FloatArray:
    period = 1.6 * weave.period  # two squares
    waves = _wave(x / period + weave.phase[0]) * _wave(y / period + weave.phase[1])
    return _threshold(waves, 1.5 * period)


def _dots(x: FloatArray, y: FloatArray, weave: _Weave) -> FloatArray:
    period = 1.4 * weave.period
    u = (x / period + weave.phase[0]) % 1 - np.float32(0.5)
    v = (y / period + weave.phase[1]) % 1 - np.float32(0.5)
    pixels = (np.float32(0.36) - np.hypot(u, v)) * np.float32(period)  # into the dot
    dots: FloatArray = np.clip(np.float32(0.5) + pixels, 0, 1)
    return dots


def _spokes(x: FloatArray, y: FloatArray, weave: _Weave) -> FloatArray:
    count = round(2 * np.pi * 0.7 * weave.radius / weave.period)  # the period holds in the middle of a ring
    angle = np.arctan2(y, x) / np.float32(2 * np.pi)
    return _threshold(_wave(count * angle + weave.phase[0]), weave.period)


def _zigzag(x: FloatArray, y: FloatArray, weave: _Weave) -> FloatArray:
    fold = np.abs((x / (2 * weave.period) + weave.phase[0]) % 1 - np.float32(0.5))  # 0 to 1/2 and back
    return _threshold(_wave(y / weave.period + 2 * fold + weave.phase[1]), weave.period)


_Shape = Callable[[FloatArray, FloatArray], FloatArray]
_Texture = Callable[[FloatArray, FloatArray, _Weave], FloatArray]

_CLASSES: Final[dict[str, tuple[_Shape, _Texture]]] = {
    "disk": (_disk, _stripes),
    "square": (_square, _checkers),
    "triangle": (_triangle, _dots),
    "ring": (_ring, _spokes),
    "cross": (_cross, _zigzag),
}

SHAPE_CLASSES: Final[tuple[str, ...]] = tuple(_CLASSES)
"""Names of the classes that can be drawn, in their usual order."""


@functools.lru_cache(maxsize=32)
def _upsampling(num_cells: int, size: int) -> FloatArray:
    """(size, num_cells) weights that interpolate between random values, with smooth joints."""
    position = np.linspace(0, num_cells - 1, size, endpoint=False)
    left = position.astype(int)
    t = position - left
    t = t * t * (3 - 2 * t)
    weights = np.zeros((size, num_cells), np.float32)
    weights[np.arange(size), left] = 1 - t
    weights[np.arange(size), left + 1] += t
    return weights


def _smooth_noise(rng: np.random.Generator, size: int, octaves: Sequence[int]) -> FloatArray:
    """(size, size) noise of about [-1, 1]; octave i has `octaves[i]` cells a side, strength 0.6**i."""
    total = np.zeros((size, size), np.float32)
    for i, num_cells in enumerate(octaves):
        weights = _upsampling(num_cells + 1, size)
        cells = rng.uniform(-1, 1, (num_cells + 1, num_cells + 1)).astype(np.float32)
        total += np.float32(0.6**i) * (weights @ cells @ weights.T)
    return total


def _pick_color(rng: np.random.Generator, taken: list[FloatArray], style: ShapesStyle) -> FloatArray:
    """Draw a color that is far from those taken, the farthest of ten draws if none is, and take it."""
    best, best_distance = None, -1.0
    for _ in range(10):
        hsv = (rng.random(), rng.uniform(*style.saturation), rng.uniform(*style.brightness))
        color = np.array(colorsys.hsv_to_rgb(*hsv), np.float32)
        nearest = min((float(np.linalg.norm(color - other)) for other in taken), default=np.inf)
        if nearest > best_distance:
            best, best_distance = color, nearest
        if nearest >= style.color_distance:
            break
    assert best is not None
    taken.append(best)
    return best


def _draw_background(rng: np.random.Generator, size: int, base: FloatArray, style: ShapesStyle) -> FloatArray:
    """(size, size, 3) in about [0, 1]: a gradient and noise between two colors around `base`."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    blend = slope_x * axis + slope_y * axis[:, None] + _smooth_noise(rng, size, (3, 7, 15, 31))
    direction = rng.normal(size=3)
    direction *= 0.5 * style.background_contrast / np.linalg.norm(direction)
    background: FloatArray = base + blend[..., None] * direction.astype(np.float32)
    return background


def _place(rng: np.random.Generator, size: int, margin: float) -> tuple[FloatArray, FloatArray]:
    """Coordinates (x, y) of all pixels, each (size, size), from a random center within the margin."""
    center_x, center_y = rng.uniform(margin * size, (1 - margin) * size, 2)
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x, y = np.meshgrid(axis - np.float32(center_x), axis - np.float32(center_y))
    return x, y


def _rotate(rng: np.random.Generator, x: FloatArray, y: FloatArray, degrees: float) -> tuple[FloatArray, FloatArray]:
    """Turn coordinates by a random angle of at most so many degrees."""
    angle = np.radians(rng.uniform(-degrees, degrees))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _blob(rng: np.random.Generator, x: FloatArray, y: FloatArray) -> FloatArray:
    """Signed distance, roughly, to an irregular outline around the unit circle's inside."""
    angle = np.arctan2(y, x)
    outline = np.full_like(x, 0.75)
    for k, strength in ((2, 0.15), (3, 0.15), (5, 0.08)):
        outline += np.float32(strength) * np.sin(k * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    return np.hypot(x, y) - outline


def _draw_layer(
    rng: np.random.Generator,
    size: int,
    name: str | None,
    *,
    classes: Sequence[str],
    color: FloatArray,
    style: ShapesStyle,
) -> _Layer:
    """Draw an object of class `name`, or a distractor if that is None."""
    low, high = style.distractor_size if name is None else style.object_size
    radius = np.float32(0.5 * size * rng.uniform(low, high))
    shape, texture = _CLASSES[name or classes[int(rng.integers(len(classes)))]]
    kind = None if name else rng.choice(("plain", "blotches", "blob"), p=style.distractor_kinds)

    x, y = _place(rng, size, style.object_margin)
    unit_x, unit_y = _rotate(rng, x / radius, y / radius, style.object_rotation)
    distance = _blob(rng, unit_x, unit_y) if kind == "blob" else shape(unit_x, unit_y)
    coverage = np.clip(np.float32(0.5) - radius * distance, 0, 1)

    if kind == "plain":
        pattern = np.full_like(x, 0.5)
    elif kind == "blotches":
        pattern = np.clip(np.float32(0.5) + 2 * _smooth_noise(rng, size, (size // 6,)), 0, 1)
    else:
        weave = _Weave(rng.uniform(*style.texture_period), (rng.random(), rng.random()), float(radius))
        pattern = texture(*_rotate(rng, x, y, style.texture_rotation), weave)
        if rng.random() < 0.5:
            pattern = 1 - pattern
    shade = np.float32(rng.uniform(*style.texture_contrast)) * (pattern - np.float32(0.5))
    return _Layer(name, coverage, color + shade[..., None])


def _draw_layers(
    rng: np.random.Generator,
    size: int,
    *,
    classes: Sequence[str],
    colors: list[FloatArray],
    style: ShapesStyle,
) -> list[_Layer]:
    """Draw the objects and distractors of an image, the lowest first."""
    num_objects = rng.integers(*style.num_objects, endpoint=True)
    num_distractors = rng.integers(*style.num_distractors, endpoint=True)
    names: list[str | None] = [classes[i] for i in rng.permutation(len(classes))[:num_objects]]
    names += [None] * int(num_distractors)
    layers = []
    for i in rng.permutation(len(names)):
        color = _pick_color(rng, colors, style)
        layers.append(_draw_layer(rng, size, names[i], classes=classes, color=color, style=style))
    return layers


def _stack(layers: Sequence[_Layer], size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Tell which layer is on top where.

    Returns:
        (H, W) position of the topmost layer + 1, 0 where there is none; and the visible pixels of each layer.
    """
    top = np.zeros((size, size), np.intp)
    for i, layer in enumerate(layers):
        top[layer.inside] = i + 1
    return top, np.bincount(top.ravel(), minlength=len(layers) + 1)[1:]


def _drop_hidden(layers: Sequence[_Layer], size: int, style: ShapesStyle) -> list[_Layer]:
    """Leave out, one after the other, the objects of which too little is visible."""
    layers = list(layers)
    while True:
        _, pixels = _stack(layers, size)
        for i, layer in enumerate(layers):
            least = max(style.min_visible_pixels, style.min_visible * layer.inside.sum())
            if layer.name and pixels[i] < least:
                del layers[i]
                break  # what it covered may be visible enough now
        else:
            return layers


def draw_shapes(
    rng: np.random.Generator,
    image_size: int,
    *,
    classes: Sequence[str] = SHAPE_CLASSES,
    style: ShapesStyle = DEFAULT_STYLE,
) -> Scene:
    """Draw one image with its mask.

    Args:
        rng: Source of all that is random; the same state gives the same scene.
        image_size: Pixels of both sides.
        classes: Names out of `SHAPE_CLASSES`; the mask value of a class is its position + 1.
        style: How hard the image is.

    Returns:
        The scene, with at least one object and at least `style.min_visible_pixels` pixels of each.

    Raises:
        AfaError: The style leaves no object visible.
    """
    for _ in range(100):
        colors: list[FloatArray] = []
        image = _draw_background(rng, image_size, _pick_color(rng, colors, style), style)
        layers = _draw_layers(rng, image_size, classes=classes, colors=colors, style=style)
        layers = _drop_hidden(layers, image_size, style)
        if any(layer.name for layer in layers):
            break
    else:
        raise AfaError(f"{style} leaves no object visible at {image_size} pixels: make the objects larger")

    for layer in layers:
        image += layer.coverage[..., None] * (layer.color - image)
    image *= 1 + np.float32(style.shading) * _smooth_noise(rng, image_size, (2,))[..., None]
    image += np.float32(style.noise) * rng.standard_normal(image.shape, np.float32)

    top, pixels = _stack(layers, image_size)
    values = [0, *(1 + classes.index(layer.name) if layer.name else 0 for layer in layers)]
    return Scene(
        image=(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8),
        mask=np.array(values, np.uint8)[top],
        visible={layer.name: float(pixels[i] / layer.inside.sum()) for i, layer in enumerate(layers) if layer.name},
        num_distractors=sum(layer.name is None for layer in layers),
    )


def write_shapes(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    image_size: int = 128,
    seed: int = 0,
    classes: Sequence[str] = SHAPE_CLASSES,
    style: ShapesStyle = DEFAULT_STYLE,
    progress: bool = False,
) -> None:
    """Write a generated data set, or keep the one that is there if it was made with the same parameters.

    The folder holds JPEGImages/ID.jpg, SegmentationClassAug/ID.png (class indices in the VOC palette, without
    ignored pixels), lists/train.txt, lists/val.txt, lists/tags.csv, classes.txt and shapes.json, the
    parameters. It appears only when it is complete. Equal parameters give equal files, byte for byte.

    Args:
        root: Folder to write; must be absent, empty, or hold a data set written with the same parameters.
        num_train: Training images, named train_00000 and on.
        num_val: Held-out images, named val_00000 and on.
        image_size: Pixels of both sides, at least 32.
        seed: Start of the random numbers, at least 0.
        classes: Names out of `SHAPE_CLASSES`, each once; their order is that of the mask values.
        style: How hard the images are.
        progress: Whether to show a progress bar on stderr.

    Raises:
        AfaError: A parameter is out of its range, the folder holds other files or another data
            set, or it cannot be written.
    """
    _check("num_train", num_train, low=1)
    _check("num_val", num_val, low=1)
    _check("image_size", image_size, low=32)
    _check("seed", seed, low=0)
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(SHAPE_CLASSES):
        raise AfaError(
            f"classes of the generated data set are {list(classes)}: choose from {', '.join(SHAPE_CLASSES)}, each once"
        )
    parameters = {
        "format": _FORMAT,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "seed": seed,
        "classes": list(classes),
        "style": dataclasses.asdict(style),
    }
    marker = json.dumps(parameters, indent=1) + "\n"
    if _is_written(root, marker):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            unfinished = Path(folder) / "data"
            _write_files(unfinished, (num_train, num_val), image_size, seed, classes, style, progress)
            (unfinished / MARKER_NAME).write_text(marker, encoding="utf-8")
            if root.exists():
                root.rmdir()
            unfinished.rename(root)
    except OSError as error:
        if not _is_written(root, marker):  # else another process was faster
            raise AfaError(f"{root}: cannot be written ({error}); free space or choose another folder") from None


def _write_files(
    root: Path,
    num_images: tuple[int, int],
    image_size: int,
    seed: int,
    classes: Sequence[str],
    style: ShapesStyle,
    progress: bool,
) -> None:
    """Write all files but the marker."""
    for name in ("JPEGImages", "SegmentationClassAug", "lists"):
        (root / name).mkdir(parents=True)
    _write_lines(root / "classes.txt", classes)
    tags = ["image,tags"]
    names: list[list[str]] = [[], []]
    jobs = [(split, i) for split in (0, 1) for i in range(num_images[split])]
    for split, i in track(jobs, "Generating images", console=Console(stderr=True), disable=not progress):
        name = f"{_SPLITS[split]}_{i:05d}"
        rng = np.random.default_rng([seed, split, i])
        scene = draw_shapes(rng, image_size, classes=classes, style=style)
        image_path = root / "JPEGImages" / f"{name}.jpg"
        Image.fromarray(scene.image).save(image_path, quality=_JPEG_QUALITY, subsampling="4:4:4")
        write_index_png(root / "SegmentationClassAug" / f"{name}.png", scene.mask)
        tags.append(f"{name},{' '.join(c for c in classes if c in scene.visible)}")
        names[split].append(name)
    _write_lines(root / "lists" / "tags.csv", tags)
    for split in (0, 1):
        _write_lines(root / "lists" / f"{_SPLITS[split]}.txt", names[split])


def _check(key: str, value: int, *, low: int) -> None:
    if value < low:
        raise AfaError(f"{key} of the generated data set is {value}: it must be at least {low}")


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _is_written(root: Path, marker: str) -> bool:
    """Tell whether the folder holds the data set; refuse one that holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / MARKER_NAME
    if not path.is_file():
        raise AfaError(f"{root} exists and holds no generated data set: choose another folder for it")
    if path.read_text(encoding="utf-8") != marker:
        raise AfaError(f"{path}: this data set has other parameters: remove {root} or choose another folder")
    return True
