"""SamePlace: do maps peak at one and the same place, and is that place no organ of theirs?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import Average, PairMetric, synced
from camtrain.metrics._pairs import Pairs, select_pairs

PLACES = 512
"""Most places that are told apart: 8 x 8 x 8 of a volume, 22 x 22 of a picture."""


class SamePlace(PairMetric):
    """Share of the maps that peak outside their region, in the place where most of these peaks lie.

    0 where every map peaks inside its region. 1 where all maps peak in one place that is nobody's organ: a corner of
    the scan, a border that padding made, a text burnt in. Peaks inside the region do not count, since the hearts of
    all cases lie in one place too. A map without positive cells has no peak and counts for `undefined_rate()`.

    Places are blocks of the grid, 8 along each axis of a volume, so that maps of different sizes compare.

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs: sum of the labels' own shares).
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = SamePlace(num_labels=2, average="none")
        >>> maps = torch.tensor([[[9.0, 1.0, 0.0], [9.0, 0.0, 1.0]], [[8.0, 0.0, 0.0], [0.0, 1.0, 5.0]]])
        >>> allowed = torch.tensor([[[False, True, True], [False, True, True]]]).expand(2, -1, -1)
        >>> metric.update(maps, allowed, label=torch.ones(2, 2))
        >>> metric.compute(), metric.pooled()
        (tensor([1.0000, 0.5000], dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """

    higher_is_better = False
    same_place: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("same_place", PLACES)

    def pooled(self) -> Tensor:
        """The share with the maps of all labels in one heap, a scalar (all processes must call it together)."""
        with synced(self):
            return self.same_place.sum(dim=0).max() / (self.counted - self.undefined).sum()

    def _add(self, pairs: Pairs) -> None:
        place, outside, empty = _peaks(pairs)
        self._count(empty, pairs.label)
        rows = torch.nn.functional.one_hot(place[outside], PLACES)
        self._sum_up("same_place", rows, pairs.label[outside])

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.same_place.max(dim=1).values, self.counted - self.undefined


def same_place(maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None) -> Tensor:
    """The share for each label of one batch; functional twin of `SamePlace`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.

    Returns:
        (L,), NaN where no map of the label has a peak.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
        >>> same_place(maps, torch.tensor([[[False, True]]]).expand(3, -1, -1), torch.ones(3, 1))
        tensor([0.6667], dtype=torch.float64)
    """
    pairs = select_pairs(maps, allowed, label, has_organs)
    metric = SamePlace(maps.shape[1], "none").to(maps.device)
    metric.update_pairs(pairs)
    return metric.averaged("none")


def _peaks(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Place of each peak (P,), does it lie outside the region (P,), is there none (P,)."""
    highest, cell = pairs.maps.max(dim=1)
    empty = (highest <= 0) | pairs.broken
    outside = ~pairs.allowed.gather(1, cell[:, None])[:, 0] & ~empty
    along = int(PLACES ** (1 / len(pairs.size)) + 1e-6)
    place = torch.zeros_like(cell)
    for index, size in zip(torch.unravel_index(cell, pairs.size), pairs.size, strict=True):
        blocks = min(along, size)
        place = place * along + index * blocks // size
    return place, outside, empty
