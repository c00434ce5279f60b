"""Loggers and disks that fail: one warning, training goes on, nothing that can be kept is lost."""

from __future__ import annotations

import csv
import errno
import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._logger_guard import _CALLS, _FIRST
from camtrain.reporting import patience, read_cases
from camtrain.reporting.alarm_log import read_alarms

LP = "lightning.pytorch"


def loggers_of(namespace="pytorch_lightning"):
    return importlib.import_module(f"{namespace}.loggers")


def fit(kit, folder, logger, namespace="pytorch_lightning", module=None, epochs=3, **options):
    """A fit, and the warnings of camtrain in it."""
    added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, panel_cases=2, labels_per_case=1, **options)
    trainer = kit.make_trainer(folder, added, logger=logger, max_epochs=epochs, namespace=namespace)
    data = kit.loader(kit.make_cases())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module or kit.make_lit(kit.make_net(), namespace), data, data)
    assert trainer.current_epoch == epochs
    return added, [str(w.message) for w in seen if str(w.message).startswith("camtrain")]


def epochs_in(path):
    with path.open() as file:
        return [row["epoch"] for row in csv.DictReader(file)]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["log_metrics", "save", "finalize"])
@pytest.mark.parametrize("namespace", ["pytorch_lightning", pytest.param(LP, marks=pytest.mark.slow)])
def test_a_logger_on_a_full_disk(kit, tmp_path, namespace, broken):
    class Full(loggers_of(namespace).CSVLogger):
        pass

    setattr(Full, broken, full)
    logger = Full(tmp_path)
    added, said = fit(kit, tmp_path, logger, namespace)
    assert len(said) == 1
    assert "Full failed (OSError" in said[0]
    assert "No space left" in said[0]
    run = added.publisher.run_dir
    assert set(epochs_in(run.scores_path)) == set(epochs_in(run.cases_path)) == {"0", "1", "2"}
    assert len(list(run.path.glob("epochs/*/overview.png"))) == 3
    assert not set(vars(logger)) & {*_FIRST, *_CALLS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "broken"),
    [("CSVLogger", "log_hyperparams"), ("CSVLogger", "log_graph"), ("TensorBoardLogger", "log_hyperparams")],
)
def test_the_first_words_to_a_logger_on_a_full_disk(kit, tmp_path, kind, broken):
    """What Lightning calls before the first step, of a module that has something to say there."""

    class Lit(type(kit.make_lit(kit.make_net()))):
        def __init__(self, net, lr=0.5):
            super().__init__(net)
            self.save_hyperparameters("lr")

    logger = type("Full", (getattr(loggers_of(), kind),), {broken: full})(tmp_path)
    added, said = fit(kit, tmp_path, logger, module=Lit(kit.make_net()), epochs=1)
    assert len(said) == 1
    assert "Full failed (OSError" in said[0]
    assert set(epochs_in(added.publisher.run_dir.scores_path)) == {"0"}
    if kind == "CSVLogger":  # the scores are tried all the same
        assert "val/organ_iou" in (Path(logger.log_dir) / "metrics.csv").read_text()


class DeadClient:
    @staticmethod
    def log_image(*_, **__):
        raise RuntimeError("the tracking server is gone")


def plain_logger(name, **methods):
    """A user's own logger class of that name."""
    base = loggers_of().logger.Logger
    usual = {
        "name": "mine",
        "version": 0,
        "log_hyperparams": lambda *_, **__: None,
        "log_metrics": lambda *_, **__: None,
    }
    return type(name, (base,), {**usual, **methods})()


@pytest.mark.slow
def test_any_failure_of_our_own_calls_is_caught_but_only_what_is_a_failure_of_lightnings(kit, tmp_path):
    csv_logger = loggers_of().CSVLogger
    mlflow = plain_logger("MLFlowLogger", experiment=DeadClient(), run_id="r")
    _, said = fit(kit, tmp_path, mlflow)
    assert len(said) == 1
    assert "MLFlowLogger failed (RuntimeError: the tracking server is gone)" in said[0]

    class Wrong(csv_logger):
        def log_metrics(self, metrics, step=None):
            raise TypeError("metrics are no numbers")

    with pytest.raises(TypeError, match="no numbers"):
        fit(kit, tmp_path / "wrong", Wrong(tmp_path / "wrong"))
    with pytest.raises(OSError, match="No space left"):
        fit(kit, tmp_path / "bare", type("Full", (csv_logger,), {"log_metrics": full})(tmp_path), guard_loggers=False)


def test_what_the_user_did_wrong_stays_an_error(kit, tmp_path):
    def validation_step(self, batch, batch_idx):
        self.log("val/auroc", 0.5)
        return self(batch["image"])

    module = kit.make_lit(kit.make_net(), validation_step=validation_step)
    with pytest.raises(InputError, match="is logged by camtrain and by somebody else"):
        fit(kit, tmp_path, loggers_of().CSVLogger(tmp_path), module=module)


def test_a_logger_that_comes_back_is_used_again(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "WAIT", 0.0)
    monkeypatch.setattr(patience, "_SHARE", 0)

    class Sometimes(loggers_of().CSVLogger):
        tried = 0

        def log_metrics(self, metrics, step=None):
            Sometimes.tried += 1
            if Sometimes.tried == 1:
                full()
            super().log_metrics(metrics, step)

    logger = Sometimes(tmp_path)
    _, said = fit(kit, tmp_path, logger)
    assert len(said) == 1
    assert Sometimes.tried == 3
    with open(f"{logger.log_dir}/metrics.csv") as file:  # noqa: PTH123
        assert sum(bool(row["val/organ_iou"]) for row in csv.DictReader(file)) == 2


def test_a_broken_logger_is_left_alone_for_a_while():
    calls = []

    def broken():
        calls.append(1)
        full()

    waits = patience.Patience("it", "all is well")
    with pytest.warns(UserWarning, match=r"it failed \(OSError.*all is well"):
        assert not waits(broken)
    for _ in range(1000):
        assert not waits(broken)
    assert len(calls) == 1
    assert waits.waiting
    with pytest.raises(InputError):
        patience.Patience("it", "")(lambda: (_ for _ in ()).throw(InputError("wrong")))
    with pytest.raises(KeyboardInterrupt):
        patience.Patience("it", "")(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["epoch 1", "all"])
def test_our_own_folder_on_a_full_disk(kit, tmp_path, monkeypatch, where):
    """Scores of the epochs in which the disk was full are written as soon as it takes them."""
    monkeypatch.setattr(patience, "WAIT", 0.0)
    monkeypatch.setattr(patience, "_SHARE", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    real, state = os.replace, {"full": False}

    def replace(source, target):
        if state["full"] and "camtrain" in str(target):
            full()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)

    def on_train_epoch_start(self):
        state["full"] = where == "all" or self.current_epoch == 1

    module = kit.make_lit(kit.make_net(), on_train_epoch_start=on_train_epoch_start)
    added, said = fit(kit, tmp_path, loggers_of().CSVLogger(tmp_path), module=module)
    assert len(said) == 1
    assert "No space left" in said[0]
    run = added.publisher.run_dir
    assert not [p for p in run.path.rglob("*") if ".tmp." in p.name]  # half files take the room that is missing
    if where == "all":
        assert not run.scores_path.exists()
    else:
        assert set(epochs_in(run.scores_path)) == {"0", "1", "2"}
        assert {row.epoch for row in read_cases(run)} == {0, 1, 2}
        assert sorted(p.parent.name for p in run.path.glob("epochs/*/overview.png")) == ["0000", "0002"]


def test_a_folder_that_cannot_be_made(kit, tmp_path, monkeypatch, caplog):
    from camtrain.reporting import run_dir

    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(run_dir, "_new_folder", full)
    added, said = fit(kit, tmp_path, False)
    assert added.publisher.run_dir is None
    assert len(said) == 1
    assert "No space left" in said[0]
    assert added.scores["val"]
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(InputError, match="cannot make the run folder"):
        fit(kit, tmp_path / "file", False)


def test_an_unknown_logger_gets_scalars_and_is_told_what_it_misses(kit, tmp_path):
    keys = set()
    logger = plain_logger("Mine", log_metrics=lambda self, metrics, step=None: keys.update(metrics))
    trainer = kit.make_trainer(tmp_path, ct.AttentionMonitor(kit.LAYER, kit.TABLE), logger=logger)
    module, data = kit.make_lit(kit.make_net()), kit.loader(kit.make_cases())
    with pytest.warns(UserWarning, match="Mine gets scores but no pictures and no tables from camtrain; they are in"):
        trainer.fit(module, data, data)
    assert {"val/organ_iou", "val/energy_inside/stent"} <= keys


CHANGED = {
    "foreign": lambda text: "name,score\nmine,1\n",
    "bytes": lambda text: "\udcff\x00" * 9,
    "one line": lambda text: text + "0,9,val\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CHANGED)
def test_files_that_somebody_changed_are_put_aside_with_one_warning_each(kit, tmp_path, how):
    """What can be read of them is kept, nothing of theirs is lost, and the run goes on."""
    names = ["scores.csv", "cases.csv", "alarms.csv", "panel.json"]
    spoilt = {}

    def on_train_epoch_start(self):
        for path in [added.publisher.run_dir.path / name for name in names] if self.current_epoch == 1 else ():
            text = CHANGED[how](path.read_text())
            spoilt[path.name] = text.encode(errors="surrogateescape")
            path.write_bytes(spoilt[path.name])

    # Every label is told of in the second epoch, that with the changed files.
    alarms = [{"name": "energy_below_chance", "threshold": 99.0, "patience": 2}]
    added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, panel_cases=2, labels_per_case=1, alarms=alarms)
    trainer = kit.make_trainer(tmp_path, added, max_epochs=3)
    data = kit.loader(kit.make_cases())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(kit.make_lit(kit.make_net(), on_train_epoch_start=on_train_epoch_start), data, data)
    said = [str(w.message) for w in seen if "changed by somebody else" in str(w.message)]
    assert trainer.current_epoch == 3
    run = added.publisher.run_dir
    for name in names:
        assert sum(f"/{name}" in text for text in said) == 1, (name, said)
        stem, _, ending = name.partition(".")
        assert (run.path / f"{stem}.changed.{ending}").read_bytes() == spoilt[name]
    kept = {0} if how == "one line" else set()
    assert {row.epoch for row in run.read_scores()} == kept | {1, 2}
    assert {row.epoch for row in read_cases(run)} == kept | {1, 2}
    assert {row.epoch for row in read_alarms(run.path)} == {1}
    assert {case["split"] for case in run.read_panel()["cases"]} == {"val"}


FORKED = """
import os, sys
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment

import camtrain as ct


class WandbLogger(Logger):
    name = version = "x"

    @property
    @rank_zero_experiment
    def experiment(self):
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()} {os.environ.get('LOCAL_RANK')}\\n")

    def log_metrics(self, *args, **kwargs): pass
    def log_hyperparams(self, *args, **kwargs): pass


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.layer(batch["image"]).mean((2, 3))).sum()

    def validation_step(self, batch, batch_idx): pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


cases = [{"image": torch.zeros(1, 8, 8), "label": torch.ones(1)}] * 2
monitor = ct.AttentionMonitor("layer", alarms=[], report=False)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=WandbLogger(), callbacks=[monitor],
                     max_steps=1, limit_val_batches=0, enable_checkpointing=False, default_root_dir=sys.argv[2])
loader = torch.utils.data.DataLoader(cases, 1)
trainer.fit(Lit(), loader, loader)
"""


@pytest.mark.slow
def test_of_forked_processes_only_the_first_opens_a_run(tmp_path):
    opened = tmp_path / "opened"
    command = [sys.executable, "-c", FORKED, str(opened), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line.split()[1] for line in opened.read_text().splitlines()} == {"0"}
