"""Two processes with uneven shares equal one process on the whole batch (rule 9)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from camtrain.losses import OrganMaskLoss

FORMS = ["softplus", "l2", "l2_normalised", "energy"]
# How many of the four samples the first process has; "bare" takes the organs of all samples of the second.
SHARES = [(3, "organs"), (1, "organs"), (3, "bare"), (4, "organs")]
CASES = list(itertools.product(FORMS, ["global", "per_label"], SHARES, [None, [1.0, 0.5, 0.0, 2.0, 1.0]]))


class Head(nn.Module):
    """Maps W * A, so that the gradient of W is what the processes exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2)).double())

    def forward(self, activations: Tensor) -> Tensor:
        return activations[:, None] * self.weight


def a_batch(first: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    activations = torch.randn(4, 2, 3, generator=rng, dtype=torch.float64)
    allowed = torch.rand(4, 5, 2, 3, generator=rng) < 0.5
    label = (torch.rand(4, 5, generator=rng) < 0.5).double()
    label[0, 1], allowed[3, 2] = float("nan"), False
    label[:, 4] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    has_organs = torch.ones(4, dtype=torch.bool)
    if kind == "bare":
        has_organs[first:] = False
    return activations, allowed, label, has_organs


def one_case(case, head, share: slice):
    form, reduction, (first, kind), weights = case
    activations, allowed, label, has_organs = (t[share] for t in a_batch(first, kind))
    module = OrganMaskLoss(form, reduction=reduction, label_weights=weights, weight=0.3)
    parts = module.parts(head(activations), allowed, label, has_organs)
    (module.weight * parts.loss).backward()
    counts = [parts.unknown_labels, parts.cases_without_organs, parts.labels_without_region]
    return parts.loss.detach(), parts.evidence, torch.stack(counts)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    head = DistributedDataParallel(Head())
    results = []
    for case in CASES:
        head.zero_grad()
        first = case[2][0]
        loss, evidence, counts = one_case(case, head, slice(0, first) if rank == 0 else slice(first, 4))
        results.append((loss, evidence, counts, head.module.weight.grad.clone()))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_processes_equal_one(tmp_path):
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for number, case in enumerate(CASES):
        head = Head()
        loss, evidence, counts = one_case(case, head, slice(0, 4))
        pair = [result[number] for result in results]
        torch.testing.assert_close((pair[0][0] + pair[1][0]) / 2, loss, msg=f"loss of {case}")
        for one in pair:
            torch.testing.assert_close(one[1], evidence, msg=f"evidence of {case}")
            assert torch.equal(one[2], counts), case
            torch.testing.assert_close(one[3], head.weight.grad, msg=f"gradient of {case}")
