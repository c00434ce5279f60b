"""AverageIncrease: how often the network is surer when it sees only what the map shows."""

from __future__ import annotations

import torch
from torch import Tensor

from camtrain.metrics._change import ChangeMetric, check_min_probability, checked_pairs, scored


class AverageIncrease(ChangeMetric):
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

    def _name(self) -> str:
        return "increase"

    def _score(self, before: Tensor, after: Tensor) -> Tensor:
        return _increase(before, after)


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
    score = scored(_increase(before, after), before, check_min_probability(min_probability))
    return score.masked_fill(~counted, torch.nan)


def _increase(before: Tensor, after: Tensor) -> Tensor:
    return (before < after).to(before).masked_fill(after.isnan(), torch.nan)
