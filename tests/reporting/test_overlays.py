from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camtrain.reporting import overlays
from camtrain.reporting.scene import Scene


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)),
    st.tuples(st.integers(1, 13), st.integers(1, 11), st.integers(1, 9)),
    st.integers(0, 999),
)
def test_enlarge_is_torch_interpolate(cells, size, seed):
    values = np.random.default_rng(seed).normal(size=cells).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size=size, mode="trilinear")
    np.testing.assert_allclose(overlays.enlarge(values, size), expected[0, 0].numpy(), atol=1e-5)


def test_section_is_a_plane_of_the_enlarged_volume():
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    whole = overlays.enlarge(values, (12, 10, 15))
    for axis in range(3):
        for index in range(whole.shape[axis]):
            flat = overlays.section(values, axis, (index + 0.5) / whole.shape[axis])
            rest = [n for a, n in enumerate(whole.shape) if a != axis]
            np.testing.assert_allclose(overlays.enlarge(flat, rest), whole.take(index, axis=axis), atol=1e-6)


def test_map_lies_on_the_voxel_that_it_belongs_to(chest):
    image, _ = chest
    values = np.zeros((10, 17, 7))
    values[8, 3, 5] = 1.0  # right, back, up
    for plane, (high, left) in {"axial": (False, True), "coronal": (True, True), "sagittal": (True, False)}.items():
        point = (8 * 4 + 2, 3 * 2 + 1, 5 * 4 + 2)
        scene = Scene.make(image * 0, point=point, window=(0, 1))
        tile = scene.tile(plane, (120, 100), values)
        rows, columns = np.nonzero(tile.sum(-1) > 0.9 * tile.sum(-1).max())
        assert (rows.mean() < 60) == high
        assert (columns.mean() < 50) == left


def test_zero_map_leaves_the_image_untouched(chest):
    image, _ = chest
    scene = Scene.make(image)
    for plane in scene.planes:
        plain = scene.tile(plane, (90, 80))
        np.testing.assert_array_equal(scene.tile(plane, (90, 80), np.zeros((5, 4, 3)), scale=1.0), plain)
        np.testing.assert_array_equal(scene.tile(plane, (90, 80), np.full((5, 4, 3), np.nan), scale=1.0), plain)


def test_signs_have_their_colours():
    base = np.full((1, 3, 3), 120, np.uint8)
    for strength in (0.3, 1.0, 7.0):
        negative, zero, positive = overlays.blend(base, np.array([[-strength, 0, strength]]), 1.0)[0].astype(int)
        assert positive[0] > zero[0] > positive[2]
        assert negative[2] > zero[2] > negative[0]
        assert zero.tolist() == [120, 120, 120]


def test_grey_and_colour_pictures_are_mixed_alike():
    rng = np.random.default_rng(0)
    base, values = rng.integers(0, 256, (30, 20)).astype(np.uint8), rng.normal(size=(30, 20))
    np.testing.assert_array_equal(
        overlays.blend(base, values, 1.5), overlays.blend(np.repeat(base[..., None], 3, axis=2), values, 1.5)
    )


def test_colour_grows_with_the_value_and_stops_at_the_scale():
    base = np.full((1, 1, 3), 60, np.uint8)
    distance = [
        np.abs(overlays.blend(base, np.array([[v]]), 2.0)[0, 0].astype(int) - 60).sum() for v in (0, 0.5, 1, 1.5, 2, 9)
    ]
    assert distance[0] == 0
    assert distance[:5] == sorted(set(distance))
    assert distance[4] == distance[5]
    np.testing.assert_array_equal(
        overlays.blend(base, np.array([[np.inf]]), 2.0), overlays.blend(base, np.array([[2.0]]), 2.0)
    )


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-37, 1.0, 1e37, 3e38])
@pytest.mark.parametrize("colours", [False, True])
def test_colours_of_any_scale_are_those_of_one(scale, colours):
    """The maps of a saturated network are all but nothing, and are drawn all the same."""
    base = np.arange(9, dtype=np.uint8).reshape(3, 3) * 20
    base = np.repeat(base[..., None], 3, axis=2) if colours else base
    values = np.array([[1.0, -1.0, 0.0], [9.0, -9.0, np.nan], [np.inf, -np.inf, 0.0]])
    with np.errstate(over="ignore"):
        drawn = overlays.blend(base, values * scale, scale)
    np.testing.assert_array_equal(drawn, overlays.blend(base, values, 1.0))


def test_several_maps_are_laid_over_one_picture():
    rng = np.random.default_rng(0)
    base, maps = rng.integers(0, 256, (5, 7), dtype=np.uint8), rng.standard_normal((4, 5, 7))
    for one in (base, np.repeat(base[..., None], 3, axis=2)):
        np.testing.assert_array_equal(
            overlays.blend(one, maps, 0.7), np.stack([overlays.blend(one, each, 0.7) for each in maps])
        )


def test_outline_is_where_allowed_changes():
    inside = np.zeros((20, 30), bool)
    inside[5:12, 8:20] = True
    rim = overlays.outline(inside)
    expected = inside.copy()
    expected[6:11, 9:19] = False
    np.testing.assert_array_equal(rim, expected)
    assert not overlays.outline(np.ones((4, 5), bool)).any()
    assert not overlays.outline(np.zeros((4, 5), bool)).any()


@given(st.integers(1, 3), st.integers(0, 999))
def test_outline_reference(width, seed):
    """Slow reference: an inside pixel belongs to the rim if any pixel within `width` in either direction is outside."""
    rng = np.random.default_rng(seed)
    inside = np.kron(rng.random((3, 4)) > 0.4, np.ones((4, 3), bool)).astype(bool)
    rows, columns = inside.shape
    expected = np.zeros_like(inside)
    for r in range(rows):
        for c in range(columns):
            near = inside[max(0, r - width) : r + width + 1, max(0, c - width) : c + width + 1]
            expected[r, c] = inside[r, c] and not near.all()
    np.testing.assert_array_equal(overlays.outline(inside, width), expected)


def test_outline_on_the_picture(chest):
    image, lungs = chest
    scene = Scene.make(image, lungs, point=(28, 18, 14))
    tile = scene.tile("axial", (34 * 4, 40 * 4))
    green = (tile == overlays.OUTLINE).all(-1)
    rows, columns = np.nonzero(green)
    section = lungs[:, :, 14]
    # Patient's right (high index) is on the left of the picture.
    right_lung = columns < 80
    assert (39 - np.nonzero(section[20:])[0].max() - 20) * 4 == pytest.approx(columns[right_lung].min(), abs=4)
    assert (33 - np.nonzero(section)[1].max()) * 4 == pytest.approx(rows.min(), abs=4)
    assert (33 - np.nonzero(section)[1].min() + 1) * 4 == pytest.approx(rows.max() + 1, abs=4)


def test_cells_keep_their_corners():
    cells = np.zeros((2, 2), bool)
    cells[0, 1] = True
    np.testing.assert_array_equal(overlays.region(cells, (4, 6), smooth=False)[:2, 3:], True)
    assert overlays.region(cells, (4, 6), smooth=False).sum() == 6


def test_thin_organs_survive_a_small_picture():
    thin = np.zeros((100, 100), bool)
    thin[:, 50] = True
    assert overlays.region(thin, (40, 40), smooth=True).any()


@pytest.mark.parametrize("unit", [(0.0, 1.0), (-300.0, 800.0), (-2.1, 3.3)])
def test_window_shows_any_range_alike(unit, chest):
    low, high = unit
    image, _ = chest
    expected = Scene.make(image).tile("axial", (60, 60)).astype(int)
    got = Scene.make(low + image * (high - low)).tile("axial", (60, 60)).astype(int)
    assert np.abs(got - expected).max() <= 1
    assert np.ptp(expected) > 200


def test_hounsfield_units_are_shown_in_one_window_whatever_metal_and_padding_there_is(chest):
    image, _ = chest
    scan = -1000 + 1400 * image
    tiles = []
    for extreme, padding in ((400, -1000), (3071, -1000), (20000, -3024)):
        case = scan.copy()
        case[:, :3, :3], case[-1] = extreme, padding
        assert overlays.window_of(case) == (-1000.0, 400.0)
        tiles.append(Scene.make(case).tile("axial", (60, 60)))
    np.testing.assert_array_equal(tiles[1], tiles[0])
    np.testing.assert_array_equal(tiles[2], tiles[0])


def test_window_of_odd_images():
    for image in (np.zeros((4, 4)), np.full((4, 4), 7.0), np.full((4, 4), np.nan)):
        low, high = overlays.window_of(image)
        assert low < high
    sparse = np.zeros((100, 100))
    sparse[3, 4] = 1
    assert overlays.window_of(sparse) == (0.0, 1.0)
    assert overlays.grey(np.array([[np.nan, np.inf]]), (0.0, 1.0), (1, 2)).tolist() == [[0, 255]]


def test_shared_scale():
    assert overlays.shared_scale([np.zeros(3), np.full(2, np.nan)]) == 1.0
    assert overlays.shared_scale([]) == 1.0
    assert overlays.shared_scale([np.array([0.0] * 5000 + [2.0])]) == pytest.approx(2.0, abs=2)
    assert overlays.shared_scale([np.array([-4.0, 1.0, np.nan, np.inf])], quantile=1.0) == 4.0
