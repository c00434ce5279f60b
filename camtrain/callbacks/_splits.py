"""Which split a batch belongs to, and which of its cases a distributed sampler has shown before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

# Stage of the Trainer -> the module's step to watch, and the hook in which an epoch's scores are logged.
HOOKS = {
    "fit": ("validation_step", "on_validation_epoch_end"),
    "validate": ("validation_step", "on_validation_epoch_end"),
    "test": ("test_step", "on_test_epoch_end"),
}


def split_name(trainer: Any, dataloader_idx: int) -> str:
    """`val` or `test`, or the data module's own word for this loader.

    Several validation loaders are `val`, `val_1`, `val_2`; test loaders take the names of the data module's
    `test_splits`, else `test`, `test_1`.
    """
    if trainer.testing:
        splits = getattr(getattr(trainer, "datamodule", None), "test_splits", None)
        if splits and dataloader_idx < len(splits):
            return str(splits[dataloader_idx])
    base = "test" if trainer.testing else "val"
    return base if dataloader_idx == 0 else f"{base}_{dataloader_idx}"


def loader_of(trainer: Any, dataloader_idx: int) -> Any:
    """The evaluation DataLoader that runs, or None where it cannot be told."""
    if trainer.testing:
        loop = trainer.test_loop
    elif trainer.state.fn == "fit":
        loop = trainer.fit_loop.epoch_loop.val_loop
    else:
        loop = trainer.validate_loop
    # `trainer.val_dataloaders` gives the loaders of the last fit, also while `trainer.validate` runs others.
    loaders = getattr(getattr(loop, "_combined_loader", None), "flattened", None)
    if loaders is None:
        loaders = (trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders) or []
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    return loaders[dataloader_idx] if dataloader_idx < len(loaders) else None


def is_repeat(loader: Any, start: int, count: int) -> list[bool]:
    """For the cases `start` ... of this process: did the sampler add them only to make the ranks even?

    Args:
        loader: The DataLoader, whose sampler decides; without a `DistributedSampler` in order nothing repeats.
        start: Cases that this process has seen of it.
        count: Cases of this batch.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.shuffle:
        return [False] * count
    total = len(sampler.dataset)  # type: ignore[arg-type]
    # Without shuffling rank r gets the padded positions r, r + world, ...; those past the end are repeats.
    return [(start + k) * sampler.num_replicas + sampler.rank >= total for k in range(count)]


class Repeats:
    """No case counts twice: what a sampler or a dataset showed for a second time becomes unknown.

    Lightning's sampler fills up uneven ranks with cases that were already seen. Our own datasets with
    `on_error="skip"` leave broken cases out, so that rows move up, and let the next case stand in for a whole batch.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._next: dict[int, int] = {}
        self._shown: dict[int, ShownOnce] = {}

    def begin(self) -> None:
        """A new pass."""
        self._seen.clear()
        self._next.clear()
        self._shown.clear()

    def unknown(
        self, trainer: Any, label: Tensor, ids: list[str] | None, batch_idx: int, dataloader_idx: int
    ) -> Tensor:
        """(B, L) with the rows of repeated cases made NaN."""
        loader = loader_of(trainer, dataloader_idx)
        # Batches that memory did not suffice for never came here; only the last one may be smaller than others.
        missed = max(0, batch_idx - self._next.get(dataloader_idx, 0)) * (getattr(loader, "batch_size", None) or 0)
        start = self._seen.get(dataloader_idx, 0) + missed
        self._seen[dataloader_idx], self._next[dataloader_idx] = start + len(label), batch_idx + 1
        names = getattr(getattr(loader, "dataset", None), "case_ids", None)
        if names is not None and ids is not None:
            if dataloader_idx not in self._shown:
                self._shown[dataloader_idx] = ShownOnce(names, loader.sampler)
            repeats = [self._shown[dataloader_idx].again(case) for case in ids]
        else:
            repeats = is_repeat(loader, start, len(label))
        if not any(repeats):
            return label
        return torch.where(torch.tensor(repeats, device=label.device)[:, None], torch.nan, label)


class ShownOnce:
    """Which cases of a dataset with names of its own this process has counted in a pass.

    Args:
        names: Of all cases, in the order of the dataset; no name twice.
        sampler: Of the loader; with a `DistributedSampler` in order a case belongs to one process.

    Example:
        >>> shown = ShownOnce(["a", "b"], None)
        >>> [shown.again(case) for case in "aba"]
        [False, False, True]
    """

    def __init__(self, names: Sequence[str], sampler: Any) -> None:
        in_order = isinstance(sampler, DistributedSampler) and not sampler.shuffle
        share = slice(sampler.rank, None, sampler.num_replicas) if in_order else slice(None)
        self._left = set(names[share])

    def again(self, case: str) -> bool:
        """Was this case counted before, or does another process count it?"""
        if case in self._left:
            self._left.remove(case)
            return False
        return True
