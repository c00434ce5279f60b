"""PointingGame: does the strongest cell lie where the label may be read from?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import Average, PairMetric, sum_dtype
from camtrain.metrics._pairs import Pairs, select_pairs


class PointingGame(PairMetric):
    """Share of maps whose single strongest cell lies in the allowed region, or close enough to it.

    After Zhang et al. (Excitation Backprop, 2018), in any number of dimensions. A miss is also: a map without
    positive cells, and a map whose maximum is reached by two cells or more, since neither points anywhere. Close
    enough is a Euclidean ball around the cell, measured between cell centres.

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional; spacing, mm per *cell of the maps*, (rank,) or (B, rank), needed
    with `tolerance_mm`; a case with NaN in its spacing (unknown geometry) is undefined.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        tolerance: Radius in cells.
        tolerance_mm: Radius in mm, instead of `tolerance`.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: A negative radius, or both radii.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.0, 9.0, 1.0]], [[0.0, 1.0, 9.0]]])
        >>> allowed = torch.tensor([[[True, False, False]]]).expand(2, 1, 3)
        >>> metric = PointingGame(num_labels=1, tolerance=1)
        >>> metric.update(maps, allowed, label=torch.ones(2, 1))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    hits: Tensor

    def __init__(
        self,
        num_labels: int,
        average: Average = "macro",
        tolerance: float = 0.0,
        tolerance_mm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_labels, average, settings=radius_settings(tolerance, tolerance_mm), **kwargs)
        self.tolerance, self.tolerance_mm = tolerance, tolerance_mm
        self._add_sum("hits")

    def update(
        self,
        maps: Tensor,
        allowed: Tensor,
        label: Tensor,
        has_organs: Tensor | None = None,
        spacing: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract, or `spacing` is missing.
        """
        self._add(select_pairs(maps, allowed, label, has_organs, self.num_labels), spacing)

    def _add(self, pairs: Pairs, spacing: Tensor | Sequence[float] | None = None) -> None:
        self._record("hits", _hits(pairs, self.tolerance, self.tolerance_mm, spacing), pairs)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.hits, self.counted - self.undefined


def pointing_game(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None = None,
    tolerance: float = 0.0,
    tolerance_mm: float | None = None,
    spacing: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """1 where the single strongest cell is allowed, else 0, per pair; functional twin of `PointingGame`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.
        tolerance: Radius in cells.
        tolerance_mm: Radius in mm, instead of `tolerance`.
        spacing: mm per cell of the maps, (rank,) or (B, rank), with `tolerance_mm`.

    Returns:
        (B, L), NaN where the pair does not count or the geometry that a radius in mm needs is unknown.

    Raises:
        InputError: Wrong radii or spacing, or shapes, types or label values that break the contract.

    Example:
        >>> import torch
        >>> pointing_game(torch.tensor([[[0.0, 9.0, 1.0]]]), torch.tensor([[[True, False, False]]]), torch.ones(1, 1))
        tensor([[0.]], dtype=torch.float64)
    """
    radius_settings(tolerance, tolerance_mm)
    pairs = select_pairs(maps, allowed, label, has_organs)
    return pairs.spread(_hits(pairs, tolerance, tolerance_mm, spacing))


def _hits(
    pairs: Pairs, tolerance: float, tolerance_mm: float | None, spacing: Tensor | Sequence[float] | None
) -> Tensor:
    """(P,) 1.0 or 0.0, NaN where the spacing is unknown."""
    step = None if tolerance_mm is None else _pair_spacing(pairs, spacing)
    if not len(pairs):
        return pairs.maps.new_zeros(0, dtype=sum_dtype())
    top, peak = pairs.maps.max(dim=1)
    points = (top > 0) & ((pairs.maps == top[:, None]).sum(dim=1) == 1)
    if step is None and tolerance < 1:
        inside = pairs.allowed.gather(1, peak[:, None])[:, 0]
    else:
        radius = tolerance if tolerance_mm is None else tolerance_mm
        inside = (pairs.allowed & _near(peak, pairs.size, radius, step)).any(dim=1)
    score = (points & inside).to(sum_dtype())
    return score if step is None else score.masked_fill(~step.isfinite().all(dim=1), torch.nan)


def _near(peak: Tensor, size: tuple[int, ...], radius: float, step: Tensor | None) -> Tensor:
    """(P, N) bool: cells whose centre lies within `radius` of the centre of cell `peak`."""
    squared = torch.zeros(len(peak), *size, dtype=sum_dtype(), device=peak.device)
    for axis, centre in enumerate(torch.unravel_index(peak, size)):
        along = (torch.arange(size[axis], device=peak.device) - centre[:, None]).to(squared.dtype)
        if step is not None:
            along = along * step[:, axis, None]
        squared += along.square().reshape(len(peak), *[-1 if i == axis else 1 for i in range(len(size))])
    # Three cells of 0.7 mm are 2.1 mm, whatever the last bit says.
    return (squared <= radius**2 * (1 + 1e-6)).flatten(1)


def _pair_spacing(pairs: Pairs, spacing: Tensor | Sequence[float] | None) -> Tensor:
    """(P, rank) mm per cell."""
    rank = len(pairs.size)
    if spacing is None:
        raise InputError("tolerance_mm needs spacing=, mm per cell of the maps: pass it to update, or use tolerance=")
    step = torch.as_tensor(spacing, dtype=sum_dtype(), device=pairs.maps.device)
    if tuple(step.shape) not in ((rank,), (pairs.shape[0], rank)):
        raise InputError(
            f"expected spacing of shape ({rank},) or ({pairs.shape[0]}, {rank}) = (B, axes), got {tuple(step.shape)}: "
            "mm per cell of the maps along each axis"
        )
    if bool((step <= 0).any()):
        raise InputError(f"expected spacing above 0 mm, got {step.min().item():g}: NaN stands for unknown")
    return step.expand(pairs.shape[0], rank)[pairs.sample]


def radius_settings(tolerance: float, tolerance_mm: float | None) -> tuple[float, float]:
    """Both radii as numbers that tell two metrics apart; a radius in mm that is not used is -1.

    Raises:
        InputError: A radius that is none, or both.

    Example:
        >>> radius_settings(0.0, 12.0)
        (0.0, 12.0)
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"expected a tolerance of 0 cells or more, got {tolerance}")
    if tolerance_mm is None:
        return tolerance, -1.0
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError(f"expected tolerance_mm of 0 mm or more, got {tolerance_mm}")
    if tolerance:
        raise InputError("expected tolerance (cells) or tolerance_mm, got both: drop one of them")
    return tolerance, tolerance_mm
