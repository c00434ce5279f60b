"""What the data modules share: checks of their numbers, cases per split, and a loader that leaves the global seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from monai.data import DataLoader
from torch.utils.data import Dataset

from camtrain._errors import InputError


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


def seeded_loader(dataset: Dataset[Any], batch_size: int, num_workers: int, seed: int, shuffle: bool) -> DataLoader:
    """A loader whose order follows from `seed` alone.

    Args:
        dataset: The cases; its `make_all`, if it has one, is called before worker processes inherit it.
        batch_size: Cases per batch.
        num_workers: Worker processes, kept from epoch to epoch.
        seed: Of the order.
        shuffle: A new order every epoch, or always that of the dataset.
    """
    if num_workers and hasattr(dataset, "make_all"):
        dataset.make_all()
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # An own generator: MONAI's loader would reset torch's global one, and the order should follow our seed.
        generator=torch.Generator().manual_seed(seed),
    )
