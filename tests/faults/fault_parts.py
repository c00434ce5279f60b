"""What the runs of these tests are made of: random cases, a net with dropout, and a callback that ends the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time

import pytorch_lightning as pl
from monai.data import Dataset
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import nn

from camtrain.data import ExactLoader, PhantomDataModule


class Augmented(PhantomDataModule):
    """The phantom with random transforms, through the loader that a user's own data takes."""

    def train_dataloader(self):
        keys = ["image", "organs"]
        changes = Compose([RandFlipd(keys, 0.5, 0), RandFlipd(keys, 0.5, 2), RandGaussianNoised("image")])
        return ExactLoader(
            Dataset(list(self._sets["train"]), changes),
            seed=self._seed,
            trainer=lambda: self.trainer,
            shuffle=True,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class DroppingNet(nn.Sequential):
    """Dropout before and behind the layer of the maps."""

    def __init__(self, labels: int = 2):
        super().__init__()
        self.start = nn.Sequential(nn.Conv3d(1, 4, 3, stride=2), nn.ReLU(), nn.Dropout3d(0.3))
        self.conv = nn.Conv3d(4, 5, 3, stride=2)
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(180, labels))


class EndsAt(pl.Callback):
    """Sends this process a signal when a step has ended; or from then on lets no file grow beyond some bytes.

    `group`: has the process that started this one send SIGTERM to this one's whole group, as clusters do; instead of
    behind a training step, with `validating`, in the first validation from that step on.
    """

    def __init__(self, step=0, sent=0, rank=0, bytes_left=0, group=0, validating=0):
        self.step, self.sent, self.rank, self.bytes_left = step, sent, rank, bytes_left
        self.group, self.validating = group, validating

    def on_validation_batch_start(self, trainer, *rest):
        if self.validating and trainer.global_step >= self.step:
            self.validating = 0
            self._ask_outside()

    def _ask_outside(self):
        assert len(multiprocessing.active_children()) >= 2, "no worker is there to be hit"
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(0.5)  # what a worker's death does is done by then

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step != self.step or trainer.global_rank != self.rank or self.validating:
            return
        if self.group:
            self._ask_outside()
            return
        if self.bytes_left:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes_left, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), self.sent)
