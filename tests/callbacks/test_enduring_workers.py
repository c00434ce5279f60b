"""Workers of a Trainer's loaders outlast SIGTERM, from the moment in which they are started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from monai.data import ThreadDataLoader
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, Dataset

from camtrain.callbacks._enduring_workers import EnduringWorkers

SLOW_START = {"seconds": 0.0}


def _be_slow():
    time.sleep(SLOW_START["seconds"])


os.register_at_fork(after_in_child=_be_slow)


class SlowToArrive(Dataset):
    """Cases whose way into a spawned worker takes a while."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([float(index)])

    def __setstate__(self, state):
        time.sleep(0.5)


class Parents(Dataset):
    """Whose child the worker is."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.tensor(os.getppid())


def trainer():
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture
def slow_start():
    SLOW_START["seconds"] = 0.5
    yield
    SLOW_START["seconds"] = 0.0


@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]
)
def test_workers_hit_in_the_moment_of_their_start(context, slow_start):
    plain = DataLoader._get_iterator
    run = trainer()
    enduring = EnduringWorkers(run)
    loader = run.strategy.process_dataloader(
        DataLoader(SlowToArrive(), num_workers=2, multiprocessing_context=context, persistent_workers=True)
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = iter(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert [batch.item() for batch in batches] == [0, 1, 2, 3]
    assert {worker.pid for worker in multiprocessing.active_children()} == {worker.pid for worker in workers}
    enduring.undo()
    assert DataLoader._get_iterator is plain
    os.kill(workers[0].pid, signal.SIGTERM)
    workers[0].join(10)
    assert workers[0].exitcode == 0
    loader._iterator._shutdown_workers()


@pytest.mark.slow
@pytest.mark.parametrize("started_before", [False, True])
def test_a_fork_server_outlasts_it_and_processes_of_the_user_do_not(started_before):
    context, run = multiprocessing.get_context("forkserver"), trainer()
    if started_before:
        own = context.Process(target=int)
        own.start()
        own.join(20)
    enduring = EnduringWorkers(run)
    loader = run.strategy.process_dataloader(
        DataLoader(Parents(), num_workers=1, multiprocessing_context=context, persistent_workers=True)
    )
    server = next(iter(loader)).item()
    for process in (server, *(worker.pid for worker in multiprocessing.active_children())):
        os.kill(process, signal.SIGTERM)
    time.sleep(0.2)
    assert [parent.item() for parent in loader] == [server, server]
    enduring.undo()
    loader._iterator._shutdown_workers()
    own = context.Process(target=time.sleep, args=(60,), daemon=True)
    own.start()
    own.terminate()
    own.join(10)
    try:
        assert own.exitcode == -signal.SIGTERM
    finally:
        own.kill()


def test_workers_that_are_threads():
    handler, run, began = signal.getsignal(signal.SIGTERM), trainer(), []
    enduring = EnduringWorkers(run)
    loader = run.strategy.process_dataloader(
        ThreadDataLoader(Parents(), num_workers=2, use_thread_workers=True, worker_init_fn=began.append)
    )
    assert [parent.item() for parent in loader] == [os.getppid()] * 2
    assert sorted(began) == [0, 1]
    assert signal.getsignal(signal.SIGTERM) is handler
    enduring.undo()


def test_several_runs_leave_the_loaders_as_they_were():
    plain = DataLoader._get_iterator
    runs = [trainer(), trainer()]
    first, second = map(EnduringWorkers, runs)
    assert DataLoader._get_iterator is not plain
    first.undo()
    first.undo()
    assert DataLoader._get_iterator is not plain
    second.undo()
    assert DataLoader._get_iterator is plain
