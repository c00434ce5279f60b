"""Orders and draws of cases follow from seed and epoch: a run that goes on sees what it would have seen.

tests/faults ends whole runs and starts them again.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

from camtrain.callbacks._whole_checkpoints import write_checkpoint
from camtrain.callbacks.exact_resume import _last_path
from camtrain.data import ExactLoader, PhantomDataModule


@pytest.mark.parametrize("workers", [0, 2])
def test_orders_follow_from_seed_and_epoch(workers):
    def loader(seed=1):
        data = PhantomDataModule(cases=7, val_cases=1, test_cases=1, size=16, batch_size=3, seed=seed,
                                 num_workers=workers)  # fmt: skip
        data.setup("fit")
        return data.train_dataloader()

    def ids(loader):
        return [case for batch in loader for case in batch["id"]]

    whole, resumed = loader(), loader()
    assert isinstance(whole.sampler, RandomSampler)  # where Lightning finds none, it does not shuffle between processes
    epochs = [ids(whole) for _ in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert all(sorted(order) == sorted(epochs[0]) for order in epochs)
    for epoch in (2, 0, 1, 2):
        resumed.sampler.set_epoch(epoch)
        assert ids(resumed) == epochs[epoch]
    assert ids(loader(seed=2)) != epochs[0]


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index + torch.rand(())


def test_a_loader_goes_on_where_it_was_whatever_its_workers():
    def loader(workers):
        return ExactLoader(Noise(), seed=5, shuffle=True, batch_size=2, num_workers=workers,
                           persistent_workers=workers > 0)  # fmt: skip

    def batches(loader):
        return [batch.tolist() for batch in loader]

    whole, other = loader(0), loader(1)
    epochs = [batches(whole) for _ in range(3)]
    assert len({value for epoch in epochs for batch in epoch for value in batch}) == 21  # new draws for every epoch
    assert [batches(other) for _ in range(3)] == epochs
    other.load_state_dict({"epoch": 1, "batches": 3})
    before = torch.get_rng_state()
    assert batches(other) == epochs[1][3:]
    assert torch.equal(torch.get_rng_state(), before)
    assert other.state_dict() == {"epoch": 1, "batches": 4}
    whole.load_state_dict(other.state_dict())
    assert batches(whole) == epochs[2]


def test_without_a_seed_the_order_is_that_of_the_run(monkeypatch):
    def order(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return [int(i) for batch in ExactLoader(list(range(20)), shuffle=True, batch_size=4) for i in batch]

    assert order(1) == order(1) != order(2)


def test_batches_of_indices_may_be_arrays():
    found = ExactLoader(list(range(6)), seed=0, batch_sampler=[np.array([4, 1]), np.array([0])])
    assert [batch.tolist() for batch in found] == [[4, 1], [0]]


def test_another_walk_through_the_cases_in_mid_epoch_is_whole():
    place = SimpleNamespace(current=SimpleNamespace(processed=4))
    other = ExactLoader(list(range(20)), batch_size=2, trainer=lambda: trainer)
    fit = ExactLoader(list(range(20)), batch_size=2, trainer=lambda: trainer)
    combined = SimpleNamespace(flattened=[fit])
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=place), _combined_loader=combined)
    trainer = SimpleNamespace(training=True, current_epoch=0, limit_train_batches=1.0, fit_loop=loop)
    assert (len(list(fit)), len(list(other))) == (6, 10)


def test_where_the_last_checkpoint_goes_may_be_an_address():
    folder = SimpleNamespace(dirpath="s3://bucket/run/", CHECKPOINT_NAME_LAST="last", FILE_EXTENSION=".ckpt")
    assert _last_path(SimpleNamespace(checkpoint_callbacks=[folder])) == "s3://bucket/run/last.ckpt"


def test_two_runs_that_write_to_one_place_do_not_share_a_half_file(tmp_path, monkeypatch):
    parts = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (parts.append(self.name), replace(self, to))[1])
    for step in (1, 2):
        write_checkpoint({"step": step}, tmp_path / "last.ckpt")
    assert len(set(parts)) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    old = tmp_path / ".last.ckpt.0a.part"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_checkpoint({"step": 3}, tmp_path / "last.ckpt")
    assert not old.exists()
