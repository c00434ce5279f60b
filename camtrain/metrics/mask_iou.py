"""MaskIoU: overlap of a thresholded map with the allowed region, both ways."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from camtrain._errors import InputError, nearest
from camtrain.metrics._pair_metric import Average, PairMetric, sum_dtype
from camtrain.metrics._pairs import Pairs, select_pairs

Threshold = Literal["mean_std", "percentile"] | float
_RULES = ("mean_std", "percentile")


class MaskIoU(PairMetric):
    """Intersection over union of the attended cells and the allowed region.

    Attended is what lies strictly above a threshold taken from the signed map itself: mean + k * std over its cells
    (numpy's std, ddof 0; Lee et al., Relevance-CAM, 2021), a share of the map's maximum, or a percentile. Unlike
    OrganIoU it also charges for organ that is *not* attended. Undefined: maps without positive cells, and maps of
    which nothing lies above the threshold (a constant map, for example).

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        threshold: `"mean_std"`, `"percentile"`, or a number in [0, 1): that share of the map's maximum.
        k: Standard deviations above the mean, for `"mean_std"`.
        percentile: In [0, 100), linear between cells, for `"percentile"`.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: Unknown rule, or a number out of range.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[4.0, 3.0, 0.0, -1.0]]])
        >>> metric = MaskIoU(num_labels=1, threshold=0.5)
        >>> metric.update(maps, allowed=torch.tensor([[[True, False, False, False]]]), label=torch.ones(1, 1))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    mask_iou: Tensor

    def __init__(
        self,
        num_labels: int,
        average: Average = "macro",
        threshold: Threshold = "mean_std",
        k: float = 1.0,
        percentile: float = 95.0,
        **kwargs: Any,
    ) -> None:
        _check(threshold, k, percentile)
        share = threshold if isinstance(threshold, (int, float)) else -1.0 - _RULES.index(threshold)
        super().__init__(num_labels, average, settings=(share, k, percentile), **kwargs)
        self.threshold, self.k, self.percentile = threshold, k, percentile
        self._add_sum("mask_iou")

    def _add(self, pairs: Pairs) -> None:
        self._record("mask_iou", _iou(pairs, self.threshold, self.k, self.percentile), pairs)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.mask_iou, self.counted - self.undefined


def mask_iou(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None = None,
    threshold: Threshold = "mean_std",
    k: float = 1.0,
    percentile: float = 95.0,
) -> Tensor:
    """Intersection over union of the attended cells and the allowed region, per pair; functional twin of `MaskIoU`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.
        threshold: As for `MaskIoU`.
        k: As for `MaskIoU`.
        percentile: As for `MaskIoU`.

    Returns:
        (B, L), NaN where the pair does not count, the map has no positive cell or nothing lies above the threshold.

    Raises:
        InputError: Unknown rule, a number out of range, or shapes, types or label values that break the contract.

    Example:
        >>> import torch
        >>> maps, allowed = torch.tensor([[[9.0, 0.0, 0.0]]]), torch.tensor([[[True, True, False]]])
        >>> mask_iou(maps, allowed, torch.ones(1, 1))
        tensor([[0.5000]], dtype=torch.float64)
    """
    _check(threshold, k, percentile)
    pairs = select_pairs(maps, allowed, label, has_organs)
    return pairs.spread(_iou(pairs, threshold, k, percentile))


def _iou(pairs: Pairs, threshold: Threshold, k: float, percentile: float) -> Tensor:
    """(P,), NaN for maps that mark nothing."""
    if not len(pairs):
        return pairs.maps.new_zeros(0, dtype=sum_dtype())
    cells = pairs.maps.to(sum_dtype())
    top = cells.amax(dim=1)
    if threshold == "mean_std":
        std, mean = torch.std_mean(cells, dim=1, correction=0)
        level = mean + k * std
    elif threshold == "percentile":
        level = _percentile(cells, percentile)
    else:
        level = top * float(threshold)
    # Rounding of the mean must not let a constant map rise above itself.
    seen = (top > 0) & (cells.amin(dim=1) < top)
    attended = (cells > level[:, None]) & seen[:, None]
    union = (attended | pairs.allowed).sum(dim=1)
    inside = (attended & pairs.allowed).sum(dim=1)
    return torch.where(attended.any(dim=1), inside.to(cells.dtype) / union, torch.nan)


def _percentile(cells: Tensor, percentile: float) -> Tensor:
    """(P,) linear between order statistics; `torch.quantile` stops at 16 million cells."""
    rank = percentile / 100 * (cells.shape[1] - 1)
    low, share = math.floor(rank), rank - math.floor(rank)
    below = cells.kthvalue(low + 1, dim=1).values
    above = cells.kthvalue(min(low + 2, cells.shape[1]), dim=1).values
    return below + share * (above - below)


def _check(threshold: Threshold, k: float, percentile: float) -> None:
    if isinstance(threshold, str):
        if threshold not in _RULES:
            raise InputError(
                f"expected threshold mean_std, percentile or a number in [0, 1), "
                f"got {threshold!r}{nearest(threshold, _RULES)}"
            )
    elif not 0 <= threshold < 1:
        raise InputError(f"expected a threshold in [0, 1), a share of the map's maximum, got {threshold}: try 0.5")
    if not math.isfinite(k):
        raise InputError(f"expected a finite k, got {k}: standard deviations above the mean")
    if not 0 <= percentile < 100:
        raise InputError(f"expected a percentile in [0, 100), got {percentile}: try 95")
