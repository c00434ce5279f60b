"""One thing at a time in a thread of its own, for what may wait for a server."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """Runs one action at a time beside the training; the process ends without waiting for it.

    Args:
        name: Of the thread.

    Example:
        >>> done = []
        >>> background = Background("table")
        >>> background.start(lambda: done.append(1))
        >>> background.wait(5), done
        (True, [1])
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None

    @property
    def busy(self) -> bool:
        """Is the last action still under way?"""
        return self._thread is not None and self._thread.is_alive()

    def start(self, action: Callable[[], object]) -> None:
        """Begin an action; only where none is under way.

        Raises:
            RuntimeError: One is under way.
        """
        if self.busy:
            raise RuntimeError(f"{self._name}: one action at a time; ask `busy` first")
        self._thread = Thread(target=action, name=self._name, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the action; is it over?"""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy
