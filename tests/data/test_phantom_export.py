"""Phantom cases as files: what is written is what the generator made, and the manifest names it."""

import csv

import nibabel as nib
import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.data.phantom import LABELS, Phantom
from camtrain.data.phantom_export import export_phantom

SIZE = (20, 16, 18)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_files_hold_the_cases(tmp_path):
    path = export_phantom(tmp_path / "new", {"train": 2, "shift_reversed": 1}, size=SIZE, seed=3)
    rows = rows_of(path)
    assert list(rows[0]) == ["id", "image", "organs", "split", *LABELS]
    assert [r["split"] for r in rows] == ["train", "train", "shift_reversed"]
    phantom = Phantom(size=SIZE, seed=3)
    for row, index in zip(rows, (0, 1, 0), strict=True):
        case = phantom.case(row["split"], index)
        scan, organs = (nib.load(path.parent / row[k]) for k in ("image", "organs"))
        assert scan.get_data_dtype() == np.int16
        assert np.allclose(scan.get_fdata(), case.hu, atol=0.51)
        assert np.array_equal(organs.get_fdata(), case.organs)
        assert np.allclose(scan.affine, case.affine)
        assert np.allclose(organs.affine, case.affine)
        assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
        assert [float(row[n]) for n in LABELS] == case.label.tolist()


def test_one_number_is_shared_out(tmp_path):
    rows = rows_of(export_phantom(tmp_path, 7, size=(16, 16, 16), labels=["effusion"], shortcut=None))
    assert [r["split"] for r in rows] == ["train"] * 5 + ["val", "test"]
    assert set(rows[0]) == {"id", "image", "organs", "split", "effusion"}


def test_wrong_input(tmp_path):
    with pytest.raises(InputError, match="at least 3"):
        export_phantom(tmp_path, 2)
    with pytest.raises(InputError, match="split does not know 'trian'; nearest: train"):
        export_phantom(tmp_path, {"trian": 1})
    export_phantom(tmp_path, {"train": 1}, size=(16, 16, 16))
    with pytest.raises(InputError, match=r"manifest\.csv exists already"):
        export_phantom(tmp_path, {"train": 1}, size=(16, 16, 16))


def test_the_manifest_module_reads_it(tmp_path):
    from camtrain.data import ManifestDataModule

    path = export_phantom(tmp_path, {"train": 2, "val": 1}, size=SIZE)
    data = ManifestDataModule(manifest=str(path), table="phantom", spacing=None, size=SIZE, batch_size=2, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    phantom = Phantom(size=SIZE)
    assert sorted(batch["id"]) == ["train-00000", "train-00001"]
    for i, name in enumerate(batch["id"]):
        case = phantom.case("train", int(name[-5:]))
        image = np.clip((np.round(case.hu) + 1000) / 1800, 0, 1)
        assert np.allclose(batch["image"][i, 0], image, atol=1e-3)
        assert np.array_equal(batch["organs"][i, 0], case.organs)
