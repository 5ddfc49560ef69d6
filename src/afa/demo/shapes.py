"""Generated images: textured objects on textured backgrounds, with exact masks.

A class is a shape *and* a texture: a striped disk, a checkered square, a dotted triangle, a spoked ring, a
zigzag cross. Colors are random and say nothing of the class. Objects cover each other and may be cut by the
border; distractors, which are background, have the shape of a class without its texture or the reverse. The
masks are exact. Writing a data set of them is up to `afa.demo.write`.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from afa.errors import AfaError

FloatArray = npt.NDArray[np.floating[Any]]  # in practice float32, for speed
_Phase = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class ShapesStyle:
    """How hard the images are. Sizes are shares of the image side unless in pixels; colors lie in [0, 1]."""

    num_objects: tuple[int, int] = (1, 3)
    """Fewest and most objects in an image, each of another class; with 0, some images hold distractors alone."""
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

NEGATIVES_STYLE: Final = ShapesStyle(num_objects=(0, 1), num_distractors=(1, 3))
"""For one class: about half of the images are without it, and all have what looks like it in shape or texture."""


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


# Textures: a pattern in [0, 1] of points in pixels from the object's center, with edges about a pixel wide. Repetitions
# are `period` pixels long and begin at `phase`, shares of a period; `radius` is the object's, pixels.


def _wave(position: FloatArray) -> FloatArray:
    """Sine with one repetition per unit."""
    wave: FloatArray = np.sin(np.float32(2 * np.pi) * position)
    return wave


def _threshold(wave: FloatArray, period: float) -> FloatArray:
    """Turn a wave in [-1, 1] into bands whose edges are a pixel wide."""
    bands: FloatArray = np.clip(np.float32(0.5) + wave * np.float32(period / (2 * np.pi)), 0, 1)
    return bands


def _stripes(x: FloatArray, y: FloatArray, period: float, phase: _Phase, radius: float) -> FloatArray:
    return _threshold(_wave(x / period + phase[0]), period)


def _checkers(x: FloatArray, y: FloatArray, period: float, phase: _Phase, radius: float) -> FloatArray:
    period = 1.6 * period  # two squares
    waves = _wave(x / period + phase[0]) * _wave(y / period + phase[1])
    return _threshold(waves, 1.5 * period)


def _dots(x: FloatArray, y: FloatArray, period: float, phase: _Phase, radius: float) -> FloatArray:
    period = 1.4 * period
    u = (x / period + phase[0]) % 1 - np.float32(0.5)
    v = (y / period + phase[1]) % 1 - np.float32(0.5)
    pixels = (np.float32(0.36) - np.hypot(u, v)) * np.float32(period)  # into the dot
    dots: FloatArray = np.clip(np.float32(0.5) + pixels, 0, 1)
    return dots


def _spokes(x: FloatArray, y: FloatArray, period: float, phase: _Phase, radius: float) -> FloatArray:
    count = round(2 * np.pi * 0.7 * radius / period)  # the period holds in the middle of a ring
    angle = np.arctan2(y, x) / np.float32(2 * np.pi)
    return _threshold(_wave(count * angle + phase[0]), period)


def _zigzag(x: FloatArray, y: FloatArray, period: float, phase: _Phase, radius: float) -> FloatArray:
    fold = np.abs((x / (2 * period) + phase[0]) % 1 - np.float32(0.5))  # 0 to 1/2 and back
    return _threshold(_wave(y / period + 2 * fold + phase[1]), period)


_Shape = Callable[[FloatArray, FloatArray], FloatArray]
_Texture = Callable[[FloatArray, FloatArray, float, _Phase, float], FloatArray]

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
        period, phase = rng.uniform(*style.texture_period), (rng.random(), rng.random())
        pattern = texture(*_rotate(rng, x, y, style.texture_rotation), period, phase, float(radius))
        if rng.random() < 0.5:
            pattern = 1 - pattern
    shade = np.float32(rng.uniform(*style.texture_contrast)) * (pattern - np.float32(0.5))
    return _Layer(name, coverage, color + shade[..., None])


def _draw_layers(
    rng: np.random.Generator, size: int, classes: Sequence[str], colors: list[FloatArray], style: ShapesStyle
) -> list[_Layer]:
    """Draw the objects and distractors of an image, the lowest first."""
    num_objects = rng.integers(*style.num_objects, endpoint=True)
    num_distractors = rng.integers(*style.num_distractors, endpoint=True)
    names: list[str | None] = [classes[i] for i in rng.permutation(len(classes))[:num_objects]]
    names += [None] * int(num_distractors)
    return [
        _draw_layer(rng, size, names[i], classes, _pick_color(rng, colors, style), style)
        for i in rng.permutation(len(names))
    ]


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
        The scene, with at least one object, unless the style allows none, and at least `style.min_visible_pixels`
        pixels of each.

    Raises:
        AfaError: The style leaves no object visible.
    """
    for _ in range(100):
        colors: list[FloatArray] = []
        image = _draw_background(rng, image_size, _pick_color(rng, colors, style), style)
        layers = _draw_layers(rng, image_size, classes, colors, style)
        empty = not any(layer.name for layer in layers)  # then nothing is hidden
        layers = _drop_hidden(layers, image_size, style)
        if empty or any(layer.name for layer in layers):
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
