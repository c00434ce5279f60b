"""`import_scans`: what is found, matched by name, told when ambiguous; what was written trains as is."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data import ManifestDataModule, make_ct_rate_tree, make_rad_chestct_tree, make_voc_tree
from camtrain.data.import_known import import_rad_chestct, import_voc
from camtrain.data.import_labels import split_by_lot
from camtrain.data.import_table import make_table, read_class_map, total_segmentator
from camtrain.data.importing import Options, import_scans
from camtrain.data.phantom_export import export_phantom

CT = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen"


@pytest.fixture
def touch(tmp_path):
    """Makes empty files; names of folders do not matter, contents are never read."""

    def _touch(*names: str) -> Path:
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"\0" * 128 + b"DICM" if "dicom" in name else b"")
        return tmp_path

    return _touch


def pairs(root, organs="organs", **options):
    found = import_scans(root / "scans", Options(organs=root / organs if organs else None, **options))
    return {case.id: case.organs and case.organs.relative_to(root).as_posix() for case in found.cases}


BINARY = ("heart.nii.gz", "liver.nii.gz")


@pytest.mark.parametrize(
    ("scans", "organs", "expected"),
    [
        (["a.nii.gz"], ["a.nii.gz"], {"a": "organs/a.nii.gz"}),
        (["a.nii"], ["a_seg.nii.gz"], {"a": "organs/a_seg.nii.gz"}),
        (["A_CT.nii.gz"], ["a-segmentation.nrrd"], {"A": "organs/a-segmentation.nrrd"}),
        (["a.nrrd"], [f"a/{name}" for name in BINARY], {"a": "organs/a"}),
        (["a.mha"], [f"a/segmentations/{name}" for name in BINARY], {"a": "organs/a/segmentations"}),
        (
            ["a/ct.nii.gz", "b/ct.nii.gz"],
            ["a/seg.nii.gz", "b.nii.gz"],
            {"a": "organs/a/seg.nii.gz", "b": "organs/b.nii.gz"},
        ),
        (["imagesTr/a_0000.nii.gz"], ["labelsTr/a.nii.gz"], {"a": "organs/labelsTr/a.nii.gz"}),
        (
            ["p1/1.dcm", "p1/2.dcm", "p2/dicom/000001"],
            ["p1.nii.gz", "p2_total.nii.gz"],
            {"p1": "organs/p1.nii.gz", "p2": "organs/p2_total.nii.gz"},
        ),
        (
            ["train_fixed/train_1/train_1_a/train_1_a_1.nii.gz", "train_fixed/train_1/train_1_a/train_1_a_2.nii.gz"],
            ["train/train_1/train_1_a/train_1_a_2.nii.gz"],
            {"train_1_a_1": None, "train_1_a_2": "organs/train/train_1/train_1_a/train_1_a_2.nii.gz"},
        ),
        (
            ["x/a.nii.gz", "y/a.nii.gz"],
            ["x/a.nii.gz", "y/a.nii.gz"],
            {"x_a": "organs/x/a.nii.gz", "y_a": "organs/y/a.nii.gz"},
        ),
        (
            ["a.nii.gz", "b.nii.gz", "c.nii.gz", "notes.txt", ".hidden.nii.gz"],
            ["a.nii.gz"],
            {"a": "organs/a.nii.gz", "b": None, "c": None},
        ),
    ],
)
def test_names_that_people_have(touch, scans, organs, expected):
    root = touch(*(f"scans/{name}" for name in scans), *(f"organs/{name}" for name in organs))
    assert pairs(root, split=[1.0, 0.0]) == expected


def test_segmentations_among_the_scans(touch):
    names = ["s1/ct.nii.gz", *(f"s1/segmentations/{name}" for name in BINARY), "s2/ct.nii.gz", "s2/ct_seg.nii.gz"]
    root = touch(*(f"scans/{name}" for name in names))
    expected = {"s1": "scans/s1/segmentations", "s2": "scans/s2/ct_seg.nii.gz"}
    assert pairs(root, None, split=[0.5, 0.5]) == expected
    assert pairs(root, "scans", split=[0.5, 0.5]) == expected


def test_segmentations_in_a_folder_inside_of_the_scans(touch):
    root = touch("scans/a.nii.gz", "scans/b.nii.gz", "scans/masks/a.nii.gz")
    assert pairs(root, "scans/masks", split=[0.5, 0.5]) == {"a": "scans/masks/a.nii.gz", "b": None}


def test_a_pattern_says_where_they_are(touch):
    root = touch("scans/a.nii.gz", "scans/b.nii.gz", "organs/a/first.nii.gz", "organs/a/second.nii.gz")
    assert pairs(root, organs_at="{id}/second.nii.gz", split=[0.5, 0.5])["a"] == "organs/a/second.nii.gz"


def test_everything_ambiguous_is_told_at_once(touch):
    root = touch(
        *("scans/p1/ct1.nii.gz", "scans/p1/ct2.nii.gz", "scans/b.nii.gz"),
        *("organs/p1.nii.gz", "organs/b.nii.gz", "organs/x/b_seg.nii.gz", "organs/stranger.nii.gz"),
    )
    with pytest.raises(InputError) as caught:
        pairs(root)
    text = str(caught.value)
    assert "3 faults" in text
    assert "p1.nii.gz fits 2 scans" in text
    assert "b.nii.gz has 2 segmentations" in text
    assert "stranger.nii.gz fits no scan" in text


def test_links_are_followed_once(touch):
    root = touch("scans/a.nii.gz", "scans/b.nii.gz", "organs/a.nii.gz")
    (root / "scans" / "loop").symlink_to(root / "scans")
    assert set(pairs(root, split=[0.5, 0.5])) == {"a", "b"}


def test_links_above_the_manifest_do_not_lead_astray(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "scans").mkdir()
    for name in "abc":
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "scans" / f"{name}.nii.gz")
    found = import_scans(tmp_path / "scans", Options(labels_only=["mass"]))
    manifest, table = found.write(tmp_path / "link" / "study")
    assert len(ManifestDataModule(manifest, table).manifest.cases) == 3


# Labels, patients, splits --------------------------------------------------------------------------------------------


def labelled(root, text, **options):
    (root / "labels.csv").write_text(text, encoding="utf-8")
    found = import_scans(root / "scans", Options(labels=root / "labels.csv", **options))
    return found, {case.id: case for case in found.cases}


@pytest.mark.parametrize("written", ["{}", "{}.nii.gz", "scans/{}.nii.gz", "C:\\data\\{}.nii"])
def test_rows_are_found_by_id_or_file(touch, written):
    root = touch(*(f"scans/{name}.nii.gz" for name in "abc"))
    rows = "".join(f"{written.format(name)},{value}\n" for name, value in zip("abc", ("1", "0", ""), strict=True))
    found, cases = labelled(root, f"VolumeName,Mass\n{rows}")
    assert found.labels == ("Mass",)
    assert cases["a"].label == (1.0,)
    assert cases["b"].label == (0.0,)
    assert np.isnan(cases["c"].label[0])


def test_semicolons_byte_order_marks_words_and_ages(touch):
    root = touch(*(f"scans/{name}.nii.gz" for name in "abcd"))
    text = "﻿id;age;sex;mass;split;patient\na;61;f;1;train;p\nb;1;m;-1;train;p\nc;70;m;0.0;val;q\nz;3;m;1;val;q\n"
    with pytest.raises(InputError, match="d has no split"):
        labelled(root, text)
    found, cases = labelled(root, text + "d;5;f;nan;test;r\n")
    assert found.labels == ("mass",)
    assert [cases[name].split for name in "abcd"] == ["train", "train", "val", "test"]
    assert cases["b"].patient == "p"
    assert any("age, sex" in note for note in found.notes)
    assert any("1 rows of labels.csv have no scan" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "id,mass\na,1\nb,maybe\nc,0\na,2\n",
            "3 faults.*row 3, column 'mass': [^\n]*'maybe'.*row 5: [^\n]*'a' already in row 2.*row 5, [^\n]*'2'",
        ),
        ("number,mass\na,1\n", "a column with ids or file names"),
        ("id,mass\na\n", "row 2 has 1 cells"),
        ("id,mass,mass\na,1,1\n", "'mass' stands twice"),
        ("id,mass\n", "got 1 rows"),
        ("id,mass\nx,1\n", "no id fits a scan"),
    ],
)
def test_wrong_labels(touch, text, told):
    root = touch(*(f"scans/{name}.nii.gz" for name in "abc"))
    with pytest.raises(InputError, match=f"(?s){told}"):
        labelled(root, text)


def test_a_patient_in_two_splits_is_told(touch):
    root = touch(*(f"scans/{name}.nii.gz" for name in "abc"))
    with pytest.raises(InputError, match=r"patient 'p' is in 'train' \(a\) and in 'val' \(b\)"):
        labelled(root, "id,mass,patient,split\na,1,p,train\nb,1,p,val\nc,0,q,test\n")


def test_lots_keep_patients_together_and_every_split_filled():
    groups = [f"p{i // 3}" for i in range(60)]
    splits = split_by_lot(groups, (0.7, 0.15, 0.15), 0)
    assert all(
        len({split for group, split in zip(groups, splits, strict=True) if group == name}) == 1 for name in groups
    )
    assert [splits.count(word) for word in ("train", "val", "test")] == [42, 9, 9]
    assert split_by_lot(groups, (0.7, 0.15, 0.15), 1) != splits
    assert set(split_by_lot(["a", "b", "c"], (0.98, 0.01, 0.01), 0)) == {"train", "val", "test"}
    assert set(split_by_lot(["a", "b"], (80, 20), 0)) == {"train", "val"}
    with pytest.raises(InputError, match="at least one patient for each of train, val, test, got 2"):
        split_by_lot(["a", "a", "b"], (0.7, 0.15, 0.15), 0)
    with pytest.raises(InputError, match="two or three parts"):
        split_by_lot(["a", "b"], (1.0,), 0)


def test_patients_from_names_and_splits_from_folders_and_files(touch):
    names = ["train/p1-1.nii.gz", "train/p1-2.nii.gz", "valid/p2-1.nii.gz"]
    root = touch(*(f"scans/{name}" for name in names))
    found = import_scans(root / "scans", Options(patient=r"(p\d+)-", split="folder"))
    assert [(case.patient, case.split) for case in found.cases] == [("p1", "train"), ("p1", "train"), ("p2", "val")]
    (root / "splits.csv").write_text("id,split\np1-1,test\np1-2,test\np2-1,external\n")
    found = import_scans(root / "scans", Options(split_file=root / "splits.csv"))
    assert [case.split for case in found.cases] == ["test", "test", "external"]
    for pattern, told in ((r"(", "regular expression"), (r"p\d", "with a group"), (r"(q\d)", "fits no id")):
        with pytest.raises(InputError, match=told):
            import_scans(root / "scans", Options(patient=pattern))


# The table -----------------------------------------------------------------------------------------------------------


def test_rules_come_from_shipped_tables_and_the_rest_is_free():
    made = make_table(
        ["Pleural effusion", "gallstones", "rib_fracture", "mystery"], total_segmentator(), ["lung_vessels"]
    )
    assert list(made.sources.values()) == ["ct_rate", "totalsegmentator_abdomen", "totalsegmentator_chest", ""]
    assert made.without_rule == ["mystery"]
    assert made.table.rules["Pleural effusion"] == OrganTable.load("ct_rate").rules["pleural_effusion"]
    assert made.table.organs["lung_vessels"] == (201,)
    again = OrganTable.load(json.loads(json.dumps(made.table.to_dict())))
    assert again == made.table


def test_a_label_that_is_a_letter_beside_one_with_a_rule():
    made = make_table(["emphysma", "Emphysema", "mystery"], total_segmentator())
    assert made.near == {"emphysma": "emphysema"}
    assert made.without_rule == ["emphysma", "mystery"]


def test_rules_need_their_organs():
    made = make_table(["cardiomegaly", "emphysema"], {"heart": 1, "atrial_appendage_left": 2})
    assert made.sources == {"cardiomegaly": "ct_rate", "emphysema": ""}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,name\n0,background\n7,heart\n9,aorta\n"),
        ("a.csv", "﻿heart;7\naorta;9\n"),
        ("a.json", '{"heart": 7, "aorta": 9}'),
        ("a.json", '{"7": "heart", "9": "aorta"}'),
        ("dataset.json", '{"name": "x", "labels": {"background": 0, "heart": 7, "aorta": 9}}'),
    ],
)
def test_class_maps(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / name) == {"heart": 7, "aorta": 9}


@pytest.mark.parametrize("text", ["nothing", '{"labels": [1]}', "1,heart\n1,aorta\n", "1,heart\n2,heart\n"])
def test_wrong_class_maps(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=r"a\.csv: expected"):
        read_class_map(tmp_path / "a.csv")


# What was written trains ---------------------------------------------------------------------------------------------


def test_written_files_train_as_they_are(tmp_path):
    root = make_ct_rate_tree(tmp_path / "dataset", train=3, valid=1, size=(20, 20, 16))
    options = Options(
        organs=root / "ts_seg" / "ts_total" / "train_fixed",
        labels=root / "multi_abnormality_labels" / "train_predicted_labels.csv",
    )
    found = import_scans(root / "train_fixed", options)
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    manifest, table = found.write(tmp_path / "study")
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    assert not any(Path(row["image"]).is_absolute() for row in csv.DictReader(manifest.open()))
    data = ManifestDataModule(manifest, table, spacing=20, size=16, batch_size=1)
    assert len(data.labels) == 18
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (1, 1, 16, 16, 16)
    assert {case.patient for case in data.manifest.cases} == {"train_1", "train_2", "train_3"}
    with pytest.raises(InputError, match="would be replaced"):
        found.write(tmp_path / "study")
    found.write(tmp_path / "study", overwrite=True, absolute=True)
    assert all(Path(row["image"]).is_absolute() for row in csv.DictReader(manifest.open()))


def test_folders_of_binary_files_train_too(tmp_path):
    manifest = export_phantom(tmp_path / "files", {"train": 2, "val": 1}, size=(16, 16, 16))
    for row in csv.DictReader(manifest.open()):
        volume = nib.load(tmp_path / "files" / row["organs"])
        (tmp_path / "seg" / row["id"]).mkdir(parents=True)
        for name, number in {"heart": 3, "aorta": 4}.items():
            mask = nib.Nifti1Image((np.asarray(volume.dataobj) == number).astype(np.uint8), volume.affine)
            nib.save(mask, tmp_path / "seg" / row["id"] / f"{name}.nii.gz")
        (tmp_path / "ct").mkdir(exist_ok=True)
        (tmp_path / "files" / row["image"]).rename(tmp_path / "ct" / f"{row['id']}.nii.gz")
    options = Options(organs=tmp_path / "seg", labels_only=["cardiomegaly"], split=[0.7, 0.3])
    manifest, table = import_scans(tmp_path / "ct", options).write(tmp_path / "study")
    data = ManifestDataModule(manifest, table, batch_size=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert bool(batch["has_organs"].all())
    assert set(batch["organs"].unique().tolist()) <= {0, 51, 52}


@pytest.mark.skipif(not CT.exists(), reason="the real CT is not here")
def test_a_real_scan_and_the_names_in_its_segmentation(tmp_path):
    found = import_scans(CT, Options(labels_only=["kidney_stone"], split=[1.0, 0.0]))
    (case,) = found.cases
    assert case.organs == CT / "organs.nii.gz"
    assert any("were read from the header of organs.nii.gz" in note for note in found.notes)
    assert found.made.table.organs["aorta"] == (52,)
    manifest, table = found.write(tmp_path)
    data = ManifestDataModule(manifest, table, spacing=6, size=(64, 48, 16), val_split=None, batch_size=1)
    data.setup("fit")
    assert 5 in next(iter(data.train_dataloader()))["organs"]


# RAD-ChestCT and VOC -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rad_chestct(tmp_path):
    pytest.importorskip("camtrain.data.volume_numpy", reason="manifests read no npz yet")
    root = make_rad_chestct_tree(tmp_path / "rad", train=2, val=2, test=1, size=(20, 24, 24))
    found = import_rad_chestct(root, label_set="plain")
    assert [case.split for case in found.cases] == ["train", "train", "val", "val", "test"]
    assert found.cases[0].patient == found.cases[1].patient == "trnmrn0000"
    manifest, table = found.write(tmp_path / "study")
    data = ManifestDataModule(manifest, table, size=(20, 24, 24), batch_size=2)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["label"].shape == (2, 84)


@pytest.mark.slow
def test_rad_chestct_with_lungs_of_the_partition(tmp_path):
    root = make_rad_chestct_tree(tmp_path / "rad", train=2, val=1, test=0, size=(20, 24, 24))
    (tmp_path / "lungs").mkdir()
    for name in ("trn00001", "val00001"):
        np.savez(tmp_path / "lungs" / f"{name}_seg.npz", segmap=np.zeros((2, 2, 2), np.uint8))
    found = import_rad_chestct(root, organs=tmp_path / "lungs")
    assert len(found.labels) == 80
    assert found.made.table.organs == {"lungs": (1,)}
    assert found.made.table.rules["lung_nodule"].organs == ("lungs",)
    assert found.made.table.rules["heart_cardiomegaly"].anywhere
    np.savez(tmp_path / "lungs" / "trn00002_organs.npz", organs=np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InputError, match="organs of one kind"):
        import_rad_chestct(root, organs=tmp_path / "lungs")
    with pytest.raises(InputError, match="img"):
        import_rad_chestct(root, tables=tmp_path / "lungs")


def test_voc(tmp_path):
    root = make_voc_tree(tmp_path / "voc", train=4, val=2, test=0, size=32)
    found = import_voc(root)
    assert [case.split for case in found.cases] == ["train"] * 4 + ["val"] * 2
    manifest, table = found.write(tmp_path / "study")
    assert OrganTable.load(table).organs["void"] == (255,)
    pytest.importorskip("camtrain.data.volume_picture", reason="manifests read no pictures yet")
    data = ManifestDataModule(manifest, table, window=(0, 255), batch_size=2, spacing=None)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert 255 in batch["organs"]


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="--scans expects a folder"):
        import_scans(tmp_path / "nowhere", Options())
    with pytest.raises(InputError, match="expected scans"):
        import_scans(tmp_path, Options())
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match="--organs expects a folder"):
        import_scans(tmp_path, Options(organs=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="expected a VOC tree"):
        import_voc(tmp_path)
