"""RelevanceRank: of as many strongest cells as the allowed region has, how many lie inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import Average, ChanceMetric, sum_dtype
from camtrain.metrics._pairs import Pairs, select_pairs

# Cells sorted at once: values and their places take twelve bytes each.
_CELLS = 1 << 22


class RelevanceRank(ChanceMetric):
    """Of the k = |R| cells with the highest map values, the share that lies in the allowed region R.

    Relevance rank accuracy (Arras et al., CLEVR-XAI, 2022). Only the order of the cells matters, so there is no
    threshold to choose, and a perfect map reaches 1 whatever the size of R. Cells that tie for the last places share
    them: the score is the expected one if the tie were broken at random. A map without positive cells ranks nothing
    as evidence: it is counted by `undefined_rate()`. A random order scores `chance()`.

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[9.0, 7.0, 1.0, -2.0]]])
        >>> metric = RelevanceRank(num_labels=1)
        >>> metric.update(maps, allowed=torch.tensor([[[True, False, True, False]]]), label=torch.ones(1, 1))
        >>> metric.compute(), metric.chance()
        (tensor(0.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    higher_is_better = True
    relevance_rank: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("relevance_rank")

    def _add(self, pairs: Pairs) -> None:
        self._record("relevance_rank", _rank_accuracy(pairs), pairs)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.relevance_rank, self.counted - self.undefined


def relevance_rank(maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None) -> Tensor:
    """Share of the |R| strongest cells that lie in the allowed region R, per pair; functional twin of `RelevanceRank`.

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
        >>> maps, allowed = torch.tensor([[[9.0, 1.0, 1.0, 0.0]]]), torch.tensor([[[True, True, False, False]]])
        >>> relevance_rank(maps, allowed, torch.ones(1, 1))  # the second place is shared
        tensor([[0.7500]], dtype=torch.float64)
    """
    pairs = select_pairs(maps, allowed, label, has_organs)
    return pairs.spread(_rank_accuracy(pairs))


def _rank_accuracy(pairs: Pairs) -> Tensor:
    """(P,), NaN for maps without positive cells."""
    step = max(1, _CELLS // pairs.maps.shape[1])
    parts = zip(torch.split(pairs.maps, step), torch.split(pairs.allowed, step), strict=True)
    return torch.cat([_of_part(maps, allowed) for maps, allowed in parts])


def _of_part(maps: Tensor, allowed: Tensor) -> Tensor:
    """(p,) for maps (p, N) float and allowed (p, N) bool, at least one True in each row."""
    places = allowed.sum(dim=1)
    last = (_by_selection if maps.device.type == "cpu" else _by_sorting)(maps, places)[:, None]
    above, tied = maps > last, maps == last
    shared = (places - above.sum(dim=1)).to(sum_dtype()) / tied.sum(dim=1)
    inside = (above & allowed).sum(dim=1) + shared * (tied & allowed).sum(dim=1)
    return torch.where(maps.amax(dim=1) > 0, inside / places, torch.nan)


def _by_selection(maps: Tensor, places: Tensor) -> Tensor:
    """The places-th largest value of each row of maps (p, N), (p,): four times faster than sorting on a CPU."""
    from_below = (maps.shape[1] - places + 1).tolist()
    found = [row.kthvalue(at).values for row, at in zip(maps, from_below, strict=True)]
    return torch.stack(found) if found else maps.new_empty(0)


def _by_sorting(maps: Tensor, places: Tensor) -> Tensor:
    """The same where a launch per row would cost more than the sorting."""
    return maps.sort(dim=1, descending=True).values.gather(1, places[:, None] - 1)[:, 0]
