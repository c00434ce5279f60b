"""`ManifestDataModule`'s options: caches, broken files, mirrored patients, pictures, splits from elsewhere, weights."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from volume_files import write_mrc

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.manifest_augment import Mirror, mirrored_labels
from camtrain.data.manifest_cache import CaseDataset, DiskDataset, LazyDataset
from camtrain.data.manifest_module import ManifestDataModule
from camtrain.data.manifest_plan import CachePlan, check_cache
from camtrain.data.manifest_transforms import load_case

TABLE = {
    "organs": {"heart": 3, "lung_left": 1, "lung_right": 2},
    "labels": {
        "effusion_left": ["lung_left"],
        "effusion_right": ["lung_right"],
        "nodule": ["lung_left", "lung_right"],
        "stent": ["heart"],
    },
}
LABELS = list(TABLE["labels"])


@pytest.fixture
def study(tmp_path):
    """Five small scans, a manifest, and a module with any arguments."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        hu = rng.integers(-1000, 800, (11 + i, 10, 9)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([2, 2, 3, 1.0])), tmp_path / f"{i}.nii.gz")
        if i != 1:
            organs = rng.integers(0, 4, hu.shape).astype(np.uint8)
            nib.save(nib.Nifti1Image(organs, np.diag([2, 2, 3, 1.0])), tmp_path / f"{i}_seg.nii.gz")
        rows.append(f"{i},{i}.nii.gz,{'' if i == 1 else f'{i}_seg.nii.gz'},{'train' if i < 4 else 'val'},{i % 2},0,1,")
    (tmp_path / "cases.csv").write_text("\n".join([f"id,image,organs,split,{','.join(LABELS)}", *rows]) + "\n")

    def _make(**arguments):
        options = {"table": TABLE, "size": (12, 8, 10), "spacing": 2.5, "batch_size": 4} | arguments
        return ManifestDataModule(tmp_path / "cases.csv", **options)

    _make.folder = tmp_path
    return _make


def batch_of(data, split="train"):
    data.setup("fit")
    torch.manual_seed(0)
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    return next(iter(loader))


def by_id(batch):
    order = np.argsort(batch["id"])
    return {key: [value[i] for i in order] for key, value in batch.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [0.0, 1.0])
@pytest.mark.parametrize(("cache", "kind"), [("lazy", LazyDataset), ("disk", DiskDataset), (False, CaseDataset)])
def test_every_cache_gives_the_same_batches(study, cache, kind, mirror):
    reference = by_id(batch_of(study(cache=True, mirror=mirror)))
    data = study(cache=cache, cache_dir=study.folder / "cache", mirror=mirror)
    for _ in range(2):  # read, then kept
        batch = by_id(batch_of(data))
        assert batch["id"] == list("0123")
        for key in ("image", "organs", "affine", "label", "original_affine", "original_shape", "has_organs"):
            for one, other in zip(batch[key], reference[key], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert isinstance(data.train_dataloader().dataset, kind)


@pytest.mark.parametrize("cache", ["lazy", "disk"])
def test_kept_cases_are_not_read_again(study, cache):
    data = study(cache=cache, cache_dir=study.folder / "cache")
    data.setup("fit")
    assert (
        not list((study.folder / "cache").glob("*.pt"))
        if cache == "disk"
        else data.train_dataloader().dataset.kept == 0
    )
    first = by_id(batch_of(data))
    for scan in study.folder.glob("*.nii.gz"):
        scan.write_bytes(b"") if cache == "lazy" else None
    again = by_id(batch_of(data))
    assert all(torch.equal(a, b) for a, b in zip(first["image"], again["image"], strict=True))


def test_a_changed_scan_is_read_anew_from_disk_and_a_damaged_file_too(study, caplog):
    data = study(cache="disk", cache_dir=study.folder / "cache")
    first = by_id(batch_of(data))
    nib.save(nib.Nifti1Image(np.full((11, 10, 9), 800, np.int16), np.diag([2, 2, 3, 1.0])), study.folder / "0.nii.gz")
    changed = by_id(batch_of(data))
    assert not torch.equal(first["image"][0], changed["image"][0])
    assert torch.equal(first["image"][1], changed["image"][1])
    for file in (study.folder / "cache").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:50])
    again = by_id(batch_of(data))
    assert torch.equal(again["image"][0], changed["image"][0])
    assert "read anew" in caplog.text
    assert not list((study.folder / "cache").glob("*.part"))


def test_other_settings_are_other_files(study):
    batch_of(study(cache="disk", cache_dir=study.folder / "cache"))
    batch = by_id(batch_of(study(cache="disk", cache_dir=study.folder / "cache", window=[-200, 200])))
    assert torch.equal(batch["image"][0], by_id(batch_of(study(cache=False, window=[-200, 200])))["image"][0])


@pytest.mark.slow
def test_workers_fill_one_memory(study):
    data = study(cache="lazy", num_workers=2, batch_size=1)
    data.setup("fit")
    loader = data.train_dataloader()
    seen = [by_id(batch)["image"][0] for batch in loader]
    assert len(seen) == 4
    assert loader.dataset.kept == 4  # what the workers read is here
    for scan in study.folder.glob("*.nii.gz"):
        scan.write_bytes(b"")
    assert len(list(loader)) == 4


def test_the_plan_follows_the_memory(study, monkeypatch, caplog):
    monkeypatch.setattr("camtrain.data.manifest_plan.FEW_CASES", 2)
    assert isinstance(_dataset(study()), LazyDataset)
    assert isinstance(_dataset(study(size=None, batch_size=1)), CaseDataset)
    monkeypatch.setattr("camtrain.data.manifest_plan.free_memory", lambda: 1000)
    assert isinstance(_dataset(study(cache_dir=study.folder / "c")), DiskDataset)
    dataset = _dataset(study())
    assert isinstance(dataset, CaseDataset)
    assert dataset.cache_num == 0
    assert "every epoch reads all files" in caplog.text


def _dataset(data):
    data.setup("fit")
    return data.train_dataloader().dataset


def test_what_earlier_splits_take_is_not_free(study, monkeypatch):
    plan = CachePlan("auto", (100, 100, 100), None, 0, None)
    monkeypatch.setattr("camtrain.data.manifest_plan.free_memory", lambda: 45_000_000)
    cases = study().manifest.cases[:3]
    assert plan.bytes(cases) == 18_000_000
    assert [plan.kind(split, cases) for split in ("train", "val")] == ["memory", "none"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("some", None, 8), "lazy"),
        (("disk", None, 8), "cache_dir"),
        (("lazy", None, None), "size"),
        ((2, None, 8), "rate"),
    ],
)
def test_caches_that_there_are_not(arguments, words):
    with pytest.raises(InputError, match=words):
        check_cache(*arguments)


# ---- broken files -------------------------------------------------------------------------------------------------


def break_(study, *names):
    for name in names:
        path = study.folder / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes()[:200])


def test_all_broken_cases_are_told_before_the_first_step(study):
    break_(study, 0, 2)
    data = study(num_workers=0)
    with pytest.raises(InputError) as error:
        data.setup("fit")
    lines = str(error.value).splitlines()
    assert lines[0] == "the cases: 2 faults"
    assert ["row 2 (id '0')" in lines[1], "row 4 (id '2')" in lines[2]] == [True, True]


@pytest.mark.parametrize("cache", [True, False, "lazy", "disk"])
def test_a_broken_case_is_left_out_and_told_once(study, caplog, cache):
    break_(study, 0, 2)
    data = study(cache=cache, cache_dir=study.folder / "cache", on_error="skip")
    for _ in range(3):
        assert by_id(batch_of(data))["id"] == ["1", "3"]
    told = [r.message for r in caplog.records if "left out" in r.message]
    assert len(told) == 2
    assert "row 2 (id '0'): expected a readable NIfTI" in told[0]


def test_another_case_stands_in_where_a_batch_would_be_empty(study):
    break_(study, 0, 1, 2)
    data = study(cache=False, on_error="skip", batch_size=1)
    data.setup("fit")
    assert [batch["id"] for batch in data.train_dataloader()] == [["3"]] * 4
    break_(study, 3)
    data = study(cache=False, on_error="skip")
    with pytest.raises(InputError, match="none of 4 cases can be read"):
        batch_of(data)


@pytest.mark.slow
def test_workers_survive_a_broken_file(study):
    break_(study, 1)
    data = study(cache="lazy", on_error="skip", num_workers=2, batch_size=2)
    data.setup("fit")
    loader = data.train_dataloader()
    for _ in range(2):
        assert sorted(i for batch in loader for i in batch["id"]) in (["0", "2", "3"], ["0", "2", "3", "3"])
    assert loader.dataset.broken.tolist() == [0, 1, 0, 0]


# ---- mirrored patients --------------------------------------------------------------------------------------------


def test_a_mirrored_patient_keeps_every_finding_in_its_organs(study):
    plain, mirrored = (by_id(batch_of(study(mirror=m))) for m in (0.0, 1.0))
    table = OrganTable.load(TABLE)
    partner = [1, 0, 2, 3]
    for i in range(4):
        torch.testing.assert_close(mirrored["image"][i], plain["image"][i].flip(1))
        torch.testing.assert_close(mirrored["label"][i], plain["label"][i][partner], equal_nan=True)
        before, after = (table.allowed(b["organs"][i][None], size=None)[0] for b in (plain, mirrored))
        assert torch.equal(after, before[partner].flip(1))
        # Each voxel keeps its place in the scanner's world.
        corner = mirrored["affine"][i] @ torch.tensor([0.0, 0, 0, 1])
        torch.testing.assert_close(corner, plain["affine"][i] @ torch.tensor([11.0, 0, 0, 1]))


def test_validation_is_never_mirrored(study):
    batches = [batch_of(study(mirror=m), "val")["image"] for m in (0.0, 1.0)]
    assert torch.equal(*batches)


def test_labels_bound_to_a_side_need_a_partner(study):
    with pytest.raises(InputError, match="got effusion_left: set mirror to 0"):
        study(mirror=0.5, labels=["effusion_left", "nodule"])
    lobes = {
        "organs": {"lobe_left": 1, "lobe_right": 2, "middle_right": 3},
        "labels": {
            "a_left": ["lobe_left"],
            "a_right": ["lobe_right", "middle_right"],
            "b": ["lobe_left", "lobe_right", "middle_right"],
        },
    }
    with pytest.raises(InputError, match="got a_left, a_right"):
        mirrored_labels(OrganTable.load(lobes))
    assert mirrored_labels(OrganTable.load(lobes).select(["b"])) == (0,)
    with pytest.raises(InputError, match="probability"):
        study(mirror=2)


def test_half_of_the_cases_are_mirrored():
    torch.manual_seed(0)
    mirror = Mirror(None, 0.5)
    mirror.set_random_state(0)
    from monai.data import MetaTensor

    image = MetaTensor(torch.arange(3.0)[None, :, None, None])
    turned = sum(float(mirror({"image": image, "label": torch.zeros(1)})["image"][0, 0, 0, 0]) == 2 for _ in range(200))
    assert 75 < turned < 125


# ---- pictures, subtomograms, organs in several files --------------------------------------------------------------


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 30), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (20, 50), dtype=np.uint8)).save(tmp_path / "b.png")
    mask = np.zeros((40, 30), np.uint8)
    mask[:10] = 3
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    (tmp_path / "c.csv").write_text(
        f"id,image,organs,split,{LABELS[3]}\nA,a.png,a_mask.png,train,1\nB,b.png,,train,0\n"
    )
    data = ManifestDataModule(tmp_path / "c.csv", TABLE, size=(20, 24), val_split=None, augment=True)
    data.setup("fit")
    batch = by_id(next(iter(data.train_dataloader())))
    assert batch["image"][0].shape == batch["organs"][0].shape == (1, 20, 24)
    data = ManifestDataModule(tmp_path / "c.csv", TABLE, size=(20, 15), val_split=None)
    batch = by_id(batch_of(data))
    assert batch["organs"][0].unique().tolist() == [0, 3]
    assert (batch["organs"][0][0, :5] == 3).all()
    assert 0.2 < batch["image"][0].mean() < 0.8
    assert batch["original_shape"][0].tolist() == [40, 30]
    assert load_case(tmp_path / "a.png", size=16)["image"].shape == (1, 1, 16, 16)


def test_coloured_pictures_and_those_that_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "rgb.png")
    case = load_case(tmp_path / "rgb.png")
    assert case["image"].shape == (1, 3, 8, 8)
    assert case["organs"].shape == (1, 1, 8, 8)
    table = OrganTable.load(TABLE)
    with pytest.raises(InputError, match="one id per pixel"):
        load_case(tmp_path / "rgb.png", organs=tmp_path / "rgb.png", table=table)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "bad.png").read_bytes()[:900])
    with pytest.raises(InputError, match="readable PNG or JPEG"):
        load_case(tmp_path / "bad.png")
    with pytest.raises(InputError, match="which have no mm"):
        load_case(tmp_path / "rgb.png", spacing=1)
    (tmp_path / "c.csv").write_text("id,image,organs,split,stent\nA,rgb.png,,train,1\nB,b.nii.gz,,train,0\n")
    with pytest.raises(InputError, match=r"got both: rgb\.png in the row of 'A' and b\.nii\.gz in that of 'B'"):
        ManifestDataModule(tmp_path / "c.csv", TABLE, check_files=False)


def test_subtomograms_from_mrc_files(tmp_path):
    rng = np.random.default_rng(0)
    for i, dtype in enumerate(("f4", "i1", "i2")):
        write_mrc(tmp_path / f"{i}.mrc", rng.normal(30, 9, (8, 8, 8)).astype(dtype), order="<>"[i % 2])
    rows = "".join(f"{i},{i}.mrc,,train,{i % 2},{1 - i % 2}\n" for i in range(3))
    (tmp_path / "c.csv").write_text("id,image,organs,split,ribosome,proteasome\n" + rows)
    table = {"organs": {"particle": 1}, "labels": {"ribosome": "anywhere", "proteasome": "anywhere"}}
    data = ManifestDataModule(tmp_path / "c.csv", table, size=8, window="zscore", batch_size=3, val_split=None)
    batch = batch_of(data)
    for image in batch["image"]:
        assert image.mean().abs() < 1e-5
        assert image.std() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(batch["affine"][0].diagonal(), torch.tensor([0.5, 1.5, 3.0, 1.0]))  # nm
    assert data.hparams["window"] == "zscore"


def test_percentiles(study):
    image = by_id(batch_of(study(window="percentiles")))["image"][0]
    assert (image.min(), image.max()) == (0, 1)
    with pytest.raises(InputError, match="'percentiles' or 'zscore', got 'zcore'"):
        study(window="zcore")


def test_organs_in_several_files(study):
    ids = nib.load(study.folder / "0_seg.nii.gz")
    for name, number in (("heart", 3), ("lung_left", 1), ("lung_right", 2)):
        mask = nib.Nifti1Image((np.asarray(ids.dataobj) == number).astype(np.uint8), ids.affine)
        nib.save(mask, study.folder / f"{name}.nii.gz")
    text = (study.folder / "cases.csv").read_text()
    reference = by_id(batch_of(study()))["organs"][0]
    (study.folder / "cases.csv").write_text(
        text.replace("0_seg.nii.gz", "heart.nii.gz|lung_left.nii.gz|lung_right.nii.gz")
    )
    assert torch.equal(by_id(batch_of(study()))["organs"][0], reference)


# ---- splits and weights -------------------------------------------------------------------------------------------


def test_folds_and_split_files(study):
    seen = []
    for fold in range(5):
        data = study(folds=5, fold=fold)
        seen += [case.id for case in data.manifest.split("val")]
        assert data.manifest.splits == {"train": 4, "val": 1}
    assert sorted(seen) == list("01234")
    (study.folder / "s.csv").write_text("id,split\n4,train\n0,val\n")
    data = study(splits=study.folder / "s.csv")
    assert [case.id for case in data.manifest.split("train")] == ["4"]
    assert data.hparams["splits"] == str(study.folder / "s.csv")


def test_weights_of_the_training_split(study):
    data = study()
    assert data.label_counts["effusion_left"] == {"present": 2, "absent": 2, "unknown": 0}
    assert data.label_counts["stent"] == {"present": 0, "absent": 0, "unknown": 4}
    text = (study.folder / "cases.csv").read_text().replace("train,1,0", "train,0,0", 1)
    (study.folder / "cases.csv").write_text(text)
    assert study().class_weights == [3.0, 1.0, 1.0, 1.0]


def test_nothing_is_read_before_it_is_asked_for(study):
    for scan in study.folder.glob("*.nii.gz"):
        scan.unlink()
    data = study(cache="lazy", check_files=False)
    data.setup("fit")
    with pytest.raises(InputError, match=r"row [2-5]"):
        next(iter(data.train_dataloader()))


def test_a_rebuilt_module_has_the_same_options(study, caplog):
    with caplog.at_level(logging.ERROR):
        data = study(cache="disk", cache_dir=study.folder / "c", folds=2, fold=1, mirror=0.5, on_error="skip")
        again = ManifestDataModule(**dict(data.hparams))
    assert dict(again.hparams) == dict(data.hparams)
    assert again.manifest == data.manifest


def test_labels_without_a_rule_are_told_with_all_else(study):
    text = (study.folder / "cases.csv").read_text()
    (study.folder / "cases.csv").write_text(text.replace("nodule", "nodul").replace("1.nii.gz", "none.nii.gz"))
    with pytest.raises(InputError) as error:
        study()
    lines = str(error.value).splitlines()
    assert lines[0].endswith(": 2 faults")
    assert "got none for 'nodul'; nearest: nodule" in lines[1]
    assert "row 3 (id '1')" in lines[2]
