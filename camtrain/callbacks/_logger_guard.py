"""Loggers that fail do not take the training with them."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable
from typing import Any

from camtrain.reporting import Patience, open_loggers

_CALLS = ("log_metrics", "save", "after_save_checkpoint", "finalize")
# Once, before the first step: where they fail, the scores are tried all the same.
_FIRST = ("log_hyperparams", "log_graph")
# Packages that have exceptions of their own for a service that is dead or a network that is gone.
_CLIENTS = {"wandb", "mlflow", "neptune", "comet_ml", "clearml", "tensorboard", "requests", "urllib3", "grpc"}


def logger_failure(error: Exception) -> bool:
    """A disk or a connection that is gone, or what a logger's client says about it; not what its caller did wrong.

    Example:
        >>> logger_failure(ConnectionResetError("Connection lost")), logger_failure(TypeError("no number"))
        (True, False)
    """
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


# One for each logger, so that a dead service is told of once, whoever finds out.
_patience: weakref.WeakKeyDictionary[Any, Patience] = weakref.WeakKeyDictionary()


def patience_with(logger: Any) -> Patience:
    """The patience that all calls of a logger share."""
    meanwhile = "scores, cases and pictures are in the run folder all the same"
    own = Patience(type(logger).__name__, meanwhile, logger_failure)
    try:
        return _patience.setdefault(logger, own)
    except TypeError:  # a user's logger without a hash or weak references
        return own


class LoggerGuard:
    """Puts a `Patience` around what Lightning itself calls of the Trainer's loggers, on the objects, until `stop()`.

    Scores reach the loggers through Lightning, which lets their failures end the training. `finalize`, which comes
    after every callback has left, stays guarded until it was called.

    Args:
        loggers: `trainer.loggers`.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        self._covered: list[tuple[Any, str]] = []
        for logger in loggers:
            patience = patience_with(logger)
            for name in (*_FIRST, *_CALLS) if hasattr(logger, "__dict__") else ():
                self._cover(logger, name, patience.alike() if name in _FIRST else patience)

    def _cover(self, logger: Any, name: str, patience: Patience) -> None:
        original = getattr(logger, name, None)
        # One guard is enough, however many monitors there are; what the user put on the object stays on top.
        if original is None or type(logger).__name__ == "DummyLogger" or name in vars(logger):
            return

        @functools.wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> None:
            patience(original, *args, **kwargs)
            if name == "finalize":
                vars(logger).pop(name, None)

        setattr(logger, name, guarded)
        self._covered.append((logger, name))

    def stop(self) -> None:
        """Give the loggers their own methods back; calling it twice is calling it once."""
        for logger, name in self._covered:
            with contextlib.suppress(TypeError):
                _patience.pop(logger, None)
            if name != "finalize":
                vars(logger).pop(name, None)
        self._covered.clear()


class OpensLoggers:
    """The attribute `log` of a monitor, which Lightning sets before it opens the loggers, and tells so who trains.

    No hook comes that early: where W&B's server is gone, Lightning's own opening would end the run before `setup`.
    """

    def __set__(self, monitor: Any, log: Any) -> None:
        vars(monitor)["log"] = log
        trainer = getattr(getattr(log, "__self__", None), "_trainer", None)
        if trainer is None or not monitor.guard_loggers:
            return
        # Processes that were forked know their rank from the Trainer alone yet, loggers take each for the first.
        if trainer.local_rank == trainer.node_rank == 0:
            open_loggers(trainer.loggers)

    def __get__(self, monitor: Any, kind: type | None = None) -> Any:
        try:
            return vars(monitor)["log"]
        except (KeyError, TypeError):
            raise AttributeError("log") from None
