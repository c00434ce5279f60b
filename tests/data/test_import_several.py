"""`import_scans` where the organs of a case are several files, and training on what was written."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest

from camtrain.data import ManifestDataModule
from camtrain.data.importing import Options, import_scans

BINARY = ("heart.nii.gz", "liver.nii.gz")


@pytest.fixture
def touch(tmp_path):
    """Makes empty files; contents are never read."""

    def _touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return _touch


def test_binary_files_named_after_case_and_organ(touch):
    names = [f"organs/{case}_{organ}.nii.gz" for case in ("a", "b_1") for organ in ("heart", "lung_upper_lobe_left")]
    root = touch("scans/a.nii.gz", "scans/b_1.nii.gz", "scans/c.nii.gz", "organs/c_heart.nii.gz", *names)
    found = import_scans(root / "scans", Options(organs=root / "organs", split=[0.5, 0.5], labels_only=["mass"]))
    assert [len(case.organs) for case in found.cases] == [2, 2, 1]
    assert found.kinds == {"scans: NIfTI": 3, "segmentations: binary files of a case": 3}
    rows = {row["id"]: row["organs"] for row in csv.DictReader(found.write(root / "study")[0].open())}
    assert rows["b_1"] == "../organs/b_1_heart.nii.gz|../organs/b_1_lung_upper_lobe_left.nii.gz"
    assert rows["c"] == "../organs/c_heart.nii.gz|"  # a file of ids has no separator
    options = Options(organs=root / "organs", organs_at="{id}_heart.nii.gz|{id}_liver.nii.gz", split=[0.5, 0.5])
    assert [len(case.organs) for case in import_scans(root / "scans", options).cases] == [1, 1, 1]


def test_binary_files_beside_the_scan(touch):
    root = touch(*(f"scans/{case}/{name}" for case in "ab" for name in ("ct.nii.gz", *BINARY)))
    assert {
        c.id: c.organs.relative_to(root).as_posix()
        for c in import_scans(root / "scans", Options(split=[0.5, 0.5])).cases
    } == {"a": "scans/a", "b": "scans/b"}
    flat = touch(*(f"flat/{case}{name}.nii.gz" for case in "ab" for name in ("", "_heart", "_liver")))
    found = import_scans(flat / "flat", Options(split=[0.5, 0.5]))
    assert {case.id: len(case.organs) for case in found.cases} == {"a": 2, "b": 2}


def test_what_was_imported_trains(tmp_path):
    """One case has the heart alone, which as a file of ids would be another organ."""
    ids = np.zeros((12, 10, 8), np.uint8)
    ids[2:5, 2:8, 2:6], ids[7:9, 3:6, 3:5] = 10, 51  # lung_upper_lobe_left and heart of TotalSegmentator
    (tmp_path / "ct").mkdir()
    (tmp_path / "seg").mkdir()
    for case, organs in {"a": {"lung_upper_lobe_left": 10, "heart": 51}, "b": {"heart": 51}}.items():
        nib.save(nib.Nifti1Image((ids * 9.0 - 900).astype(np.int16), np.eye(4)), tmp_path / "ct" / f"{case}.nii.gz")
        for name, number in organs.items():
            mask = nib.Nifti1Image((ids == number).astype(np.uint8), np.eye(4))
            nib.save(mask, tmp_path / "seg" / f"{case}_{name}.nii.gz")
    options = Options(organs=tmp_path / "seg", labels_only=["cardiomegaly"], split=[0.5, 0.5])
    manifest, table = import_scans(tmp_path / "ct", options).write(tmp_path / "study")
    data = ManifestDataModule(manifest, table, batch_size=1, train_split="train", val_split="val")
    data.setup("fit")
    found = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        found |= {batch["id"][0]: batch["organs"].unique().tolist() for batch in loader}
    assert found == {"a": [0, 10, 51], "b": [0, 51]}
