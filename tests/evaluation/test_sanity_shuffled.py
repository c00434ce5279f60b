"""Labels of other cases: what is exchanged, in which loader, and two models compared."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import camtrain as ct
from camtrain._errors import InputError
from camtrain.data import PhantomDataModule
from camtrain.data.manifest_module import ManifestDataModule
from camtrain.evaluation.shuffled import ShuffledLabels, compare_models, shuffle_labels
from camtrain.evaluation.similarity import spearman
from camtrain.models import FlattenNet, LitClassifier


class Counts:
    """Cases whose reading is counted."""

    def __init__(self, cases):
        self.cases, self.read = cases, 0

    def __len__(self):
        return self.cases

    def __getitem__(self, index):
        self.read += 1
        label = torch.tensor([index % 2, float("nan") if index == 3 else index / 100])
        return {"image": torch.full((1, 2), index), "label": label, "organs": index}


@pytest.mark.parametrize("cases", [2, 3, 17])
def test_rows_go_to_other_cases_and_nothing_else_moves(cases):
    plain, shuffled = Counts(cases), ShuffledLabels(Counts(cases), seed=4)
    assert len(shuffled) == cases
    assert sorted(shuffled.order) == list(range(cases))
    assert all(here != there for here, there in enumerate(shuffled.order)), "a case keeps its label"
    for index in range(cases):
        case, other = shuffled[index], plain[shuffled.order[index]]
        assert (case["organs"], case["image"][0, 0].item()) == (index, index)
        assert torch.equal(case["label"].nan_to_num(-1), other["label"].nan_to_num(-1))
    first = shuffled.dataset.read
    assert first <= 2 * cases
    for index in range(cases):
        shuffled[index]
    assert shuffled.dataset.read == first + cases, "labels are read once"


def test_the_permutation_is_the_seeds_and_the_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (ShuffledLabels(Counts(30), seed=s).order for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())
    own = ShuffledLabels(Counts(5))
    own[0]["label"].add_(9)
    fresh = ShuffledLabels(Counts(5))[0]["label"]
    assert not torch.equal(own._labels[own.order[0]], fresh), "one tensor, as datasets that keep their cases hand out"
    assert torch.equal(own.dataset[own.order[0]]["label"], fresh)


def test_refused_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(InputError, match="map-style dataset, got Stream"):
        ShuffledLabels(Stream())
    with pytest.raises(InputError, match="at least two cases"):
        ShuffledLabels(Counts(1))
    with pytest.raises(InputError, match="dicts with the key 'target', got image, label, organs: pass key="):
        ShuffledLabels(Counts(4), key="target")[0]
    with pytest.raises(IndexError):
        ShuffledLabels(Counts(4))[4]
    with pytest.raises(InputError, match="expected a LightningDataModule, got list"), shuffle_labels([]):
        pass


def by_case(loader):
    """Case -> its label, as they come in batches."""
    return {i: row.tolist() for batch in loader for i, row in zip(batch["id"], batch["label"], strict=True)}


def phantom(**arguments):
    return PhantomDataModule(cases=10, size=16, batch_size=4, test_splits=["test"], **arguments)


def test_only_the_training_loader_of_the_phantom_and_only_inside():
    data = phantom()
    true, validation = by_case(data.train_dataloader()), by_case(data.val_dataloader())
    with shuffle_labels(data, seed=2) as within:
        assert within is data
        false = by_case(data.train_dataloader())
        assert by_case(data.val_dataloader()) == validation
        assert [len(b["label"]) for b in data.train_dataloader()] == [4, 4, 2]
        assert by_case(data.train_dataloader()) == false
    assert set(false) == set(true)
    assert sorted(false.values()) == sorted(true.values())
    assert sum(false[i] != true[i] for i in true) > 5
    assert by_case(data.train_dataloader()) == true
    assert "train_dataloader" not in vars(data)
    with pytest.raises(ValueError, match="own"), shuffle_labels(data):
        raise ValueError("the user's own error")
    assert by_case(data.train_dataloader()) == true


class Spy(pl.Callback):
    def __init__(self):
        self.seen = {"train": {}, "val": {}}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen["train"] |= dict(zip(batch["id"], batch["label"].tolist(), strict=True))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.seen["val"] |= dict(zip(batch["id"], batch["label"].tolist(), strict=True))


def fit(data, tmp_path):
    spy = Spy()
    model = LitClassifier(FlattenNet(len(data.labels), size=16, widths=(2, 2, 2, 2)), labels=data.labels)
    pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[spy], logger=False, enable_checkpointing=False,
               enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
               num_sanity_val_steps=0).fit(model, data)  # fmt: skip
    return spy.seen


def test_a_fit_with_shuffled_labels(tmp_path):
    data = phantom()
    true, validation = by_case(data.train_dataloader()), by_case(data.val_dataloader())
    with shuffle_labels(data, seed=2):
        false = by_case(data.train_dataloader())
        assert fit(data, tmp_path) == {"train": false, "val": validation}
    assert fit(data, tmp_path) == {"train": true, "val": validation}
    assert false != true


def test_worker_processes_get_the_same_labels():
    with shuffle_labels(phantom(), seed=2) as data:
        alone = by_case(data.train_dataloader())
    with shuffle_labels(phantom(num_workers=1), seed=2) as data:
        assert by_case(data.train_dataloader()) == alone


def test_manifest_data(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["id,image,organs,split,nodule,effusion"]
    for i, (nodule, effusion) in enumerate([("1", "0"), ("0", ""), ("1", "1"), ("0", "0"), ("", "1")]):
        nib.save(nib.Nifti1Image(rng.integers(-900, 500, (8, 8, 8)).astype(np.int16), np.eye(4)), tmp_path / f"{i}.nii")
        lines.append(f"case{i},{i}.nii,,{'val' if i == 3 else 'train'},{nodule},{effusion}")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    table = {"organs": {"lung": 1}, "labels": {"nodule": ["lung"], "effusion": ["lung"]}}
    data = ManifestDataModule(tmp_path / "cases.csv", table, size=8, batch_size=3)
    data.setup("fit")
    true, validation = by_case(data.train_dataloader()), by_case(data.val_dataloader())
    with shuffle_labels(data, seed=1):
        false = by_case(data.train_dataloader())
        assert by_case(data.val_dataloader()) == validation
    assert list(map(str, true.values())) != [str(false[i]) for i in true]
    assert sorted(map(str, true.values())) == sorted(map(str, false.values()))
    assert str(by_case(data.train_dataloader())) is not None
    assert {i: str(v) for i, v in by_case(data.train_dataloader()).items()} == {i: str(v) for i, v in true.items()}


def test_plain_loaders_keep_their_settings_and_other_things_are_refused():
    class Module(pl.LightningDataModule):
        given = None

        def train_dataloader(self):
            return self.given

    data = Module()
    data.given = DataLoader(Counts(7), batch_size=2, drop_last=True, shuffle=True, collate_fn=list)
    with shuffle_labels(data):
        made = data.train_dataloader()
    assert (made.batch_size, made.drop_last, made.collate_fn, made.sampler) == (2, True, list, data.given.sampler)
    data.given = DataLoader(Counts(7), batch_sampler=[[0, 1], [2, 3, 4]], collate_fn=list)
    with shuffle_labels(data):
        assert [len(batch) for batch in data.train_dataloader()] == [2, 3]
    data.given = [data.given]
    with shuffle_labels(data), pytest.raises(InputError, match="one DataLoader, and train_dataloader gives list"):
        data.train_dataloader()


def net(seed, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 42, 3))


def test_two_models_compared():
    image = torch.rand(5, 1, 8, 9, generator=torch.Generator().manual_seed(1))
    label = (torch.rand(5, 3, generator=torch.Generator().manual_seed(2)) < 0.6).float()
    one, other = net(0), net(1)
    table = compare_models(one, other, image, ["hirescam", "guided_backprop"], label=label)
    expected = spearman(ct.explain(one, image, "hirescam", "1"), ct.explain(other, image, "hirescam", "1"))
    for column in range(3):
        (row,) = (r for r in table.rows if r.method == "hirescam" and r.label == f"label {column}")
        assert row.spearman == pytest.approx(expected[label[:, column] == 1, column].mean().item(), abs=1e-5)
        assert (row.stage, row.layer) == (0, "1")
    same = compare_models(one, net(0), image, ["hirescam"])
    assert all(row.spearman == pytest.approx(1) and row.ssim == pytest.approx(1, abs=1e-4) for row in same.rows)
    text = str(table)
    assert "Maps of two models" in text
    assert "verdict" not in text
    with pytest.raises(InputError, match="two maps of one shape"):
        compare_models(one, nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), image,
                       ["hirescam"])  # fmt: skip
