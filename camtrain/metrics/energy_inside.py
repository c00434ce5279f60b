"""EnergyInside: the share of positive evidence that lies where the label may be read from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import Average, ChanceMetric, sum_dtype
from camtrain.metrics._pairs import Pairs, select_pairs


class EnergyInside(ChanceMetric):
    """Share of the positive evidence inside the allowed region, sum(relu(map) * allowed) / sum(relu(map)).

    Known as the energy pointing game (Wang et al., Score-CAM, 2020) and as relevance mass accuracy (Arras et al.,
    2022). A map without positive cells has no score: it is counted by `undefined_rate()`. A map that is spread evenly
    scores `chance()`.

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[3.0, -5.0, 1.0], [2.0, 2.0, -1.0]]])
        >>> allowed = torch.tensor([[[True, True, False], [True, False, False]]])
        >>> metric = EnergyInside(num_labels=2, average="none")
        >>> metric.update(maps, allowed, label=torch.ones(1, 2))
        >>> metric.compute()
        tensor([0.7500, 0.5000], dtype=torch.float64)
        >>> metric.chance()
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    higher_is_better = True
    energy: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("energy")

    def _add(self, pairs: Pairs) -> None:
        self._record("energy", _share_inside(pairs), pairs)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.energy, self.counted - self.undefined


def energy_inside(maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None) -> Tensor:
    """Share of the positive evidence inside the allowed region, per pair; functional twin of `EnergyInside`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.

    Returns:
        (B, L), NaN where the pair does not count or has no positive cell.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> energy_inside(torch.tensor([[[3.0, -5.0, 1.0]]]), torch.tensor([[[True, True, False]]]), torch.ones(1, 1))
        tensor([[0.7500]], dtype=torch.float64)
    """
    pairs = select_pairs(maps, allowed, label, has_organs)
    return pairs.spread(_share_inside(pairs))


def _share_inside(pairs: Pairs) -> Tensor:
    """(P,), NaN for maps without positive cells."""
    positive = pairs.maps.relu()
    total = positive.sum(dim=1, dtype=sum_dtype())
    inside = positive.masked_fill(~pairs.allowed, 0.0).sum(dim=1, dtype=sum_dtype())
    return torch.where(total > 0, inside / total, torch.nan)
