"""Of the present labels, how many were scored?"""

from __future__ import annotations

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import LabelMetric, sum_dtype


class ScoredShare(LabelMetric):
    """Share of the present pairs of case and label whose map was scored, per label.

    As input to `update`: present (B, L) bool. `score` then takes those that were scored.

    Args:
        num_labels: L.

    Example:
        >>> import torch
        >>> share = ScoredShare(2, average="none")
        >>> share.update(torch.tensor([[True, True], [True, False]]))
        >>> share.score(torch.tensor([[True, True], [False, False]]))
        >>> share.compute().tolist(), round(share.averaged("micro").item(), 3)
        ([0.5, 1.0], 0.667)
    """

    higher_is_better = None

    def update(self, present: Tensor) -> None:
        """Add one batch, of which nothing is scored yet; see the class for shapes."""
        column = present.nonzero()[:, 1]
        self._count(torch.ones_like(column, dtype=torch.bool), column)

    def score(self, scored: Tensor) -> None:
        """Some of the pairs that were added are scored."""
        column = scored.nonzero()[:, 1]
        self.undefined = self.undefined.index_add(0, column, -torch.ones_like(column))
        self._computed = None

    def _totals(self) -> tuple[Tensor, Tensor]:
        return (self.counted - self.undefined).to(sum_dtype()), self.counted
