"""What the data modules share: checks of their numbers, cases per split, and a loader that leaves the global seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from monai.data import DataLoader
from torch.utils.data import Dataset, Sampler

from camtrain._errors import InputError
from camtrain.data.exact_loader import EpochShuffle, ExactLoader, TrainerOf
from camtrain.data.organ_share import OrganShareSampler


def at_least(low: int, **numbers: float | None) -> None:
    """Compare arguments with the least that they may be; None is left to its default.

    Args:
        low: The least.
        numbers: Argument -> value.

    Raises:
        InputError: One is below.

    Example:
        >>> at_least(1, cases=4, val_cases=None)
    """
    for word, value in numbers.items():
        if value is not None and value < low:
            kind = "number" if isinstance(value, float) else "whole number"
            raise InputError(f"{word} expects a {kind} of at least {low}, got {value}")


def cases_by_split(cases: int, val_cases: int | None, test_cases: int | None, tests: Iterable[str]) -> dict[str, int]:
    """Number of cases of each split; what is None is a quarter of the training cases, and at least one.

    Example:
        >>> cases_by_split(10, None, 5, ["test", "shift"])
        {'train': 10, 'val': 2, 'test': 5, 'shift': 5}
    """
    quarter = max(1, cases // 4)
    return {"train": cases, "val": val_cases or quarter} | dict.fromkeys(tests, test_cases or quarter)


def seeded_loader(
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    seed: int,
    shuffle: bool,
    trainer: TrainerOf | None = None,
) -> DataLoader:
    """A loader whose order follows from `seed` alone.

    Args:
        dataset: The cases; its `make_all`, if it has one, is called before worker processes inherit it.
        batch_size: Cases per batch.
        num_workers: Worker processes, kept from epoch to epoch.
        seed: Of the order.
        shuffle: A new order every epoch, or always that of the dataset.
        trainer: Gives the Trainer, for a run that is resumed.
    """
    if num_workers and hasattr(dataset, "make_all"):
        dataset.make_all()
    return ExactLoader(
        dataset,
        trainer=trainer if shuffle else None,
        batch_size=batch_size,
        sampler=EpochShuffle(dataset, seed, batch_size) if shuffle else None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # An own generator: MONAI's loader would reset torch's global one, and the order should follow our seed.
        generator=torch.Generator().manual_seed(seed),
    )


def train_sampler(
    dataset: Dataset[Any], has_organs: Sequence[bool], batch_size: int, organ_share: float | None, seed: int
) -> Sampler[int]:
    """The order of training cases: a plain shuffle, or one that gives every batch its share of cases with organs.

    Args:
        dataset: The training cases.
        has_organs: One flag per case.
        batch_size: Of the loader.
        organ_share: Part of each batch that has organs; None = a plain shuffle.
        seed: Of the order; equal in all processes.

    Example:
        >>> sorted(train_sampler([10, 20], [True, False], 2, None, 0))
        [0, 1]
    """
    if organ_share is None:
        return EpochShuffle(dataset, seed, batch_size)
    return OrganShareSampler(has_organs, batch_size, organ_share, seed=seed)
