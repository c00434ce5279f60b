"""Subtomograms as batches, and a real training on them with both callbacks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from scipy.ndimage import distance_transform_edt

import camtrain as ct
from camtrain._batch import read_batch
from camtrain._lightning import LightningDataModule
from camtrain.data import CryoETDataModule
from camtrain.data.cryoet import CLASSES
from camtrain.data.cryoet_module import CryoETDataset, particles
from camtrain.models import LitClassifier, SubtomogramCNN

SIZE = (20, 24, 22)


def module(**options):
    plain = {"classes": ["rod", "torus", "shell"], "cases": 6, "size": SIZE, "batch_size": 4, "val_cases": 5}
    return CryoETDataModule(**(plain | {"test_cases": 7} | options))


def test_labels_and_table_are_there_after_init():
    data = CryoETDataModule()
    assert isinstance(data, LightningDataModule)
    assert data.labels == data.table.labels == list(CLASSES)
    assert len(CLASSES) == 10
    assert data.test_splits == ["test"]
    assert module().labels == ["rod", "torus", "shell"]


def test_train_batch():
    batch = next(iter(module(snr=0.1).train_dataloader()))
    assert set(batch) == {"image", "label", "organs", "has_organs", "id"}  # never the particle itself
    assert batch["image"].shape == batch["organs"].shape == (4, 1, *SIZE)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].mean().abs() < 1e-3
    assert batch["label"].shape == (4, 3)
    assert batch["label"].sum(1).tolist() == [1] * 4
    assert batch["has_organs"].all()
    read = read_batch(batch, outputs=3)
    assert read.label.shape == (4, 3)
    assert read.affine is None


@pytest.mark.parametrize("split", ["val", "test"])
def test_scoring_batches_carry_the_particle(split):
    data = module()
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()[0]
    for batch in loader:
        inside = batch["particle"]
        assert inside.shape == batch["image"].shape
        assert inside.dtype == torch.bool
        assert (batch["organs"][inside] == 1).all()
        allowed = data.table.allowed(batch["organs"])
        assert torch.equal(allowed, (batch["organs"] == 1).expand(-1, 3, *SIZE))
        where = particles(batch)
        assert torch.equal(where.flatten(2).any(2), batch["label"].bool())
        assert torch.equal(where.any(1, keepdim=True), inside)


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_margin_is_the_distance_from_the_particle(margin):
    """Against scipy's distance, which counts from the middles of voxels."""
    dataset = CryoETDataset(module(voxel=1.2).simulation, "test", 3, margin=margin, truth=True)
    for case in (dataset[i] for i in range(3)):
        away = distance_transform_edt(~case["particle"][0].numpy(), sampling=1.2)
        organs = case["organs"][0].numpy() == 1
        assert away[organs].max() <= margin + 1.2
        assert organs[away <= margin - 1.2].all()
        assert organs[away == 0].all()


def test_loaders_and_splits():
    data = module(test_splits=["noise_free", "test"], snr=0.2)
    loaders = data.test_dataloader()
    assert all(isinstance(d, DataLoader) for d in (*loaders, data.train_dataloader(), data.val_dataloader()))
    assert [next(iter(d))["id"][0] for d in loaders] == ["noise_free-00000", "test-00000"]
    assert [len(d.dataset) for d in loaders] == [7, 7]
    assert len(CryoETDataModule(cases=9).val_dataloader().dataset) == 2
    everything = [data.train_dataloader(), data.val_dataloader(), loaders[1]]
    seen = [{o.numpy().tobytes() for batch in d for o in batch["organs"]} for d in everything]
    for one, other in itertools.combinations(seen, 2):
        assert not one & other


def test_order_follows_the_seed_alone():
    def order(data):
        return [i for batch in data.train_dataloader() for i in batch["id"]]

    torch.manual_seed(0)
    first = order(module())
    torch.manual_seed(1)
    assert order(module()) == first
    assert order(module(seed=5)) != first


def test_a_kept_case_is_the_one_that_is_made_anew(monkeypatch):
    data = module(snr=0.1, num_workers=0)
    kept = data.test_dataloader()[0].dataset
    first = kept[2]
    kept.make_all()
    assert kept[2]["image"].equal(first["image"])
    monkeypatch.setattr("camtrain.data.cryoet_module.MEMORY", 0)
    fresh = CryoETDataset(data.simulation, "test", 7, truth=True)
    fresh.make_all()
    assert not fresh._kept
    for key in ("image", "label", "organs", "particle"):
        assert fresh[2][key].equal(first[key])
    with pytest.raises(IndexError, match="case 7 of 7"):
        kept[7]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": ["rod", "tours"]}, "torus"),
        ({"size": 12}, "at least 20 nm"),
        ({"snr": -1.0}, "snr expects"),
        ({"test_splits": ["tset"]}, "test, noise_free"),
        ({"cases": 0}, "cases expects"),
        ({"margin": -1.0}, "margin expects"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ct.InputError, match=words):
        module(**arguments)


@pytest.mark.slow
def test_an_epoch_with_both_callbacks(tmp_path):
    import pytorch_lightning as pl

    torch.manual_seed(0)
    data = module(snr=0.5)
    net = SubtomogramCNN(size=SIZE, widths=(2, 3), hidden=4)
    model = LitClassifier(net, labels=data.labels, loss=torch.nn.CrossEntropyLoss())
    layer = "net.maxpool2"
    callbacks = [
        ct.MaskLossCallback(layer=layer, table=data.table, weight=0.5),
        ct.AttentionMonitor(layer=layer, table=data.table, methods=["hirescam", "respondcam"]),
    ]
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["train/mask_loss"] > 0
    assert found["train/task_loss"] == pytest.approx(np.log(3), abs=0.5)
    assert 0 <= found["val/organ_iou"] <= 1
    assert any("respondcam" in name for name in found)
    trainer.test(model, data)
