"""DICOM series folders: order, place, values, and series that make no volume."""

from __future__ import annotations

import importlib.util
import shutil

import nibabel as nib
import numpy as np
import pytest
from volume_files import AXIAL, DICOM_ORIGIN, DICOM_STEP, write_series

from camtrain._errors import InputError
from camtrain.data.manifest_files import read_header, read_image, read_volume
from camtrain.data.manifest_transforms import load_case
from camtrain.data.volume_dicom import series_of

needs_pydicom = pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed")
SHAPE, STEP, ORIGIN = (5, 7, 4), DICOM_STEP, DICOM_ORIGIN


@pytest.fixture
def counts():
    return np.random.default_rng(0).integers(0, 3000, SHAPE)


@needs_pydicom
def test_values_and_places(tmp_path, counts):
    folder = write_series(tmp_path / "ct", counts)
    volume, header = read_volume(folder), read_header(folder)
    np.testing.assert_array_equal(volume.numpy()[0], counts - 1024)
    assert header.shape == SHAPE
    assert header.spacing == pytest.approx(STEP)
    matrix = np.diag([-0.8, -1.2, 2.5, 1.0])
    matrix[:3, 3] = [100, -50, 20]
    np.testing.assert_allclose(volume.affine, matrix)
    np.testing.assert_allclose(header.affine, matrix)
    assert series_of(folder) == {"series 2 thorax": 4}


@needs_pydicom
@pytest.mark.parametrize("turned", [AXIAL, (0, 1, 0, 0, 0, -1), (0.8, 0.6, 0, 0, 0, -1), (1, 0, 0, 0, -1, 0)])
def test_every_voxel_lies_where_the_standard_says(tmp_path, counts, turned):
    folder = write_series(tmp_path / "ct", counts, turned, shear=0.3)  # a tilted gantry
    volume = read_volume(folder)
    normal = np.cross(turned[:3], turned[3:])
    for column, row, place in ((0, 0, 0), (4, 0, 1), (0, 6, 2), (3, 5, 3)):
        at = np.array(ORIGIN) + place * (normal * STEP[2] + np.array([0, 0.3, 0]))
        at = at + column * STEP[0] * np.array(turned[:3]) + row * STEP[1] * np.array(turned[3:])
        found = volume.affine.numpy() @ [column, row, place, 1]
        np.testing.assert_allclose(found[:3], at * [-1, -1, 1], atol=1e-6)
        assert volume[0, column, row, place] == counts[column, row, place] - 1024


@needs_pydicom
def test_a_tilted_gantry_is_put_upright_by_spacing(tmp_path):
    """The table moves upwards, the slices lean by 20 degrees: a sheared grid, which resampling makes rectangular."""
    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    shape, step, slope = (20, 24, 11), DICOM_STEP, np.array([2.0, -3.0, 5.0])
    places = [np.add(DICOM_ORIGIN, (0, 0, 2.5 * k)) for k in range(shape[2])]
    columns, rows, slices = np.meshgrid(*map(np.arange, shape), indexing="ij")
    world = np.stack([columns * step[0], rows * step[1] * cos, rows * step[1] * sin + slices * 2.5], -1)
    values = 1000 + (world @ slope)  # of the place alone, wherever the grid lies
    turned = (1, 0, 0, 0, cos, sin)
    place = {"ImagePositionPatient": lambda k: [float(v) for v in places[k]]}
    folder = write_series(tmp_path / "ct", np.rint(values), turned, intercept=0, **place)
    sheared = read_volume(folder).affine.numpy()[:3, :3]
    assert abs(sheared[:, 1] @ sheared[:, 2]) > 0.5
    case = load_case(folder, spacing=2.0, window=(0.0, 3000.0))
    axes = case["affine"].numpy()[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag([4.0] * 3), atol=1e-6)
    image = case["image"].numpy()[0, 0] * 3000
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), -1)
    at = (grid @ axes.T + case["affine"].numpy()[:3, 3]) * [-1, -1, 1] - DICOM_ORIGIN  # RAS to LPS
    height = at[..., 2] - at[..., 1] * sin / cos
    inside = (at[..., :2] > 1).all(-1) & (at[..., 0] < 14) & (at[..., 1] < 25) & (height > 1) & (height < 24)
    assert inside.sum() > 500
    np.testing.assert_allclose(image[inside], 1000 + (at @ slope)[inside], atol=1.5)


@needs_pydicom
def test_the_same_case_as_nifti(tmp_path, counts):
    folder = write_series(tmp_path / "ct", counts)
    volume = read_volume(folder)
    nib.save(nib.Nifti1Image(volume.numpy()[0].astype(np.int16), volume.affine.numpy()), tmp_path / "ct.nii.gz")
    one, other = (load_case(path, spacing=1.5, size=8) for path in (folder, tmp_path / "ct.nii.gz"))
    np.testing.assert_allclose(one["image"], other["image"], atol=1e-6)
    np.testing.assert_allclose(one["affine"], other["affine"])
    assert one["id"] == ["ct"]


@needs_pydicom
def test_slope_and_other_files(tmp_path, counts):
    folder = write_series(tmp_path / "ct", counts, slope=0.5, intercept=-3.25)
    (folder / "notes.txt").write_text("no DICOM")
    np.testing.assert_allclose(read_image(folder).numpy()[0], counts * 0.5 - 3.25, rtol=1e-6)


@needs_pydicom
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SamplesPerPixel": 3}, ["colours (RGB)"]),
        ({"NumberOfFrames": 12, "ImagePositionPatient": None}, ["12 frames", "dcm2niix", "(and 3 more)"]),
        ({"Modality": "SEG", "NumberOfFrames": 12, "PixelSpacing": None}, ["(SEG)", "NIfTI label map", "(and 3 more)"]),
        ({"ImageOrientationPatient": lambda k: list(AXIAL if k else (0, 1, 0, 0, 0, -1))}, ["mixture"]),
        ({"PixelSpacing": lambda k: [1.2, 0.8] if k else [2, 2]}, ["pixels of one size"]),
        ({"ImagePositionPatient": lambda k: [0, 0, [0, 2.5, 5, 10][k]]}, ["even", "1 of 5 slices is missing"]),
        ({"ImagePositionPatient": lambda k: [0, 0, [0, 2.5, 6, 8.5][k]]}, ["3.5 mm", "at several distances"]),
        ({"ImagePositionPatient": lambda k: [0, 0, [0, 2.5, 2.5, 5][k]]}, ["two reconstructions or time points"]),
        ({"ImagePositionPatient": None}, ["ImagePositionPatient", "(and 3 more)"]),
        ({"PixelData": b"\0" * 10}, ["readable pixels"]),
    ],
)
def test_series_that_make_no_volume(tmp_path, counts, changes, words):
    folder = write_series(tmp_path / "ct", counts, **changes)
    with pytest.raises(InputError) as error:
        read_volume(folder)
    for word in [str(folder), *words]:
        assert word in str(error.value)


@needs_pydicom
def test_a_slope_does_not_wrap_around(tmp_path, counts):
    folder = write_series(tmp_path / "ct", counts + 40000, slope=2, intercept=-7)
    np.testing.assert_array_equal(read_volume(folder).data[0], 2 * (counts + 40000) - 7)


@needs_pydicom
@pytest.mark.parametrize("packing", ["RLE", "bigendian", "jp2klossless", "jpeg_ls_lossless"])
def test_files_of_pydicom_in_other_transfer_syntaxes(tmp_path, packing):
    from pydicom.data import get_testdata_file

    volumes = []
    for name in ("MR_small.dcm", f"MR_small_{packing}.dcm"):
        path = get_testdata_file(name, download=False)
        if path is None:
            pytest.skip(f"{name} does not come with this pydicom")
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(path, folder)
        if packing.startswith("jpeg") and name.endswith("lossless.dcm") and not decodes_jpeg_ls():
            for read in (read_header, read_volume):  # told before a pixel is read
                with pytest.raises(InputError, match=r"got JPEG-LS Lossless .* pip install pylibjpeg pylibjpeg-libjp"):
                    read(folder)
            return
        volumes.append(read_volume(folder))
    np.testing.assert_array_equal(volumes[0].data, volumes[1].data)
    np.testing.assert_allclose(volumes[0].affine, volumes[1].affine)


def decodes_jpeg_ls():
    return any(importlib.util.find_spec(name) for name in ("pylibjpeg", "jpeg_ls", "pyjpegls", "gdcm"))


@needs_pydicom
def test_two_series_in_a_folder_are_named(tmp_path, counts):
    folder = write_series(tmp_path / "ct", counts)
    write_series(folder, counts[:, :, :2], uid="1.2.4", name="t", SeriesDescription="bone")
    with pytest.raises(InputError, match=r"got 2 in .* \(series 2 thorax: 4 files; series 2 bone: 2 files\)"):
        read_header(folder)


@needs_pydicom
def test_a_folder_without_dicom_and_a_truncated_file(tmp_path, counts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no DICOM image among 1 files"):
        read_volume(tmp_path / "empty")
    folder = write_series(tmp_path / "ct", counts)
    broken = next(folder.iterdir())
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(InputError, match=broken.name):
        read_volume(folder)


def test_without_pydicom_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    (tmp_path / "a.dcm").touch()
    with pytest.raises(InputError, match=r"pip install 'pydicom>=2\.4'"):
        read_volume(tmp_path)


@needs_pydicom
def test_itk_says_the_same(tmp_path, counts):
    sitk = pytest.importorskip("SimpleITK")
    folder = write_series(tmp_path / "ct", counts, (0.8, 0.6, 0, 0, 0, -1))
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    sitk.WriteImage(image, str(tmp_path / "itk.nrrd"))
    one, other = read_volume(folder), read_volume(tmp_path / "itk.nrrd")
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
    np.testing.assert_array_equal(one.numpy(), other.numpy())
