"""AverageIncrease: how often the network is surer when it sees only what the map shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import Average, LabelMetric, sum_dtype
from camtrain.metrics.average_drop import check_min_probability, checked_pairs, scored


class AverageIncrease(LabelMetric):
    """Share of the pairs with p < o, p the probability of the image and o that of the image under its map.

    From Grad-CAM++ (Chattopadhay et al., 2018), called increase in confidence there; a share in 0..1, where papers
    print per cent. Higher is better: the map leaves out what confuses. An o equal to p is no increase. As for
    `AverageDrop`, pairs with p < `min_probability` have no score and are counted by `undefined_rate()`.

    As input to `update`: before (B, L) and after (B, L) probabilities, after NaN where not computed; label (B, L), NaN
    = unknown: pairs with a present label count. asked (B, L) bool, optional: a pair asked for that has no `after` (its
    map is empty or constant and masks nothing) is counted, and undefined.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        min_probability: Least p that has a score, in 0..1.
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = AverageIncrease(num_labels=1)
        >>> metric.update(torch.tensor([[0.8], [0.6]]), torch.tensor([[0.6], [0.7]]), label=torch.ones(2, 1))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    increase: Tensor

    def __init__(
        self, num_labels: int, average: Average = "macro", min_probability: float = 0.5, **kwargs: Any
    ) -> None:
        self.min_probability = check_min_probability(min_probability)
        super().__init__(num_labels, average, settings=(self.min_probability,), **kwargs)
        self._add_sum("increase")

    def update(self, before: Tensor, after: Tensor, label: Tensor, asked: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or values break the contract.
        """
        counted, before, after = checked_pairs(before, after, label, asked, self.num_labels)
        score, column = _increase(before, after, self.min_probability)[counted], counted.nonzero(as_tuple=True)[1]
        lost = score.isnan()
        self._count(lost, column)
        self._sum_up("increase", score[~lost], column[~lost])

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.increase, self.counted - self.undefined


def average_increase(before: Tensor, after: Tensor, label: Tensor, min_probability: float = 0.5) -> Tensor:
    """1 where p < o, else 0; functional twin of `AverageIncrease`.

    Args:
        before: (B, L) probabilities p of the images.
        after: (B, L) probabilities o of the masked images, NaN where not computed.
        label: (B, L), NaN = unknown.
        min_probability: Least p that has a score.

    Returns:
        (B, L), NaN where the pair does not count or has no score.

    Raises:
        InputError: Shapes, types or values break the contract.

    Example:
        >>> import torch
        >>> average_increase(torch.tensor([[0.8, 0.6]]), torch.tensor([[0.2, 0.9]]), torch.ones(1, 2))
        tensor([[0., 1.]], dtype=torch.float64)
    """
    counted, before, after = checked_pairs(before, after, label)
    return _increase(before, after, check_min_probability(min_probability)).masked_fill(~counted, torch.nan)


def _increase(before: Tensor, after: Tensor, least: float) -> Tensor:
    """(B, L), NaN where undefined."""
    risen = (before < after).to(sum_dtype()).masked_fill(after.isnan(), torch.nan)
    return scored(risen, before, least)
