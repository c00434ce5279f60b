"""Cases of earlier steps that lend to those of this step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain.callbacks._regions import Cases

SEGMENTED = 8
"""So many cases with organs are wanted in a step; what the batch lacks comes from the steps before."""
BYTES = 2**28
"""What they may take between steps; one is kept whatever its size."""


@dataclass(frozen=True)
class _Kept:
    case: Cases
    spacing: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(int(value.nbytes) for value in vars(self.case).values())

    def fits(self, own: Cases, spacing: Tensor | None) -> bool:
        image = self.case.image
        same = image.shape[1:] == own.image.shape[1:] and image.dtype == own.image.dtype
        return same and (self.spacing is None) == (spacing is None)


class Lenders:
    """What is kept from step to step: the last case, which a batch of one borrows from, and a few with organs.

    Args:
        organs: Keep cases with organs, for those without.
    """

    def __init__(self, organs: bool) -> None:
        self._organs = organs
        self._last: _Kept | None = None
        self._segmented: deque[_Kept] = deque(maxlen=SEGMENTED)

    def clear(self) -> None:
        """Forget all; of every epoch, so that a run that goes on from a checkpoint lends as one that never stopped."""
        self._last = None
        self._segmented.clear()

    def join(self, own: Cases, spacing: Tensor | None) -> tuple[Cases, Tensor | None]:
        """The cases of a step with those that lend to them behind; what they leave for the next step is kept.

        Args:
            own: The cases of the batch.
            spacing: (B, axes) mm, or None.

        Returns:
            The batch's cases first, then others of the same shape, and the spacing of all.
        """
        lacks = SEGMENTED - int(own.has_organs.sum()) if self._organs else 0
        lent = [kept for kept in self._segmented if kept.fits(own, spacing)][: max(0, lacks)]
        if not lent and len(own.image) == 1 and self._last is not None and self._last.fits(own, spacing):
            lent = [self._last]
        self._keep(own, spacing)
        if not lent:
            return own, spacing
        columns = zip(vars(own).values(), *(vars(kept.case).values() for kept in lent), strict=True)
        joined = Cases(*(torch.cat([mine, *(t.to(mine) for t in theirs)]) for mine, *theirs in columns))
        if spacing is None:
            return joined, None
        return joined, torch.cat([spacing, *(kept.spacing.to(spacing) for kept in lent if kept.spacing is not None)])

    def _keep(self, own: Cases, spacing: Tensor | None) -> None:
        self._last = _row(own, spacing, len(own.image) - 1)
        if not self._organs:
            return
        for row in own.has_organs.nonzero().flatten().tolist()[-SEGMENTED:]:
            self._segmented.appendleft(_row(own, spacing, row))
        while len(self._segmented) > 1 and sum(kept.nbytes for kept in self._segmented) > BYTES:
            self._segmented.pop()


def _row(cases: Cases, spacing: Tensor | None, row: int) -> _Kept:
    """One case, copied: the user may change the batch in place."""
    where = slice(row, row + 1)
    return _Kept(
        Cases(*(value[where].clone() for value in vars(cases).values())),
        None if spacing is None else spacing[where].clone(),
    )
