from __future__ import annotations

import time

import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.reporting import compose_grid, compose_montage, compose_panel, geometry, side_by_side
from camtrain.reporting.montage import Row
from camtrain.reporting.overlays import OUTLINE
from camtrain.reporting.panels import state_note
from camtrain.reporting.scene import Scene


def coloured(picture):
    """Pixels that are not grey."""
    return np.ptp(picture.astype(int), axis=-1) > 30


def a_map(seed=0, shape=(5, 4, 3)):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(40, 34, 28), (20, 60, 9), (8, 8, 80), (90, 4, 5)])
def test_any_shape_gives_a_panel_of_the_asked_width(shape):
    image = np.random.default_rng(0).random(shape)
    for width in (320, 640):
        panel = compose_panel(image, a_map(), image > 0.5, caption="case", width=width)
        assert panel.shape[1:] == (width, 3)
        assert panel.dtype == np.uint8
        assert panel.shape[0] < 3 * width


def test_2d_photographs_1d_signals_and_channels():
    photo = np.random.default_rng(0).random((3, 50, 70))
    assert compose_panel(photo, a_map(shape=(5, 7)), np.ones((50, 70), bool)).shape[1] == 640
    assert compose_panel(photo[0], a_map(shape=(5, 7))).shape[1] == 640
    assert compose_panel(np.ones((2, 300)), a_map(shape=(20,)), np.arange(300) > 100).shape[1] == 640
    colours = Scene.make(photo * 0 + np.array([1.0, 0, 0])[:, None, None], rank=2, window=(0, 1))
    assert colours.tile("image", (20, 20))[10, 10].tolist() == [255, 0, 0]
    volume = np.random.default_rng(3).random((4, 6, 7, 8))
    np.testing.assert_array_equal(compose_panel(volume, a_map()), compose_panel(volume[0], a_map()))


def test_scale_stays_as_given(chest):
    image, lungs = chest
    values = np.zeros((5, 4, 3))
    values[3, 2, 1] = 1.0
    weak, same = (compose_panel(image, v, lungs, scale=1.0) for v in (values * 0.3, values * 0.3))
    strong = compose_panel(image, values, lungs, scale=1.0)
    np.testing.assert_array_equal(weak, same)
    assert coloured(strong).sum() > coloured(weak).sum()
    # Without a scale each panel would look alike but for the numbers on the bar.
    free = [compose_panel(image, v, lungs)[:-40] for v in (values, values * 0.3)]
    np.testing.assert_array_equal(*free)


def test_image_alone_carries_no_drawing(chest):
    image, lungs = chest
    panel = compose_panel(image, np.zeros((5, 4, 3)), lungs)
    half = (panel.shape[0] - 30) // 2
    green = (panel == OUTLINE).all(-1)
    assert not green[: half - 10].any()
    assert green[half:-30].any()


def test_empty_and_undefined_maps_are_named():
    assert state_note(np.full((2, 2), np.nan)) == "not computed"
    assert state_note(np.array([np.nan, 1.0])) == "cells undefined"
    assert state_note(np.zeros(3)) == "all zero"
    assert state_note(-np.ones(3)) == "no positive cell"
    assert state_note(np.array([-1.0, 2.0])) == ""


def test_empty_and_undefined_maps_are_drawn(chest):
    image, lungs = chest
    for values in (np.full((5, 4, 3), np.nan), np.zeros((5, 4, 3)), -np.ones((5, 4, 3)), np.full((5, 4, 3), np.inf)):
        for region in (None, lungs, np.zeros_like(lungs), np.ones_like(lungs), np.zeros((5, 4, 3), bool)):
            assert compose_panel(image, values, region, marked=True).shape[1] == 640


def test_letters_only_where_the_orientation_is_known(chest):
    image, _ = chest
    values = np.zeros((5, 4, 3))
    known, unknown = compose_panel(image, values, axes="RAS"), compose_panel(image, values)
    assert known.shape == unknown.shape
    assert (known != unknown).any()
    assert compose_panel(image[0], np.zeros((4, 3))).shape[1] == 640


def test_cross_marks_the_peak(chest):
    image, _ = chest
    values = np.zeros((10, 17, 7))
    values[8, 12, 5] = 1
    scene = Scene.make(image * 0, point=(34, 25, 22), window=(0, 1))
    tile = scene.tile("axial", (340, 400), values, scale=1e9, marked=True)
    rows, columns = np.nonzero((tile == 255).all(-1))
    assert rows.mean() == pytest.approx((33 - 25 + 0.5) * 10, abs=6)
    assert columns.mean() == pytest.approx((39 - 34 + 0.5) * 10, abs=6)
    far = Scene.make(image * 0, point=(34, 25, 2), window=(0, 1)).tile(
        "axial", (340, 400), values, scale=1e9, marked=True
    )
    assert not (far == 255).all(-1).any()


def test_grid_and_pairs(chest):
    image, lungs = chest
    pair = compose_panel(image, {"before": a_map(1), "after": a_map(2)}, lungs, caption="x" * 300)
    single = compose_panel(image, a_map(1), lungs)
    assert pair.shape[0] > single.shape[0]
    sheet = compose_grid([pair, single, single], columns=2, gap=10)
    assert sheet.shape == (2 * pair.shape[0] + 10, 2 * 640 + 10, 3)
    with pytest.raises(InputError, match="at least one panel"):
        compose_grid([])


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_side_by_side(chest, plane):
    image, lungs = chest
    hot = np.zeros((5, 4, 3))
    hot[3, 2, 1] = 1
    row = Row(image, [hot * 0, hot], lungs, caption="case · nodule", plane=plane, axes="RAS", scale=1.0)
    picture = side_by_side([row, row], ("CT", "plain", "mask loss"), width=900, caption="phantom")
    assert picture.shape[1] == 900
    body = picture[60:-60]
    green = (body == OUTLINE).all(-1)
    hot_pixels = coloured(body) & ~green
    thirds = [slice(0, 300), slice(300, 600), slice(600, 900)]
    assert all(green[:, t].any() for t in thirds)
    assert hot_pixels[:, thirds[2]].sum() > 1000
    assert hot_pixels[:, thirds[0]].sum() + hot_pixels[:, thirds[1]].sum() < 1200  # soft edges of the outline


def test_side_by_side_names_the_outline(chest):
    image, lungs = chest

    def legends(outlined, **words):
        return side_by_side([Row(image, [a_map()], outlined)], ("CT", "a"), width=600, **words)[-40:]

    usual, named, absent = legends(lungs), legends(lungs, region="cells in a wrong place"), legends(None)
    assert (usual != named).any()
    assert (legends(lungs, region="allowed region") == usual).all()
    assert (usual == OUTLINE).all(-1).any()
    assert not (absent == OUTLINE).all(-1).any()


def test_side_by_side_says_what_is_wrong(chest):
    image, _ = chest
    with pytest.raises(InputError, match="expected 2 maps in each row"):
        side_by_side([Row(image, [a_map()])], ("CT", "a", "b"))
    with pytest.raises(InputError, match="one per map, got 1"):
        side_by_side([Row(image, [a_map(), a_map()], scale=[1.0])], ("CT", "a", "b"))
    with pytest.raises(InputError, match="nearest: axial"):
        side_by_side([Row(image, [a_map()], plane="axail")], ("CT", "a"))
    with pytest.raises(InputError, match="at least one row"):
        side_by_side([], ("CT",))


@pytest.mark.parametrize("columns", ["planes", 1, 5])
def test_montage(chest, columns):
    image, lungs = chest
    maps = {"nodule": a_map(1), "effusion": a_map(2), "empty": np.zeros((5, 4, 3))}
    montage = compose_montage(
        image[None], maps, {"nodule": lungs}, captions={"nodule": "p 0.93"}, columns=columns, axes="RAS", width=800
    )
    assert montage.shape[1] == 800
    assert (montage == OUTLINE).all(-1).any()
    one = compose_montage(image, {"nodule": maps["nodule"]}, columns=columns, width=800)
    assert one.shape[0] < montage.shape[0]


def test_montage_of_a_2d_image_and_bad_arguments(chest):
    assert compose_montage(np.eye(40, 50), {"a": a_map(shape=(4, 5))}, columns=3).shape[1] == 1200
    with pytest.raises(InputError, match="positive number of slices"):
        compose_montage(chest[0], {"a": a_map()}, columns=0)
    with pytest.raises(InputError, match="at least one label"):
        compose_montage(chest[0], {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": a_map(shape=(4,))}, "1 spatial axes like its map"),
        ({"maps": {}}, "at least one map"),
        ({"maps": {"a": a_map(), "b": a_map(shape=(4, 4))}}, "map with 3 axes"),
        ({"allowed": np.ones((4, 4), bool)}, "allowed region with 3 axes"),
        ({"spacing": (1, 2)}, "3 positive voxel sizes"),
        ({"spacing": (1, 2, 0)}, "3 positive voxel sizes"),
        ({"point": (1, 2, 99)}, "voxel index inside"),
        ({"scale": 0.0}, "positive finite scale"),
        ({"scale": float("nan")}, "positive finite scale"),
        ({"axes": "RAX"}, "one letter per axis"),
        ({"image": np.zeros((2, 2, 2, 2, 2)), "maps": a_map(shape=(2, 2, 2, 2))}, "1, 2 or 3 spatial axes"),
    ],
)
def test_errors(chest, changes, message):
    with pytest.raises(InputError, match=message):
        compose_panel(**({"image": chest[0], "maps": a_map()} | changes))


def test_inputs_are_left_alone(chest):
    image, lungs = chest
    values = a_map()
    before = image.copy(), values.copy(), lungs.copy()
    compose_panel(image, values, lungs, marked=True, caption="x")
    for now, then in zip((image, values, lungs), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_real_scan(abdomen):
    """Liver on the left of the picture, spine at the bottom: the scan is RAS."""
    image, organs, affine = abdomen
    axes, spacing = geometry(affine)
    liver = organs == 5
    scene = Scene.make(image, liver, spacing=spacing, axes=axes)
    size = (303, 366)
    green = (scene.tile("axial", size) == OUTLINE).all(-1)
    assert np.nonzero(green)[1].mean() < 183
    bright = scene.tile("axial", size, outlined=False)[..., 0] > 240
    assert np.median(np.nonzero(bright)[0]) > 151
    panel = compose_panel(image, a_map(shape=(16, 13, 4)), liver, spacing=spacing, axes=axes, caption="abdomen")
    assert panel.shape[1] == 640


def test_panels_are_cheap(chest):
    """A hundred panels an epoch must not be felt; generous bound for a busy machine, best of several."""
    image, lungs = chest
    values = a_map()
    times = []
    for _ in range(12):
        start = time.process_time()
        compose_panel(image, values, lungs, axes="RAS", caption="case 1 · nodule", scale=1.0)
        times.append(time.process_time() - start)
    assert min(times) < 0.03


def test_each_method_can_have_its_own_scale():
    """A map a hundred times smaller than its neighbour is blank on a common scale and visible on its own."""
    image, large = np.full((12, 12, 12), 0.5), np.ones((3, 3, 3))
    maps = {"hirescam": large, "gradcam": large / 100}
    blank = compose_panel(image, maps, scale=1.0)
    shown = compose_panel(image, maps, scale={"hirescam": 1.0, "gradcam": 0.01})
    height = min(len(blank), len(shown))
    warm = [(p[:height].astype(int)[..., 0] - p[:height].astype(int)[..., 2] > 60).sum() for p in (blank, shown)]
    assert warm[1] > 1.5 * warm[0] > 0
