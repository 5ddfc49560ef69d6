"""The method once more, as slow loops over plain NumPy arrays in double precision: the oracle of the tests.

Written from the equations, one image at a time, without a thought for speed. Nothing here imports afa.
Arrays: image (3, H, W) in [0, 1], cam (C, H, W), scores (K, H, W) or any number of channels, label (H, W),
box (top, bottom, left, right) half open, tags (C,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

IGNORE = 255
DILATIONS = (1, 2, 4, 8, 12, 24)
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


# --- Resizing ---


def _source(position: int, size: int, new_size: int, align_corners: bool) -> tuple[int, int, float]:
    """Two neighbors in the old row and the share of the second, for a position in the new one."""
    if align_corners:
        place = position * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
    else:
        place = max((position + 0.5) * size / new_size - 0.5, 0.0)
    first = min(int(place), size - 1)
    return first, min(first + 1, size - 1), place - first


def bilinear(maps: Array, size: tuple[int, int], *, align_corners: bool = False) -> Array:
    maps = np.asarray(maps, dtype=np.float64)
    _, height, width = maps.shape
    out = np.zeros((maps.shape[0], *size))
    for y in range(size[0]):
        y0, y1, fy = _source(y, height, size[0], align_corners)
        for x in range(size[1]):
            x0, x1, fx = _source(x, width, size[1], align_corners)
            upper = (1 - fx) * maps[:, y0, x0] + fx * maps[:, y0, x1]
            lower = (1 - fx) * maps[:, y1, x0] + fx * maps[:, y1, x1]
            out[:, y, x] = (1 - fy) * upper + fy * lower
    return out


def nearest(label: Array, size: tuple[int, int]) -> Array:
    height, width = label.shape
    out = np.zeros(size, dtype=label.dtype)
    for y in range(size[0]):
        for x in range(size[1]):
            out[y, x] = label[y * height // size[0], x * width // size[1]]
    return out


def softmax(values: Array, axis: int = 0) -> Array:
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


# --- Low-level refinement (Eq. 8-10) ---


def _clamped(y: int, x: int, height: int, width: int) -> tuple[int, int]:
    """Replicate padding: what lies outside is the nearest border pixel."""
    return min(max(y, 0), height - 1), min(max(x, 0), width - 1)


def neighbors(y: int, x: int, height: int, width: int, dilations: Sequence[int]) -> list[tuple[int, int]]:
    return [_clamped(y + d * dy, x + d * dx, height, width) for d in dilations for dy, dx in DIRECTIONS]


def refinement_kernel(
    image: Array,
    *,
    dilations: Sequence[int] = DILATIONS,
    rgb_bandwidth: float = 0.3,
    pos_bandwidth: float = 0.3,
    pos_weight: float = 0.01,
    kind: str = "par",
) -> Array:
    """(n, H, W) weights of the neighbors."""
    image = np.asarray(image, dtype=np.float64)
    _, height, width = image.shape
    kernel = np.zeros((8 * len(dilations), height, width))
    distances = np.array([d * math.hypot(dy, dx) for d in dilations for dy, dx in DIRECTIONS])
    position = softmax(-((distances / (distances.std(ddof=1) + 1e-8) / pos_bandwidth) ** 2))
    for y in range(height):
        for x in range(width):
            colors = np.array([image[:, v, u] for v, u in neighbors(y, x, height, width, dilations)])
            sigma = colors.std(axis=0, ddof=1)
            difference = np.abs(colors - image[:, y, x])
            if kind == "pamr":
                kernel[:, y, x] = softmax((-difference / (1e-8 + 0.1 * sigma)).mean(axis=1))
                continue
            exponent = -((difference / ((sigma + 1e-8) * rgb_bandwidth)) ** 2)
            kernel[:, y, x] = softmax(exponent.mean(axis=1))
            if kind == "par":
                kernel[:, y, x] += pos_weight * position
    return kernel


def refine(scores: Array, kernel: Array, *, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Array:
    current = np.asarray(scores, dtype=np.float64)
    _, height, width = current.shape
    for _ in range(iterations):
        following = np.zeros_like(current)
        for y in range(height):
            for x in range(width):
                for n, (v, u) in enumerate(neighbors(y, x, height, width, dilations)):
                    following[:, y, x] += kernel[n, y, x] * current[:, v, u]
        current = following
    return current


def par(image: Array, scores: Array, *, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Array:
    resized = bilinear(scores, (image.shape[1], image.shape[2]), align_corners=True)
    return refine(resized, refinement_kernel(image, dilations=dilations), dilations=dilations, iterations=iterations)


# --- CAM and labels (Eq. 2, Eq. 4) ---


def fuse_scores(plain: Sequence[Array], flipped: Sequence[Array], size: tuple[int, int]) -> Array:
    """CAM of one image from its raw class scores per scale, and those of the flipped image."""
    total = np.zeros((plain[0].shape[0], *size))
    for straight, mirrored in zip(plain, flipped, strict=True):
        upright = bilinear(mirrored, size)[:, :, ::-1]
        total += np.maximum(np.maximum(bilinear(straight, size), upright), 0)
    for c in range(len(total)):
        total[c] -= total[c].min()
        total[c] /= total[c].max() + 1e-5
    return total


def competing(cam: Array, tags: Array, background: float) -> tuple[list[int], Array]:
    """Class indices of the background and the tagged classes, and their scores."""
    classes = [0] + [c + 1 for c in range(len(tags)) if tags[c] > 0]
    constant = np.full((1, *cam.shape[1:]), background)
    return classes, np.concatenate([constant, np.asarray(cam, dtype=np.float64)])[classes]


def merge(low: Array, high: Array) -> Array:
    label = np.full(low.shape, IGNORE)
    for place in np.ndindex(*low.shape):
        if high[place] != 0:
            label[place] = high[place]
        elif low[place] == 0:
            label[place] = 0
    return label


def in_box_only(label: Array, box: Sequence[int]) -> Array:
    top, bottom, left, right = box
    out = np.full(label.shape, IGNORE)
    out[top:bottom, left:right] = label[top:bottom, left:right]
    return out


def threshold_label(cam: Array, tags: Array, box: Sequence[int], *, low: float, high: float) -> Array:
    """Label of the CAM alone: no softmax, no refinement."""
    label = np.full(cam.shape[1:], IGNORE)
    for y, x in np.ndindex(*cam.shape[1:]):
        best = max((c for c in range(len(tags)) if tags[c] > 0), key=lambda c: cam[c, y, x], default=None)
        value = 0.0 if best is None else cam[best, y, x]
        if value <= low:
            label[y, x] = 0
        elif value > high and best is not None:
            label[y, x] = best + 1
    return in_box_only(label, box)


def initial_label(
    image: Array,
    cam: Array,
    tags: Array,
    box: Sequence[int],
    *,
    backgrounds: tuple[float, float] = (0.35, 0.55),
    iterations: int = 10,
    dilations: Sequence[int] = DILATIONS,
) -> Array:
    height, width = cam.shape[1:]
    half = (height // 2, width // 2)
    small_image = bilinear(image, half)
    labels = []
    for background in backgrounds:
        classes, scores = competing(cam, tags, background)
        scores = softmax(bilinear(scores, half))
        refined = par(small_image, scores, iterations=iterations, dilations=dilations)
        labels.append(np.array(classes)[bilinear(refined, (height, width)).argmax(axis=0)])
    return in_box_only(merge(*labels), box)


# --- Affinity and random walk (Eq. 5-7) ---


def near(i: int, j: int, width: int, radius: int) -> bool:
    """Whether tokens i and j of a grid lie within a Chebyshev distance."""
    return max(abs(i // width - j // width), abs(i % width - j % width)) <= radius


def affinity_label(label: Array, *, radius: int) -> Array:
    """Pair labels of a token label map (h, w)."""
    width = label.shape[1]
    flat = label.reshape(-1)
    out = np.full((len(flat), len(flat)), IGNORE)
    for i in range(len(flat)):
        for j in range(len(flat)):
            if IGNORE not in (flat[i], flat[j]) and near(i, j, width, radius):
                out[i, j] = int(flat[i] == flat[j])
    return out


def propagate(
    cam: Array,
    tags: Array,
    affinity: Array,
    *,
    background: float,
    radius: int,
    power: float = 2.0,
    epsilon: float = 0.1,
) -> Array:
    """(K, h, w) from a CAM (C, h, w) at token resolution; absent classes are 0."""
    height, width = cam.shape[1:]
    classes, scores = competing(cam, tags, background)
    scores = softmax(scores)
    out = np.zeros((len(cam) + 1, height, width))
    tokens = height * width
    weights = np.zeros((tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            if near(i, j, width, radius):
                weights[i, j] = float(affinity[i, j]) ** power
    for j in range(tokens):
        degree = weights[:, j].sum() + epsilon
        for channel, c in enumerate(classes):
            total = 0.0
            for i in range(tokens):
                total += scores[channel, i // width, i % width] * weights[i, j]
            out[c, j // width, j % width] = total / degree
    return out


def refine_in_box(
    image: Array,
    scores: Array,
    box: Sequence[int],
    *,
    iterations: int = 10,
    dilations: Sequence[int] = DILATIONS,
) -> Array:
    """Refinement of full-size scores inside the valid box, at half its size; 0 outside."""
    top, bottom, left, right = box
    size = (bottom - top, right - left)
    half_image = bilinear(image[:, top:bottom, left:right], (size[0] // 2, size[1] // 2))
    refined = par(half_image, scores[:, top:bottom, left:right], iterations=iterations, dilations=dilations)
    out = np.zeros(scores.shape)
    out[:, top:bottom, left:right] = bilinear(refined, size)
    return out


def refined_label(
    image: Array,
    cam: Array,
    tags: Array,
    affinity: Array,
    box: Sequence[int],
    *,
    grid: tuple[int, int],
    radius: int,
    iterations: int = 10,
    backgrounds: tuple[float, float] = (0.35, 0.55),
    dilations: Sequence[int] = DILATIONS,
) -> Array:
    labels = []
    for background in backgrounds:
        spread = propagate(bilinear(cam, grid), tags, affinity, background=background, radius=radius)
        full = bilinear(spread, (image.shape[1], image.shape[2]))
        classes, _ = competing(cam, tags, background)
        refined = refine_in_box(image, full[classes], box, iterations=iterations, dilations=dilations)
        labels.append(np.array(classes)[refined.argmax(axis=0)])
    return in_box_only(merge(*labels), box)


# --- Losses (Eq. 5, 11) ---


def affinity_loss(affinity: Array, label: Array) -> float:
    positive = [1 - float(a) for a, y in zip(affinity.flat, label.flat, strict=True) if y == 1]
    negative = [float(a) for a, y in zip(affinity.flat, label.flat, strict=True) if y == 0]
    return 0.5 * sum(positive) / (len(positive) + 1) + 0.5 * sum(negative) / (len(negative) + 1)


def segmentation_loss(logits: Array, label: Array) -> float:
    """logits (B, K, H, W), label (B, H, W)."""
    background: list[float] = []
    foreground: list[float] = []
    for b, y, x in np.ndindex(*label.shape):
        true = int(label[b, y, x])
        if true == IGNORE:
            continue
        column = logits[b, :, y, x].astype(np.float64)
        entropy = math.log(np.exp(column - column.max()).sum()) + column.max() - column[true]
        (background if true == 0 else foreground).append(entropy)
    return math.fsum(0.5 * sum(part) / len(part) for part in (background, foreground) if part)


def classification_loss(logits: Array, tags: Array) -> float:
    terms = []
    for logit, tag in zip(logits.flat, tags.flat, strict=True):
        probability = 1 / (1 + math.exp(-logit))
        terms.append(-(tag * math.log(probability) + (1 - tag) * math.log(1 - probability)))
    return sum(terms) / len(terms)


# --- Several scales ---


def multiscale_logits(
    image: Array, logits_of: Callable[[Array], Array], *, long_side: int, scales: Sequence[float]
) -> Array:
    """(K, H, W) as the published script computes them; `logits_of` turns (3, h, w) into (K, h', w')."""
    height, width = image.shape[1:]
    factor = long_side / max(height, width)
    seen = bilinear(image, (int(height * factor), int(width * factor)))
    passes = {}
    for scale in scales:
        view = bilinear(seen, (int(seen.shape[1] * scale), int(seen.shape[2] * scale)))
        mirrored = np.ascontiguousarray(view[:, :, ::-1])
        passes[scale] = (logits_of(view) + logits_of(mirrored)[:, :, ::-1]) / 2
    grid = passes[1.0].shape[1:]
    largest = np.maximum.reduce([bilinear(each, grid) for each in passes.values()])
    return bilinear(largest, (height, width))


# --- Schedule and score ---


def repeat_factors(tagged: Array, balance: float) -> list[float]:
    """tagged (N, C)."""
    counts = [sum(bool(row[c]) for row in tagged) for c in range(tagged.shape[1])]
    known = [count for count in counts if count]
    mean = sum(known) / len(known)
    return [
        max([1.0] + [(mean / count) ** balance for count, tag in zip(counts, row, strict=True) if tag])
        for row in tagged
    ]


def learning_rate(
    step: int,
    *,
    base: float = 6e-5,
    max_steps: int = 20_000,
    warmup_steps: int = 1_500,
    warmup_ratio: float = 1e-6,
    power: float = 1.0,
) -> float:
    if step < warmup_steps:
        return base * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))
    return float(base * (1 - step / max_steps) ** power)


def miou(label: Array, prediction: Array, num_classes: int) -> float:
    shared = [0] * num_classes
    true = [0] * num_classes
    claimed = [0] * num_classes
    for truth, guess in zip(label.flat, prediction.flat, strict=True):
        if truth == IGNORE:
            continue
        true[truth] += 1
        claimed[guess] += 1
        shared[truth] += truth == guess
    present = [c for c in range(num_classes) if true[c]]
    return sum(shared[c] / (true[c] + claimed[c] - shared[c]) for c in present) / len(present)
