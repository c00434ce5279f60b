"""CT-RATE: layout, tables, headers, organs, splits by patient, and the sampler's share."""

from __future__ import annotations

import csv
import logging
import shutil

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from camtrain._batch import read_batch
from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data import (
    CTRateDataModule,
    ManifestDataModule,
    RadChestCTDataModule,
    make_ct_rate_tree,
    make_rad_chestct_tree,
)
from camtrain.data.ct_rate_files import (
    FINDINGS,
    Header,
    OrganFinder,
    chosen_for_validation,
    label_name,
    parse_name,
    read_headers,
    read_labels,
)
from camtrain.data.ct_rate_header import CorrectHeader
from camtrain.data.manifest import Case
from camtrain.data.manifest_transforms import build_transforms
from camtrain.data.phantom_export import export_phantom
from camtrain.models import FlattenNet, LitClassifier

SIZE = (24, 24, 20)
ORGANS = "ts_seg/ts_total"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_ct_rate_tree(tmp_path_factory.mktemp("ct_rate") / "dataset", train=7, valid=3, size=SIZE)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_ct_rate_tree(tmp_path_factory.mktemp("raw") / "dataset", train=7, valid=3, size=SIZE, fixed=False)


@pytest.fixture
def copy(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "dataset")


def module(root, **options):
    return CTRateDataModule(root, **({"spacing": 16, "size": SIZE, "val_share": 0.3} | options))


def rewrite(file, change):
    rows = list(csv.reader(file.open()))
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(change(rows))


def test_the_shipped_table_has_a_rule_for_every_published_finding():
    table = OrganTable.load("ct_rate")
    assert set(table.labels) == {label_name(finding) for finding in FINDINGS}
    assert len(table.organs) == 117
    effusion = table.rules["pleural_effusion"]
    assert effusion.hull
    assert "heart" in effusion.minus
    assert len(effusion.units) == 2  # a hull for each lung, not one around both
    assert len(table.rules["lymphadenopathy"].units) == 1
    assert table.rules["consolidation"] == effusion
    assert len({rule for rule in table.rules.values() if rule.shaped}) == 3  # each costs time in every step
    assert table.rules["medical_material"].anywhere


def test_the_tree_is_the_published_layout(tree):
    assert (tree / "train_fixed/train_3/train_3_b/train_3_b_2.nii.gz").is_file()
    assert (tree / "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz").is_file()
    header = next(csv.reader((tree / "multi_abnormality_labels/train_predicted_labels.csv").open()))
    assert header == ["VolumeName", *FINDINGS]
    rows = list(csv.DictReader((tree / "metadata/validation_metadata.csv").open()))
    assert rows[0]["XYSpacing"].startswith("[")


def test_batch(tree):
    data = module(tree, organs=tree / ORGANS, batch_size=4)
    assert data.labels == [label_name(finding) for finding in FINDINGS]
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["organs"].shape == (4, 1, *SIZE)
    assert batch["label"].shape == (4, 18)
    assert all(patient == name.rsplit("_", 2)[0] for patient, name in zip(batch["patient"], batch["id"], strict=True))
    for has, organs in zip(batch["has_organs"], batch["organs"], strict=True):
        assert bool(organs.any()) == bool(has)
    read_batch(batch, {}, None)


def test_no_patient_is_in_two_splits_and_all_its_scans_stay_together(tree):
    data = module(tree, organs=tree / ORGANS)
    splits = {split: data.cases(split) for split in ("train", "val", "valid")}
    people = {split: {case.patient for case in cases} for split, cases in splits.items()}
    assert not people["train"] & people["val"]
    assert sum(len(cases) for cases in splits.values()) == 2 * (7 + 2 + 3 + 1)
    third = [split for split, cases in splits.items() for case in cases if case.patient == "train_3"]
    assert len(third) == 4  # two scans, two reconstructions each
    assert len(set(third)) == 1


def test_patients_keep_their_side_when_more_are_downloaded():
    some = [f"train_{i}" for i in range(0, 400, 3)]
    every = [f"train_{i}" for i in range(400)]
    assert chosen_for_validation(some, 0.2, 0) == chosen_for_validation(every, 0.2, 0) & set(some)
    assert 50 < len(chosen_for_validation(every, 0.2, 0)) < 110
    assert chosen_for_validation(every, 0.2, 1) != chosen_for_validation(every, 0.2, 0)
    assert len(chosen_for_validation(["train_1", "train_2"], 0.001, 0)) == 1
    assert len(chosen_for_validation(["train_1", "train_2"], 0.999, 0)) == 1
    assert chosen_for_validation(["train_1"], 0.5, 0) == set()


def test_val_share_zero_validates_on_the_published_split(tree):
    data = module(tree, val_share=0)
    assert {case.patient for case in data.cases("val")} == {"valid_1", "valid_2", "valid_3"}
    assert len({case.patient for case in data.cases("train")}) == 7


def test_first_reconstructions_only(tree, caplog):
    with caplog.at_level(logging.INFO):
        cases = module(tree, reconstructions="first").cases("train")
    assert all(case.id.endswith("_1") for case in cases)
    assert "9 are second reconstructions; 1 are not there; 1 show no chest" in caplog.text


@pytest.mark.slow
def test_headers_that_were_published_wrong_give_the_same_images(tree, raw):
    right, wrong = module(tree, organs=tree / ORGANS), module(raw, organs=raw / ORGANS)
    for data in (right, wrong):
        data.setup("test")
    for one, other in zip(right.test_dataloader()[0], wrong.test_dataloader()[0], strict=True):
        assert one["id"] == other["id"]
        # The origin is not in the metadata, so that the crop may fall half a voxel aside; HU and mm are the same.
        assert one["image"].shape == other["image"].shape
        assert torch.allclose(one["image"], other["image"], atol=2e-3)
        assert torch.equal(one["organs"], other["organs"])
        assert torch.allclose(one["affine"][:, :3, :3], other["affine"][:, :3, :3])
        lengths = other["original_affine"][:, :3, :3].norm(dim=1)
        assert torch.allclose(lengths, one["original_affine"][:, :3, :3].norm(dim=1))


def test_spacing_follows_the_axes_of_the_file(tmp_path):
    # Axes: back, up, left; the spacing of the metadata is that of the file's axes.
    affine = np.array([[0, 0, -1, 5], [-1, 0, 0, 7], [0, 1, 0, 9], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine), tmp_path / "train_1_a_1.nii.gz")
    read = build_transforms(None).transforms[0]
    case = read(Case("train_1_a_1", tmp_path / "train_1_a_1.nii.gz", None, "train", (), "", "here"))
    fixed = CorrectHeader({"train_1_a_1": Header(2.0, -1000.0, (0.5, 0.7, 3.0))})(case)
    assert fixed["image"].shape == (1, 5, 3, 4)
    assert np.allclose(np.diag(fixed["image"].affine)[:3], [3.0, 0.5, 0.7])
    assert np.allclose(np.linalg.norm(fixed["original_affine"][:3, :3], axis=0), [0.5, 0.7, 3.0])
    assert torch.equal(fixed["image"].as_tensor(), case["image"].as_tensor() * 2 - 1000)
    assert CorrectHeader({})(case) is case


def test_metadata_is_left_alone_where_headers_are_right(copy):
    (copy / "metadata/train_metadata.csv").unlink()
    module(copy).setup("fit")
    with pytest.raises(InputError, match="hold neither HU nor spacing"):
        module(copy, correct_headers=True).setup("fit")


@pytest.mark.parametrize("place", ["{tree}", "{scan}", "flat", "seg", "binary", "nested"])
def test_organs_in_every_place_that_people_have_them(tmp_path, place):
    volume = parse_name("train_4_b_2")
    paths = {
        "{tree}": "train/train_4/train_4_b/train_4_b_2.nii.gz",
        "{scan}": "train_4/train_4_b/train_4_b_2.nii.gz",
        "flat": "train_4_b_2.nii.gz",
        "seg": "train_4_b_2_seg.nii.gz",
        "binary": "train_4_b_2/heart.nii.gz",
        "nested": "train_fixed/train_4/train_4_b/train_4_b_2/segmentations/heart.nii.gz",
    }
    file = tmp_path / paths[place]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    found = OrganFinder(tmp_path).find("train_fixed", volume)
    assert found == (file.parent if file.name == "heart.nii.gz" else file)
    assert OrganFinder(tmp_path).find("train_fixed", parse_name("train_4_b_1")) is None
    assert OrganFinder(None).find("train_fixed", volume) is None


@pytest.mark.slow
def test_share_of_organs_in_every_batch(tree):
    data = module(tree, organs=tree / ORGANS, batch_size=2, organ_share=0.5, val_share=0.2)
    data.setup("fit")
    loader = data.train_dataloader()
    for _ in range(2):
        assert all(batch["has_organs"].sum() == 1 for batch in loader if len(batch["id"]) == 2)


@pytest.mark.slow
def test_other_modules_take_the_share_too(tmp_path):
    manifest = export_phantom(tmp_path / "files", {"train": 6, "val": 2}, size=(16, 16, 16))
    rows = list(csv.reader(manifest.open()))
    for row in rows[1:5]:
        row[2] = ""
    rewrite(manifest, lambda _: rows)
    data = ManifestDataModule(manifest, "phantom", batch_size=2, organ_share=0.5)
    data.setup("fit")
    assert [int(batch["has_organs"].sum()) for batch in data.train_dataloader()] == [1, 1, 1]
    root = make_rad_chestct_tree(tmp_path / "rad", train=6, val=2, test=0, size=(20, 24, 24))
    np.savez(root / "trn00001_organs.npz", organs=np.zeros(np.load(root / "trn00001.npz")["ct"].shape, dtype=np.uint8))
    rad = RadChestCTDataModule(root, organs=root, size=(20, 24, 24), batch_size=2, organ_share=0.5)
    (root / "val00001_organs.npz").write_bytes((root / "trn00001_organs.npz").read_bytes())
    rad.setup("fit")
    assert [int(batch["has_organs"].sum()) for batch in rad.train_dataloader()] == [1, 1, 1]
    assert rad.organ_report(["train", "val"]).cases == {"train": (6, 1), "val": (2, 1)}


def test_report_and_warning(copy, caplog):
    def only_the_sick_are_segmented(rows):
        organs = {file.name for file in (copy / ORGANS).rglob("*.nii.gz")}
        return [rows[0], *([row[0], *row[1:3], str(int(row[0] in organs)), *row[4:]] for row in rows[1:])]

    rewrite(copy / "multi_abnormality_labels/train_predicted_labels.csv", only_the_sick_are_segmented)
    data = module(copy, organs=copy / ORGANS, labels=["cardiomegaly"])
    report = data.organ_report(["train", "val"])
    (row, *_) = report.rows
    assert (row.split, row.difference) == ("train", 1)
    assert row.verdict == "too few"  # a handful of patients proves nothing, however clear it looks
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert f"{row.present} of {row.present + row.absent} cases of 'train' have organs" in caplog.text


@pytest.mark.slow
def test_fits_and_comes_back_from_its_checkpoint(tree, tmp_path):
    data = module(tree, organs=tree / ORGANS, labels=["lung_nodule", "cardiomegaly"], batch_size=4, organ_share=0.5)
    model = LitClassifier(FlattenNet(size=SIZE, widths=(2, 2, 2, 2)), labels=data.labels)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CTRateDataModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.labels == data.labels
    assert [case.id for case in again.cases("val")] == [case.id for case in data.cases("val")]
    assert dict(again.hparams) == dict(data.hparams)


# Wrong input ---------------------------------------------------------------------------------------------------------


def refused(match, root, **options):
    with pytest.raises(InputError, match=match) as caught:
        module(root, **options).setup("fit")
    assert "\n" not in str(caught.value)


def test_wrong_arguments(tree, tmp_path):
    refused("no such folder: set root=", tmp_path / "nowhere")
    refused("'all' or 'first', got 'second'", tree, reconstructions="second")
    refused("val_share expects", tree, val_share=1)
    refused("cache expects", tree, cache=2)
    refused("train, val or valid, got 'tset'", tree, test_splits=["tset"])
    refused("nearest: lung_nodule", tree, labels=["lung_nodul"])
    refused("each one once", tree, labels=["lung_nodule", "lung_nodule"])
    refused("organs expects a folder of segmentations", tree, organs=tree)
    refused("no such folder: correct organs=", tree, organs=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("expected organs of the", tree, organs=tmp_path / "empty")


def test_share_without_cases_of_both_kinds(tree):
    data = module(tree, organ_share=0.5)
    data.setup("fit")
    with pytest.raises(InputError, match="got none with among"):
        data.train_dataloader()


def test_wrong_tables_name_file_and_rows(copy):
    file = copy / "multi_abnormality_labels/train_predicted_labels.csv"
    rows = list(csv.reader(file.open()))
    wrong = [["train_x.nii.gz", *rows[1][1:]], [rows[2][0], "2", "yes", *rows[2][3:]], rows[3], rows[3]]
    rewrite(file, lambda _: [rows[0], *wrong])
    with pytest.raises(InputError) as caught:
        module(copy)
    text = str(caught.value)
    assert "4 faults" in text
    for part in (
        "row 2: VolumeName 'train_x'",
        "row 3, column 'Medical material': '2'",
        "'yes'",
        f"row 5: {rows[3][0].removesuffix('.nii.gz')!r} stands in row 4 already",
    ):
        assert part in text
    rewrite(file, lambda _: [rows[0], rows[1][:-1]])
    with pytest.raises(InputError, match="row 2 has 18 cells instead of 19"):
        module(copy)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="CSV file in UTF-8"):
        module(copy)
    file.unlink()
    with pytest.raises(InputError, match="with the findings, got none"):
        module(copy)


def test_empty_cells_are_unknown(copy):
    file = copy / "multi_abnormality_labels/train_predicted_labels.csv"
    rewrite(file, lambda rows: [rows[0], [rows[1][0], "", "-1", "NaN", *rows[1][4:]]])
    _, found = read_labels(file)
    assert np.isnan(next(iter(found.values()))[:3]).all()


def test_wrong_metadata_is_told_at_once(raw):
    file = raw / "metadata/train_metadata.csv"
    names = {"train_1_a_1", "train_2_a_1"}
    assert read_headers(file, names)["train_1_a_1"].intercept == -8192
    with pytest.raises(InputError, match=r"train_metadata\.csv, no row for train_99_a_1"):
        read_headers(file, names | {"train_99_a_1"})


def test_metadata_with_words_instead_of_numbers(tmp_path):
    file = tmp_path / "m.csv"
    file.write_text("VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\ntrain_1_a_1.nii.gz,1,none,[1; 1],0\n")
    with pytest.raises(InputError, match="row 2 \\(train_1_a_1\\): 1, none"):
        read_headers(file, {"train_1_a_1"})


def test_no_volume_and_no_folder(copy):
    shutil.rmtree(copy / "train_fixed")
    with pytest.raises(InputError, match="expected the folder train_fixed or train"):
        module(copy).setup("fit")
    (copy / "train_fixed").mkdir()
    with pytest.raises(InputError, match="got none of 20; 19 are not there; 1 show no chest"):
        module(copy).setup("fit")


def test_tree_refuses_a_full_folder_and_wrong_numbers(tree, tmp_path):
    with pytest.raises(InputError, match="empty or new folder"):
        make_ct_rate_tree(tree)
    with pytest.raises(InputError, match="numbers from 0 on"):
        make_ct_rate_tree(tmp_path / "a", train=-1)


def test_names():
    assert parse_name("dataset/train_fixed/train_10/train_10_c/train_10_c_2.nii.gz").scan == "train_10_c"
    assert parse_name("train_1.nii.gz") is None
