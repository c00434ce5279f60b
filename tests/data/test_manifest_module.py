"""`ManifestDataModule`: the batch contract, splits, cache, checkpoints, and errors that name file and row."""

from __future__ import annotations

import time
import types
from pathlib import Path

import lightning.pytorch as lp
import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import pytorch_lightning.demos.boring_classes
import torch
from monai.transforms import Compose, Lambda
from torch.utils.data import RandomSampler

from camtrain._batch import read_batch
from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.manifest_module import CaseDataset, ManifestDataModule
from camtrain.data.manifest_transforms import load_case

TABLE = (
    "organs: {heart: 3, lung_left: 1, lung_right: 2}\n"
    "labels: {nodule: [lung_left], effusion: [heart], mass: anywhere}\n"
)
HEADER = "id,image,organs,split,effusion,nodule"
CT = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen"
needs_ct = pytest.mark.skipif(not CT.exists(), reason="the real CT is not here")


@pytest.fixture
def study(tmp_path):
    """Writes a manifest of small scans of different sizes, voxel sizes and orientations."""
    rng = np.random.default_rng(0)
    (tmp_path / "table.yaml").write_text(TABLE)
    affines = [np.diag([2, 2, 3, 1.0]), np.diag([-1.5, -1.5, 5, 1.0]), np.diag([1, -2, -2.5, 1.0])]
    shapes = [(14, 13, 9), (18, 20, 7), (21, 9, 11)]
    for name, shape, matrix in zip("abc", shapes, affines, strict=True):
        matrix[:3, 3] = rng.uniform(-50, 50, 3)
        hu = rng.integers(-1000, 800, shape).astype(np.int16)
        organs = rng.integers(0, 4, shape).astype(np.uint8)
        nib.save(nib.Nifti1Image(hu, matrix), tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(organs, matrix), tmp_path / f"{name}_seg.nii.gz")

    def _write(*rows, header=HEADER, **arguments):
        (tmp_path / "cases.csv").write_text("\n".join([header, *rows]) + "\n")
        options = {"spacing": 2.5, "size": (12, 10, 8), "table": tmp_path / "table.yaml"} | arguments
        return ManifestDataModule(tmp_path / "cases.csv", **options)

    _write.folder = tmp_path
    return _write


ROWS = ("A,a.nii.gz,a_seg.nii.gz,train,1,", "B,b.nii.gz,,train,0,1", "C,c.nii.gz,c_seg.nii.gz,val,-1,0")


def test_batch_contract(study):
    data = study(*ROWS, batch_size=2)
    assert data.labels == ["effusion", "nodule"]
    assert list(data.table.labels) == ["effusion", "nodule"]
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert type(batch["image"]) is torch.Tensor
    assert type(batch["organs"]) is torch.Tensor
    assert batch["image"].shape == batch["organs"].shape == (2, 1, 12, 10, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["organs"].dtype == torch.int32
    assert batch["affine"].shape == (2, 4, 4)
    order = [batch["id"].index(i) for i in "AB"]
    a, b = order
    assert batch["has_organs"].dtype == torch.bool
    assert batch["has_organs"][order].tolist() == [True, False]
    assert batch["label"].dtype == torch.float32
    assert batch["label"][a, 0] == 1
    assert batch["label"][a, 1].isnan()
    assert batch["label"][b].tolist() == [0, 1]
    assert batch["organs"][a].unique().tolist() == [0, 1, 2, 3]
    assert not batch["organs"][b].any()
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert not torch.equal(batch["affine"][0], batch["affine"][1])
    for i in order:
        assert nib.aff2axcodes(batch["affine"][i].numpy()) == ("R", "A", "S")
    contract = read_batch(batch, outputs=2)
    assert contract.affine is not None
    assert contract.ids == batch["id"]


def test_regions_come_from_the_table(study):
    data = study(*ROWS)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    allowed = data.table.allowed(batch["organs"])
    assert torch.equal(allowed[:, 0:1], batch["organs"] == 3)
    assert torch.equal(allowed[:, 1:2], batch["organs"] == 1)


def test_affine_is_the_place_of_the_voxels(study):
    data = study(*ROWS, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for i, name in enumerate(batch["id"]):
        scan = nib.load(study.folder / f"{name.lower()}.nii.gz")
        middle = scan.affine @ [*(np.array(scan.shape) - 1) / 2, 1]
        centre = batch["affine"][i].double().numpy() @ [5.5, 4.5, 3.5, 1]
        assert np.abs(centre - middle).max() <= 2.5  # cropped around the middle, to a voxel


def test_labels_argument_orders_columns_and_table(study):
    data = study(*ROWS, labels=["nodule", "effusion"])
    assert data.labels == list(data.table.labels) == ["nodule", "effusion"]
    data.setup("validate")
    label = next(iter(data.val_dataloader()))["label"]
    assert label[0, 0] == 0
    assert label[0, 1].isnan()


def test_table_may_be_an_object_or_the_content(study):
    table = OrganTable.load(study.folder / "table.yaml")
    for source in (table, table.to_dict(), str(study.folder / "table.yaml")):
        data = study(*ROWS, table=source)
        assert data.table == table.select(["effusion", "nodule"])


def test_one_name_may_stand_without_a_list(study):
    data = study(*ROWS, labels="nodule", test_splits="val")
    assert data.labels == ["nodule"]
    assert data.test_splits == ["val"]


def test_several_test_splits(study):
    rows = (*ROWS[:2], "C,c.nii.gz,c_seg.nii.gz,test,-1,0")
    data = study(*rows)
    data.setup("test")
    assert next(iter(data.test_dataloader()))["id"] == ["C"]
    data = study(*rows, test_splits=["test", "train"])
    data.setup("test")
    assert [[i for b in loader for i in b["id"]] for loader in data.test_dataloader()] == [["C"], ["A", "B"]]


def test_no_validation(study):
    data = study(*ROWS[:2], val_split=None)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_incomplete_batches_and_shuffling(study):
    rows = [f"{i},{n}.nii.gz,,train,1,0" for i in range(4) for n in [f"a{i}"]] + [ROWS[2]]
    for i in range(4):
        (study.folder / f"a{i}.nii.gz").write_bytes((study.folder / "a.nii.gz").read_bytes())
    data = study(*rows, batch_size=3)
    data.setup("fit")
    torch.manual_seed(5)
    loader = data.train_dataloader()
    epochs = [[i for batch in loader for i in batch["id"]] for _ in range(8)]
    assert all(sorted(ids) == ["0", "1", "2", "3"] for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) > 1
    torch.manual_seed(5)
    loader = data.train_dataloader()
    assert [[i for batch in loader for i in batch["id"]] for _ in range(8)] == epochs


def test_loader_leaves_the_global_random_state_usable(study):
    data = study(*ROWS)
    data.setup("fit")
    torch.manual_seed(1)
    first = torch.rand(3)
    data.train_dataloader()
    assert not torch.equal(torch.rand(3), first)  # MONAI's loader would start the generator again


def test_cache_keeps_volumes_in_memory(study):
    data = study(*ROWS, cache=True)
    data.setup("fit")
    for scan in study.folder.glob("*.nii.gz"):
        scan.unlink()
    assert len(list(data.train_dataloader())) == 1
    data.setup("fit")  # a second fit with one object reads nothing again
    assert len(list(data.val_dataloader())) == 1


@pytest.mark.parametrize("cache", [True, False, 0.5])
def test_cache_changes_nothing(study, cache):
    data = study(*ROWS, cache=cache)
    data.setup("validate")
    reference = study(*ROWS, cache=True)
    reference.setup("validate")
    one, other = next(iter(data.val_dataloader())), next(iter(reference.val_dataloader()))
    for key in ("image", "organs", "affine"):
        assert torch.equal(one[key], other[key])


def test_augmentation_is_for_training_only_and_new_each_epoch(study):
    data = study(*ROWS, augment=True, batch_size=2, test_splits=["train"])
    data.setup("fit")
    torch.manual_seed(0)
    loader = data.train_dataloader()
    one, other = (dict(zip(b["id"], b["image"], strict=True)) for b in (next(iter(loader)), next(iter(loader))))
    assert any(not torch.equal(one[i], other[i]) for i in one)
    data.setup("test")
    for still in (data.val_dataloader(), data.test_dataloader()):
        assert torch.equal(next(iter(still))["image"], next(iter(still))["image"])


def test_augmentation_follows_from_seed_epoch_and_case(study, monkeypatch):
    """So the number of workers does not matter, nor what was drawn before: a run that goes on sees the same cases."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    made = []
    for workers, on_error in ((0, "raise"), (1, "skip")):
        data = study(*ROWS, augment=True, batch_size=2, num_workers=workers, on_error=on_error)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        made.append(torch.cat([batch["image"] for batch in loader]))
        torch.rand(5)
    assert torch.equal(*made)


@pytest.mark.slow
@pytest.mark.parametrize("lightning", [pl, lp])
def test_trainer_fits_and_checkpoint_rebuilds(study, lightning):
    class Net(lightning.LightningModule):
        def __init__(self, labels=("x",)):
            super().__init__()
            self.save_hyperparameters()
            self.head = torch.nn.Linear(1, 2)
            self.seen = []

        def training_step(self, batch):
            self.seen += batch["id"]
            known = ~batch["label"].isnan()
            return self.head(batch["image"].mean((1, 2, 3, 4))[:, None])[known].square().mean()

        def validation_step(self, batch):
            self.seen += batch["id"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data, net = study(*ROWS), Net()
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**options, default_root_dir=study.folder, log_every_n_steps=1)
    trainer.fit(net, datamodule=data)
    assert set(net.seen) == {"A", "B", "C"}
    path = study.folder / "net.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = ManifestDataModule.load_from_checkpoint(path)
    assert again.labels == data.labels
    assert dict(again.hparams) == dict(data.hparams)
    again.setup("validate")
    assert next(iter(again.val_dataloader()))["image"].shape == (1, 1, 12, 10, 8)


def _command_line(config, *arguments):
    from pytorch_lightning.cli import LightningCLI

    cli = LightningCLI(
        pl.demos.boring_classes.BoringModel,
        ManifestDataModule,
        args=["--config", str(config), *arguments],
        run=False,
        save_config_callback=None,
        trainer_defaults={"logger": False, "accelerator": "cpu"},
    )
    return cli.datamodule


@pytest.mark.slow
def test_command_line_can_parse_it(study, monkeypatch):
    study(*ROWS)
    monkeypatch.chdir(study.folder)
    Path("config.yaml").write_text(
        "data: {manifest: cases.csv, table: table.yaml, spacing: [2, 2, 2.5], size: 16, "
        "window: [-1000, 800], cache: 0.5, labels: [nodule], test_splits: [val]}"
    )
    data = _command_line("config.yaml", "--data.batch_size=3", "--data.num_workers", "0")
    assert data.labels == ["nodule"]
    assert data.hparams["spacing"] == [2, 2, 2.5]
    assert (data.cache_rate, data.batch_size) == (0.5, 3)
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["image"].shape == (1, 1, 16, 16, 16)
    inline = "{organs: {heart: 3}, labels: {nodule: anywhere}}"
    assert _command_line("config.yaml", f"--data.table={inline}").table.anywhere == (True,)
    Path("wrong.yaml").write_text("organs: {heart: 3}\nlabels: {nodule: [hart]}\n")
    with pytest.raises(InputError, match=r"wrong\.yaml.*'hart'"):
        _command_line("config.yaml", "--data.table=wrong.yaml")


# ---- wrong input --------------------------------------------------------------------------------------------------


def test_label_without_a_rule(study):
    with pytest.raises(InputError, match=r"cases\.csv: expected a rule .*'nodul'; nearest: nodule.*labels="):
        study("A,a.nii.gz,,train,1,1", header="id,image,organs,split,effusion,nodul")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"labels": ["mass"]}, "labels= names 'mass', which is no label column"),
        ({"table": "totalsegmentator_chst"}, "totalsegmentator_chest"),
        ({"batch_size": 0}, "batch_size expects a whole number from 1 on, got 0"),
        ({"num_workers": -1}, "num_workers expects"),
        ({"cache": 2.0}, "cache expects"),
        ({"size": (8, 8)}, "size expects"),
        ({"spacing": -1}, "spacing expects"),
        ({"window": [5, 5]}, "window expects"),
    ],
)
def test_wrong_arguments(study, arguments, match):
    with pytest.raises(InputError, match=match):
        study(*ROWS, **arguments)


@pytest.mark.parametrize(
    ("stage", "rows", "match"),
    [
        ("fit", ["A,a.nii.gz,,tran,1,0", ROWS[2]], "train_split expects .*'train', got none; nearest: tran"),
        ("fit", ROWS[:2], "val_split expects cases of the split 'val', got none"),
        ("validate", ROWS[:2], "val_split expects"),
        ("test", ROWS, "test_splits expects cases of the split 'test', got none"),
    ],
)
def test_a_missing_split_is_told_when_it_is_asked_for(study, stage, rows, match):
    data = study(*rows)
    with pytest.raises(InputError, match=match):
        data.setup(stage)


def test_cases_that_no_loader_uses_are_reported(study, caplog):
    study(*ROWS[:2], "C,c.nii.gz,,external,-1,0")
    assert "cases in no train, validation or test split: 1 of 'external'" in caplog.text


def test_different_sizes_in_a_batch(study):
    data = study(*ROWS, size=None, batch_size=2)
    data.setup("fit")
    with pytest.raises(InputError, match=r"one size in a batch, got \(.*\) for '[AB]' and .* set size="):
        next(iter(data.train_dataloader()))


def _break(folder, what):
    if what == "truncated":
        path = folder / "b.nii.gz"
        path.write_bytes(path.read_bytes()[:900])
        return ["b.nii.gz", "readable NIfTI"]
    scan = nib.load(folder / "b.nii.gz")
    if what == "nan":
        data = scan.get_fdata()
        data[1, 2, 3] = np.nan
        nib.save(nib.Nifti1Image(data, scan.affine), folder / "b.nii.gz")
        return ["1 NaN or Inf voxels"]
    if what == "grid":
        nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), scan.affine), folder / "b_seg.nii.gz")
        return ["one voxel grid", "(3, 4, 5)", "(18, 20, 7)"]
    nib.save(nib.Nifti1Image(np.full(scan.shape, 42, np.uint8), scan.affine), folder / "b_seg.nii.gz")
    return ["42", "b_seg.nii.gz"]


@pytest.mark.parametrize("what", ["truncated", "nan", "grid", "id"])
def test_a_bad_volume_names_file_and_row(study, what):
    data = study(ROWS[0], "B,b.nii.gz,b_seg.nii.gz,train,0,1", ROWS[2])
    words = _break(study.folder, what)
    with pytest.raises(InputError) as error:
        data.setup("fit")
    for word in ["cases.csv, row 3 (id 'B')", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_without_cache_the_loader_raises_one_sentence(study, workers):
    data = study(ROWS[0], "B,b.nii.gz,b_seg.nii.gz,train,0,1", ROWS[2], cache=False, num_workers=workers)
    _break(study.folder, "truncated")
    data.setup("fit")
    with pytest.raises(InputError) as error:
        list(data.train_dataloader())
    assert str(error.value).startswith(f"{study.folder}/cases.csv, row 3 (id 'B'): expected a readable NIfTI")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_workers_give_the_same_batches(study):
    batches = []
    for workers in (0, 2):
        data = study(*ROWS, cache=False, num_workers=workers)
        data.setup("validate")
        batches.append(next(iter(data.val_dataloader())))
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert type(batches[1]["image"]) is torch.Tensor


# ---- a real scan --------------------------------------------------------------------------------------------------


@needs_ct
def test_real_ct_with_organs_by_totalsegmentator(tmp_path):
    table = OrganTable.load("totalsegmentator_abdomen")
    name = next(iter(table.labels))
    (tmp_path / "cases.csv").write_text(
        f"id,image,organs,split,{name}\nreal,{CT / 'ct.nii.gz'},{CT / 'organs.nii.gz'},val,1\n"
    )
    data = ManifestDataModule(
        tmp_path / "cases.csv", "totalsegmentator_abdomen", spacing=3, size=(128, 96, 32), window=(-1000, 800)
    )
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 1, 128, 96, 32)
    hu = nib.load(CT / "ct.nii.gz").get_fdata()
    ids = nib.load(CT / "organs.nii.gz").get_fdata()
    # 122 x 101 x 30 voxels of 3 mm in RAS already: padded by 3 and 1, cropped by 2 and 3.
    np.testing.assert_allclose(
        batch["image"][0, 0, 3:125, :, 1:31], np.clip((hu[:, 2:98] + 1000) / 1800, 0, 1), atol=1e-6
    )
    np.testing.assert_array_equal(batch["organs"][0, 0, 3:125, :, 1:31], ids[:, 2:98])
    assert not batch["image"][0, 0, :3].any()
    shift = nib.load(CT / "ct.nii.gz").affine @ [-3, 2, -1, 1]
    np.testing.assert_allclose(batch["affine"][0, :, 3], shift, rtol=1e-5)
    regions = data.table.allowed(batch["organs"])
    assert regions.shape == (1, 1, 128, 96, 32)


@pytest.mark.slow
@needs_ct
def test_real_organs_as_a_folder_give_the_same_ids(tmp_path):
    table = OrganTable.load("totalsegmentator_abdomen")
    scan = nib.load(CT / "organs.nii.gz")
    ids = np.asarray(scan.dataobj)
    (tmp_path / "organs").mkdir()
    for name, (number,) in table.organs.items():
        if (ids == number).any():
            mask = nib.Nifti1Image((ids == number).astype(np.uint8), scan.affine)
            nib.save(mask, tmp_path / "organs" / f"{name}.nii.gz")
    case = load_case(CT / "ct.nii.gz", organs=tmp_path / "organs", table=table)
    np.testing.assert_array_equal(case["organs"][0, 0], ids)


def test_a_broken_case_leaves_no_thread_at_work():
    """A thread that still reads when the process ends aborts it, whatever the exit code was to be."""
    busy = []

    def read(case):
        if case == "bad":
            raise InputError("broken")
        busy.append(case)
        time.sleep(0.2)
        busy.remove(case)
        return {"image": torch.zeros(1)}

    cases = [types.SimpleNamespace(where=f"row {i}", name="bad" if i == 1 else f"c{i}") for i in range(6)]
    with pytest.raises(InputError, match="row 1: broken"):
        CaseDataset(cases, Compose([Lambda(lambda case: read(case.name))]), 1.0, 3)
    assert not busy


def test_orders_follow_from_the_seed_and_the_epoch(study, monkeypatch):
    """A run that goes on from a checkpoint sees its cases as it would have seen them."""
    rows = [f"{i},{name}.nii.gz,,train,1,0" for i, name in enumerate("abaab")] + ["v,c.nii.gz,,val,0,1"]
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def loader():
        data = study(*rows, batch_size=2)
        data.setup("fit")
        return data.train_dataloader()

    def ids(loader):
        return [case for batch in loader for case in batch["id"]]

    whole, resumed = loader(), loader()
    epochs = [ids(whole) for _ in range(4)]
    assert len({tuple(order) for order in epochs}) > 1
    assert isinstance(whole.sampler, RandomSampler)  # where Lightning finds none, it does not shuffle between processes
    resumed.sampler.set_epoch(3)
    assert ids(resumed) == epochs[3]
