"""Volumes on their way to the network and back: values, geometry, and the sentence for a bad file."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.manifest import Case
from camtrain.data.manifest_transforms import CaseError, build_transforms, collate, load_case, to_original_grid

TABLE = (
    "organs: {heart: 3, aorta: [4, 5], lung_left: 1, lung_right: 2}\nlabels: {nodule: [lung_left], effusion: [heart]}\n"
)


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table.yaml").write_text(TABLE)
    return OrganTable.load(tmp_path / "table.yaml")


def affine(spacing=(1, 1, 1), axes=(1, 2, 3), degrees=0.0, origin=(12, -30, 55)):
    """Voxel to world: `axes` are the signed world axes of the voxel axes (-1 = to the left)."""
    matrix = np.eye(4)
    for column, (axis, step) in enumerate(zip(axes, spacing, strict=True)):
        matrix[:3, column] = 0
        matrix[abs(axis) - 1, column] = np.sign(axis) * step
    matrix[:3, :3] = (
        Rotation.from_euler("xyz", [degrees, -degrees / 2, degrees / 3], degrees=True).as_matrix() @ matrix[:3, :3]
    )
    matrix[:3, 3] = origin
    return matrix


def save(path, data, matrix):
    nib.save(nib.Nifti1Image(data, matrix), path)
    return path


GRIDS = {
    "ras": affine((2, 2, 3)),
    "lps": affine((0.7, 0.7, 5), axes=(-1, -2, 3)),
    "sagittal": affine((1, 1.5, 4), axes=(2, -3, -1)),
    "oblique": affine((0.8, 1.1, 2.5), axes=(-1, -2, 3), degrees=12),
}


def places(case, matrix):
    """Where the network's voxels lie in the voxels of the scan: (3, *S)."""
    step = np.linalg.inv(matrix) @ case["affine"].numpy()
    index = np.stack(np.meshgrid(*map(np.arange, case["image"].shape[2:]), indexing="ij"))
    return np.einsum("ij,jxyz->ixyz", step[:3, :3], index) + step[:3, 3, None, None, None]


def within(source, shape, margin):
    return np.all([(s >= -margin) & (s <= n - 1 + margin) for s, n in zip(source, shape, strict=True)], axis=0)


@pytest.mark.parametrize("matrix", GRIDS.values(), ids=GRIDS)
def test_image_is_the_scan_at_the_place_that_affine_says(tmp_path, matrix):
    hu = np.random.default_rng(0).uniform(-1500, 1500, (24, 17, 13)).astype(np.float32)
    path = save(tmp_path / "ct.nii.gz", hu, matrix)
    case = load_case(path, spacing=(1.5, 2, 2.5), size=(14, 12, 40), window=(-1000, 800))
    image = case["image"][0, 0].numpy()
    assert image.shape == (14, 12, 40)
    assert image.dtype == np.float32
    source = places(case, matrix)
    expected = np.clip((map_coordinates(hu, source, order=1, mode="nearest") + 1000) / 1800, 0, 1)
    inside = within(source, hu.shape, 0)
    assert inside.mean() > 0.15
    np.testing.assert_allclose(image[inside], expected[inside], atol=2e-5)
    beyond = ~within(source, hu.shape, 1.6)
    assert beyond.any()
    assert not image[beyond].any()  # padded with air


@pytest.mark.parametrize("matrix", GRIDS.values(), ids=GRIDS)
def test_axes_run_right_front_up(tmp_path, matrix):
    case = load_case(save(tmp_path / "ct.nii.gz", np.zeros((6, 7, 8), np.int16), matrix), spacing=2)
    assert nib.aff2axcodes(case["affine"].numpy()) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(case["affine"][:3, :3], axis=0), 2, rtol=1e-5)


@pytest.mark.parametrize("matrix", GRIDS.values(), ids=GRIDS)
def test_organs_go_with_the_image(tmp_path, table, matrix):
    organs = np.zeros((20, 18, 16), np.uint8)
    organs[3:9, 4:10, 2:12], organs[12:17, 8:15, 5:9] = 3, 5
    path = save(tmp_path / "ct.nii.gz", np.zeros(organs.shape, np.int16), matrix)
    mask = save(tmp_path / "seg.nii.gz", organs, matrix)
    case = load_case(path, spacing=1.3, size=(40, 38, 42), organs=mask, table=table)
    assert case["organs"].dtype == torch.int32
    assert case["organs"].shape == case["image"].shape
    assert case["organs"].unique().tolist() == [0, 3, 5]
    source = places(case, matrix)
    expected = map_coordinates(organs, source, order=0)
    clear = within(source, organs.shape, 0) & np.all(np.abs(source % 1 - 0.5) > 0.01, axis=0)
    assert clear.mean() > 0.05
    np.testing.assert_array_equal(case["organs"][0, 0].numpy()[clear], expected[clear])


def test_organs_stored_in_another_voxel_order_are_the_same_grid(tmp_path, table):
    organs = np.zeros((9, 8, 7), np.uint8)
    organs[2, 3, 4] = 3
    path = save(tmp_path / "ct.nii.gz", organs.astype(np.float32) * 800, GRIDS["lps"])
    turned = nib.as_closest_canonical(nib.Nifti1Image(organs, GRIDS["lps"]))
    nib.save(turned, tmp_path / "seg.nii.gz")
    case = load_case(path, organs=tmp_path / "seg.nii.gz", table=table)
    assert case["image"].argmax() == case["organs"].argmax()


def test_folder_of_binaries_becomes_ids(tmp_path, table, caplog):
    folder = tmp_path / "organs"
    folder.mkdir()
    masks = {name: np.zeros((6, 5, 4), np.uint8) for name in ("heart", "aorta", "liver")}
    masks["heart"][1:3, 1, 1], masks["aorta"][2:5, 1, 1], masks["liver"][5, 4, 3] = 1, 255, 1
    for name, data in masks.items():
        save(folder / f"{name}.nii.gz", data, np.eye(4))
    (folder / "notes.txt").touch()
    path = save(tmp_path / "ct.nii.gz", np.zeros((6, 5, 4), np.int16), np.eye(4))
    with caplog.at_level(logging.INFO, "camtrain"):
        organs = load_case(path, organs=folder, table=table)["organs"][0, 0]
    assert organs[:, 1, 1].tolist() == [0, 3, 3, 4, 4, 0]  # in the overlap the table's first organ stays
    assert organs[5, 4, 3] == 0
    assert "1 files of organs that the table does not know" in caplog.text
    assert "1 voxels belong to two organs" in caplog.text


def test_trailing_axis_of_one_is_dropped_and_slope_is_applied(tmp_path):
    image = nib.Nifti1Image(np.full((4, 5, 6, 1), 50, np.int16), np.eye(4))
    image.header.set_slope_inter(2, -1000)
    nib.save(image, tmp_path / "ct.nii")
    stored = np.asarray(nib.load(tmp_path / "ct.nii").dataobj).flat[0]
    case = load_case(tmp_path / "ct.nii", window=(-1000, 1000))
    assert case["image"].shape == (1, 1, 4, 5, 6)
    np.testing.assert_allclose(case["image"], (stored + 1000) / 2000, rtol=1e-6)


def test_a_header_without_orientation_is_told(tmp_path, caplog):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None), tmp_path / "ct.nii")
    load_case(tmp_path / "ct.nii")
    assert "ct.nii: the header does not say where left and right are" in caplog.text


# ---- the way back -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axes=st.permutations([1, 2, 3]),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    degrees=st.sampled_from([0.0, 17.0]),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 2.5])] * 3),
    at=st.tuples(st.integers(3, 9), st.integers(3, 8), st.integers(3, 7)),
    network=st.sampled_from([None, 1.0, (1.2, 0.9, 2.0)]),
)
def test_a_marked_voxel_comes_back_to_its_place(tmp_path, axes, signs, degrees, spacing, at, network):
    matrix = affine(spacing, [a * s for a, s in zip(axes, signs, strict=True)], degrees)
    grid = np.stack(np.meshgrid(*map(np.arange, (13, 12, 11)), indexing="ij"), axis=-1)
    apart = np.linalg.norm((grid - at) * spacing, axis=-1)
    hu = (-1000 + 1800 * np.exp(-0.5 * (apart / 2.0) ** 2)).astype(np.float32)
    case = load_case(save(tmp_path / "ct.nii", hu, matrix), spacing=network, size=48)
    back = to_original_grid(case["image"][0, 0], case["affine"], case["original_shape"], case["original_affine"])
    assert back.shape == hu.shape
    found = np.array(np.unravel_index(back.argmax(), back.shape))
    mm = max(spacing) if network is None else max(max(spacing), np.max(network))
    assert np.linalg.norm((found - at) * spacing) <= mm + 1e-6
    if network is None:
        np.testing.assert_allclose(back, (hu + 1000) / 1800, atol=1e-5)


def test_outside_the_crop_is_zero_and_inside_is_whole():
    crop = np.eye(4)
    crop[:3, :3] *= 2
    crop[:3, 3] = [4.5, 4.5, 4.5]  # first centre: voxels 4 and 5 of the scan lie in the first cell
    back = to_original_grid(torch.ones(3, 2, 1), torch.tensor(crop), (12, 10, 8), np.eye(4))
    expected = np.zeros((12, 10, 8), np.float32)
    expected[4:10, 4:8, 4:6] = 1
    np.testing.assert_array_equal(back, expected)


def test_back_on_a_turned_grid_equals_the_formula():
    volume = np.random.default_rng(1).normal(size=(7, 6, 5))
    network, scan = affine((2, 3, 2.5), degrees=9), affine((1.5, 2, 3), axes=(-2, 1, -3), origin=(20, -20, 65))
    back = to_original_grid(volume, network, (9, 8, 6), scan)
    for index in np.ndindex(9, 8, 6):
        where = np.linalg.inv(network) @ scan @ [*index, 1]
        inside = all(-0.5 <= w <= n - 0.5 for w, n in zip(where, volume.shape, strict=False))
        expected = map_coordinates(volume, where[:3, None], order=1, mode="nearest")[0] if inside else 0
        assert back[index] == pytest.approx(expected, abs=1e-5)
    assert (back != 0).any()
    assert (back == 0).any()


def test_ids_come_back_whole_with_order_zero():
    ids = np.random.default_rng(2).integers(0, 5, (6, 6, 6))
    back = to_original_grid(ids, affine((2, 2, 2), origin=(0, 0, 0)), (11, 11, 11), affine(origin=(0, 0, 0)), order=0)
    assert set(np.unique(back)) <= set(range(5))
    np.testing.assert_array_equal(back[::2, ::2, ::2], ids)


def test_back_wants_one_volume():
    with pytest.raises(InputError, match=r"\(X, Y, Z\), got \(1, 2, 2, 2\)"):
        to_original_grid(np.ones((1, 2, 2, 2)), np.eye(4), (2, 2, 2), np.eye(4))


# ---- augmentation -------------------------------------------------------------------------------------------------


def test_augmentation_moves_image_organs_and_affine_together(tmp_path, table):
    organs = np.zeros((30, 28, 26), np.uint8)
    organs[8:14, 9:17, 12:20] = 3
    hu = np.where(organs > 0, 800, -1000).astype(np.int16)
    image, mask = save(tmp_path / "ct.nii", hu, GRIDS["lps"]), save(tmp_path / "seg.nii", organs, GRIDS["lps"])
    plain = load_case(image, spacing=1, size=32, organs=mask, table=table)
    transforms = build_transforms(table, spacing=1, size=32, augment=True)
    transforms.set_random_state(3)
    batch = collate([transforms(Case("a", image, mask, "train", (1.0, 0.0), "", "row"))])
    assert not torch.allclose(batch["affine"][0], plain["affine"].float(), atol=0.1)
    centre = [
        torch.cat([(b["organs"][0, 0] == 3).nonzero().double().mean(0), torch.ones(1, dtype=torch.float64)])
        for b in (plain, batch)
    ]
    np.testing.assert_allclose(batch["affine"][0].double() @ centre[1], plain["affine"] @ centre[0], atol=0.4)
    inside = batch["image"][batch["organs"] > 0].mean()
    assert inside > 0.7


# ---- bad files ----------------------------------------------------------------------------------------------------


def _truncated(folder):
    path = save(folder / "ct.nii.gz", np.random.default_rng(0).normal(size=(30, 30, 30)), np.eye(4))
    path.write_bytes(path.read_bytes()[:5000])
    return path


def _nan(folder):
    data = np.zeros((5, 5, 5), np.float32)
    data[0, 0, :3] = [np.nan, np.inf, -np.inf]
    return save(folder / "ct.nii.gz", data, np.eye(4))


def _text(folder):
    (folder / "ct.nii.gz").write_bytes(gzip.compress(b"not a scan"))
    return folder / "ct.nii.gz"


def _dicom_name(folder):
    (folder / "ct.dcm").write_bytes(b"DICM" * 200)
    return folder / "ct.dcm"


def _four_axes(folder):
    return save(folder / "ct.nii", np.zeros((4, 4, 4, 3), np.float32), np.eye(4))


def _flat_affine(folder):
    raw = bytearray(save(folder / "ct.nii", np.zeros((4, 4, 4), np.float32), np.eye(4)).read_bytes())
    raw[320:324] = bytes(4)  # the third slope of the header's third row: slices without thickness
    (folder / "ct.nii").write_bytes(raw)
    return folder / "ct.nii"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_truncated, ["readable NIfTI", "truncated", "again"]),
        (_nan, ["3 NaN or Inf voxels", "replace"]),
        (_text, ["readable NIfTI"]),
        (_dicom_name, ["readable NIfTI", "ct.dcm"]),
        (_four_axes, ["3D volume", "(4, 4, 4, 3)"]),
        (_flat_affine, ["voxel-to-world", "header"]),
        (lambda folder: folder / "none.nii", ["does not exist", "correct the path"]),
    ],
)
def test_bad_images(tmp_path, make, words):
    path = make(tmp_path)
    with pytest.raises(InputError) as error:
        load_case(path)
    for word in [path.name, *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def _organs(folder, data, matrix=None):
    return save(folder / "seg.nii.gz", data, np.eye(4) if matrix is None else matrix)


@pytest.mark.parametrize(
    ("data", "matrix", "words"),
    [
        (
            np.zeros((6, 5, 5), np.uint8),
            None,
            ["shape (6, 5, 4)", "shape (6, 5, 5)", "seg.nii.gz", "ct.nii.gz", "nearest"],
        ),
        (np.zeros((6, 5, 4), np.uint8), affine((1, 1, 1.1), origin=(0, 0, 0)), ["0 0 1.1 0", "one voxel grid"]),
        (np.zeros((6, 5, 4), np.uint8), affine(origin=(3, 0, 0)), ["1 0 0 3", "one voxel grid"]),
        (np.full((6, 5, 4), 1.5, np.float32), None, ["whole organ ids", "1.5", "nearest neighbour"]),
        (np.full((6, 5, 4), 77, np.uint8), None, ["seg.nii.gz", "77"]),
    ],
)
def test_bad_organs(tmp_path, table, data, matrix, words):
    path = save(tmp_path / "ct.nii.gz", np.zeros((6, 5, 4), np.int16), np.eye(4))
    with pytest.raises(InputError) as error:
        load_case(path, organs=_organs(tmp_path, data, matrix), table=table)
    for word in words:
        assert word in str(error.value)


def test_rounding_in_the_header_is_the_same_grid(tmp_path, table):
    path = save(tmp_path / "ct.nii.gz", np.zeros((6, 5, 4), np.int16), np.eye(4))
    mask = _organs(tmp_path, np.zeros((6, 5, 4), np.uint8), affine(origin=(1e-3, 0, -2e-3)))
    assert load_case(path, organs=mask, table=table)["has_organs"].tolist() == [True]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no NIfTI file", "heart"]),
        ({"spleen": np.zeros((6, 5, 4))}, ["spleen", "heart", "rename"]),
        ({"heart": np.arange(120).reshape(6, 5, 4) / 120}, ["binary file", "heart.nii.gz", "threshold"]),
        ({"heart": np.zeros((6, 5, 4)), "aorta": np.zeros((6, 5, 3))}, ["one voxel grid", "aorta.nii.gz", "(6, 5, 3)"]),
    ],
)
def test_bad_organ_folders(tmp_path, table, files, words):
    folder = tmp_path / "organs"
    folder.mkdir()
    for name, data in files.items():
        save(folder / f"{name}.nii.gz", data.astype(np.float32), np.eye(4))
    path = save(tmp_path / "ct.nii.gz", np.zeros((6, 5, 4), np.int16), np.eye(4))
    with pytest.raises(InputError) as error:
        load_case(path, organs=folder, table=table)
    for word in words:
        assert word in str(error.value)


def test_organs_without_a_table_or_a_file(tmp_path, table):
    path = save(tmp_path / "ct.nii.gz", np.zeros((6, 5, 4), np.int16), np.eye(4))
    with pytest.raises(InputError, match="table="):
        load_case(path, organs=path)
    with pytest.raises(InputError, match=r"organs, got .*none\.nii"):
        load_case(path, organs=Path("none.nii"), table=table)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"window": (800, -1000)}, "window expects"),
        ({"window": (1, 2, 3)}, "window expects"),
        ({"spacing": 0}, "spacing expects one or three positive numbers of mm, got 0"),
        ({"spacing": (1, 2)}, "spacing expects"),
        ({"size": (8, 8.5, 8)}, "size expects one or three positive whole numbers"),
        ({"size": -4}, "size expects"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(InputError, match=match):
        build_transforms(None, **arguments)


def test_case_error_keeps_its_sentence_only():
    name = f"{CaseError.__module__}.{CaseError.__qualname__}"
    worker = (
        f"Caught CaseError in DataLoader worker process 0.\nOriginal Traceback ...\n{name}: row 3: expected a, got b\n"
    )
    assert str(CaseError(worker)) == "row 3: expected a, got b"
    assert str(CaseError("row 3: expected a: got b")) == "row 3: expected a: got b"
