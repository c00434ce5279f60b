"""What may fail and must not stop a training: tried, told once, left alone for a while, tried again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from camtrain._errors import InputError

WAIT = 30.0  # seconds after a failure before the next try
SLOW = 5.0  # seconds from which on a question to a server is told of
_SHARE = 100  # ... and at least so many times as long as the failed try took: failing costs at most a hundredth


def any_failure(error: Exception) -> bool:
    """Everything but what a user has to correct: for calls that are camtrain's own."""
    return not isinstance(error, InputError)


def file_failure(error: Exception) -> bool:
    """A disk that is full or gone."""
    return isinstance(error, OSError)


class Patience:
    """Runs what may fail: a file, a logger, a service.

    A failure gives one warning, and the next try comes after `WAIT` seconds at the earliest; until then every call is
    left out at once. So a broken logger neither stops nor slows a training.

    Args:
        what: Who failed, for the warning: `"WandbLogger"`.
        meanwhile: What the user has all the same: `"scores and pictures are in runs/..."`.
        catches: Which exceptions are failures; all others are raised.
        slow: For what runs beside the training, in a thread of its own: it is tried again after `WAIT` seconds, however
            long a failure takes, and what was done but took more seconds than this is told of like a failure.

    Example:
        >>> patience = Patience("the logger", "scores are in scores.csv")
        >>> patience(print, "logged")
        logged
        True
    """

    def __init__(
        self,
        what: str,
        meanwhile: str,
        catches: Callable[[Exception], bool] = any_failure,
        slow: float | None = None,
    ) -> None:
        self.what, self.meanwhile, self.catches, self.slow = what, meanwhile, catches, slow
        self._told: list[str] = []
        self._again = 0.0
        self.failing = False
        """Did the last try fail?"""

    def alike(self) -> Patience:
        """Another one for something smaller in the same place: it waits by itself, and the two warn once together."""
        other = Patience(self.what, self.meanwhile, self.catches, self.slow)
        other._told = self._told
        return other

    @property
    def waiting(self) -> bool:
        """Has it failed so lately that it is not tried?"""
        return time.monotonic() < self._again

    def forget(self) -> None:
        """Have the next call try, however lately it failed."""
        self._again = 0.0

    def __call__(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Do it, unless it failed lately.

        Returns:
            Whether it was done.

        Raises:
            Exception: Whatever `catches` says is no failure.
        """
        return self.attempt(self.catches, action, *args, **kwargs)

    def attempt(
        self, catches: Callable[[Exception], bool], action: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> bool:
        """The same, with another idea of what a failure is."""
        if self.waiting:
            return False
        start = time.monotonic()
        try:
            action(*args, **kwargs)
        except Exception as error:
            if not catches(error):
                raise
            self._leave_alone(start, error)
            self.failing = True
            return False
        self.failing = False
        if self.slow is not None and (took := time.monotonic() - start) > self.slow:
            self._tell(TimeoutError(f"it took {took:.0f} s"))
        return True

    def _leave_alone(self, start: float, error: Exception) -> None:
        now = time.monotonic()
        self._again = now + (WAIT if self.slow is not None else max(WAIT, _SHARE * (now - start)))
        self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            reason = f"{type(error).__name__}: {error}".strip().rstrip(":")
            self._told.append(reason)
            warnings.warn(
                f"camtrain: {self.what} failed ({reason}). Training goes on; {self.meanwhile}. It is tried again from "
                "time to time, without another warning",
                stacklevel=6,
            )


class PatientSink:
    """A sink whose failures, of any kind, do not reach the training; it has the methods of its sink.

    Args:
        sink: The sink.
        patience: What it is called through.
    """

    def __init__(self, sink: Any, patience: Patience) -> None:
        self.sink, self._patience = sink, patience

    def images(self, *args: Any, **kwargs: Any) -> None:
        """Hand pictures on."""
        self.send("images", *args, **kwargs)

    def table(self, *args: Any, **kwargs: Any) -> None:
        """Hand a table on."""
        self.send("table", *args, **kwargs)

    def send(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of the sink, where it has such a method."""
        if (method := getattr(self.sink, name, None)) is not None:
            self._patience.attempt(any_failure, method, *args, **kwargs)


class Unwritten:
    """Rows that wait for a disk that takes them.

    Args:
        write: Takes a list of rows; raises where the disk does not.
        patience: Shared by the files of a folder.

    Example:
        >>> rows = []
        >>> waiting = Unwritten(rows.extend, Patience("the run folder", "nothing is lost"))
        >>> waiting.add([1, 2])
        >>> rows
        [1, 2]
    """

    def __init__(self, write: Callable[[list[Any]], Any], patience: Patience) -> None:
        self._write, self._patience = write, patience
        self._rows: list[Any] = []
        self._begun = False

    def add(self, rows: Sequence[Any]) -> None:
        """Write these rows and all that could not be written before; the first time also none: a file without rows."""
        self._rows += rows
        if (self._rows or not self._begun) and self._patience(self._write, self._rows):
            self._begun = True
            self._rows = []
