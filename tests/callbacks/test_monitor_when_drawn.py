"""In which validations pictures are made, and what an alarm counts, where an epoch has several or not every one."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import camtrain as ct
from camtrain.callbacks._last_pass import comes_last


class Stream(IterableDataset):
    """Six cases whose number is not told."""

    def __iter__(self):
        return iter(torch.ones(6, 1))


def fitted(tmp_path, namespace="pytorch_lightning", data=None, **options):
    """What `comes_last` says in each validation of a fit of six batches per epoch, with its epoch."""
    pl, said = importlib.import_module(namespace), []

    class Said(pl.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            said.append((trainer.current_epoch, comes_last(trainer)))

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[Said()], num_sanity_val_steps=0,
                         **dict.fromkeys(quiet, False), **options)  # fmt: skip
    trainer.fit(Lit(), DataLoader(data or torch.ones(6, 1)), DataLoader(torch.ones(1, 1)))
    return said


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"max_epochs": 3}, 3),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, 2),
        ({"max_epochs": 2, "val_check_interval": 0.5}, 4),
        ({"max_epochs": 2, "val_check_interval": 0.5, "namespace": "lightning.pytorch"}, 4),
        ({"max_epochs": 2, "val_check_interval": 4}, 2),  # the last one is not at the end of its epoch
        ({"max_epochs": 3, "check_val_every_n_epoch": 2, "val_check_interval": 0.5}, 2),
        ({"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 5}, 3),
        ({"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 8}, 2),
        (
            {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 10},
            1,
        ),  # in the second epoch
        ({"max_epochs": 2, "data": Stream()}, 2),
    ],
)
def test_the_last_validation_of_a_fit_is_known(tmp_path, options, validations):
    said = fitted(tmp_path, **options)
    assert len(said) == validations
    assert [told is True for _, told in said] == [False] * (validations - 1) + [True]
    # The others of its epoch are known not to be the last.
    assert all((told is not None) == (epoch == said[-1][0]) for epoch, told in said)


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -1, "max_steps": 12},
        {"max_epochs": 2, "data": Stream(), "val_check_interval": 2},
        {"max_epochs": 2, "val_check_interval": "00:00:00:00"},
    ],
)
def test_where_the_last_validation_cannot_be_known_nothing_is_said(tmp_path, options):
    said = fitted(tmp_path, **options)
    assert len(said) > 1
    assert {told for _, told in said} == {None}


class Passes(ct.AttentionMonitor):
    """Says of each validation its epoch, whether it has pictures, and whether it scored the paid method."""

    def __init__(self, kit, every, alarms=()):
        super().__init__(kit.LAYER, kit.TABLE, methods=["hirescam", "lrp"], every_n_epochs=every, alarms=list(alarms),
                         panel_cases=1, labels_per_case=1, report=False)  # fmt: skip
        self.passes, self.events = [], []

    def _close(self, trainer):
        drawn = [entry.case for panel in self.panels.values() for entry in panel.entries]
        paid = "lrp" in {score.method for score in self.scores["val"]}
        self.passes.append((trainer.current_epoch, bool(drawn), paid))
        self.events += [(trainer.current_epoch, len(self.passes)) for _ in self.alarms.events]
        super()._close(trainer)


def fit(kit, folder, added, ckpt_path=None, **options):
    trainer = kit.make_trainer(folder, added, **options)
    data = kit.loader(kit.make_cases(6))
    trainer.fit(kit.make_lit(kit.make_net()), data, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


@pytest.mark.slow
def test_the_trained_network_is_drawn_and_paid_methods_are_scored_with_it(kit, tmp_path):
    added = Passes(kit, every=3)
    trainer = fit(kit, tmp_path, added, max_epochs=5)
    assert added.passes == [(0, True, True), *((n, False, False) for n in (1, 2)), (3, True, True), (4, True, True)]
    assert sorted(path.name for path in (added.publisher.run_dir.path / "epochs").iterdir()) == ["0000", "0003", "0004"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Passes(kit, every=3)  # in the rhythm of the first run
    fit(kit, tmp_path, again, max_epochs=8, ckpt_path=tmp_path / "last.ckpt")
    assert [(epoch, drawn) for epoch, drawn, _ in again.passes] == [(5, False), (6, True), (7, True)]


@pytest.mark.slow
def test_an_epoch_with_several_validations_is_drawn_once_and_counted_once(kit, tmp_path):
    added = Passes(kit, 1, [{"name": "energy_below_chance", "threshold": 100.0, "patience": 2}])
    fit(kit, tmp_path, added, max_epochs=3, val_check_interval=0.5)
    drawn = [(0, True, True), (0, False, False), (1, True, True), (1, False, False), (2, False, False), (2, True, True)]
    assert added.passes == drawn
    # Patience of two epochs: the first validation of the second one raises, once.
    assert set(added.events) == {(1, 3)}
    assert len(added.state_dict()["alarms"]["board"]["history"]["val"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_steps": 1}, {}])
def test_the_first_validation_of_a_fit_is_drawn_in_its_last_epoch_too(kit, tmp_path, options):
    """`max_steps` or early stopping may end the fit before the validation that `max_epochs` has last."""
    added = Passes(kit, 1)
    fit(kit, tmp_path, added, max_epochs=1, val_check_interval=1, **options)
    assert [drawn for _, drawn, _ in added.passes] == ([True] if options else [True, True])
    assert [path.name for path in (added.publisher.run_dir.path / "epochs").iterdir()] == ["0000"]
