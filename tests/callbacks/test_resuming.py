"""Orders and draws of cases follow from seed and epoch: a run that goes on sees what it would have seen.

tests/faults ends whole runs and starts them again.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import RandomSampler

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
