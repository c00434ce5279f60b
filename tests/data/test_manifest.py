"""The CSV of a manifest: what is read, and the sentence for everything that is wrong with it."""

from __future__ import annotations

import math

import pytest

from camtrain._errors import InputError
from camtrain.data.manifest import read_manifest

HEADER = "id,image,organs,split,nodule,cardiomegaly"


@pytest.fixture
def write(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz", "seg.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "organs").mkdir()

    def _write(*lines, header=HEADER, encoding="utf-8"):
        path = tmp_path / "cases.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
        return path

    return _write


def test_reads_rows_paths_labels_and_splits(write, tmp_path):
    path = write("A,a.nii.gz,seg.nii.gz,train,1,0", "", "B, b.nii.gz ,organs,val,,-1", "C,c.nii.gz,,external,NaN,1.0")
    manifest = read_manifest(str(path))
    assert manifest.labels == ("nodule", "cardiomegaly")
    a, b, c = manifest.cases
    assert (a.id, a.image, a.organs, a.split, a.label) == (
        "A",
        tmp_path / "a.nii.gz",
        tmp_path / "seg.nii.gz",
        "train",
        (1, 0),
    )
    assert b.organs == tmp_path / "organs"
    assert all(math.isnan(v) for v in b.label)
    assert c.organs is None
    assert math.isnan(c.label[0])
    assert c.label[1] == 1.0
    assert manifest.splits == {"train": 1, "val": 1, "external": 1}
    assert [case.id for case in manifest.split("external")] == ["C"]


def test_labels_argument_chooses_and_orders(write):
    path = write("A,a.nii.gz,,train,1,0,63", header=HEADER + ",age")
    manifest = read_manifest(path, labels=["cardiomegaly", "nodule"])
    assert manifest.labels == ("cardiomegaly", "nodule")
    assert manifest.cases[0].label == (0, 1)


def test_byte_order_mark_and_quotes_are_read(write, tmp_path):
    (tmp_path / "x,y.nii.gz").touch()
    path = write('A,"x,y.nii.gz",,train,1,0', encoding="utf-8-sig")
    assert read_manifest(path).cases[0].image.name == "x,y.nii.gz"


def test_one_patient_may_have_two_scans_in_one_split(write):
    path = write(
        "A,a.nii.gz,,train,1,0,P", "B,b.nii.gz,,train,1,0,P", "C,c.nii.gz,,val,1,0,", header=HEADER + ",patient"
    )
    assert [case.patient for case in read_manifest(path).cases] == ["P", "P", ""]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no rows", "one row per case"]),
        (["A,a.nii.gz,,train,1,2"], ["row 2", "'A'", "cardiomegaly", "'2'", "0, 1, or empty"]),
        (["A,a.nii.gz,,train,0.5,0"], ["row 2", "nodule", "'0.5'"]),
        (["A,a.nii.gz,,train,yes,0"], ["row 2", "nodule", "'yes'"]),
        (["A,a.nii.gz,,train,1,0", "", "B,nowhere.nii.gz,,train,1,0"], ["row 4", "'B'", "nowhere.nii.gz", "image"]),
        (["A,a.nii.gz,nowhere,train,1,0"], ["row 2", "nowhere", "organs", "does not exist"]),
        (["A,organs,,train,1,0"], ["row 2", "NIfTI file", "folder"]),
        (["A,,,train,1,0"], ["row 2", "'image'", "nothing"]),
        (["A,a.nii.gz,,,1,0"], ["row 2", "'split'", "nothing"]),
        (["A,a.nii.gz,,train,1"], ["row 2", "6 fields", "got 5"]),
        (["A,a.nii.gz,,train,1,0,,"], ["row 2", "6 fields", "got 8"]),
        (["A,a.nii.gz,,train,1,0", "A,b.nii.gz,,train,1,0"], ["row 3", "'A'", "row 2", "every id once"]),
        (["A,a.nii.gz,,train,1,0", "A,a.nii.gz,,val,1,0"], ["row 3", "'A'", "'train' and 'val'"]),
        (["A,a.nii.gz,,train,1,0", "B,./a.nii.gz,,val,1,0"], ["row 3", "a.nii.gz", "'val'", "row 2", "one split"]),
    ],
)
def test_bad_rows(write, lines, words):
    path = write(*lines)
    with pytest.raises(InputError) as error:
        read_manifest(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_one_patient_in_two_splits(write):
    path = write("A,a.nii.gz,,train,1,0,P7", "B,b.nii.gz,,test,1,0,P7", header=HEADER + ",patient")
    with pytest.raises(InputError, match=r"row 3 .*'B'.*patient 'P7' in 'test' and \(row 2.*'train'"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("id,image,split,nodule", ["'organs' is missing", "may be left empty"]),
        ("id,images,organs,split,nodule", ["'image' is missing", "nearest: images"]),
        ("id;image;organs;split;nodule", ["separated by commas"]),
        ("id,image,organs,split,nodule,nodule", ["2 named 'nodule'"]),
        ("id,image,organs,split,nodule,", ["named ''"]),
    ],
)
def test_bad_headers(write, header, words):
    path = write("A,a.nii.gz,,train,1", header=header)
    with pytest.raises(InputError) as error:
        read_manifest(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_no_label_column(write):
    with pytest.raises(InputError, match=r"cases\.csv: expected at least one label, got only the columns id, image"):
        read_manifest(write("A,a.nii.gz,,train", header="id,image,organs,split"))


def test_labels_argument_with_a_typo_or_twice(write):
    path = write("A,a.nii.gz,,train,1,0")
    with pytest.raises(InputError, match=r"labels= names 'nodul'.*nearest: nodule"):
        read_manifest(path, labels=["nodul"])
    with pytest.raises(InputError, match="'nodule' 2 times"):
        read_manifest(path, labels=["nodule", "nodule"])


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv.*manifest="):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(InputError, match="manifest="):
        read_manifest(tmp_path)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(InputError, match="empty file"):
        read_manifest(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"id,image\n\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_manifest(tmp_path / "binary.csv")


def test_a_split_that_no_row_has(write):
    manifest = read_manifest(write("A,a.nii.gz,,trian,1,0"))
    with pytest.raises(InputError, match="train_split expects cases of the split 'train', got none; nearest: trian"):
        manifest.split("train", "train_split")
