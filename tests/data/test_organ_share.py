"""The sampler that shares cases with organs out among batches, epochs and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from camtrain._errors import InputError
from camtrain.data.organ_share import OrganShareSampler, count_between


def batches(sampler, size):
    return list(BatchSampler(sampler, size, drop_last=False))


def flags(with_organs, without):
    return [True] * with_organs + [False] * without


@pytest.mark.parametrize(("share", "size"), [(0.5, 4), (0.25, 4), (0.3, 10), (0.1, 3), (0.9, 2), (0.5, 3)])
def test_every_batch_has_its_share_give_or_take_the_rounding(share, size):
    has = flags(11, 90)
    order = batches(OrganShareSampler(has, size, share, seed=3), size)
    counts = [sum(has[case] for case in batch) for batch in order]
    for count, batch in zip(counts, order, strict=True):
        assert abs(count - share * len(batch)) < 1
    assert abs(sum(counts) - share * len(has)) <= 1


def test_share_of_a_third_of_ten_is_never_off_by_binary_fractions():
    assert [count_between(10 * i, 10 * i + 10, 0.3, 0.0) for i in range(1000)] == [3] * 1000


def test_cases_of_one_kind_come_equally_often():
    has = flags(7, 93)
    seen = Counter(OrganShareSampler(has, 4, 0.5))
    organs = [seen[case] for case in range(7)]
    assert max(organs) - min(organs) <= 1
    assert max(seen[case] for case in range(7, 100)) == 1


def test_without_a_share_everybody_comes_once():
    has = flags(7, 20)
    sampler = OrganShareSampler(has, 4, None)
    assert sorted(sampler) == list(range(27))
    counts = [sum(has[case] for case in batch) for batch in batches(sampler, 4)]
    assert set(counts) <= {0, 1, 2}


def test_epochs_differ_and_repeat_by_seed():
    has = flags(10, 30)
    one, other = OrganShareSampler(has, 4, seed=5), OrganShareSampler(has, 4, seed=5)
    first = list(one)
    assert first == list(one) == list(other)
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first
    assert list(OrganShareSampler(has, 4, seed=6)) != first


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_every_process_has_its_share_and_no_case_of_another(replicas, drop_last):
    has, size = flags(40, 63), 4
    ranks = [OrganShareSampler(has, size, 0.25, replicas, rank, 7, drop_last) for rank in range(replicas)]
    orders = [list(rank) for rank in ranks]
    assert {len(order) for order in orders} == {len(ranks[0])}
    whole = 103 // (replicas * size) * size
    assert len(ranks[0]) == (whole if drop_last else -(-103 // replicas))
    for rank in ranks:
        for batch in batches(rank, size):
            assert abs(sum(has[case] for case in batch) - 0.25 * len(batch)) < 1
    # 0.25 of 103 are less than 40, so that no process takes a case with organs of another; 63 others are too few.
    organs = [case for order in orders for case in order if has[case]]
    assert len(organs) == len(set(organs))
    others = Counter(case for order in orders for case in order if not has[case])
    assert max(others.values()) - min(others[case] for case in range(40, 103)) <= 1


def test_less_than_a_case_per_batch_falls_to_all_processes():
    has = flags(50, 150)
    counts = [sum(has[case] for case in OrganShareSampler(has, 1, 0.25, 4, rank)) for rank in range(4)]
    assert all(abs(count - 12.5) <= 1 for count in counts)
    # In every step one of the four processes has organs, so that the mask loss always has something to say.
    steps = zip(*(list(OrganShareSampler(has, 1, 0.25, 4, rank)) for rank in range(4)), strict=True)
    assert all(sum(has[case] for case in step) == 1 for step in steps)


@pytest.mark.parametrize("drop_last", [False, True])
def test_loader_has_the_length_that_it_says(drop_last):
    sampler = OrganShareSampler(flags(5, 18), 4, 0.5, drop_last=drop_last)
    loader = DataLoader(list(range(23)), batch_size=4, sampler=sampler, drop_last=drop_last)
    assert len(loader) == len(list(loader)) == (5 if drop_last else 6)


def test_lightning_leaves_it_in_place():
    # Lightning replaces every sampler but those of this class under DDP.
    assert isinstance(OrganShareSampler(flags(1, 1), 2), DistributedSampler)


SCRIPT = """
import json, sys
import torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader
from camtrain.data import OrganShareSampler

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, index):
        self.seen.append([self.current_epoch, *batch.tolist()])
        return self.weight.sum()

    def train_dataloader(self):
        sampler = OrganShareSampler([True] * 6 + [False] * 19, 4, 0.5, seed=3)
        return DataLoader(torch.arange(25), batch_size=4, sampler=sampler)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

lit = Lit()
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
trainer.fit(lit)
json.dump(lit.seen, open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w"))
"""


@pytest.mark.slow
def test_lightning_with_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    has = flags(6, 19)
    for rank, steps in enumerate(ranks):
        for epoch in range(2):
            sampler = OrganShareSampler(has, 4, 0.5, 2, rank, seed=3)
            sampler.set_epoch(epoch)
            assert [case for step in steps if step[0] == epoch for case in step[1:]] == list(sampler)
        whole = [step[1:] for step in steps if len(step) == 5]
        assert whole
        assert all(sum(has[case] for case in step) == 2 for step in whole)
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"has_organs": flags(2, 2), "share": 0.0}, "between 0 and 1, got 0.0"),
        ({"has_organs": flags(2, 2), "share": 1.5}, "between 0 and 1, got 1.5"),
        ({"has_organs": flags(0, 4)}, "got none with among 4"),
        ({"has_organs": flags(4, 0)}, "got none without among 4"),
        ({"has_organs": [], "share": None}, "got none with"),
        ({"has_organs": flags(2, 2), "batch_size": 0}, "from 1 on, got 0"),
        ({"has_organs": flags(2, 2), "batch_size": 8, "drop_last": True}, "one whole batch"),
    ],
)
def test_wrong_arguments_are_told(arguments, told):
    with pytest.raises(InputError, match=told):
        OrganShareSampler(**({"batch_size": 2} | arguments))
