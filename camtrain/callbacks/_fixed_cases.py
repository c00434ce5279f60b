"""A few validation cases that are chosen once and kept, so that the same images are asked about every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain.anatomy.donors import Donor, choose_donor, small_copy


@dataclass(frozen=True, eq=False)
class FixedCase:
    """One case on the CPU.

    Attributes:
        id: Its name.
        image: (C, *S) as the network got it; float16 where that is exact enough.
        organs: (1, *S) integer ids.
        label: (L,), NaN = unknown.
        affine: (4, 4) voxel to world in mm, or None.
        allowed_organs: (L, organs), where the batch says of each case which organs its labels may use; else None.
    """

    id: str
    image: Tensor
    organs: Tensor
    label: Tensor
    affine: Tensor | None
    allowed_organs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return int(self.image.nbytes + self.organs.nbytes)


class FixedCases:
    """Chooses cases of one pass, balanced over labels and truths, and keeps them; lends their images to each other.

    Every segmented case of the pass is looked at. While there is room each one is kept; after that it takes the place
    of the one that is missed least, where a case is worth the sum over its known labels of what it adds to the square
    root of the number of cases with that label and truth: a second positive of a rare finding counts for more than a
    twentieth negative of another. So the choice follows from the order of the cases alone.

    Args:
        count: Most cases.
        memory: Most bytes of images and organs; two cases are kept whatever their size, so that one can lend to the
            other.
    """

    def __init__(self, count: int, memory: int) -> None:
        self.count, self.memory = count, memory
        self.complete = False
        self._wanted: list[str] = []
        self._kept: list[FixedCase] = []

    def __len__(self) -> int:
        """Number of cases that are kept."""
        return len(self._kept)

    def __iter__(self) -> Iterator[FixedCase]:
        """The cases, in the order in which they came."""
        return iter(self._kept)

    def offer(
        self,
        ids: Sequence[str],
        image: Tensor,
        organs: Tensor,
        label: Tensor,
        segmented: Tensor,
        affine: Tensor | None = None,
        allowed_organs: Tensor | None = None,
    ) -> None:
        """Look at the cases of one batch, while the choice is not complete.

        Args:
            ids: B names; of cases with one name the first counts.
            image: (B, C, *S).
            organs: (B, 1, *S).
            label: (B, L), NaN = unknown.
            segmented: (B,) bool.
            affine: (B, 4, 4), or None.
            allowed_organs: (B, L, organs), or None.
        """
        if self.complete:
            return
        held = {case.id for case in self._kept}
        truths, usable = label.detach().float().cpu(), segmented.cpu().tolist()
        for row, name in enumerate(ids):
            known = bool((~truths[row].isnan()).any())
            if name in held or not usable[row] or not known or (self._wanted and name not in self._wanted):
                continue
            if not self._wanted and not self._is_welcome(truths[row], image[row].numel()):
                continue
            held.add(name)
            at = None if affine is None else affine[row].double().cpu()
            told = None if allowed_organs is None else allowed_organs[row].detach().cpu().clone()
            self._take(FixedCase(name, small_copy(image[row]), _small_ids(organs[row]), truths[row].clone(), at, told))

    def end(self) -> None:
        """The pass is over: what was chosen stays."""
        self.complete = self.complete or len(self._kept) > 0
        # None of the cases of an earlier run came by: these are other data, to be chosen from anew.
        self._wanted = []

    def state(self) -> list[str]:
        """The names, for a checkpoint."""
        return [case.id for case in self._kept] or list(self._wanted)

    def load(self, names: Sequence[str]) -> None:
        """Take the choice of an earlier run; the next pass brings the images."""
        self._wanted, self.complete = [str(name) for name in names], False
        self._kept.clear()

    def donor(self, case: str, column: int, truth: float, shape: Sequence[int]) -> Donor | None:
        """Another of the cases lends its image (see `camtrain.anatomy.donors.choose_donor`)."""
        lenders = (Donor(kept.id, kept.image, kept.label) for kept in self._kept)
        return choose_donor(lenders, case, column, truth, shape)

    def _is_welcome(self, label: Tensor, voxels: int) -> bool:
        """Would it stay? Asked before anything is copied; its size is not known better than to a factor."""
        if len(self._kept) < 2 or (len(self._kept) < self.count and self._bytes() + 3 * voxels <= self.memory):
            return True
        labels = [case.label for case in self._kept]
        return least_missed([*labels, label]) < len(labels)

    def _take(self, case: FixedCase) -> None:
        self._kept.append(case)
        while len(self._kept) > 2 and (len(self._kept) > self.count or self._bytes() > self.memory):
            self._kept.pop(least_missed([kept.label for kept in self._kept]))

    def _bytes(self) -> int:
        return sum(case.nbytes for case in self._kept)


def least_missed(labels: Sequence[Tensor]) -> int:
    """Index of the case without which the balance over labels and truths suffers least; of equals the last one.

    Args:
        labels: (L,) of each case, NaN = unknown.

    Example:
        >>> least_missed([torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0])])
        2
    """
    table = torch.stack(list(labels))
    shown = torch.cat([table == 0, table == 1], dim=1).double()
    worth = (shown.sum(dim=0) - shown).clamp(min=0).sqrt().sum(dim=1)  # of those that remain without it
    best = worth.max()
    return int((worth >= best - 1e-9).nonzero()[-1])


def rule_to_ask(labels: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[int]:
    """Which group of labels each case is asked about: one per case, so that every label and truth has its share.

    Args:
        labels: (L,) of each case, NaN = unknown.
        groups: Columns of labels that are asked about together (equal rules share their images).

    Returns:
        Index of a group for each case; -1 where it knows none of their labels.

    Example:
        >>> rule_to_ask([torch.tensor([1.0, 0.0])] * 3, [[0], [1]])
        [0, 1, 0]
    """
    counts = torch.zeros(2, len(labels[0]) if labels else 0, dtype=torch.float64)
    chosen = []
    for label in labels:
        shown = torch.stack([label == 0, label == 1]).double()
        gain = ((counts + 1).sqrt() - counts.sqrt()) * shown
        # The mean over the group: a rule of thirty labels would be asked about every time by its sum.
        worth = [float(gain[:, list(group)].sum() / len(group)) for group in groups]
        best = max(range(len(groups)), key=lambda at: (worth[at], -at), default=-1)
        if best >= 0 and worth[best] > 0:
            counts[:, list(groups[best])] += shown[:, list(groups[best])]
        else:
            best = -1
        chosen.append(best)
    return chosen


def _small_ids(organs: Tensor) -> Tensor:
    """A copy on the CPU, in one byte per voxel where the ids allow it."""
    plain = organs.detach().as_subclass(Tensor).cpu()
    low, high = int(plain.min()), int(plain.max())
    return plain.to(torch.uint8 if low >= 0 and high < 256 else torch.int32, copy=True)
