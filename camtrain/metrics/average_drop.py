"""AverageDrop: how much of a probability is lost when the network sees only what the map shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._curve import check_probabilities
from camtrain.metrics._pair_metric import Average, LabelMetric, counted_pairs, sum_dtype


class AverageDrop(LabelMetric):
    """Mean of max(0, p - o) / p, p the probability of the image and o that of the image under its map.

    From Grad-CAM++ (Chattopadhay et al., 2018); a share in 0..1, where papers print per cent. Lower is better: what
    the map shows is enough. The network's classes exclude each other there, and p is that of the top class; where
    labels do not, p can be tiny and the ratio says nothing. Pairs with p < `min_probability` have no score therefore,
    and are counted by `undefined_rate()`. Read it beside `AverageIncrease`: a map that shows everything drops nothing.

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
        >>> metric = AverageDrop(num_labels=2, average="none")
        >>> metric.update(torch.tensor([[0.8, 0.1]]), torch.tensor([[0.6, 0.1]]), label=torch.ones(1, 2))
        >>> metric.compute()
        tensor([0.2500,    nan], dtype=torch.float64)
        >>> metric.undefined_rate()
        tensor([0., 1.], dtype=torch.float64)
    """

    higher_is_better = False
    drop: Tensor

    def __init__(
        self, num_labels: int, average: Average = "macro", min_probability: float = 0.5, **kwargs: Any
    ) -> None:
        self.min_probability = check_min_probability(min_probability)
        super().__init__(num_labels, average, settings=(self.min_probability,), **kwargs)
        self._add_sum("drop")

    def update(self, before: Tensor, after: Tensor, label: Tensor, asked: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or values break the contract.
        """
        counted, before, after = checked_pairs(before, after, label, asked, self.num_labels)
        score, column = _drop(before, after, self.min_probability)[counted], counted.nonzero(as_tuple=True)[1]
        lost = score.isnan()
        self._count(lost, column)
        self._sum_up("drop", score[~lost], column[~lost])

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.drop, self.counted - self.undefined


def average_drop(before: Tensor, after: Tensor, label: Tensor, min_probability: float = 0.5) -> Tensor:
    """max(0, p - o) / p of each pair; functional twin of `AverageDrop`.

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
        >>> average_drop(torch.tensor([[0.8, 0.6]]), torch.tensor([[0.2, 0.9]]), torch.ones(1, 2))
        tensor([[0.7500, 0.0000]], dtype=torch.float64)
    """
    counted, before, after = checked_pairs(before, after, label)
    return _drop(before, after, check_min_probability(min_probability)).masked_fill(~counted, torch.nan)


def _drop(before: Tensor, after: Tensor, least: float) -> Tensor:
    """(B, L), NaN where undefined."""
    return scored((before - after).relu() / before, before, least)


def scored(score: Tensor, before: Tensor, least: float) -> Tensor:
    """`score`, NaN where the probability `before` is below `least`, or 0 and no ratio can be taken to it."""
    return torch.where((before >= least) & (before > 0), score, torch.nan)


def checked_pairs(
    before: Tensor, after: Tensor, label: Tensor, asked: Tensor | None = None, num_labels: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check one batch of probabilities.

    Returns:
        (B, L) bool: which pairs count; before and after in the dtype of the sums.

    Raises:
        InputError: Shapes, types or values break the contract.
    """
    for name, values in (("before", before), ("after", after)):
        if values.ndim != 2 or not values.is_floating_point() or values.shape != before.shape:
            raise InputError(
                f"expected before and after of one shape (B, L) in floating point, got {name} of shape "
                f"{tuple(values.shape)} in {values.dtype}: probabilities of the images and of the masked images"
            )
    computed = ~after.isnan()
    if asked is not None:
        if asked.dtype != torch.bool or asked.shape != after.shape:
            raise InputError(
                f"expected asked as bool of shape (B, L) = {tuple(after.shape)}, got {tuple(asked.shape)} in "
                f"{asked.dtype}: the pairs that were given to masked_probabilities()"
            )
        computed = computed | asked.to(computed.device)
    counted = counted_pairs(computed, label, num_labels)
    before, after = before.detach().to(sum_dtype()), after.detach().to(before.device, sum_dtype())
    check_probabilities(before[counted], "before")
    check_probabilities(after[counted], "after")
    return counted, before, after


def check_min_probability(least: float) -> float:
    """`least` as a float, if it is in 0..1.

    Raises:
        InputError: It is not.
    """
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
        raise InputError(f"expected min_probability in 0..1, got {least!r}: the least probability that has a score")
    return float(least)
