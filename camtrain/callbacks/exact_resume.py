"""ExactResume: a run that was ended, however, and is started again ends where the run without interruption ends."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from camtrain._lightning import Callback
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

    After SIGTERM, by which clusters announce the end, the step is finished, `last.ckpt` is written and the run ends: in
    the middle of an epoch too. During a validation nothing is written: the run goes on from the checkpoint before.

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
        self.seed = seed
        self._whole: WholeCheckpoints | None = None

    def state_dict(self) -> dict[str, Any]:
        """The seed, so that a resumed run draws from the same one."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the draws of the run that is resumed."""
        self.seed = state_dict.get("seed", self.seed)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have checkpoints appear whole."""
        if stage == "fit" and self._whole is None:
            self._whole = WholeCheckpoints(trainer.strategy)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the Trainer as it was."""
        if self._whole is not None:
            self._whole.undo()
            self._whole = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fix the seed before anything draws."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**31

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the step's draws."""
        words = [int(self.seed or 0), int(trainer.current_epoch), int(batch_idx), int(trainer.global_rank)]
        drawn = np.random.SeedSequence(words).generate_state(3)
        torch.manual_seed(int(drawn[0]))
        np.random.seed(int(drawn[1]))  # noqa: NPY002  (the global state is what transforms and modules draw from)
        random.seed(int(drawn[2]))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After SIGTERM a checkpoint; where another process is gone, a sentence."""
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
    """Has a step ended, and is the epoch not at its end, where ModelCheckpoint has written what is to be written?"""
    done = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(trainer.training and 0 < done.completed == done.ready < trainer.num_training_batches)


def _last_path(trainer: Any) -> Path | None:
    """Where `--ckpt_path last` looks: the file of the ModelCheckpoint with `save_last`, else beside the first one's."""
    found = sorted(trainer.checkpoint_callbacks, key=lambda each: not getattr(each, "save_last", False))
    for each in found:
        folder = getattr(each, "dirpath", None)
        if folder is not None and hasattr(each, "CHECKPOINT_NAME_LAST"):
            known = getattr(each, "last_model_path", "")
            name = Path(known).name if known else f"{each.CHECKPOINT_NAME_LAST}{each.FILE_EXTENSION}"
            return Path(folder) / name
    return None
