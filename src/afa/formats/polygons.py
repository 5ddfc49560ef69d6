"""Formats of polygons, LabelMe's JSON files and YOLO's text files; and the way from a mask's regions to polygons.

An outline runs along the pixels' edges and is then simplified. Coordinates are those of the pixels' corners: pixel
(row, column) covers x from column to column + 1 and y from row to row + 1. Pixels that touch at a corner only are not
connected, so an outline never crosses itself; where a region almost closes around a place, its outline may pass the
same corner twice.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from afa.formats.job import Job

TOLERANCE: Final = 1.0
"""How far a simplified outline may leave the pixels' edges, pixels; the least that straightens every staircase."""

MIN_AREA: Final = 10.0
"""Regions of a smaller area are left out as specks, square pixels."""

# Bits of the four pixels around a vertex: 1 above left, 2 above right, 4 below left, 8 below right. For each pattern
# that is a corner of the outline: whether its horizontal edge leads right, its vertical edge leads down, and the way
# along the outline, region on the right-hand side, leaves by the horizontal one. Two opposite pixels are two corners.
_CORNERS: Final[dict[int, tuple[tuple[int, int, int], ...]]] = {
    1: ((0, 0, 1),),
    2: ((1, 0, 0),),
    4: ((0, 1, 0),),
    8: ((1, 1, 1),),
    7: ((1, 1, 0),),
    11: ((0, 1, 1),),
    13: ((1, 0, 1),),
    14: ((0, 0, 0),),
    6: ((1, 0, 0), (0, 1, 0)),
    9: ((0, 0, 1), (1, 1, 1)),
}


def write_labelme(job: Job) -> None:
    """Write NAME.json for each image, larger regions first; images stay where they are, but for those of shards."""
    for item, label in job.masks:
        path, image = job.target / f"{item.name}.json", job.image_path(item, item.file_name)
        annotation = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [
                {
                    "label": job.classes[value - 1],
                    "points": np.round(polygon, 3).tolist(),
                    "group_id": None,
                    "description": "",
                    "shape_type": "polygon",
                    "flags": {},
                    "mask": None,
                }
                for value, polygon in _polygons(job, label)
            ],
            "imagePath": os.path.relpath(image.resolve(), path.parent.resolve()),
            "imageData": None,
            "imageHeight": label.shape[0],
            "imageWidth": label.shape[1],
        }
        job.write(f"{item.name}.json", json.dumps(annotation, indent=2) + "\n")


def write_yolo(job: Job) -> None:
    """Write images, labels with one polygon a line, its class (from 0) before it, and data.yaml."""
    for item, label in job.masks:
        job.add_image(item, f"images/{item.file_name}")
        size = np.array([label.shape[1], label.shape[0]])
        lines = [
            f"{value - 1} {' '.join(f'{coordinate:.6f}' for coordinate in (polygon / size).ravel())}\n"
            for value, polygon in _polygons(job, label)
        ]
        # As YOLO finds it: labels replaces the last folder called images, and txt replaces the suffix.
        place = "/labels/".join(f"/images/{item.file_name}".rsplit("/images/", 1)).removeprefix("/")
        job.write(f"{place.rpartition('.')[0] or place}.txt", "".join(lines))
    names = [f"  {index}: {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(job.classes)]
    job.write("data.yaml", "\n".join(["train: images", "val: images", "names:", *names]) + "\n")


def _polygons(job: Job, label: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.float64]]]:
    """Mask value and polygon of each region, the largest first: what lies in a hole is painted over it."""
    job.count_ignored(label)
    found = []
    for value in job.present(label):
        outlines = outline(label == value)
        found += [(area, value, ring) for area, ring in zip(outlines.areas, outlines.polygons, strict=True)]
        job.tally.filled_holes += outlines.filled_holes
        job.tally.dropped_regions += outlines.dropped
    found.sort(key=lambda region: -region[0])
    return [(value, ring) for _, value, ring in found]


@dataclass(frozen=True)
class Outlines:
    """The outlines of the regions of one class in one image.

    Attributes:
        polygons: (P, 2) float64 corners (x, y) of each region's outer outline, largest region first; the last
            corner is not the first again.
        areas: Square pixels within each outline before it was simplified, holes included.
        filled_holes: Holes that the outlines cannot show.
        dropped: Regions left out because they are smaller than the least area.
    """

    polygons: list[NDArray[np.float64]]
    areas: list[float]
    filled_holes: int
    dropped: int


def outline(mask: NDArray[np.bool_], *, tolerance: float = TOLERANCE, min_area: float = MIN_AREA) -> Outlines:
    """Draw the polygons of a binary mask.

    Args:
        mask: (H, W) bool.
        tolerance: How far the polygons may leave the pixels' edges, pixels; 0 follows them exactly.
        min_area: Smaller regions are dropped, square pixels.

    Returns:
        One polygon for each region of pixels that touch at edges.

    >>> outline(np.ones((2, 3), dtype=bool), min_area=0).polygons[0].tolist()
    [[0.0, 0.0], [3.0, 0.0], [3.0, 2.0], [0.0, 2.0]]
    """
    rings = [(ring, signed_area(ring)) for ring in trace_rings(mask)]
    outer = sorted(((ring, area) for ring, area in rings if area > 0), key=lambda pair: -pair[1])
    kept = [(ring, area) for ring, area in outer if area >= min_area]
    return Outlines(
        polygons=[simplify(ring, tolerance) for ring, _ in kept],
        areas=[area for _, area in kept],
        filled_holes=len(rings) - len(outer),
        dropped=len(outer) - len(kept),
    )


def trace_rings(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Follow the boundary of a binary mask.

    Corners in a row, sorted, are in turn the left and right ends of horizontal edges, and so are those in a
    column of vertical edges; each corner's successor is the other end of the edge by which the way leaves it.

    Args:
        mask: (H, W) bool.

    Returns:
        Rings of (P, 2) float64 corners (x, y), turning at each: outer boundaries clockwise as seen on a screen,
        holes the other way round.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    pattern = padded[:-1, :-1] | padded[:-1, 1:] << 1 | padded[1:, :-1] << 2 | padded[1:, 1:] << 3
    rows, columns = np.nonzero(np.isin(pattern, list(_CORNERS)))
    patterns = pattern[rows, columns]
    parts = []
    for code, corners in _CORNERS.items():
        place = np.stack([rows, columns])[:, patterns == code]
        parts += [np.pad(place, ((0, 3), (0, 0))) + np.array([[0, 0, *corner]]).T for corner in corners]
    y, x, right, down, by_row = np.concatenate(parts, axis=1)
    # At two corners in one place, the edges that end there come before those that begin.
    next_corner = np.where(
        by_row, _other_ends(np.lexsort((right, x, y))), _other_ends(np.lexsort((down, y, x)))
    ).tolist()

    points = np.stack([x, y], axis=1).astype(np.float64)
    seen = np.zeros(len(points), dtype=bool)
    rings = []
    # Each ring starts at its uppermost, leftmost corner.
    for first in np.lexsort((right, x, y)).tolist():
        if seen[first]:
            continue
        ring = [first]
        while (corner := next_corner[ring[-1]]) != first:
            ring.append(corner)
        seen[ring] = True
        rings.append(points[ring])
    return rings


def _other_ends(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The other end of each corner's edge, for corners in the order in which every second one ends an edge."""
    other = np.empty_like(order)
    other[order[0::2]] = order[1::2]
    other[order[1::2]] = order[0::2]
    return other


def signed_area(ring: NDArray[np.float64]) -> float:
    """Area within a ring of (P, 2) corners, square pixels; negative if it turns counterclockwise on a screen."""
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def simplify(ring: NDArray[np.float64], tolerance: float) -> NDArray[np.float64]:
    """Leave out corners of a ring that lie near the edge between their neighbors that stay.

    Args:
        ring: (P, 2) corners (x, y), P >= 4.
        tolerance: Largest distance of a corner left out to that edge, pixels.

    Returns:
        (Q, 2), some of the corners in their order; the ring itself where fewer than three would stay.

    Source: D. Douglas and T. Peucker, Algorithms for the reduction of the number of points required to
    represent a digitized line or its caricature, 1973; applied to the two halves of the ring between its first
    corner and the one farthest from it.
    """
    if tolerance <= 0:
        return ring
    closed = np.concatenate([ring, ring[:1]])
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    keep = np.zeros(len(closed), dtype=bool)
    keep[[0, far]] = True
    spans = [(0, far), (far, len(ring))]
    while spans:
        start, stop = spans.pop()
        if stop - start < 2:
            continue
        along = closed[stop] - closed[start]
        away = closed[start + 1 : stop] - closed[start]
        # Where the ring passes a corner twice, both ends may be the same point.
        share = np.clip(away @ along / max(along @ along, 1.0), 0, 1)
        distance = np.hypot(*(away - share[:, None] * along).T)
        farthest = int(distance.argmax())
        if distance[farthest] > tolerance:
            middle = start + 1 + farthest
            keep[middle] = True
            spans += [(start, middle), (middle, stop)]
    simple = ring[keep[:-1]]
    return simple if len(simple) > 2 else ring
