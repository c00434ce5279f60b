"""Splits from files and folds: no patient in two, alike shares of every label, the same for the same seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.data.manifest import Case, Manifest, read_manifest
from camtrain.data.manifest_splits import assign_folds, kfold, label_counts, splits_from_files

NAN = float("nan")


def cohort(patients=60, seed=0, split="train"):
    rng = np.random.default_rng(seed)
    cases = []
    for patient in range(patients):
        truth = (float(rng.random() < 0.5), float(rng.random() < 0.1), NAN if rng.random() < 0.3 else 1.0)
        for scan in range(int(rng.integers(1, 4))):
            name = f"p{patient}s{scan}"
            cases.append(Case(name, Path(f"{name}.nii"), None, split, truth, f"p{patient}", f"c.csv, row {name}"))
    return Manifest(Path("c.csv"), ("common", "rare", "nearly"), tuple(cases))


def test_folds_keep_patients_together_and_shares_alike():
    manifest = cohort()
    place = assign_folds(manifest.cases, 5, seed=3)
    assert set(place) == {case.id for case in manifest.cases}
    for patient in {case.patient for case in manifest.cases}:
        assert len({place[case.id] for case in manifest.cases if case.patient == patient}) == 1
    for column in range(3):
        counts = [sum(c.label[column] == 1 for c in manifest.cases if place[c.id] == fold) for fold in range(5)]
        scans = sum(c.label[column] == 1 for c in manifest.cases) / 5
        assert max(abs(n - scans) for n in counts) <= 3  # a patient has up to three scans
    sizes = [list(place.values()).count(fold) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 4


def test_folds_follow_the_seed_and_not_the_order_of_rows():
    manifest = cohort()
    turned = list(manifest.cases)
    random.Random(1).shuffle(turned)
    assert assign_folds(manifest.cases, 4, seed=5) == assign_folds(turned, 4, seed=5)
    assert assign_folds(manifest.cases, 4, seed=5) != assign_folds(manifest.cases, 4, seed=6)


def test_every_case_validates_once_and_test_cases_stay():
    train, test = cohort(30), cohort(5, split="test")
    renamed = [
        Case(f"t{c.id}", Path(f"t{c.id}.nii"), None, "test", c.label, f"t{c.patient}", f"c.csv, row t{c.id}")
        for c in test.cases
    ]
    manifest = Manifest(train.path, train.labels, (*train.cases, *renamed))
    seen = []
    for fold in range(3):
        split = kfold(manifest, 3, fold)
        assert split.splits["test"] == len(renamed)
        assert set(split.splits) == {"train", "val", "test"}
        seen += [case.id for case in split.split("val")]
    assert sorted(seen) == sorted(case.id for case in train.cases)


@pytest.mark.parametrize(("folds", "fold", "words"), [(1, 0, "at least 2"), (3, 3, "fold="), (99, 0, "fewer folds")])
def test_wrong_folds(folds, fold, words):
    with pytest.raises(InputError, match=words):
        kfold(cohort(8), folds, fold)


def test_folds_of_nothing():
    with pytest.raises(InputError, match="got none of these"):
        kfold(cohort(8, split="external"), 2, 0)


@pytest.fixture
def manifest(tmp_path):
    rows = "".join(f"{i},{i}.nii,,p{i // 2},{i % 2}\n" for i in range(6))
    (tmp_path / "c.csv").write_text("id,image,organs,patient,nodule\n" + rows)
    return read_manifest(tmp_path / "c.csv", split_column=None, check_files=False)


def test_splits_from_a_csv_by_id_or_patient(manifest, tmp_path):
    (tmp_path / "s.csv").write_text("patient,split\np0,train\np1,val\n")
    assert splits_from_files(manifest, tmp_path / "s.csv").splits == {"train": 2, "val": 2, "": 2}
    (tmp_path / "s.csv").write_text("id,split\n" + "".join(f"{i},{'train' if i < 4 else 'val'}\n" for i in range(6)))
    assert splits_from_files(manifest, tmp_path / "s.csv").splits == {"train": 4, "val": 2}


def test_splits_from_lists(manifest, tmp_path):
    (tmp_path / "a.txt").write_text("0\n1\n\n")
    (tmp_path / "b.txt").write_text("4\n5\n")
    split = splits_from_files(manifest, {"train": tmp_path / "a.txt", "val": tmp_path / "b.txt"})
    assert [case.split for case in split.cases] == ["train", "train", "", "", "val", "val"]


def test_faults_of_split_files_are_told_at_once(manifest, tmp_path):
    (tmp_path / "s.csv").write_text("id,split\n0,train\n0,val\n7,train\n8,val\n")
    with pytest.raises(InputError) as error:
        splits_from_files(manifest, tmp_path / "s.csv")
    text = str(error.value)
    assert "3 faults" in text
    assert "row 3: expected every id in one split, got '0'" in text
    assert "row 4" in text
    assert "'8'" in text


def test_a_patient_in_two_split_files(manifest, tmp_path):
    (tmp_path / "s.csv").write_text("id,split\n0,train\n1,val\n")
    with pytest.raises(InputError, match=r"patient 'p0' in 'val' and .*'train'"):
        splits_from_files(manifest, tmp_path / "s.csv")
    (tmp_path / "s.csv").write_text("name,split\n0,train\n")
    with pytest.raises(InputError, match="'id' or 'patient'"):
        splits_from_files(manifest, tmp_path / "s.csv")
    with pytest.raises(InputError, match=r"none\.txt"):
        splits_from_files(manifest, {"train": tmp_path / "none.txt"})


def test_label_counts():
    label = [(1.0, NAN), (0.0, 1.0), (1.0, 0.0)]
    cases = [Case(str(i), Path("x"), None, "train", row, "", "") for i, row in enumerate(label)]
    assert label_counts(cases).tolist() == [[2, 1, 0], [1, 1, 1]]
