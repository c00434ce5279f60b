"""What the scores of a probability before and after a change share: checks, counting, and the least probability."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._curve import check_probabilities
from camtrain.metrics._pair_metric import Average, LabelMetric, counted_pairs, sum_dtype


class ChangeMetric(LabelMetric, ABC):
    """Base of the scores of a probability that changes when the network sees only what a map shows.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        min_probability: Least probability of the image that has a score, in 0..1.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    def __init__(
        self, num_labels: int, average: Average = "macro", min_probability: float = 0.5, **kwargs: Any
    ) -> None:
        self.min_probability = check_min_probability(min_probability)
        super().__init__(num_labels, average, settings=(self.min_probability,), **kwargs)
        self._add_sum(self._name())

    @abstractmethod
    def _name(self) -> str:
        """Name of the sum of scores; another one for every class, so that a collection keeps them apart."""

    @abstractmethod
    def _score(self, before: Tensor, after: Tensor) -> Tensor:
        """Scores (B, L) from probabilities (B, L)."""

    def update(self, before: Tensor, after: Tensor, label: Tensor, asked: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or values break the contract.
        """
        counted, before, after = checked_pairs(before, after, label, asked, self.num_labels)
        score = scored(self._score(before, after), before, self.min_probability)[counted]
        lost, column = score.isnan(), counted.nonzero(as_tuple=True)[1]
        self._count(lost, column)
        self._sum_up(self._name(), score[~lost], column[~lost])

    def _totals(self) -> tuple[Tensor, Tensor]:
        return getattr(self, self._name()), self.counted - self.undefined


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
