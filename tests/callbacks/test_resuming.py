"""A run that is ended in the middle of an epoch and started again ends where the run without interruption ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import RandomSampler

from camtrain.data import PhantomDataModule

SCRIPT = """
import os, sys
import pytorch_lightning as pl, torch
import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import FlattenNet, LitClassifier

folder, step, sent, ckpt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] or None
torch.set_num_threads(1)
pl.seed_everything(3, verbose=False)
data = PhantomDataModule(["nodule", "effusion"], cases=18, val_cases=8, test_cases=1, size=[16, 20, 18], batch_size=4,
                         seed=1)
model = LitClassifier(FlattenNet(size=[16, 20, 18], labels=2), schedule="one_cycle")

class EndedFromOutside(pl.Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == step:
            os.kill(os.getpid(), sent)

last = pl.callbacks.ModelCheckpoint(dirpath=f"{folder}/checkpoints", save_last=True)
monitor = ct.AttentionMonitor(layer="net.relu", alarms=[])
swap = ct.OutsideSwap(without_organs="atlas")
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
                     enable_model_summary=False,
                     callbacks=[ct.MaskLossCallback(layer="net.relu"), swap, monitor, last, EndedFromOutside()])
trainer.fit(model, data, ckpt_path=ckpt)
panel = {split: panel.state() for split, panel in monitor.panels.items()}
metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
result = {"weights": model.state_dict(), "metrics": metrics, "thresholds": monitor.thresholds, "panel": panel,
          "step": trainer.global_step, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
torch.save(result, f"{folder}/end.pt")
"""


def train(tmp_path, name, step=0, sent=0, ckpt=""):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [str(tmp_path / name), str(step), str(int(sent)), ckpt]
    return subprocess.run(
        [sys.executable, str(script), *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def end(tmp_path, name):
    return torch.load(tmp_path / name / "end.pt", weights_only=True)


@pytest.mark.slow
def test_a_run_that_was_ended_twice_ends_as_the_whole_run(tmp_path):
    assert train(tmp_path, "whole").returncode == 0
    whole = end(tmp_path, "whole")
    assert whole["step"] == 15
    # In the middle of the second of three epochs, and of the third.
    train(tmp_path, "twice", step=8, sent=signal.SIGTERM)
    assert train(tmp_path, "twice", step=13, sent=signal.SIGKILL, ckpt="last").returncode == -signal.SIGKILL
    assert not (tmp_path / "twice" / "end.pt").exists()
    resumed = train(tmp_path, "twice", ckpt="last")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    again = end(tmp_path, "twice")
    for key in ("weights", "thresholds"):
        torch.testing.assert_close(again[key], whole[key], rtol=0, atol=0)
    for key in ("metrics", "step", "panel", "lr"):
        assert again[key] == whole[key]
    assert len(list((tmp_path / "twice" / "camtrain").iterdir())) == 1  # the run's own folder goes on


@pytest.mark.parametrize("workers", [0, 2])
def test_orders_follow_from_seed_and_epoch(workers):
    def loader(seed=1):
        data = PhantomDataModule(cases=7, val_cases=1, test_cases=1, size=16, batch_size=3, seed=seed,
                                 num_workers=workers)  # fmt: skip
        data.setup("fit")
        return data.train_dataloader()

    def ids(loader):
        return [case for batch in loader for case in batch["id"]]

    whole, resumed = loader(), loader()
    assert isinstance(whole.sampler, RandomSampler)  # where Lightning finds none, it does not shuffle between processes
    epochs = [ids(whole) for _ in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert all(sorted(order) == sorted(epochs[0]) for order in epochs)
    for epoch in (2, 0, 1, 2):
        resumed.sampler.set_epoch(epoch)
        assert ids(resumed) == epochs[epoch]
    assert ids(loader(seed=2)) != epochs[0]
