"""Shape operations against slow references and hand-made geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import Delaunay, QhullError

from camtrain.anatomy.morphology import close, convex_hull, dilate, fill_holes


def ball_offsets(radius_mm, spacing):
    reach = [int(radius_mm / s) for s in spacing]
    grid = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), -1).reshape(-1, len(spacing))
    return grid[((grid * np.asarray(spacing)) ** 2).sum(1) <= radius_mm**2 + 1e-6]


def grown(region, offsets):
    """Dilation as a union of shifted copies."""
    margin = int(np.abs(offsets).max(initial=0))
    padded = np.pad(region, margin)
    shifted = [np.roll(padded, tuple(offset), axis=tuple(range(region.ndim))) for offset in offsets]
    return np.logical_or.reduce(shifted)[tuple(slice(margin, n - margin) for n in padded.shape)]


def closed(region, offsets):
    """Closing as a union of complements: a voxel stays out if some ball that holds it misses the region."""
    margin = 2 * int(np.abs(offsets).max(initial=0))
    padded = np.pad(region, margin)
    result = ~grown(~grown(padded, offsets), -offsets)
    return result[tuple(slice(margin, n - margin) for n in padded.shape)]


@st.composite
def blobs(draw, axes=(1, 2, 3)):
    rank = draw(st.sampled_from(axes))
    shape = tuple(draw(st.integers(1, 7)) for _ in range(rank))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    spacing = tuple(draw(st.sampled_from([0.7, 1.0, 2.5])) for _ in range(rank))
    return rng.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.3])), spacing


@settings(max_examples=50, deadline=None)
@given(blobs(), st.sampled_from([0.5, 1.0, 2.5, 3.1]))
def test_dilation_and_closing_are_those_of_a_ball_in_mm(case, radius):
    region, spacing = case
    offsets = ball_offsets(radius, spacing)
    assert np.array_equal(dilate(region, radius, spacing), grown(region, offsets))
    assert np.array_equal(close(region, radius, spacing), closed(region, offsets))


@settings(max_examples=50, deadline=None)
@given(blobs(axes=(2, 3)))
def test_hull_is_the_set_of_voxels_in_a_simplex_of_the_triangulation(case):
    region, _ = case
    points = np.argwhere(region)
    try:
        simplices = Delaunay(points)
    except (QhullError, ValueError):  # no volume: the region stays as it is
        assert np.array_equal(convex_hull(region), region)
        return
    every = np.argwhere(np.ones_like(region))
    expected = (simplices.find_simplex(every, tol=1e-6) >= 0).reshape(region.shape)
    assert np.array_equal(convex_hull(region), expected)


@settings(max_examples=40, deadline=None)
@given(blobs(), st.integers(0, 2))
def test_every_operation_grows_the_region_and_commutes_with_flips(case, axis):
    region, spacing = case
    axis %= region.ndim
    operations = (convex_hull, fill_holes, lambda r: close(r, 1.9, spacing), lambda r: dilate(r, 1.9, spacing))
    for operation in operations:
        before = region.copy()
        result = operation(region)
        assert (result >= region).all()
        assert np.array_equal(region, before)
        assert np.array_equal(operation(np.flip(region, axis)), np.flip(result, axis))


def test_distances_are_in_mm_along_every_axis():
    region = np.zeros((9, 9, 9), dtype=bool)
    region[4, 4, 4] = True
    result = dilate(region, 4.0, (4.0, 2.0, 0.9))
    assert [int(result[tuple(slice(None) if a == axis else 4 for a in range(3))].sum()) for axis in range(3)] == [
        3,
        5,
        9,
    ]


def test_closing_bridges_a_gap_of_twice_the_radius_only():
    two = np.zeros((40, 30), dtype=bool)
    two[:, [5, 11]] = True  # two walls, and a gap of 5 voxels of 2 mm
    assert close(two, 6.0, (0.5, 2.0))[20, 5:12].all()
    assert not close(two, 4.0, (0.5, 2.0))[20, 6:11].any()


def test_closing_at_the_border_keeps_the_border():
    region = np.zeros((6, 6), dtype=bool)
    region[0], region[:, 0] = True, True
    assert (close(region, 3.0, (1.0, 1.0)) >= region).all()


def test_holes_are_filled_and_bays_are_not():
    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    bay = np.ones((5, 5), dtype=bool)
    bay[2, 2:] = False
    assert fill_holes(ring).all()
    assert np.array_equal(fill_holes(bay), bay)


@pytest.mark.parametrize("shape", [(0, 1), (1, 4)])
def test_hull_of_flat_regions_is_the_region(shape):
    flat = np.zeros((4, 6, 5), dtype=bool)
    flat[1, 1 : 1 + shape[0], : shape[1]] = True
    assert np.array_equal(convex_hull(flat), flat)
