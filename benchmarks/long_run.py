"""Does a long training grow? 20 epochs of 25 steps with camtrain's callbacks, and what the process holds after each.

    python benchmarks/long_run.py                                  # all settings, each in a process of its own
    python benchmarks/long_run.py --settings plain last --epochs 20 --steps 25
    python benchmarks/long_run.py --settings everything --epochs 60 --steps 10 --csv runs/long

Settings: `plain`: no callback and no logger, what Lightning and torch do by themselves; `last`: MaskLossCallback,
AttentionMonitor and OutsideSwap on the last layer of an affine head; `mid`: on a layer in the middle (autograd);
`everything`: as `last`, and the monitor with paid methods, all alarms, report, NIfTI and pictures in every epoch, to
CSVLogger, TensorBoard and offline W&B. Checkpoints in every epoch in all of them.

After each epoch: unique (USS), resident and peak memory; tensors that Python holds and their memory; nodes of autograd
graphs; hooks; wrapped steps; open files; threads; Python objects; what the callbacks hold; their state and the
checkpoint as written; the run's folder; processor time. Below the table the slope per epoch of each, with its interval
of 90 %, over the epochs behind the warm-up: the first epochs make the phantom's cases and warm the allocator.
"""

from __future__ import annotations

import argparse
import csv
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from _alive import MIB, handles, held_by, hooks, memory, plain_size, tensors
from _pairs import machine
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from scipy import stats

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import FlattenNet, LitClassifier

SETTINGS = ("plain", "last", "mid", "everything")
PAID = ("relevancecam", {"name": "scorecam", "channels": 4}, "guided_gradcam")


class Slope(NamedTuple):
    """Change per epoch of one column.

    Attributes:
        per_epoch: Least squares.
        low: Lower end of its interval of 90 %.
        high: Upper end.
        first: Value after the warm-up.
        last: Value at the end.
    """

    per_epoch: float
    low: float
    high: float
    first: float
    last: float


class Watch(pl.Callback):
    """Measures after every epoch, when validation and all other callbacks but the checkpoint are through."""

    def __init__(self, watched: Sequence[pl.Callback], folder: Path, told: int) -> None:
        self.watched, self.folder, self.told = list(watched), folder, told
        self.rows: list[dict[str, float]] = []
        self._since = time.process_time()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch before is over, and its checkpoint is written."""
        if trainer.current_epoch:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """So is the last one."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        spent = time.process_time() - self._since
        gc.collect()
        strangers = [trainer, pl_module, trainer.datamodule, *trainer.loggers, self]
        last = max(self.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
        row = {
            **memory(),
            **tensors(),
            **hooks(pl_module),
            **handles(),
            "held MiB": sum(held_by(each, strangers) for each in self.watched),
            "state KiB": plain_size([each.state_dict() for each in self.watched]),
            "checkpoint KiB": last.stat().st_size / 1024 if last else 0.0,
            "folder MiB": sum(f.stat().st_size for f in self.folder.rglob("*") if f.suffix != ".ckpt") / MIB,
            "seconds": spent,
        }
        self.rows.append(row)
        if len(self.rows) % self.told == 0 or len(self.rows) == 1:
            print(f"| {len(self.rows)} |" + "".join(f" {value:.5g} |" for value in row.values()), flush=True)
        self._since = time.process_time()


def callbacks_of(setting: str) -> list[pl.Callback]:
    """The callbacks of a setting."""
    if setting == "plain":
        return []
    layer = "net.features.4" if setting == "mid" else "net.relu"
    more: dict[str, Any] = {"report": False, "every_n_epochs": 0, "alarms": []}
    if setting == "everything":
        methods = ["hirescam", "gradcam", *PAID]
        more = {"methods": methods, "every_n_epochs": 1, "nifti_cases": 2}
    monitor = ct.AttentionMonitor(layer=layer, **more)
    return [ct.MaskLossCallback(layer=layer), monitor, ct.OutsideSwap(p=0.5)]


def loggers_of(setting: str, folder: Path) -> list[Any]:
    """The loggers of a setting."""
    if setting != "everything":
        return []
    wandb = WandbLogger(project="camtrain-long-run", save_dir=str(folder), offline=True)
    return [CSVLogger(folder), TensorBoardLogger(folder), wandb]


def run(setting: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """One training; a row per epoch."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pl.seed_everything(options.seed, verbose=False)
    size = (options.size,) * 3
    data = PhantomDataModule(
        cases=options.batch * options.steps, val_cases=options.cases, size=size, batch_size=options.batch
    )
    scores = ["auprc", "calibration_error"]
    model = LitClassifier(FlattenNet(size=size), labels=data.labels, scores=scores)
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name)
        callbacks = callbacks_of(setting)
        watch = Watch(callbacks, folder, max(1, options.epochs // 10))
        checkpoint = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            callbacks=[*callbacks, watch, checkpoint],
            logger=loggers_of(setting, folder) or False,
            default_root_dir=folder,
            accelerator="cpu",
            log_every_n_steps=5,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(model, data)
        if setting == "everything":
            trainer.loggers[-1].experiment.finish()
    return watch.rows


def slopes(rows: Sequence[dict[str, float]], warm: int) -> dict[str, Slope]:
    """Change per epoch of each column behind the warm-up.

    Example:
        >>> slopes([{"a": 9.0}, {"a": 1.0}, {"a": 3.0}, {"a": 5.0}], warm=1)["a"].per_epoch
        2.0
    """
    found = {}
    for column in rows[0]:
        values = np.array([row[column] for row in rows[warm:]])
        line = stats.linregress(np.arange(len(values)), values)
        margin = 0.0 if np.ptp(values) == 0 else float(stats.t.ppf(0.95, len(values) - 2) * line.stderr)
        found[column] = Slope(line.slope, line.slope - margin, line.slope + margin, float(values[0]), float(values[-1]))
    return found


def report(setting: str, rows: Sequence[dict[str, float]], options: argparse.Namespace) -> None:
    """The verdict as figures, and the rows as a file."""
    print(f"\n| {setting}: behind {options.warm} epochs | first | last | per epoch (90 %) |\n|---|---|---|---|")
    for column, slope in slopes(rows, options.warm).items():
        told = f"{slope.per_epoch:.2g} ({slope.low:.2g} to {slope.high:.2g})"
        constant = slope.low == slope.high == 0
        print(f"| {column} | {slope.first:.5g} | {slope.last:.5g} | {'0 in every epoch' if constant else told} |")
    if options.csv is not None:
        options.csv.mkdir(parents=True, exist_ok=True)
        with (options.csv / f"{setting}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)


def main() -> None:
    """Every setting in a process of its own: what one run leaves behind is not the next one's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25, help="per epoch")
    parser.add_argument("--warm", type=int, default=5, help="epochs that do not count for the slope")
    parser.add_argument("--size", type=int, default=36, help="of the cubes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cases", type=int, default=24, help="of the validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="folder for the rows of every epoch")
    options = parser.parse_args()
    if options.epochs - options.warm < 3:
        parser.error("--epochs: at least three more than --warm")
    if len(options.settings) > 1:
        words = [word for word in sys.argv[1:] if word not in SETTINGS and word != "--settings"]
        for setting in options.settings:
            subprocess.run([sys.executable, __file__, "--settings", setting, *words], check=True)
        return
    torch.set_num_threads(1)
    (setting,) = options.settings
    print(f"\n{setting}: {options.epochs} epochs of {options.steps} steps, batch {options.batch}, {options.size}^3; "
          f"{machine()}\n", flush=True)  # fmt: skip
    columns = "USS|RSS|peak|tensors|MiB|nodes|objects|hooks|steps|files|threads|held|state|ckpt|folder|s"
    print(f"|epoch|{columns}|\n{'|---' * (columns.count('|') + 2)}|", flush=True)
    report(setting, run(setting, options), options)


if __name__ == "__main__":
    main()
