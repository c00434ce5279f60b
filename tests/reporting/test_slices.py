from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camtrain._errors import InputError
from camtrain.reporting import slices
from camtrain.reporting.scene import Scene

SHAPE = (5, 7, 9)


def spot(rows, columns, picture):
    """Where the brightest pixel is: (share from the top, share from the left)."""
    r, c = np.unravel_index(int(picture.argmax()), picture.shape)
    return r / (rows - 1), c / (columns - 1)


@pytest.mark.parametrize(
    ("voxel", "plane", "place"),
    [
        ((4, 3, 4), "axial", (0.5, 0.0)),  # patient's right: left of the picture
        ((2, 6, 4), "axial", (0.0, 0.5)),  # front: top
        ((2, 0, 4), "axial", (1.0, 0.5)),
        ((4, 3, 8), "coronal", (0.0, 0.0)),  # right, head: top left
        ((0, 3, 0), "coronal", (1.0, 1.0)),
        ((2, 6, 8), "sagittal", (0.0, 0.0)),  # front is left, head is top
        ((2, 0, 0), "sagittal", (1.0, 1.0)),
    ],
)
def test_radiological_convention(voxel, plane, place):
    volume = np.zeros(SHAPE)
    volume[voxel] = 1
    picture = slices.cut(volume, plane, voxel[slices.NORMAL[plane]])
    assert spot(*picture.shape, picture) == place


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SAR", "PIR", "ASL"])
def test_any_orientation_gives_the_same_picture(axes):
    ras = np.random.default_rng(0).random(SHAPE)
    ornt = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axes))
    )
    other = nib.orientations.apply_orientation(ras, ornt)
    np.testing.assert_array_equal(slices.to_ras(other, axes), ras)
    voxel = (3, 5, 1)
    index = np.argwhere(other == ras[voxel])[0]
    assert slices.point_to_ras(index, other.shape, axes) == voxel

    spacing = dict(zip("RAS", (1.0, 2.0, 3.0), strict=True)) | dict(zip("LPI", (1.0, 2.0, 3.0), strict=True))
    scene = Scene.make(other, spacing=[spacing[a] for a in axes], axes=axes, point=index)
    expected = Scene.make(ras, spacing=(1, 2, 3), axes="RAS", point=voxel)
    assert scene.point == voxel
    for plane in slices.PLANES:
        assert scene.extent(plane) == expected.extent(plane)
        np.testing.assert_array_equal(scene.tile(plane, (20, 30)), expected.tile(plane, (20, 30)))


def test_extent_follows_the_spacing():
    scene = Scene.make(np.zeros(SHAPE), spacing=(0.5, 0.7, 3.0))
    assert scene.extent("axial") == pytest.approx((7 * 0.7, 5 * 0.5))
    assert scene.extent("coronal") == pytest.approx((9 * 3.0, 5 * 0.5))
    assert scene.extent("sagittal") == pytest.approx((9 * 3.0, 7 * 0.7))


def test_geometry_of_an_affine():
    affine = np.array([[0, 0, 2.5, 1], [-0.7, 0, 0, 2], [0, 0.9, 0, 3], [0, 0, 0, 1]])
    axes, spacing = slices.geometry(affine)
    assert axes == "PSR"
    assert spacing == pytest.approx((0.7, 0.9, 2.5))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.eye(3), r"shape \(4, 4\), got \(3, 3\)"),
        (np.zeros((2, 4, 4)), r"got \(2, 4, 4\)"),
        (np.diag([1.0, 0, 1, 1]), "singular"),
        (np.full((4, 4), np.nan), "non-finite"),
        (np.ones((4, 4)) + np.eye(4), "last row"),
    ],
)
def test_bad_affines(affine, message):
    with pytest.raises(InputError, match=message):
        slices.geometry(affine)


@pytest.mark.parametrize("axes", ["RA", "RRS", "XYZ", "RASL", ""])
def test_bad_axes(axes):
    with pytest.raises(InputError, match="one letter per axis"):
        slices.to_ras(np.zeros(SHAPE), axes)


def test_largest_section_lies_in_a_lung_not_between(chest):
    _, lungs = chest
    point = slices.largest_section(lungs)
    assert lungs[point]
    assert not lungs[lungs.shape[0] // 2].any()


def test_largest_section_of_everything_and_of_nothing_is_the_middle():
    assert slices.largest_section(np.ones(SHAPE, bool)) == (2, 3, 4)
    assert slices.largest_section(np.zeros(SHAPE, bool)) == (2, 3, 4)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**16))
def test_peak_is_inside_its_cell(cells, factor, seed):
    values = np.random.default_rng(seed).random((cells, 3)) + 0.1
    shape = (cells * factor + factor // 2, 12)
    found = slices.peak(values, shape)
    cell = np.unravel_index(values.argmax(), values.shape)
    for f, n, m, c in zip(found, shape, values.shape, cell, strict=True):
        assert c * n / m - 1 <= f <= (c + 1) * n / m


def test_peak_of_empty_maps_is_none():
    for values in (np.zeros((2, 2)), -np.ones((2, 2)), np.full((2, 2), np.nan)):
        assert slices.peak(values, (8, 8)) is None


def test_telling_point_sees_both_maps():
    before, after, region = np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), np.zeros((8, 8, 8), bool)
    before[0, 3, 2], after[3, 0, 2] = 5.0, 0.01  # the weaker map has the same vote
    region[6:, :2, 4:6] = True
    assert slices.telling_point((8, 8, 8), [before, after], region) == (7, 1, 5)
