"""What the scores of changed images share: checked probabilities, curves and the area under them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import (
    Average,
    LabelMetric,
    average_labels,
    check_average,
    counted_pairs,
    sum_dtype,
    synced,
)

_SLACK = 1e-6  # a mean of probabilities in float32 may exceed 1 by rounding


class CurveMetric(LabelMetric, ABC):
    """Base of the two areas under a curve of probabilities, and of the mean curve that goes with them.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        num_points: Shares at which `curve()` tells the mean curve, evenly from 0 to 1.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    def __init__(self, num_labels: int, average: Average = "macro", num_points: int = 21, **kwargs: Any) -> None:
        if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < 2:
            raise InputError(f"expected num_points as an integer of at least 2, got {num_points!r}")
        super().__init__(num_labels, average, settings=(num_points,), **kwargs)
        self.num_points = num_points
        self._add_sum(self._area_name())
        self._add_sum(self._curve_name(), num_points)

    @abstractmethod
    def _area_name(self) -> str:
        """Name of the sum of areas; another one for every class, so that a collection keeps them apart."""

    def _curve_name(self) -> str:
        return f"{self._area_name()}_curve"

    def update(self, curve: Tensor, share: Tensor, label: Tensor) -> None:
        """Add one batch.

        Args:
            curve: (B, L, T) probabilities, NaN everywhere where not computed, NaN in between where undefined.
            share: (B, L, T), or (T,) for all pairs: from 0 to 1.
            label: (B, L), NaN = unknown.

        Raises:
            InputError: Shapes, types or values break the contract.
        """
        counted, curve, share = checked_curves(curve, share, label, self.num_labels)
        chosen, at, column = curve[counted], share[counted], counted.nonzero(as_tuple=True)[1]
        area = areas(chosen, at)
        lost = area.isnan()
        self._count(lost, column)
        self._sum_up(self._area_name(), area[~lost], column[~lost])
        even = torch.linspace(0, 1, self.num_points, dtype=chosen.dtype, device=chosen.device)
        self._sum_up(self._curve_name(), interpolated(chosen[~lost], at[~lost], even), column[~lost])

    def curve(self, average: Average = "none") -> Tensor:
        """Mean curve at `num_points` shares, evenly from 0 to 1 (all processes must call it together).

        Every curve is read off linearly between its own shares: exactly, where it has one there.

        Args:
            average: `"none"` one curve per label, `"macro"` the mean over labels, `"micro"` the mean over pairs.

        Returns:
            (L, num_points), or (num_points,); NaN where no pair has a curve.
        """
        check_average(average)
        with synced(self):
            total: Tensor = getattr(self, self._curve_name())
            count = self._totals()[1]
            if average == "none":
                return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], torch.nan)
            return torch.stack([average_labels(point, count, average) for point in total.unbind(1)])

    def _totals(self) -> tuple[Tensor, Tensor]:
        return getattr(self, self._area_name()), self.counted - self.undefined


def checked_curves(
    curve: Tensor, share: Tensor, label: Tensor, num_labels: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check one batch of curves.

    Returns:
        (B, L) bool: which pairs count; curves and shares (B, L, T) in the dtype of the sums.

    Raises:
        InputError: Shapes, types or values break the contract.
    """
    if curve.ndim != 3 or not curve.is_floating_point() or curve.shape[2] < 2:
        raise InputError(
            f"expected curve of shape (B, L, T) in floating point with at least two points, got {tuple(curve.shape)} "
            f"in {curve.dtype}: pass the insertion or deletion of perturbation_curves()"
        )
    if tuple(share.shape) not in {tuple(curve.shape), tuple(curve.shape[2:])} or not share.is_floating_point():
        raise InputError(
            f"expected share of shape {tuple(curve.shape)} or {tuple(curve.shape[2:])} in floating point, one per "
            f"point of the curve, got {tuple(share.shape)} in {share.dtype}"
        )
    curve = curve.detach().to(sum_dtype())
    share = share.detach().to(curve).expand(curve.shape)
    counted = counted_pairs(~curve.isnan().all(dim=2), label, num_labels)
    check_probabilities(curve[counted], "curve")
    at = share[counted & ~curve.isnan().any(dim=2)]
    if not bool(((at[:, 0] == 0) & (at[:, -1] == 1) & (at.diff(dim=1) >= 0).all(dim=1)).all()):
        raise InputError(
            "expected shares that never fall, from 0 (nothing replaced or revealed) to 1 (everything): "
            "pass the share that perturbation_curves() gives beside the curves, not voxel counts or per cent"
        )
    return counted, curve, share


def check_probabilities(values: Tensor, name: str) -> None:
    """Refuse what lies outside of 0..1; NaN passes.

    Raises:
        InputError: Some do.
    """
    odd = (values < -_SLACK) | (values > 1 + _SLACK)
    if bool(odd.any()):
        raise InputError(
            f"expected probabilities in 0..1 for {name}, got {values[odd][0].item():g}: pass the sigmoid of the logits"
        )


def areas(curve: Tensor, share: Tensor) -> Tensor:
    """Trapezoid rule: (*, T) and (*, T) -> (*), NaN where a point of the curve is NaN."""
    # Shares of undefined curves mean nothing, and are not asked to.
    lost = curve.isnan().any(dim=-1)
    return torch.trapezoid(curve, share, dim=-1).masked_fill(lost, torch.nan)


def interpolated(curve: Tensor, share: Tensor, at: Tensor) -> Tensor:
    """Straight lines between the points of each curve.

    Args:
        curve: (P, T).
        share: (P, T), never falling, from 0 to 1.
        at: (N,) in 0..1.

    Returns:
        (P, N). Where a curve jumps at one share, what it jumps to.
    """
    wanted = at.expand(len(curve), -1).contiguous()
    right = torch.searchsorted(share.contiguous(), wanted, right=True).clamp(1, curve.shape[1] - 1)
    x0, x1 = share.gather(1, right - 1), share.gather(1, right)
    step = x1 - x0
    weight = torch.where(step > 0, (wanted - x0) / torch.where(step > 0, step, 1.0), 1.0)
    return torch.lerp(curve.gather(1, right - 1), curve.gather(1, right), weight)
