"""Opening W&B before a run begins: the run that a checkpoint goes on with, and offline where no server answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from camtrain.reporting.wandb_login import logged_in_to_wandb, wandb_mode


def open_loggers(loggers: Iterable[Any], checkpoint: Mapping[str, Any] | None = None) -> None:
    """Open the runs of W&B loggers now, offline where nobody is logged in or the server does not take them.

    Lightning opens them when `fit` begins, before any callback is asked, and lets a failure end the training; without
    a login W&B asks for one, and waits at a terminal for an answer. A mode or settings that the user has given, to the
    logger or to W&B, are left as they are, and so are other loggers. W&B tries for `WANDB_INIT_TIMEOUT` seconds (90)
    before it gives up.

    Args:
        loggers: `trainer.loggers`.
        checkpoint: A loaded checkpoint that the fit goes on from: the W&B run whose id `AttentionMonitor` kept there
            goes on, unless the logger was given an id.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(logger=False)
        >>> open_loggers(trainer.loggers)
    """
    found = [logger for logger in loggers if _is_wandb(logger)]
    for logger, run in zip(found, _runs_of(checkpoint or {}), strict=False):
        # Lightning's logger says resume="allow" by itself.
        logger._wandb_init["id"] = logger._wandb_init.get("id") or run
    for logger in found:
        if _would_ask(logger):
            _go_offline(logger, "there is no login (`wandb login`, WANDB_API_KEY)")
        try:
            _ = logger.experiment
        except Exception as error:
            # A wrong project name or the like is the user's to mend, but W&B says it in the same words as a lost
            # network; offline nothing is lost, and `wandb sync` tells.
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != "wandb":
                raise
            _go_offline(logger, " ".join(f"{type(error).__name__}: {error}".split()))
            _ = logger.experiment


def wandb_runs(loggers: Iterable[Any]) -> list[str]:
    """Ids of the W&B runs that are open, for a checkpoint.

    Example:
        >>> wandb_runs([])
        []
    """
    return [str(logger.version) for logger in loggers if _is_wandb(logger) and logger.version]


def _is_wandb(logger: Any) -> bool:
    return "WandbLogger" in {cls.__name__ for cls in type(logger).__mro__}


def _runs_of(checkpoint: Mapping[str, Any]) -> list[str]:
    states = checkpoint.get("callbacks") or {}
    kept = [state.get("wandb") for state in states.values() if isinstance(state, Mapping)]
    return next((list(runs) for runs in kept if runs), [])


def _would_ask(logger: Any) -> bool:
    """Is this a run that W&B would open online, and has nobody logged in?"""
    if getattr(logger, "_experiment", None) is not None or getattr(logger, "_offline", False):
        return False
    # A private name of Lightning's: a logger without it is left to W&B.
    given = getattr(logger, "_wandb_init", None)
    if given is None or {"mode", "settings"} & set(given) or wandb_mode() is not None or logged_in_to_wandb():
        return False
    import wandb
    from pytorch_lightning.utilities import rank_zero_only

    # Other processes open no run. A key that `wandb.login` was given in this one need not be in any file.
    first = getattr(rank_zero_only, "rank", 0) == 0
    return first and wandb.run is None and not getattr(wandb.setup().settings, "api_key", None)


def _go_offline(logger: Any, reason: str) -> None:
    warnings.warn(
        f"camtrain: W&B cannot be opened online ({reason}). This run is written offline; `wandb sync` uploads it later",
        stacklevel=4,
    )
    os.environ["WANDB_MODE"] = "offline"
    getattr(logger, "_wandb_init", {})["mode"] = "offline"
