"""AverageDrop: how much of a probability is lost when the network sees only what the map shows."""

from __future__ import annotations

import torch
from torch import Tensor

from camtrain.metrics._change import ChangeMetric, check_min_probability, checked_pairs, scored


class AverageDrop(ChangeMetric):
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

    def _name(self) -> str:
        return "drop"

    def _score(self, before: Tensor, after: Tensor) -> Tensor:
        return _drop(before, after)


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
    score = scored(_drop(before, after), before, check_min_probability(min_probability))
    return score.masked_fill(~counted, torch.nan)


def _drop(before: Tensor, after: Tensor) -> Tensor:
    return (before - after).relu() / before
