"""EmptyMapRate: how often a present label has no positive evidence anywhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camtrain.metrics._pair_metric import Average, PairMetric, sum_dtype
from camtrain.metrics._pairs import Pairs, select_pairs


class EmptyMapRate(PairMetric):
    """Share of the counted pairs whose map has no positive cell, max(map) <= 0.

    It explains the undefined rates of the other scores: an empty map can be neither inside nor outside. Undefined
    here are only maps with infinite values or with NaN in some cells.

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = EmptyMapRate(num_labels=1)
        >>> maps = torch.tensor([[[-1.0, -2.0]], [[-1.0, 0.5]]])
        >>> metric.update(maps, allowed=torch.ones(2, 1, 2, dtype=torch.bool), label=torch.ones(2, 1))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    empty: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("empty")

    def _add(self, pairs: Pairs) -> None:
        self._record("empty", _is_empty(pairs), pairs)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.empty, self.counted - self.undefined


def empty_map_rate(maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None) -> Tensor:
    """1 where a counted pair has no positive cell, else 0; functional twin of `EmptyMapRate`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.

    Returns:
        (B, L), NaN where the pair does not count.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> empty_map_rate(torch.tensor([[[-1.0, 0.0]]]), torch.tensor([[[True, False]]]), torch.ones(1, 1))
        tensor([[1.]], dtype=torch.float64)
    """
    pairs = select_pairs(maps, allowed, label, has_organs)
    return pairs.spread(_is_empty(pairs))


def _is_empty(pairs: Pairs) -> Tensor:
    """(P,) 1.0 or 0.0."""
    return (pairs.maps <= 0).all(dim=1).to(sum_dtype())
