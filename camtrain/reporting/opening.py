"""Opening W&B before a run begins: where its server cannot be reached, the run is written offline."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any


def open_loggers(loggers: Iterable[Any]) -> None:
    """Open the runs of W&B loggers now, offline where the server does not take them.

    Lightning opens them when `fit` begins, before any callback is asked, and lets a failure end the training. Other
    loggers are left alone. W&B tries for `WANDB_INIT_TIMEOUT` seconds (90) before it gives up.

    Args:
        loggers: `trainer.loggers`.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(logger=False)
        >>> open_loggers(trainer.loggers)
    """
    for logger in loggers:
        if "WandbLogger" not in {cls.__name__ for cls in type(logger).__mro__}:
            continue
        try:
            _ = logger.experiment
        except Exception as error:
            # A wrong project name or the like is the user's to mend, but W&B says it in the same words as a lost
            # network; offline nothing is lost, and `wandb sync` tells.
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != "wandb":
                raise
            _open_offline(logger, error)


def _open_offline(logger: Any, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    warnings.warn(
        f"camtrain: W&B cannot be opened online ({reason}). This run is written offline; `wandb sync` uploads it later",
        stacklevel=4,
    )
    os.environ["WANDB_MODE"] = "offline"
    logger._wandb_init["mode"] = "offline"
    _ = logger.experiment
