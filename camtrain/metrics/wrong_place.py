"""WrongPlace: how much of a map lies on cells that, in truth, did not raise the logit?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import Average, LabelMetric, counted_pairs, sum_dtype


class WrongPlace(LabelMetric):
    """Share of a map's positive mass on cells whose exact contribution to the logit is zero or negative.

    share = sum(relu(map) * [contribution <= tolerance * max |contribution|]) / sum(relu(map))

    Behind exactly one fully connected layer the contributions are known by proof: HiResCAM of the layer before it,
    whose sum and the bias are the logit (Draelos and Carin, 2020). Any map of the same layer can be held against them.
    Lower is better; HiResCAM itself scores 0 by construction, and so does every map that is a positive multiple of it,
    such as Grad-CAM behind a global average pool. The score asks for the network's own reasons: a map may avoid every
    wrong cell and lie outside the organ.

    A map without positive cells, and a pair whose map or contributions are broken (infinite, or NaN in some cells), has
    no share: `undefined_rate()` counts it.

    As input to `update`: maps (B, L, *S') and contributions (B, L, *S') signed, NaN in every cell where not computed;
    label (B, L), NaN = unknown, optional: with it, only present labels count.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        tolerance: Share of the largest |contribution| up to which a contribution counts as none.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: A tolerance outside [0, 1), or what `LabelMetric` refuses.

    Example:
        >>> import torch
        >>> metric = WrongPlace(num_labels=1)
        >>> metric.update(torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([[[2.0, -1.0, 5.0]]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    wrong_place: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(num_labels, average, settings=(_checked(tolerance),), **kwargs)
        self.tolerance = tolerance
        self._add_sum("wrong_place")

    def update(self, maps: Tensor, contributions: Tensor, label: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract.
        """
        score, counted = _shares(maps, contributions, label, self.tolerance, self.num_labels)
        column, score = counted.nonzero(as_tuple=True)[1], score[counted]
        self._count(score.isnan(), column)
        self._sum_up("wrong_place", score.nan_to_num(0.0), column)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.wrong_place, self.counted - self.undefined


def wrong_place(maps: Tensor, contributions: Tensor, label: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """Share of a map's positive mass on cells that did not raise the logit; functional twin of `WrongPlace`.

    Args:
        maps: (B, L, *S') signed maps, NaN in every cell where not computed.
        contributions: (B, L, *S') what each cell adds to the logit: HiResCAM, where one linear layer is left behind.
        label: (B, L), NaN = unknown, optional: score present labels only.
        tolerance: Share of the largest |contribution| up to which a contribution counts as none.

    Returns:
        (B, L) in [0, 1], NaN where the pair does not count, the map has no positive cell, or one of the two is broken.

    Raises:
        InputError: A tolerance outside [0, 1), or shapes, types or label values that break the contract.

    Example:
        >>> import torch
        >>> wrong_place(torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([[[2.0, -1.0, 5.0]]]))
        tensor([[0.2500]], dtype=torch.float64)
    """
    score, counted = _shares(maps, contributions, label, _checked(tolerance))
    return score.masked_fill(~counted, torch.nan)


def _shares(
    maps: Tensor, contributions: Tensor, label: Tensor | None, tolerance: float, num_labels: int | None = None
) -> tuple[Tensor, Tensor]:
    """(B, L) shares, NaN where undefined, and (B, L) bool: which pairs count."""
    _check(maps, contributions)
    shown, truth = (t.detach().as_subclass(Tensor).flatten(2) for t in (maps, contributions))
    computed = ~(shown.isnan().all(dim=2) | truth.isnan().all(dim=2))
    counted = counted_pairs(computed, label, num_labels)
    positive = shown.relu()
    wrong = truth <= tolerance * truth.abs().amax(dim=2, keepdim=True)
    # Divided by its largest value first, so that neither a tiny nor a huge map leaves the range of its type.
    top = positive.amax(dim=2, keepdim=True)
    mass = (positive / top).to(sum_dtype())
    share = mass.masked_fill(~wrong, 0.0).sum(dim=2) / mass.sum(dim=2)
    usable = shown.isfinite().all(dim=2) & truth.isfinite().all(dim=2) & (top[..., 0] > 0)
    return share.masked_fill(~usable, torch.nan), counted


def _checked(tolerance: float) -> float:
    if not 0 <= tolerance < 1:
        raise InputError(f"expected a tolerance in [0, 1), a share of the largest contribution, got {tolerance}: try 0")
    return tolerance


def _check(maps: Tensor, contributions: Tensor) -> None:
    if maps.ndim < 3 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise InputError(
            f"expected maps of shape (B, L, *S) in floating point with at least one cell, "
            f"got {tuple(maps.shape)} in {maps.dtype}: pass what explain() or tap.maps() returned"
        )
    if contributions.shape != maps.shape or not contributions.is_floating_point():
        raise InputError(
            f"expected contributions of the shape of maps {tuple(maps.shape)} in floating point, "
            f"got {tuple(contributions.shape)} in {contributions.dtype}: pass HiResCAM of the same layer and labels"
        )
