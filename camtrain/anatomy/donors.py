"""Other cases that lend their image: a small pool, bounded in memory, with both truths of as many labels as can be."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain._batch import Batch
from camtrain._errors import InputError

COUNT, MEMORY, SEARCH = 16, 2**30, 64
_LEAST = 2  # a case never lends to itself, so one donor would serve no one's own case


@dataclass(frozen=True, eq=False)
class Donor:
    """A case that lends its image.

    Attributes:
        id: Name of the case.
        image: (C, *S) on the CPU, as it is kept.
        label: (L,), NaN = unknown.
    """

    id: str
    image: Tensor
    label: Tensor


class DonorPool:
    """A few cases of the split that is evaluated, kept in memory.

    Cases are offered in the order of the data, and only the first `search` count. While there is room each one is
    kept; after that it takes the place of the one without which most is gained: first more (label, truth) pairs with
    any donor at all, then more donors for pairs with few. So the pool follows from the order of the cases alone.

    Only donors of the very same shape are handed out: cropping and padding would put air, or another part of the
    body, where the organs are. A data set in which every case has a shape of its own has no donors; resample it.

    Images are kept as float16 where that changes no voxel by more than 1/1000 of the image's range, else in their
    own dtype.

    Args:
        count: Most cases to keep, at least 2.
        memory: Most bytes to keep; two cases are kept whatever their size.
        search: How many of the first cases are looked at.

    Raises:
        InputError: A bound is too low.

    Example:
        >>> pool = DonorPool(count=2)
        >>> pool.offer(["a", "b"], torch.rand(2, 1, 4), torch.tensor([[1.0], [0.0]]))
        >>> pool.donor("a", 0, 1.0, (1, 4)).id, pool.donor("new case", 0, 0.0, (1, 4)).id
        ('b', 'a')
    """

    def __init__(self, count: int = COUNT, memory: int = MEMORY, search: int = SEARCH) -> None:
        for word, value in (("count", count), ("search", search)):
            if value < _LEAST:
                raise InputError(f"{word}= expects at least {_LEAST} cases, since no case lends to itself, got {value}")
        if memory < 1:
            raise InputError(f"memory= expects a number of bytes, got {memory}")
        self.count, self.memory, self.search = count, memory, search
        self.seen = 0
        self._kept: list[Donor] = []
        self._patients: dict[str, str | None] = {}

    @classmethod
    def of(cls, batches: Iterable[Batch], count: int = COUNT, memory: int = MEMORY, search: int = SEARCH) -> DonorPool:
        """A pool of the first cases of a split; no more batches are read than it takes.

        Args:
            batches: With image, label and ids.
            count: See the class.
            memory: See the class.
            search: See the class.

        Raises:
            InputError: A batch without image, label or ids, or a bound that is too low.
        """
        pool = cls(count, memory, search)
        for batch in batches:
            if batch.image is None or batch.label is None or batch.ids is None:
                raise InputError("donors need batches with image, label and id: add what is missing, or pass keys=")
            pool.offer(batch.ids, batch.image, batch.label)
            if pool.complete:
                break
        return pool

    def __len__(self) -> int:
        """Number of cases that are kept."""
        return len(self._kept)

    def __repr__(self) -> str:
        return f"DonorPool({len(self)} of {self.seen} cases, {self.nbytes / 2**20:.0f} MiB)"

    @property
    def complete(self) -> bool:
        """Further cases are not looked at."""
        return self.seen >= self.search

    @property
    def ids(self) -> list[str]:
        """Names of the cases that are kept."""
        return [donor.id for donor in self._kept]

    @property
    def nbytes(self) -> int:
        """Bytes that the images take."""
        return sum(donor.image.nbytes for donor in self._kept)

    def offer(
        self, ids: Sequence[str], image: Tensor, label: Tensor, patients: Sequence[str | None] | None = None
    ) -> None:
        """Look at the cases of one batch; a case that was seen before, or comes too late, is passed over.

        Args:
            ids: B names.
            image: (B, C, *S).
            label: (B, L), NaN = unknown.
            patients: Patient of each, None = unknown; a patient never lends to a scan of his or her own.

        Raises:
            InputError: Their numbers differ, or labels of another number than before.
        """
        for name, patient in zip(ids, patients or [None] * len(ids), strict=True):
            self.belongs(name, patient)
        if not len(ids) == len(image) == len(label) or label.ndim != 2:
            raise InputError(
                f"expected one id and one label row per image, got {len(ids)} ids, images {tuple(image.shape)} and "
                f"labels {tuple(label.shape)}"
            )
        if self._kept and self._kept[0].label.shape != label.shape[1:]:
            raise InputError(f"expected {len(self._kept[0].label)} labels as before, got {label.shape[1]}")
        for name, one, truth in zip(ids, image, label, strict=True):
            if not self.complete and name not in self.ids:
                self.seen += 1
                self._take(Donor(str(name), small_copy(one), truth.detach().float().cpu().clone()))

    def belongs(self, case: str, patient: str | None) -> None:
        """Whose scan a case is; None = unknown."""
        self._patients[str(case)] = patient

    def donor(self, case: str, column: int, truth: float, shape: Sequence[int]) -> Donor | None:
        """Another case's image.

        Args:
            case: Name of the case that is to be changed; it is never its own donor.
            column: The label that is asked about.
            truth: The label's truth in that case; a donor of the opposite truth goes before all others.
            shape: (C, *S) of its image.

        Returns:
            A donor; None if the pool has no other case of that shape. The same case and label always get the same
            donor, and labels of one case share donors where they can.
        """
        own = self._patients.get(case)
        others = [d for d in self._kept if own is None or self._patients.get(d.id) != own]
        return choose_donor(others, case, column, truth, shape)

    def _take(self, new: Donor) -> None:
        kept = [*self._kept, new]
        while len(kept) > _LEAST and (len(kept) > self.count or sum(d.image.nbytes for d in kept) > self.memory):
            # Of equals the newest goes, so that the pool does not change without a reason.
            worth = [_worth(kept[:i] + kept[i + 1 :]) for i in range(len(kept))]
            kept.pop(max(range(len(kept)), key=lambda i: (worth[i], i)))
        self._kept = kept


def choose_donor(donors: Iterable[Donor], case: str, column: int, truth: float, shape: Sequence[int]) -> Donor | None:
    """The case that lends its image to another one; arguments and result as in `DonorPool.donor`.

    Example:
        >>> pair = [Donor(name, torch.zeros(1, 4), torch.tensor([truth])) for name, truth in (("a", 1.0), ("b", 0.0))]
        >>> choose_donor(pair, "new case", 0, 1.0, (1, 4)).id
        'b'
    """
    others = [d for d in donors if d.id != case and tuple(d.image.shape) == tuple(shape)]
    opposite = [d for d in others if float(d.label[column]) == 1 - truth]
    # An order of the donors that is this case's own, so that not every case gets the first one.
    return min(opposite or others, key=lambda d: (zlib.crc32(f"{case}\n{d.id}".encode()), d.id), default=None)


def small_copy(image: Tensor) -> Tensor:
    """A copy on the CPU, as float16 where that changes no voxel by more than 1/1000 of the image's range."""
    plain = image.detach().as_subclass(Tensor).cpu()
    half = plain.to(torch.float16)
    span = plain.max() - plain.min()
    fits = bool(((half.to(plain.dtype) - plain).abs() <= span / 1000).all())
    return half if fits and plain.element_size() > half.element_size() else plain.clone()


def _worth(donors: list[Donor]) -> tuple[int, float]:
    """Pairs (shape, label, truth) with a donor; then a sum in which each further donor of a pair counts half."""
    covered, spread = 0, 0.0
    for shape in {d.image.shape for d in donors}:
        label = torch.stack([d.label for d in donors if d.image.shape == shape])
        counts = torch.stack([(label == 0).sum(dim=0), (label == 1).sum(dim=0)])
        covered += int((counts > 0).sum())
        spread += float((1 - 0.5 ** counts.double()).sum())
    return covered, spread
