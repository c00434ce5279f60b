"""Of the present labels, how many were scored?"""

from __future__ import annotations

from torch import Tensor

from camtrain.metrics._pair_metric import LabelMetric, sum_dtype


class ScoredShare(LabelMetric):
    """Share of the present pairs of case and label whose map was scored, per label.

    As input to `update`: present and scored, both (B, L) bool.

    Args:
        num_labels: L.

    Example:
        >>> share = ScoredShare(2, average="none")
        >>> share.update(torch.tensor([[True, True], [True, False]]), torch.tensor([[True, True], [False, False]]))
        >>> share.compute().tolist(), share.averaged("micro").item()
        ([0.5, 1.0], 0.6666666666666666)
    """

    higher_is_better = True

    def update(self, present: Tensor, scored: Tensor) -> None:
        """Add one batch; see the class for shapes."""
        self._count(~scored[present], present.nonzero()[:, 1])

    def _totals(self) -> tuple[Tensor, Tensor]:
        return (self.counted - self.undefined).to(sum_dtype()), self.counted
