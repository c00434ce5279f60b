"""Worker processes of DataLoaders that outlast SIGTERM, so that the process which they read for can end in order."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawValue
from typing import Any

from torch.utils.data import DataLoader

InitFn = Callable[[int], Any]


class EnduringWorkers:
    """Has the workers of a Trainer's loaders pass over SIGTERM from now on until `undo()`.

    Clusters send SIGTERM to every process of a job. A worker would die of it at once, and torch then ends the training
    wherever it is. The workers need no signal: they leave when their process lets go of them, or is gone.

    Args:
        trainer: Every loader of every stage passes through its strategy's `process_dataloader` before it is iterated.
            What the loader has as `worker_init_fn`, or gets from Lightning, is called as before.
    """

    def __init__(self, trainer: Any) -> None:
        self._strategy: Any = None
        self._loaders: weakref.WeakSet[Any] = weakref.WeakSet()
        strategy = trainer.strategy
        if os.name != "posix" or "process_dataloader" in vars(strategy):
            return
        self._strategy, self._number = strategy, _Number.of_this_process()
        self._number.begin()
        original = strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            self._cover(trainer, loader)
            return original(loader)

        strategy.process_dataloader = process_dataloader

    def _cover(self, trainer: Any, loader: Any) -> None:
        if not getattr(loader, "num_workers", 0) or not hasattr(loader, "worker_init_fn"):
            return
        # Lightning's seeds for workers go where nothing is yet, so they must come first.
        seeding = getattr(sys.modules[type(trainer._data_connector).__module__], "_auto_add_worker_init_fn", None)
        if seeding is not None:
            seeding(loader, trainer.global_rank)
        if not isinstance(loader.worker_init_fn, Enduring):
            loader.worker_init_fn = Enduring(loader.worker_init_fn, self._number.runs)
        self._loaders.add(loader)

    def undo(self) -> None:
        """Leave strategy and loaders as they were; workers that are still there end by SIGTERM again."""
        if self._strategy is None:
            return
        vars(self._strategy).pop("process_dataloader", None)
        self._strategy = None
        self._number.end()
        for loader in self._loaders:
            if isinstance(loader.worker_init_fn, Enduring):
                loader.worker_init_fn = loader.worker_init_fn.own
        self._loaders.clear()


class Enduring:
    """A `worker_init_fn` that has its process pass over SIGTERM while a run goes on, and then calls another one.

    Args:
        own: What the loader had.
        runs: How many runs go on in the process of the loader, in memory that it shares with its workers.
    """

    def __init__(self, own: InitFn | None, runs: Any) -> None:
        self.own, self._runs, self._parent = own, runs, 0

    def __call__(self, worker_id: int) -> None:
        # The workers of MONAI's ThreadDataLoader can be threads, which get no signals.
        if threading.current_thread() is threading.main_thread():
            self._endure()
        if self.own is not None:
            self.own(worker_id)

    def _endure(self) -> None:
        self._parent = os.getppid()
        # After torch has set its own handler, by which a worker dies.
        signal.signal(signal.SIGTERM, self._told)
        signal.siginterrupt(signal.SIGTERM, False)  # what reads a file here need not know of it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # it was born deaf: see `_start_workers`

    def _told(self, *_: Any) -> None:
        # At the end of the process Python ends its workers by SIGTERM, and waits for them: that has to work.
        if self._runs.value <= 0 or os.getppid() != self._parent:
            os._exit(0)

    def __reduce__(self) -> Any:
        # Shared memory goes to a new worker only. Whoever copies the loader copies the user's own.
        return (Enduring, (self.own, self._runs)) if get_spawning_popen() is not None else (_same, (self.own,))


class _Number:
    """How many runs go on in one process: a child process that begins a run has a number of its own."""

    _known: _Number | None = None
    _plain: Callable[[Any], Any]

    def __init__(self) -> None:
        self.process, self.runs = os.getpid(), RawValue(ctypes.c_int, 0)
        self._server: forkserver.ForkServer | None = None
        # Registered after multiprocessing's own, so called before it: whatever has happened, nothing waits for ever.
        atexit.register(self._over)

    @classmethod
    def of_this_process(cls) -> _Number:
        if cls._known is None or cls._known.process != os.getpid():
            cls._known = cls()
        return cls._known

    def begin(self) -> None:
        """One run more."""
        self.runs.value += 1
        if DataLoader._get_iterator is not _start_workers:
            _Number._plain = DataLoader._get_iterator
            DataLoader._get_iterator = _start_workers  # type: ignore[assignment,method-assign]

    def end(self) -> None:
        """One run less; behind the last one loaders start their workers as they did."""
        self.runs.value -= 1
        if not self.runs.value and DataLoader._get_iterator is _start_workers:
            DataLoader._get_iterator = _Number._plain  # type: ignore[assignment,method-assign]

    @contextmanager
    def own_fork_server(self) -> Iterator[None]:
        """A fork server that begins deaf, for workers only: they live as long as it, and begin as deaf as it is.

        Processes of the user come of the usual server, and those must hear: `Process.terminate()` is SIGTERM.
        """
        if self._server is None:
            usual: Any = forkserver._forkserver
            self._server = forkserver.ForkServer()
            self._server.set_forkserver_preload(list(usual._preload_modules))
        plain = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = self._server.connect_to_new_process
        try:
            yield
        finally:
            forkserver.connect_to_new_process = plain

    def _over(self) -> None:
        if self.process == os.getpid():
            self.runs.value = 0


def _start_workers(loader: Any) -> Any:
    """`DataLoader._get_iterator` while a run goes on: a worker that has just begun would still die of SIGTERM."""
    if not isinstance(loader.worker_init_fn, Enduring):
        return _Number._plain(loader)
    method = (loader.multiprocessing_context or multiprocessing).get_start_method()
    if method != "fork":
        resource_tracker.ensure_running()  # its own start would let SIGTERM through again
    # Processes that this thread starts begin deaf, and hear again once they are `Enduring`.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with ExitStack() as stack:
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        if method == "forkserver":
            stack.enter_context(_Number.of_this_process().own_fork_server())
        return _Number._plain(loader)


def _same(own: Any) -> Any:
    return own
