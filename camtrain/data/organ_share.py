"""`OrganShareSampler`: every batch gets its share of cases with organs, on every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Generator
from torch.utils.data import DistributedSampler

from camtrain._errors import InputError


class OrganShareSampler(DistributedSampler[int]):
    """Order of the cases in which each run of `batch_size` holds `share` cases with organs.

    Where few cases are segmented, a plain shuffle leaves many batches without any, and the mask loss has nothing to
    say there. A batch of m cases gets floor(share x m) or ceil(share x m) with organs, over an epoch share x length
    of them, give or take one. An epoch is as long as the data: where `share` is above that of the data, cases with
    organs come several times (all of them equally often, give or take once) and some of the others not at all, other
    ones in each epoch. Below, it is the other way round.

    It is a `DistributedSampler`, so that Lightning leaves it in place under DDP and calls `set_epoch`. The processes
    draw from one order without overlap; each takes its share from every batch. The order follows from seed and epoch
    alone.

    Args:
        has_organs: N flags, one per case of the data set.
        batch_size: Cases per batch and process, the same as the loader's.
        share: Part of each batch in (0, 1); None = the share of the data, in which case nobody is repeated or left
            out in an epoch (but for what evens out the processes).
        num_replicas: Processes; None = those of the running process group, or 1.
        rank: Number of this process; None likewise.
        seed: Of the order.
        drop_last: Give every process whole batches only, as a loader with `drop_last` does.

    Raises:
        InputError: An argument is out of range, or one kind of case is missing.

    Example:
        >>> has = [True, True] + [False] * 6
        >>> sampler = OrganShareSampler(has, batch_size=4, share=0.5)
        >>> order = list(sampler)
        >>> [sum(has[case] for case in order[start : start + 4]) for start in (0, 4)]
        [2, 2]
    """

    def __init__(
        self,
        has_organs: Sequence[bool],
        batch_size: int,
        share: float | None = 0.5,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        running = dist.is_available() and dist.is_initialized()
        replicas = num_replicas if num_replicas is not None else dist.get_world_size() if running else 1
        own = rank if rank is not None else dist.get_rank() if running else 0
        flags = [bool(flag) for flag in has_organs]
        self.with_organs = [case for case, flag in enumerate(flags) if flag]
        self.without_organs = [case for case, flag in enumerate(flags) if not flag]
        self.batch_size = batch_size
        self.share = check_share(share, len(self.with_organs), len(self.without_organs), batch_size)
        # A range is a data set as far as the base class looks: it asks for the length only.
        super().__init__(
            range(len(flags)),  # type: ignore[arg-type]
            num_replicas=replicas,
            rank=own,
            shuffle=True,
            seed=seed,
            drop_last=drop_last,
        )
        if drop_last:
            self.num_samples = len(flags) // (replicas * batch_size) * batch_size
            if not self.num_samples:
                raise InputError(
                    f"drop_last expects at least one whole batch for each process, got {len(flags)} cases for "
                    f"{replicas} of {batch_size}: make batch_size smaller, or leave drop_last out"
                )
        else:
            self.num_samples = math.ceil(len(flags) / replicas)
        self.total_size = self.num_samples * replicas

    def __iter__(self) -> Iterator[int]:
        """Cases of this process in this epoch."""
        generator = torch.Generator().manual_seed(hash_of(self.seed, self.epoch))
        phase = float(torch.rand((), generator=generator, dtype=torch.float64))
        # Processes are shifted against one another, so that a share below one case per batch falls to all in turn.
        phases = [(phase + rank / self.num_replicas) % 1 for rank in range(self.num_replicas)]
        organs = _endless(self.with_organs, generator)
        others = _endless(self.without_organs, generator)
        for start in range(0, self.num_samples, self.batch_size):
            stop = min(start + self.batch_size, self.num_samples)
            for rank in range(self.num_replicas):
                count = count_between(start, stop, self.share, phases[rank])
                batch = [next(organs) for _ in range(count)] + [next(others) for _ in range(stop - start - count)]
                order = torch.randperm(len(batch), generator=generator).tolist()
                if rank == self.rank:
                    yield from (batch[i] for i in order)

    def __len__(self) -> int:
        """Cases of this process in an epoch."""
        return self.num_samples


def count_between(start: int, stop: int, share: float, phase: float) -> int:
    """Cases with organs among the places start..stop-1, so that sums over neighbours never drift from the share.

    Example:
        >>> [count_between(i, i + 2, 0.25, 0.0) for i in (0, 2, 4, 6)]
        [0, 1, 0, 1]
    """
    # The rounding takes care of shares that binary numbers do not hold: 10 x 0.3 is not quite 3.
    return math.floor(round(stop * share + phase, 9)) - math.floor(round(start * share + phase, 9))


def check_share(share: float | None, with_organs: int, without: int, batch_size: int) -> float:
    """The share as a number.

    Raises:
        InputError: It is no part of a batch, or one kind of case is missing.
    """
    if batch_size < 1:
        raise InputError(f"batch_size expects a whole number from 1 on, got {batch_size}")
    if share is not None and not 0 < share < 1:
        raise InputError(f"organ_share expects a part of each batch between 0 and 1, got {share}: for example 0.5")
    if not with_organs or not without:
        missing = "with" if not with_organs else "without"
        raise InputError(
            f"organ_share needs cases with and without organs, got none {missing} among {with_organs + without}: "
            "leave organ_share out"
        )
    return with_organs / (with_organs + without) if share is None else float(share)


def hash_of(seed: int, epoch: int) -> int:
    """One seed out of two numbers; neighbours of seed and epoch share none.

    Example:
        >>> hash_of(0, 1) != hash_of(1, 0)
        True
    """
    return (seed * 1_000_003 + epoch) % 2**63


def _endless(cases: Sequence[int], generator: Generator) -> Iterator[int]:
    """One shuffle of all cases after the other."""
    while True:
        for place in torch.randperm(len(cases), generator=generator).tolist():
            yield cases[place]
