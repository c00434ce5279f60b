"""ClassSensitivity: do the maps of one case's labels differ, or does every label get the same picture?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import Average, LabelMetric, counted_pairs, sum_dtype

# Cells of one case that are held in double precision at once: what stays in a CPU's cache is three times as fast,
# while other devices want few and large pieces.
_CELLS = 1 << 16
_CELLS_ELSEWHERE = 1 << 22


class ClassSensitivity(LabelMetric):
    """Mean Pearson correlation between a label's map and the maps of the other labels of the same case.

    Lower is better. Scores of place alone reward a method that shows the same spot whatever it is asked: maps of
    Relevance-CAM without contrast correlate at 1.00 between classes, and hit the object best (Gu et al., Contrastive
    LRP, 2018, describe why). Read this number beside them. It needs no allowed region, and costs no forward.

    A constant or broken map has no correlation, and neither has a map that is alone: such pairs are counted by
    `undefined_rate()`. Constant and broken maps do not enter the means of the others either.

    As input to `update`: maps (B, L, *S') signed, NaN in every cell where not computed; label (B, L), NaN = unknown,
    optional: with it, only present labels count, each against all other labels of its case.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = ClassSensitivity(num_labels=2)
        >>> metric.update(torch.tensor([[[0.0, 1.0, 2.0], [1.0, 3.0, 5.0]]]))  # the same map at another scale
        >>> round(metric.compute().item(), 6)
        1.0
        >>> metric.update(torch.tensor([[[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]]))
        >>> round(metric.compute().item(), 6)
        0.75
    """

    higher_is_better = False
    class_sensitivity: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("class_sensitivity")

    def update(self, maps: Tensor, label: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract.
        """
        score, counted = _scores(maps, label, self.num_labels)
        column, score = counted.nonzero(as_tuple=True)[1], score[counted]
        self._count(score.isnan(), column)
        self._sum_up("class_sensitivity", score.nan_to_num(0.0), column)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.class_sensitivity, self.counted - self.undefined


def class_sensitivity(maps: Tensor, label: Tensor | None = None) -> Tensor:
    """Mean correlation of each map with the other maps of its case; functional twin of `ClassSensitivity`.

    Args:
        maps: (B, L, *S') signed maps, NaN in every cell where not computed.
        label: (B, L), NaN = unknown, optional: score present labels only.

    Returns:
        (B, L) in [-1, 1], NaN where the pair does not count, its map is constant or broken, or no other map is left.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> class_sensitivity(torch.tensor([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [2.0, 2.0, 2.0]]]))
        tensor([[-0.5000, -0.5000,     nan]], dtype=torch.float64)
    """
    score, counted = _scores(maps, label)
    return score.masked_fill(~counted, torch.nan)


def _scores(maps: Tensor, label: Tensor | None, num_labels: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, L) scores of all computed maps, NaN where undefined, and (B, L) bool: which of them count."""
    if maps.ndim < 3 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise InputError(
            f"expected maps of shape (B, L, *S) in floating point with at least one cell, "
            f"got {tuple(maps.shape)} in {maps.dtype}: pass what explain() or tap.maps() returned"
        )
    flat = maps.detach().as_subclass(Tensor).flatten(2)
    low, high = flat.amin(dim=2), flat.amax(dim=2)
    computed = ~flat.isnan().all(dim=2)
    counted = counted_pairs(computed, label, num_labels)
    # NaN anywhere makes both ends NaN. Equal ends are told here, exactly: rounding would give constants a variance.
    usable = low.isfinite() & high.isfinite() & (low < high)
    scores = torch.full(computed.shape, torch.nan, dtype=sum_dtype(), device=maps.device)
    # A case of which nothing counts need not be correlated.
    for row in (counted & usable).any(dim=1).nonzero()[:, 0].tolist():
        at = usable[row]
        if int(at.sum()) > 1:
            scores[row, at] = _mean_correlation(flat[row, at], low[row, at], high[row, at])
    return scores, counted


def _mean_correlation(maps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean correlation of each of n > 1 maps (n, N), none constant, with the n - 1 others, (n,).

    With u_i the centred map at length 1, the correlations with all maps sum to u_i . (u_1 + ... + u_n), and 1 of that
    is the map's own: n dot products instead of n squared.
    """
    low, high = low.to(sum_dtype())[:, None] / 2, high.to(sum_dtype())[:, None] / 2
    middle, reach = low + high, (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    mean = torch.zeros_like(middle)
    square, agreement = mean[:, 0].clone(), mean[:, 0].clone()
    for part in _parts(maps, middle, reach):
        mean += part.sum(dim=1, keepdim=True) / maps.shape[1]
    for part in _parts(maps, middle, reach):
        square += (part - mean).square().sum(dim=1)
    length = square.sqrt()[:, None]
    for part in _parts(maps, middle, reach):
        unit = (part - mean) / length
        agreement += unit @ unit.sum(dim=0)
    return ((agreement - 1) / (len(maps) - 1)).clamp(-1.0, 1.0)


def _parts(maps: Tensor, middle: Tensor, reach: Tensor) -> Iterator[Tensor]:
    """Some cells at a time (n, m), moved and scaled to -1..1, so that no square overflows or vanishes."""
    cells = _CELLS if maps.device.type == "cpu" else _CELLS_ELSEWHERE
    for part in torch.split(maps, max(1, cells // len(maps)), dim=1):
        yield (part.to(middle.dtype) - middle) / reach
