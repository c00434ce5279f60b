"""`ExactLoader`: order and augmentation follow from seed, epoch and case, so that a run can go on anywhere."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from monai.data import DataLoader
from torch.utils.data import Dataset, RandomSampler

TrainerOf = Callable[[], Any]


class Place(int):
    """The number of a case, which also says in which epoch it is asked for, in a worker process too.

    Example:
        >>> place = Place.of(3, epoch=7)
        >>> [10, 11, 12, 13][place], place.epoch
        (13, 7)
    """

    epoch: int

    @classmethod
    def of(cls, index: int, epoch: int) -> Place:
        """Case `index` in an epoch, counted from 0."""
        place = cls(index)
        place.epoch = epoch
        return place


@final
class EpochShuffle(RandomSampler):
    """A new order every epoch, which follows from seed and epoch alone.

    A run that goes on from a checkpoint then sees its cases in the order in which it would have seen them without the
    interruption: Lightning tells samplers the epoch. It is a `RandomSampler` because Lightning shuffles the shares of
    several processes only where it finds one.

    Args:
        dataset: The cases.
        seed: Of the orders.
        batch_size: Cases per batch.

    Example:
        >>> whole, resumed = EpochShuffle(range(8), 1, batch_size=3), EpochShuffle(range(8), 1, batch_size=3)
        >>> epochs = [list(whole) for _ in range(3)]
        >>> resumed.set_epoch(2)
        >>> list(resumed) == epochs[2]
        True
    """

    def __init__(self, dataset: Any, seed: int, batch_size: int) -> None:
        super().__init__(dataset)
        self._seed, self._next = seed, 0
        self._last_is_full = len(dataset) % batch_size == 0
        self._own = torch.Generator().manual_seed(seed)

    @property
    def epoch(self) -> int:
        """The epoch whose order comes next."""
        return self._next

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be that of `epoch`, counted from 0."""
        if epoch == self._next:
            return
        self._own.manual_seed(self._seed)
        for _ in range(epoch):
            self._order()
        self._next = epoch

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        self._next += 1
        return iter(order)

    def _order(self) -> list[int]:
        # The draws around the order are those that torch's own loader and sampler made from this generator under a
        # Trainer before there was this class: published runs keep their order.
        torch.empty((), dtype=torch.int64).random_(generator=self._own)
        order: list[int] = torch.randperm(len(self.data_source), generator=self._own).tolist()
        if not self._last_is_full:
            torch.randperm(len(self.data_source), generator=self._own)
        return order


class CaseDraws:
    """What is random in the making of a case follows from seed, epoch and case: random transforms, and global draws.

    It does not matter then how many worker processes there are, which of them makes a case, or what was made before.

    Args:
        dataset: Where MONAI's random transforms are looked for, once.
        seed: Of the draws.
    """

    # MONAI walks through the attributes of a dataset, and would run in a circle.
    __slots__ = ("_dataset", "_found", "seed")

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self.seed = dataset, seed
        self._found: list[Any] | None = None

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Draw for this case, and leave the global random states as they were."""
        if self._found is None:
            self._found = _randomizable(self._dataset)
        words = np.random.SeedSequence([self.seed, getattr(index, "epoch", 0), int(index)]).generate_state(3)
        for number, transform in enumerate(self._found):
            transform.set_random_state(seed=(int(words[0]) + number) % 2**32)
        # NumPy's global state: what transforms of other libraries draw from.
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        # Not torch.manual_seed: it would rewind the accelerator's generator, which is not put back here.
        torch.default_generator.manual_seed(int(words[1]))
        np.random.seed(int(words[1]))  # noqa: NPY002
        random.seed(int(words[2]))
        try:
            yield
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])


def _randomizable(found: Any, depth: int = 3) -> list[Any]:
    """MONAI's random transforms (or the `Compose` around them) in an object's attributes, in their order."""
    if hasattr(found, "set_random_state"):
        return [found]
    if depth == 0:
        return []
    inside: Sequence[Any] = ()
    if isinstance(found, list | tuple):
        inside = found if len(found) <= 64 else ()  # longer ones are cases
    elif isinstance(found, Mapping):
        inside = list(found.values()) if len(found) <= 64 else ()
    else:
        inside = list(getattr(found, "__dict__", {}).values())
    each = [one for thing in inside for one in _randomizable(thing, depth - 1)]
    return list({id(one): one for one in each}.values())


class DrawnByPlace(Dataset[Any]):
    """A dataset whose random draws follow from seed, epoch and case; everything else is the dataset's own.

    Args:
        dataset: With numbered cases.
        seed: Of the draws.

    Example:
        >>> class Noise(torch.utils.data.Dataset):
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return float(torch.rand(()))
        >>> cases = DrawnByPlace(Noise(), seed=1)
        >>> cases[2] == cases[2], cases[2] == cases[Place.of(2, epoch=1)]
        (True, False)
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self._draws = CaseDraws(dataset, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with self._draws.at(index):
            return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        # `__getitems__` of the dataset would pass by the draws; what pickle and copy look for is not there yet.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def drawn_by_place(dataset: Any, seed: int) -> Any:
    """The dataset with draws by place: itself where it has `draws` (camtrain's own have), else wrapped."""
    if isinstance(dataset, DrawnByPlace):
        return dataset
    if not hasattr(dataset, "draws"):
        return DrawnByPlace(dataset, seed)
    dataset.draws = CaseDraws(dataset, seed)
    return dataset


class ExactLoader(DataLoader):  # type: ignore[misc]
    """MONAI's loader for runs that can be ended anywhere and go on as if they had not been.

    Order and augmentation follow from the seed, the epoch and the case, whatever the number of workers. Where a run is
    resumed in the middle of an epoch, the cases that it has seen are not read again. Lightning alone starts the epoch
    anew there, with worker processes also in the first epoch's order.

    Args:
        dataset: With numbered cases, image and organs changed by MONAI's random transforms or by global draws.
        seed: Of the order and of the draws; None: the dataset's draws are left as they are.
        trainer: Callable that gives the Trainer, or None outside of one: `lambda: self.trainer` in a data module.
            Without it the loader goes by its sampler's epoch, and by `load_state_dict`.
        shuffle: A new order every epoch. With `sampler=` the order is the sampler's.
        kwargs: As for `torch.utils.data.DataLoader`.

    Example:
        >>> loader = ExactLoader(torch.arange(6), seed=1, shuffle=True, batch_size=2)
        >>> first = [batch.tolist() for batch in loader]
        >>> again = ExactLoader(torch.arange(6), seed=1, shuffle=True, batch_size=2)
        >>> again.load_state_dict({"epoch": 0, "batches": 1})
        >>> [batch.tolist() for batch in again] == first[1:]
        True
    """

    def __init__(
        self,
        dataset: Any,
        seed: int | None = None,
        trainer: TrainerOf | None = None,
        shuffle: bool = False,
        **kwargs: Any,
    ) -> None:
        self.seed, self.trainer = seed, trainer
        # Every process has to agree: torch's own seed of a process without `seed_everything` is drawn.
        order = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        if shuffle and kwargs.get("sampler") is None:
            kwargs["sampler"] = EpochShuffle(dataset, order, kwargs.get("batch_size") or 1)
        # An own generator: MONAI's loader would rewind the global one.
        kwargs.setdefault("generator", torch.Generator().manual_seed(order))
        super().__init__(dataset if seed is None else drawn_by_place(dataset, seed), **kwargs)
        self._resume: tuple[int, int] | None = None
        self._epoch, self._given, self._next = 0, 0, 0
        self._places = _Places(self)

    @property
    def _index_sampler(self) -> Any:
        """What torch's iterators take their batches of indices from."""
        return self._places

    def __iter__(self) -> Any:
        """The batches of an epoch, or those that are left of it."""
        return _Batches(self)

    def _place(self) -> tuple[int, int] | None:
        """Epoch and batches done, as the Trainer has them."""
        trainer = None if self.trainer is None else self.trainer()
        if trainer is None:
            return None
        combined = getattr(trainer.fit_loop, "_combined_loader", None)
        if combined is not None and all(each is not self for each in combined.flattened):
            return None  # not the loader of the fit: another walk through the cases
        return _place_of(trainer, len(self))

    def _begin(self, place: tuple[int, int] | None) -> Iterator[Any]:
        """The loader's own iterator, from a place on."""
        if place is not None:
            self._resume = place
            for sampler in (self.sampler, getattr(self.batch_sampler, "sampler", None)):
                if (tell := getattr(sampler, "set_epoch", None)) is not None:
                    tell(place[0])
        own: Iterator[Any] = super().__iter__()
        return own

    def state_dict(self) -> dict[str, int]:
        """Where it is: epoch, and batches given out in it."""
        return {"epoch": self._epoch, "batches": self._given}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Have the next iteration be what is left of that epoch, or the next epoch."""
        epoch, batches = int(state_dict["epoch"]), int(state_dict["batches"])
        self._resume = (epoch, batches) if batches < len(self) else (epoch + 1, 0)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self._resume[0])

    def _start(self) -> tuple[int, int]:
        """Epoch and batches to leave out, for an iteration that starts now."""
        resume, self._resume = self._resume, None
        self._epoch = int(getattr(self.sampler, "epoch", self._next if resume is None else resume[0]))
        self._next = self._epoch + 1
        self._given = resume[1] if resume is not None and resume[0] == self._epoch else 0
        return self._epoch, self._given


class _Places:
    """The batches of a loader's own sampler, as places, without those that are done."""

    def __init__(self, loader: ExactLoader) -> None:
        self._loader = loader

    def _source(self) -> Any:
        return self._loader.sampler if self._loader.batch_sampler is None else self._loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self._loader._start()
        for number, indices in enumerate(self._source()):
            if number < done:
                continue
            many = np.ndim(indices) > 0
            yield [Place.of(i, epoch) for i in indices] if many else Place.of(indices, epoch)

    def __len__(self) -> int:
        return len(self._source())


class _Batches:
    """An iteration of a loader: it counts for it what was given out."""

    def __init__(self, loader: ExactLoader) -> None:
        self._loader, self._place, self._begun = loader, loader._place(), False
        self._own = loader._begin(self._place)  # now: worker processes begin to read

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        if not self._begun:
            self._begun = True
            # Lightning may ask for the iterator before it reads the checkpoint of a run that is resumed.
            if (place := self._loader._place()) != self._place:
                self._own = self._loader._begin(place)
        batch = next(self._own)
        self._loader._given += 1
        return batch

    def __len__(self) -> int:
        return len(self._loader)


def _place_of(trainer: Any, batches: int) -> tuple[int, int]:
    """The epoch of a fit, and the batches of it that are done: in a resumed run those of the checkpoint."""
    if getattr(trainer, "training", True) is False:
        return int(trainer.current_epoch), 0
    done = int(trainer.fit_loop.epoch_loop.batch_progress.current.processed)
    limit = trainer.limit_train_batches
    whole = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return int(trainer.current_epoch), done if done < whole else 0
