"""ExactResume: a run that was ended, however, and is started again ends where the run without interruption ends."""

from __future__ import annotations

import importlib
import logging
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from camtrain._lightning import Callback
from camtrain.callbacks._enduring_workers import EnduringWorkers
from camtrain.callbacks._settings import given
from camtrain.callbacks._whole_checkpoints import WholeCheckpoints

_log = logging.getLogger(__name__)
# What torch's backends say where another process has gone, or has not answered for the time limit.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "Socket Timeout",
    "Watchdog caught collective operation timeout",
)


class ExactResume(Callback):
    """Makes a run that was ended and goes on from a checkpoint equal to one that was not interrupted.

    Lightning's checkpoints hold weights, optimizer, schedule and counters, and camtrain's callbacks keep thresholds,
    panel and draws in them, but nobody keeps the random states. Here every training step (dropout, noise, whatever asks
    torch, NumPy or Python's `random`) draws from a state that follows from seed, epoch, batch and process alone.

    After SIGTERM, by which clusters announce the end, the optimizer step is finished, `last.ckpt` is written and the
    run ends: in the middle of an epoch too, and in all processes together whichever of them was told. (Lightning's own
    way lets several processes wait for one another for ever.) A validation that has begun is finished before. Worker
    processes of the Trainer's loaders, whatever loaders these are, pass over a SIGTERM that reaches them too.

    Checkpoints are written whole or not at all. Where another process of the run has gone, the error says so in words.

    Order and augmentation of the cases are the data's part: camtrain's data modules do theirs without this callback,
    your own take `camtrain.data.ExactLoader`. docs/faults.md says what is exact and what is not.

    Args:
        seed: Of the draws; None = the seed of the run (`torch.initial_seed`, which `seed_everything` sets).

    Example:
        >>> ExactResume(seed=3).state_dict()
        {'seed': 3}
    """

    def __init__(self, seed: int | None = None) -> None:
        self.given = given(locals())
        self.seed = seed
        self._whole: WholeCheckpoints | None = None
        self._workers: EnduringWorkers | None = None
        self._before: Any = None
        self._asked, self._put_off = False, False
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The seed, so that a resumed run draws from the same one."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the draws of the run that is resumed."""
        self.seed = state_dict.get("seed", self.seed)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have checkpoints appear whole, and workers last as long as their run."""
        if self._workers is None:
            self._workers = EnduringWorkers(trainer)
        if stage == "fit" and self._whole is None:
            self._whole = WholeCheckpoints(trainer.strategy)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the Trainer as it was."""
        self._listen_no_more()
        self._let_workers_go()
        if self._whole is not None:
            self._whole.undo()
            self._whole = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fix the seed before anything draws."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**31

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the step's draws."""
        self._steps = int(trainer.global_step)
        words = [int(self.seed or 0), int(trainer.current_epoch), int(batch_idx), int(trainer.global_rank)]
        drawn = np.random.SeedSequence(words).generate_state(3)
        torch.manual_seed(int(drawn[0]))
        np.random.seed(int(drawn[1]))  # noqa: NPY002  (the global state is what transforms and modules draw from)
        random.seed(int(drawn[2]))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen for SIGTERM in Lightning's place; a handler that somebody else has put there stays."""
        self._asked, self._put_off = False, False
        if threading.current_thread() is not threading.main_thread():
            return
        if type(before := signal.getsignal(signal.SIGTERM)).__name__ == "_HandlersCompose":
            self._before = before
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def _listen_no_more(self) -> None:
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def _let_workers_go(self) -> None:
        if self._workers is not None:
            self._workers.undo()
            self._workers = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the run, if that was asked for, where a checkpoint says all.

        Not behind the last step of an epoch: what comes behind it writes the checkpoint of the epoch. Where a
        validation is due behind this step, it is behind the next one.
        """
        if self._before is None or not _between_steps(trainer):
            return
        if not pl_module.automatic_optimization and trainer.global_step == self._steps:
            return  # gradients that a module accumulates by hand are in no checkpoint
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        due = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if due and self._put_off:
            raise _sigterm(trainer)  # one behind every step: it would be cut off
        self._put_off = due
        if not due:
            # Lightning raises at the end of this batch, behind the hooks of all others.
            trainer._signal_connector.received_sigterm = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What comes now needs no checkpoint in between."""
        self._listen_no_more()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After SIGTERM a checkpoint; where another process is gone, a sentence."""
        self._listen_no_more()
        if type(exception).__name__ == "SIGTERMException":
            self._save_last(trainer)
        elif trainer.world_size > 1 and any(words in str(exception) for words in _LOST):
            _log.error(
                "camtrain: process %d of %d ends because another process of this run has gone or does not answer: its "
                "own error stands in its log; without one it was killed (by the system where memory ran out). Start "
                "the same command again with --ckpt_path last",
                trainer.global_rank,
                trainer.world_size,
            )
        self._let_workers_go()

    def _save_last(self, trainer: Any) -> None:
        path = _last_path(trainer)
        if path is None or not _between_steps(trainer):
            _log.warning(
                "camtrain: SIGTERM; no checkpoint was written (%s): the run goes on from the one before",
                "no ModelCheckpoint says where" if path is None else "not in the middle of a training epoch",
            )
            return
        trainer.save_checkpoint(path)
        _log.warning("camtrain: SIGTERM; the run goes on from %s with --ckpt_path last", path)


def _between_steps(trainer: Any) -> bool:
    """Has an optimizer step just ended, and more of the epoch to come?"""
    done = trainer.fit_loop.epoch_loop.batch_progress.current
    whole = done.processed == done.ready and done.processed % trainer.accumulate_grad_batches == 0
    return bool(trainer.training and whole and 0 < done.processed < trainer.num_training_batches)


def _sigterm(trainer: Any) -> BaseException:
    """The exception by which this Trainer's Lightning ends after SIGTERM."""
    names = [base.__module__ for base in type(trainer).__mro__ if base.__name__ == "Trainer"]
    package = next(n for n in names if n.startswith(("pytorch_lightning.", "lightning."))).partition(".trainer")[0]
    made: BaseException = importlib.import_module(f"{package}.utilities.exceptions").SIGTERMException()
    return made


def _last_path(trainer: Any) -> str | None:
    """Where `--ckpt_path last` looks: the file of the ModelCheckpoint with `save_last`, else beside the first one's."""
    found = sorted(trainer.checkpoint_callbacks, key=lambda each: not getattr(each, "save_last", False))
    for each in found:
        folder = getattr(each, "dirpath", None)
        if folder is not None and hasattr(each, "CHECKPOINT_NAME_LAST"):
            known = getattr(each, "last_model_path", "")
            name = Path(known).name if known else f"{each.CHECKPOINT_NAME_LAST}{each.FILE_EXTENSION}"
            return f"{str(folder).rstrip('/')}/{name}"  # it may be an address of a remote store
    return None
