"""`PhantomDataModule`: batches of the contract, splits, memory, and one sentence for wrong arguments."""

import itertools
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from monai.data import DataLoader
from torch import nn

from camtrain import data as rooms
from camtrain._batch import read_batch
from camtrain._errors import InputError
from camtrain.data import PhantomDataModule
from camtrain.data.phantom import DEFAULT_SIZE, LABELS, SPLITS, Phantom
from camtrain.data.phantom_dataset import PhantomDataset

SIZE = (22, 18, 20)


def module(**kwargs):
    return PhantomDataModule(**({"cases": 6, "size": SIZE, "batch_size": 3, "val_cases": 4, "test_cases": 5} | kwargs))


class TestContract:
    def test_labels_and_table_are_there_after_init(self):
        data = PhantomDataModule()
        assert data.labels == list(LABELS)
        assert data.table.labels == list(LABELS)
        assert data.phantom.size == DEFAULT_SIZE
        picked = PhantomDataModule(labels=["effusion", "cardiomegaly"])
        assert picked.labels == picked.table.labels == ["effusion", "cardiomegaly"]

    def test_train_batch(self):
        batch = next(iter(module().train_dataloader()))
        assert set(batch) == {"image", "label", "organs", "has_organs", "id", "affine"}  # never the lesions
        assert batch["image"].shape == (3, 1, *SIZE)
        assert batch["image"].dtype == torch.float32
        assert 0 <= batch["image"].min() < 0.1
        assert 0.5 < batch["image"].max() <= 1
        assert batch["label"].shape == (3, 8)
        assert batch["label"].dtype == torch.float32
        assert batch["organs"].shape == (3, 1, *SIZE)
        assert batch["organs"].dtype == torch.uint8
        assert batch["has_organs"].tolist() == [True] * 3
        assert batch["affine"].shape == (3, 4, 4)
        assert all(isinstance(i, str) for i in batch["id"])

    def test_read_batch_takes_it(self):
        read = read_batch(next(iter(module(labels=["nodule", "aneurysm"]).train_dataloader())), outputs=2)
        assert read.image.shape == read.organs.shape == (3, 1, *SIZE)
        assert read.label.shape == (3, 2)
        assert read.affine.shape == (3, 4, 4)
        assert len(read.ids) == 3
        assert read.has_organs.all()

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_scoring_batches_carry_lesions(self, split):
        data = module(labels=["effusion", "nodule", "aneurysm"])
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()[0]
        for batch in loader:
            lesions = batch["lesions"]
            assert lesions.shape == (len(batch["id"]), 3, *SIZE)
            assert lesions.dtype == torch.bool
            assert torch.equal(lesions.flatten(2).any(2), batch["label"].bool())
            allowed = data.table.allowed(batch["organs"])
            assert not (lesions & ~allowed).any()

    def test_loaders_are_monais(self):
        data = module()
        assert isinstance(data.train_dataloader(), DataLoader)
        assert isinstance(data.val_dataloader(), DataLoader)
        assert all(isinstance(d, DataLoader) for d in data.test_dataloader())


class TestSplits:
    def test_test_loaders_follow_the_names(self):
        data = module(test_splits=["shift_reversed", "test"])
        assert data.test_splits == ["shift_reversed", "test"]
        loaders = data.test_dataloader()
        ids = [next(iter(d))["id"][0] for d in loaders]
        assert ids == ["shift_reversed-00000", "test-00000"]
        assert [len(d.dataset) for d in loaders] == [5, 5]

    def test_default_order_and_counts(self):
        data = PhantomDataModule(cases=9, size=SIZE)
        assert data.test_splits == ["test", "shift_free", "shift_random", "shift_reversed"]
        assert len(data.train_dataloader().dataset) == 9
        assert len(data.val_dataloader().dataset) == 2
        assert len(data.test_dataloader()[0].dataset) == 2

    def test_train_val_and_test_share_no_patient(self):
        data = module(shortcut=None)
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()[0]]
        seen = [{organs.numpy().tobytes() for batch in d for organs in batch["organs"]} for d in loaders]
        for one, other in itertools.combinations(seen, 2):
            assert not one & other

    def test_order_of_training_cases_follows_the_seed_alone(self):
        def order(data):
            loader = data.train_dataloader()
            return [[i for batch in loader for i in batch["id"]] for _ in range(2)]

        torch.manual_seed(0)
        first = order(module())
        torch.manual_seed(1)
        before = torch.get_rng_state()
        assert order(module()) == first
        assert torch.equal(torch.get_rng_state(), before)
        assert first[0] != first[1]
        assert sorted(first[0]) == sorted(first[1])
        assert order(module(seed=1)) != first


class TestDataset:
    def test_cases_are_made_once(self, monkeypatch):
        dataset = PhantomDataset(module().phantom, "train", 40)
        first = dataset[17]["image"]
        monkeypatch.setattr(type(dataset.phantom), "cases", None)
        assert torch.equal(dataset[17]["image"], first)
        for index in (15, 32):
            with pytest.raises(TypeError):
                dataset[index]

    def test_neighbours_are_made_together_as_far_as_they_are_small(self, monkeypatch):
        made, cases = [], Phantom.cases
        monkeypatch.setattr(
            Phantom, "cases", lambda self, split, at, *args: made.extend(at) or cases(self, split, at, *args)
        )
        small = PhantomDataset(Phantom(size=(24, 20, 24)), "train", 20)
        small[18]
        assert sorted(made) == [16, 17, 18, 19]
        small[3], small[17]
        assert sorted(made) == list(range(20))
        for size, memory, expected in (((96, 72, 60), 2**31, [6, 7, 8]), ((150, 100, 100), 2**31, [7]), (24, 100, [7])):
            made.clear()
            shape = (size,) * 3 if isinstance(size, int) else size
            PhantomDataset(Phantom(size=shape), "train", 20, memory=memory)[7]
            assert sorted(made) == expected

    @pytest.mark.parametrize("options", [{}, {"shortcut_at": "other_organ"}, {"organs": "holes"}, {"shortcut": None}])
    def test_splits_that_share_scans_are_those_that_do_not(self, options):
        data = PhantomDataModule(cases=4, size=20, test_cases=3, **options)
        for split in ("shift_reversed", "test", "shift_free", "shift_random"):
            alone = PhantomDataset(data.phantom, split, 3, lesions=True)
            for index in range(3):
                shared, own = data._sets[split][index], alone[index]
                assert shared.pop("id") == own.pop("id")
                assert all(torch.equal(shared[name], own[name]) for name in own)

    def test_scans_of_the_same_people_are_made_once(self, monkeypatch):
        data, made = module(), []
        cases = Phantom.cases

        def counted(self, split, at, *args, **kwargs):
            made.extend((split, index) for index in at)
            return cases(self, split, at, *args, **kwargs)

        monkeypatch.setattr(Phantom, "cases", counted)
        for split in ("test", "shift_reversed", "shift_free"):
            data._sets[split][1]
        assert sorted(made) == [("test", index) for index in range(len(data._sets["test"]))]

    def test_a_split_too_large_for_the_memory_is_made_anew(self):
        dataset = PhantomDataset(module().phantom, "val", 3, lesions=True, memory=100)
        assert torch.equal(dataset[1]["image"], dataset[1]["image"])
        dataset.make_all()
        assert not dataset._kept

    def test_image_is_the_windowed_scan(self):
        phantom = module().phantom
        expected = np.clip((phantom.case("train", 1).hu + 1000) / 1800, 0, 1)
        assert np.allclose(PhantomDataset(phantom, "train", 2)[1]["image"][0], expected, atol=5e-4)

    def test_caller_cannot_spoil_the_kept_image(self):
        dataset = PhantomDataset(module().phantom, "train", 1)
        dataset[0]["image"].zero_()
        assert dataset[0]["image"].max() > 0.5

    def test_index_out_of_range(self):
        with pytest.raises(IndexError):
            PhantomDataset(module().phantom, "train", 2)[2]

    @pytest.mark.slow
    def test_workers_give_the_same_batches(self):
        alone, helped = module().val_dataloader(), module(num_workers=2).val_dataloader()
        for one, other in zip(alone, helped, strict=True):
            assert torch.equal(one["image"], other["image"])
            assert one["id"] == other["id"]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"labels": ["nodule", "efusion"]}, "labels does not know 'efusion'; nearest: effusion"),
        ({"size": 8}, "size expects three whole numbers of at least 16 voxels, got (8, 8, 8)"),
        ({"size": [30, 30]}, "size expects three whole numbers"),
        ({"shortcut": -0.5}, "shortcut expects a number from 0 to 1, got -0.5"),
        ({"shortcut_at": "organ"}, "shortcut_at does not know 'organ'"),
        ({"organs": "exakt"}, "organs does not know 'exakt'; nearest: exact"),
        ({"test_splits": ["shift_fre"]}, "test_splits does not know 'shift_fre'; nearest: shift_free"),
        ({"test_splits": ["train"]}, "test_splits does not know 'train'"),
        ({"cases": 0}, "cases expects a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size expects"),
        ({"num_workers": -1}, "num_workers expects"),
        ({"val_cases": 0}, "val_cases expects"),
        ({"cooccurrence": 2.0}, "cooccurrence expects"),
    ],
)
def test_wrong_arguments(kwargs, words):
    with pytest.raises(InputError) as error:
        PhantomDataModule(**kwargs)
    assert words in str(error.value)


def test_hyperparameters_are_plain_values():
    data = module(labels=["nodule"], shortcut_at="own_organ")
    saved = dict(data.hparams)
    assert saved["labels"] == ["nodule"]
    assert saved["shortcut_at"] == "own_organ"
    assert set(saved) >= {"cases", "size", "shortcut", "cooccurrence", "organs", "seed", "test_splits"}
    pickle.dumps(saved)


class _Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(8, 8))

    def training_step(self, batch):
        return nn.functional.binary_cross_entropy_with_logits(self.net(batch["image"]), batch["label"])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("n", float(dataloader_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_fit_and_test_under_a_trainer(tmp_path):
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path)  # fmt: skip
    data, net = module(), _Tiny()
    trainer.fit(net, datamodule=data)
    assert trainer.global_step == 2
    assert len(trainer.test(net, datamodule=data, verbose=False)) == 4


def test_room_exports():
    assert set(rooms.__all__) == set(rooms._PUBLIC) >= {"PhantomDataModule", "ManifestDataModule", "CryoETDataModule"}
    assert all(getattr(rooms, name).__name__ == name for name in rooms.__all__)
    assert dir(rooms) == sorted(rooms.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Phantom'"):
        _ = rooms.Phantom
    assert len(SPLITS) == 6
