"""Outlines against a slow painter of polygons and scipy's connected components."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from afa.formats.contours import outline, signed_area, simplify, trace_rings
from made_masks import binary_masks, iou, paint

EVERY_NEIGHBOR = np.ones((3, 3), dtype=bool)


def disc(radius: float, *, size: int = 100) -> np.ndarray:
    y, x = np.indices((size, size)) + 0.5
    return (x - size / 2) ** 2 + (y - size / 2) ** 2 < radius**2


def test_rings_enclose_exactly_the_mask() -> None:
    for mask in binary_masks():
        rings = trace_rings(mask)
        painted = np.zeros(mask.shape, dtype=bool)
        for ring in rings:
            painted ^= paint(ring, mask.shape)
        np.testing.assert_array_equal(painted, mask)
        assert sum(signed_area(ring) for ring in rings) == mask.sum()


def test_one_ring_for_each_region_and_each_hole() -> None:
    for mask in binary_masks():
        areas = [signed_area(ring) for ring in trace_rings(mask)]
        assert sum(area > 0 for area in areas) == ndimage.label(mask)[1]
        assert sum(area < 0 for area in areas) == ndimage.label(~np.pad(mask, 1), EVERY_NEIGHBOR)[1] - 1


def test_rings_turn_at_every_corner() -> None:
    for mask in binary_masks():
        for ring in trace_rings(mask):
            step = np.roll(ring, -1, axis=0) - ring
            assert ((step == 0).sum(1) == 1).all()
            assert ((step * np.roll(step, -1, axis=0)).sum(1) == 0).all()


def test_exact_polygons_are_the_regions_with_holes_filled() -> None:
    for mask in binary_masks():
        regions, count = ndimage.label(mask)
        drawn = outline(mask, tolerance=0, min_area=0)
        filled = [ndimage.binary_fill_holes(regions == index, EVERY_NEIGHBOR) for index in range(1, count + 1)]
        assert sorted(drawn.areas) == sorted(region.sum() for region in filled)
        assert drawn.areas == sorted(drawn.areas, reverse=True)
        expected = {region.tobytes() for region in filled}
        assert {paint(polygon, mask.shape).tobytes() for polygon in drawn.polygons} == expected
        assert drawn.dropped == 0


def test_specks_are_dropped_and_counted() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[0, 0] = mask[5, 5:14] = mask[10:12, :5] = True
    drawn = outline(mask, min_area=10)
    assert (drawn.areas, drawn.dropped) == ([10.0], 2)
    assert drawn.polygons[0].tolist() == [[0, 10], [5, 10], [5, 12], [0, 12]]


def test_holes_are_counted() -> None:
    mask = np.ones((12, 12), dtype=bool)
    mask[2:4, 2:4] = mask[6:9, 6:9] = False
    assert outline(mask).filled_holes == 2


def test_simplified_outlines_stay_within_the_tolerance() -> None:
    for mask in [*binary_masks(30), disc(40)]:
        for ring in trace_rings(mask):
            simple = simplify(ring, 1.0)
            assert len(simple) >= 3
            ends = np.roll(simple, -1, axis=0)
            along = ends - simple
            share = ((ring[:, None] - simple) * along).sum(2) / (along**2).sum(1)
            nearest = simple + np.clip(share, 0, 1)[:, :, None] * along
            assert np.hypot(*(ring[:, None] - nearest).T).min(0).max() < 1.001


def test_smooth_shapes_keep_their_area_with_few_corners() -> None:
    mask = disc(40)
    (polygon,) = outline(mask).polygons
    assert len(polygon) < 40
    assert iou(paint(polygon, mask.shape), mask) > 0.98
    (exact,) = outline(mask, tolerance=0).polygons
    assert len(exact) > 150


@pytest.mark.parametrize("slope", [1, 2, 3, 7])
def test_staircases_become_straight(slope: int) -> None:
    mask = np.indices((120, 120))[0] * slope >= np.indices((120, 120))[1]
    (polygon,) = outline(mask).polygons
    assert len(polygon) <= 6


def test_thin_spikes_stay() -> None:
    mask = np.zeros((20, 60), dtype=bool)
    mask[5:15, 5:20] = mask[5, 20:55] = True
    (polygon,) = outline(mask).polygons
    assert polygon[:, 0].max() == 55


def test_a_ring_may_pass_a_corner_twice() -> None:
    """Two pixels touch at a corner and are connected elsewhere: the place between them is no hole."""
    mask = np.ones((9, 9), dtype=bool)
    mask[3:6, 3:6] = False
    mask[2, 2] = mask[1, 1] = mask[0, 0] = False
    (ring,) = trace_rings(mask)
    assert len(np.unique(ring, axis=0)) < len(ring)
    assert signed_area(ring) == mask.sum()
    for tolerance in (0.5, 1.0, 20.0):
        assert np.isfinite(simplify(ring, tolerance)).all()


def test_nothing_is_drawn_of_an_empty_mask() -> None:
    drawn = outline(np.zeros((4, 5), dtype=bool))
    assert (drawn.polygons, drawn.areas, drawn.filled_holes, drawn.dropped) == ([], [], 0, 0)
