from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from camtrain._errors import InputError
from camtrain.reporting import map_affine, resample_to, save_map

OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([0.7, -0.8, 2.5]), [10, -20, 300])


@pytest.mark.parametrize("affine", [np.diag([-2.0, -2, 3, 1]), OBLIQUE])
def test_round_trip(tmp_path, affine):
    volume = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float64)
    volume[0, 0, 0] = np.nan
    path = save_map(tmp_path / "maps" / "nodule.nii.gz", volume, affine, descrip="hirescam nodule logit 1.23")
    image = nib.load(path)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.nan_to_num(volume).astype(np.float32))
    qform, qcode = image.get_qform(coded=True)
    sform, scode = image.get_sform(coded=True)
    assert (qcode, scode) == (1, 1)
    np.testing.assert_allclose(sform, affine, atol=1e-4)
    np.testing.assert_allclose(qform, affine, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert bytes(image.header["descrip"].item()).decode() == "hirescam nodule logit 1.23"
    assert [p.name for p in path.parent.iterdir()] == ["nodule.nii.gz"]


def test_a_sheared_affine_has_no_false_qform(tmp_path):
    affine = np.eye(4)
    affine[0, 2] = 0.3  # gantry tilt
    image = nib.load(save_map(tmp_path / "a.nii.gz", np.zeros((2, 3, 4)), affine))
    assert image.get_qform(coded=True)[1] == 0
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)


def test_the_same_geometry_as_a_real_scan(tmp_path, abdomen):
    image, _, affine = abdomen
    written = nib.load(save_map(tmp_path / "a.nii.gz", image, affine))
    np.testing.assert_array_equal(written.affine, affine)
    assert written.shape == image.shape


@pytest.mark.parametrize(
    ("name", "shape", "affine", "message"),
    [
        ("a.nii.gz", (2, 2, 2), np.eye(3), r"\(4, 4\), got \(3, 3\)"),
        ("a.nii.gz", (2, 2, 2), np.stack([np.eye(4)] * 2), r"\(4, 4\), got \(2, 4, 4\)"),
        ("a.nii.gz", (2, 2, 2), np.zeros((4, 4)), "singular"),
        ("a.nii.gz", (3, 2, 2, 2), np.eye(4), "each label on its own"),
        ("a.nrrd", (2, 2, 2), np.eye(4), "ends in .nii.gz"),
    ],
)
def test_refused(tmp_path, name, shape, affine, message):
    with pytest.raises(InputError, match=message):
        save_map(tmp_path / name, np.zeros(shape), affine)
    assert list(tmp_path.iterdir()) == []


def test_a_long_description_is_cut(tmp_path):
    image = nib.load(save_map(tmp_path / "a.nii", np.zeros((2, 2, 2)), np.eye(4), descrip="é" * 200))
    assert bytes(image.header["descrip"].item()) == b"?" * 79


def test_map_affine_keeps_the_corners_of_the_volume():
    shape, cells = (12, 10, 9), (3, 5, 2)
    inner = map_affine(OBLIQUE, shape, cells)
    for corner in np.ndindex(2, 2, 2):
        of_image = OBLIQUE @ [*(np.array(corner) * shape - 0.5), 1]
        of_map = inner @ [*(np.array(corner) * cells - 0.5), 1]
        np.testing.assert_allclose(of_map, of_image, atol=1e-9)


def test_resampling_to_the_image_grid_is_torch_interpolate():
    values = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    shape = (9, 8, 6)
    got = resample_to(values, map_affine(OBLIQUE, shape, values.shape), shape, OBLIQUE)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size=shape, mode="trilinear")
    np.testing.assert_allclose(got, expected[0, 0].numpy(), atol=1e-4)
    assert got.dtype == np.float32


def test_resampling_back_through_a_flip_a_permutation_and_a_crop():
    """A map made on an RAS crop lands on the right voxels of an LPS scan in another axis order."""
    scan_affine = np.array([[0, -2.0, 0, 50], [0, 0, 3.0, -10], [4.0, 0, 0, 7], [0, 0, 0, 1]])
    shape = (6, 8, 5)
    world = nib.affines.apply_affine(scan_affine, (2, 5, 1))
    crop_affine = np.diag([2.0, 3.0, 4.0, 1.0])
    crop_affine[:3, 3] = world - np.array([2.0, 3.0, 4.0])  # that voxel is (1, 1, 1) of the crop
    values = np.zeros((3, 3, 3))
    values[1, 1, 1] = 7
    got = resample_to(values, crop_affine, shape, scan_affine)
    assert np.argwhere(got > 1e-6).tolist() == [[2, 5, 1]]
    assert got[2, 5, 1] == pytest.approx(7)
    ones = resample_to(np.ones((3, 3, 3)), crop_affine, shape, scan_affine)
    assert (ones > 0).sum() == 27  # the crop's voxels and nothing outside
