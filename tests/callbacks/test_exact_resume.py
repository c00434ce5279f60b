"""SIGTERM in any step, also where a validation is due behind it: what the resumed run does is what was left to do."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import pytorch_lightning as pl
import torch

import camtrain as ct
from camtrain.callbacks._enduring_workers import Enduring

STEPS = 6


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = torch.nn.Linear(3, 1, bias=False), torch.nn.Dropout(0.5)
        self.validated, self.hooks = [], 0

    def training_step(self, batch, batch_idx):
        return self.layer(self.drop(batch)).square().mean()

    def on_train_batch_end(self, *_):
        self.hooks += 1

    def validation_step(self, batch, batch_idx):
        self.layer(batch)

    def on_validation_end(self):
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2 * STEPS, 3), batch_size=2)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(6, 3), batch_size=2)  # more than one batch


class ByHand(Module):
    """Accumulates two batches by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.layer(self.drop(batch)).square().mean())
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Ended(pl.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(kind, folder, end=None, ckpt_path=None, **options):
    pl.seed_everything(1, verbose=False)
    module = kind()
    callbacks = [ct.ExactResume(), pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_epochs=100)]
    callbacks += [] if end is None else [Ended(end)]
    trainer = pl.Trainer(
        max_epochs=2,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    if end is None:
        trainer.fit(module, ckpt_path=ckpt_path)
    else:
        with pytest.raises(BaseException) as ending:  # noqa: PT011  (Lightning's is not public)
            trainer.fit(module)
        assert type(ending.value).__name__ == "SIGTERMException"
    return module


@pytest.mark.parametrize("end", range(STEPS - 1))
@pytest.mark.parametrize("every", [1, 2, STEPS])
def test_hooks_validations_and_weights_are_those_of_the_whole_run(tmp_path, end, every):
    whole = fit(Module, tmp_path / "whole", val_check_interval=every)
    cut = fit(Module, tmp_path / "cut", end, val_check_interval=every)
    rest = fit(Module, tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt", val_check_interval=every)
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    if every > 1:
        assert cut.validated + rest.validated == whole.validated
        assert cut.hooks + rest.hooks == whole.hooks == 2 * STEPS


@pytest.mark.parametrize("end", [0, 1, 2])
def test_gradients_accumulated_by_hand_are_not_lost(tmp_path, end):
    whole = fit(ByHand, tmp_path / "whole")
    fit(ByHand, tmp_path / "cut", end)
    rest = fit(ByHand, tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert torch.equal(rest.layer.weight, whole.layer.weight)


def note(worker_id):
    """A user's own."""


class WithWorkers(Module):
    def __init__(self, own):
        super().__init__()
        self.own, self.within = own, []

    def train_dataloader(self):
        self.loader = super().train_dataloader()
        self.loader = torch.utils.data.DataLoader(self.loader.dataset, 2, num_workers=1, worker_init_fn=self.own)
        return self.loader

    def on_train_batch_end(self, *_):
        self.within.append(self.loader.worker_init_fn)


@pytest.mark.parametrize("own", [note, None])
def test_the_loaders_own_start_of_a_worker_is_called_and_comes_back(tmp_path, monkeypatch, own):
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    module = WithWorkers(own)
    trainer = pl.Trainer(
        max_steps=1,
        callbacks=[ct.ExactResume()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu",
    )
    trainer.fit(module)
    (within,) = module.within
    assert isinstance(within, Enduring)
    # Where there is none Lightning puts its own, which gives each worker a seed.
    assert within.own is own if own else within.own.func.__name__ == "pl_worker_init_function"
    assert module.loader.worker_init_fn is within.own
    assert copy.deepcopy(Enduring(own, None)) is own
    assert "process_dataloader" not in vars(trainer.strategy)
