"""Faults of volumes, built as real files: damaged, of another shape or place, mirrored, copied."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.data.manifest_files import read_image
from camtrain.doctor import Extent
from camtrain.doctor.headers import read_header

HEADERS = Extent(headers_only=True)


def cut(path, share=0.5):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def test_unreadable_truncated_gz(study):
    cut(study.folder / "c3.nii.gz")
    finding = study.examine().of("unreadable", "error")
    assert [(place.id, place.file) for place in finding.places] == [("c3", str(study.folder / "c3.nii.gz"))]
    assert "truncated" in finding.places[0].got


def test_cut_off_is_suspected_without_reading(study):
    cut(study.folder / "c11.nii.gz")  # the probes take others
    found = study.examine(HEADERS)
    assert found.ids("cut_off") == ["c11"]
    assert found.of("cut_off").severity == "warning"
    full = study.examine()
    assert full.ids("cut_off") == []
    assert full.ids("unreadable") == ["c11"]


def test_unreadable_truncated_without_gz(study):
    study.save("c10.nii", study.scan(10))
    study.rows[10][1] = "c10.nii"
    cut(study.folder / "c10.nii")
    found = study.examine(HEADERS)
    assert "truncated" in found.of("unreadable", "error").places[0].got
    assert found.examination.fails


def test_whole_files_are_not_suspected(study):
    raw = (study.folder / "c0.nii.gz").read_bytes()
    assert not read_header(study.folder / "c0.nii.gz").doubt
    plain = gzip.decompress(raw)
    (study.folder / "c1.nii.gz").write_bytes(gzip.compress(plain + bytes(100)))  # padding behind the voxels
    assert not read_header(study.folder / "c1.nii.gz").doubt


def test_unreadable_not_gz_empty_or_no_nifti(study):
    (study.folder / "c0.nii.gz").write_bytes(b"")
    (study.folder / "c1.nii.gz").write_bytes(gzip.compress(b"no header" * 100))
    (study.folder / "c2_seg.nii.gz").write_text("plain text")
    found = study.examine()
    assert found.ids("unreadable") == ["c0", "c1", "c2"]
    assert "organs" in found.of("unreadable").places[2].got


def test_unreadable_4d_rgb_complex_or_flat_affine(study):
    study.save("c0.nii.gz", np.stack([study.scan(0)] * 2, axis=-1))
    colours = np.zeros(study.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, study.affine), study.folder / "c1.nii.gz")
    study.save("c2.nii.gz", study.scan(2).astype(np.complex64))
    study.save("c4.nii.gz", study.scan(4)[..., None])  # one time point is 3D
    places = {place.id: place.got for place in study.examine().of("unreadable", "error").places}
    assert set(places) == {"c0", "c1", "c2"}
    assert "4D" in places["c0"]
    assert "RGB" in places["c1"]
    assert "complex" in places["c2"]


def test_unreadable_nan_and_ids_that_are_no_ids(study):
    hu = study.scan(0).astype(np.float32)
    hu[0, 0, 0] = np.nan
    study.save("c0.nii.gz", hu)
    study.save("c1_seg.nii.gz", study.organs() * 0.5)
    places = {place.id: place.got for place in study.examine().of("unreadable", "error").places}
    assert "NaN" in places["c0"]
    assert "whole organ ids" in places["c1"]


def test_big_endian_is_judged_as_training_judges_it(study):
    image = nib.Nifti1Image(study.scan(0), study.affine, nib.Nifti1Header(endianness=">"))
    image.set_data_dtype(">i2")
    nib.save(image, study.folder / "c0.nii.gz")
    try:
        read_image(study.folder / "c0.nii.gz")
    except InputError:
        assert study.examine().ids("unreadable") == ["c0"]
    else:
        assert study.examine().bad == []


def shifted(affine):
    affine[0, 3] += 7


def other_step(affine):
    affine[2, 2] = 3.3


def turned(affine):
    angle = np.radians(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]


@pytest.mark.parametrize("extent", [HEADERS, Extent()], ids=["headers", "full"])
@pytest.mark.parametrize(
    ("change", "word"),
    [(shifted, "shifted by 7.0"), (other_step, "voxels of 2 x 2 x 3.3 mm"), (turned, "10.0 degrees")],
)
def test_grids_that_differ_in_place_size_or_angle(study, change, word, extent):
    affine = study.affine
    change(affine)
    study.save("c2_seg.nii.gz", study.organs(), affine)
    finding = study.examine(extent).of("grids", "error")
    assert [place.id for place in finding.places] == ["c2"]
    assert word in finding.places[0].got


def test_grids_of_another_shape_or_order(study):
    study.save("c0_seg.nii.gz", study.organs()[:, :, :-2])
    study.save("c1_seg.nii.gz", study.organs().transpose(1, 0, 2))  # the affine did not follow
    places = {place.id: place.got for place in study.examine().of("grids", "error").places}
    assert "shape 24 x 20 x 14 instead of 24 x 20 x 16" in places["c0"]
    assert "another order" in places["c1"]


def test_grids_flipped_and_permuted_with_their_affine_are_one(study):
    image = nib.load(study.folder / "c0_seg.nii.gz")
    turn = nib.orientations.axcodes2ornt(("A", "L", "I"))
    nib.save(
        image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), turn)),
        image.get_filename(),
    )
    found = study.examine()
    assert found.bad == []


def test_orientation_not_said(study):
    study.save("c4.nii.gz", study.scan(4), code=0)
    assert [place.id for place in study.examine().of("orientation", "warning").places] == ["c4"]


def test_orientation_mixed_is_a_note(study):
    study.save("c4.nii.gz", study.scan(4)[::-1], np.diag([-2.0, 2, 3, 1]))
    study.rows[4][2] = ""
    assert "LAS 1" in study.examine().of("orientation", "note").got


def test_spacing_impossible_and_far(study):
    study.save("c0.nii.gz", study.scan(0), np.diag([0.002, 0.002, 0.003, 1]))  # metres
    study.save("c1.nii.gz", study.scan(1), np.diag([2, 2, 9.0, 1]))
    study.rows[0][2] = study.rows[1][2] = ""
    found = study.examine()
    titles = [f.title for f in found.findings if f.check == "spacing"]
    assert any("impossible" in title for title in titles)
    assert any("voxel size far" in title for title in titles)
    assert set(found.ids("spacing")) == {"c0", "c1"}


def test_stray_files_of_a_folder(study):
    folder = study.folder / "c0_organs"
    folder.mkdir()
    for name, number in {"lung_left": 1, "lung_right": 2, "heart": 3, "spleen": 0}.items():
        study.save(f"c0_organs/{name}.nii.gz", (study.organs() == number).astype(np.uint8))
    study.rows[0][2] = "c0_organs"
    found = study.examine()
    assert found.bad == []
    assert "spleen" in found.of("stray_files", "note").got


@pytest.mark.parametrize("extent", [HEADERS, Extent()], ids=["headers", "full"])
def test_duplicates_across_splits_and_within(study, extent):
    (study.folder / "c9.nii.gz").write_bytes((study.folder / "c1.nii.gz").read_bytes())
    (study.folder / "c4.nii.gz").write_bytes((study.folder / "c5.nii.gz").read_bytes())
    found = study.examine(extent)
    titles = " | ".join(f.title for f in found.findings if f.check == "duplicates")
    assert "1 scan in more than one split" in titles
    if extent != HEADERS:
        assert "1 scan several times in a split" in titles
    assert {"c1", "c9"} <= set(found.ids("duplicates"))
    assert not found.examination.fails


def test_duplicates_by_content_in_files_of_another_kind(study):
    study.save("c9.nii", study.scan(1).astype(np.float32))
    study.rows[9][1] = "c9.nii"
    assert set(study.examine().ids("duplicates")) == {"c1", "c9"}


@pytest.mark.slow
@pytest.mark.parametrize("extent", [HEADERS, Extent()], ids=["headers", "full"])
def test_organs_as_several_files(study, extent):
    """Grid, values and coverage of every file, in a manifest that the data module takes and in one that it refuses."""
    names = {"lung_left": 1, "lung_right": 2, "heart": 3}
    for n in range(len(study.rows)):
        for name, number in names.items():
            study.save(f"c{n}_{name}.nii.gz", (study.organs() == number).astype(np.uint8))
        study.rows[n][2] = "|".join(f"c{n}_{name}.nii.gz" for name in names)
    study.rows[1][2] = "c1_lung_left.nii.gz|c1_heart.nii.gz"
    study.save("c1_spleen.nii.gz", study.organs())
    study.rows[2][2] += "|c1_spleen.nii.gz"  # of another case, and of an organ that the table does not know
    moved = study.affine
    moved[0, 3] += 9
    study.save("c3_heart.nii.gz", (study.organs() == 3).astype(np.uint8), moved)
    study.save("c4_lung_right.nii.gz", study.organs())  # ids, where one organ is expected
    for refused in (False, True):
        if refused:
            study.rows[5][5] = "perhaps"
            study.rows[6][2] = "c6_lung_left.nii.gz|gone.nii.gz"
        found = study.examine(extent)
        full = extent.headers_only is False
        assert set(found.ids("unreadable")) - {"c4"} == ({"c2", "c3"} if full else {"c2"})
        assert not full or "c4" in found.ids("unreadable")  # the others are read where the probe takes them
        assert found.ids("grids") == ([] if full else ["c3"])
        sizes = found.examination.facts.contents
        if full:
            assert [sorted(sizes[n].organs) for n in (0, 1)] == [[1, 2, 3], [1, 3]]
        assert found.ids("paths") == (["c6"] if refused else [])
        assert ("gone.nii.gz" in found.of("paths").places[0].file) if refused else True
