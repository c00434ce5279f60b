"""PointingRecall: the pointing game in which a map may also say that its label is not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import Average, LabelMetric, average_labels, check_average, sum_dtype, synced
from camtrain.metrics._pairs import check_label
from camtrain.metrics.pointing_game import pointing_game, radius_settings

Rejection = float | Sequence[float] | Tensor


class PointingRecall(LabelMetric):
    """Share of labels that are pointed at rightly where present, and rejected where absent.

    The pointing game looks at present labels only, so that it measures precision. Here every known label plays
    (Selvaraju et al., Grad-CAM, let a map reject a class for this reason): a map whose maximum is below its label's
    threshold rejects it, which is a hit where the label is absent and a miss where it is present; a map that does not
    reject hits where the label is present and its peak lies inside. Rejecting everything scores the share of absent
    labels: `rejecting_all()` is the level to beat.

    As input to `update`: what `PointingGame` takes.

    Args:
        num_labels: L.
        rejection: Threshold of the maximum, one or one per label, chosen on validation data with
            `rejection_thresholds`; in the units of the maps.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        tolerance: Radius in cells.
        tolerance_mm: Radius in mm, instead of `tolerance`.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: Not one threshold per label, a negative radius, or both radii.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.0, 9.0]], [[0.0, 9.0]], [[0.0, 1.0]]])
        >>> allowed = torch.tensor([[[False, True]]]).expand(3, 1, 2)
        >>> metric = PointingRecall(num_labels=1, rejection=5.0)
        >>> metric.update(maps, allowed, label=torch.tensor([[1.0], [0.0], [0.0]]))
        >>> metric.compute(), metric.rejecting_all()
        (tensor(0.6667, dtype=torch.float64), tensor(0.6667, dtype=torch.float64))
    """

    higher_is_better = True
    rejection_hits: Tensor
    absent: Tensor

    def __init__(
        self,
        num_labels: int,
        rejection: Rejection = 0.0,
        average: Average = "macro",
        tolerance: float = 0.0,
        tolerance_mm: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.rejection = _thresholds(rejection, num_labels).tolist()
        settings = (*self.rejection, *radius_settings(tolerance, tolerance_mm))
        super().__init__(num_labels, average, settings=settings, **kwargs)
        self.tolerance, self.tolerance_mm = tolerance, tolerance_mm
        for name in ("rejection_hits", "absent"):
            self._add_sum(name)

    def update(
        self,
        maps: Tensor,
        allowed: Tensor,
        label: Tensor,
        has_organs: Tensor | None = None,
        spacing: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Add one batch; see `PointingGame` for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract.
        """
        check_label(label, (maps.shape[0], maps.shape[1]), self.num_labels)
        score = pointing_recall(
            maps, allowed, label, self.rejection, has_organs, self.tolerance, self.tolerance_mm, spacing
        )
        counted = ~score.isnan()
        column = counted.nonzero(as_tuple=True)[1]
        self._count(torch.zeros_like(column, dtype=torch.bool), column)
        self._sum_up("rejection_hits", score[counted], column)
        self._sum_up("absent", (label.to(score.device) == 0)[counted], column)

    def rejecting_all(self, average: Average | None = None) -> Tensor:
        """Score of maps that reject every label: the share of absent ones (all processes together).

        Args:
            average: None takes the averaging of the metric.
        """
        with synced(self):
            return average_labels(self.absent, self.counted, check_average(average or self.average))

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.rejection_hits, self.counted


def pointing_recall(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    rejection: Rejection = 0.0,
    has_organs: Tensor | None = None,
    tolerance: float = 0.0,
    tolerance_mm: float | None = None,
    spacing: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """1 where a present label is pointed at or an absent one rejected, else 0; functional twin of `PointingRecall`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        rejection: A map whose maximum is below rejects its label; one threshold, or one per label.
        has_organs: (B,) bool, optional.
        tolerance: As for `pointing_game`.
        tolerance_mm: As for `pointing_game`.
        spacing: As for `pointing_game`.

    Returns:
        (B, L), NaN where the label is unknown, the map not computed, or a present label has no region.

    Raises:
        InputError: What `pointing_game` refuses, or not one threshold per label.

    Example:
        >>> import torch
        >>> maps, allowed = torch.tensor([[[0.0, 9.0], [3.0, 0.0]]]), torch.tensor([[[False, True], [False, True]]])
        >>> pointing_recall(maps, allowed, torch.tensor([[1.0, 0.0]]), rejection=[5.0, 5.0])
        tensor([[1., 1.]], dtype=torch.float64)
    """
    score = pointing_game(maps, allowed, label, has_organs, tolerance, tolerance_mm, spacing)
    least = _thresholds(rejection, maps.shape[1]).to(score)
    # NaN maxima (maps that were not computed) compare as False, and are left out at the end.
    top = _tops(maps, score)
    known = ~top.isnan()
    score = torch.where((label.to(score.device) == 1) & (top < least), score * 0, score)
    score = torch.where(label.to(score.device) == 0, (top < least).to(score), score)
    return score.masked_fill(~known, torch.nan)


def rejection_thresholds(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None = None,
    tolerance: float = 0.0,
    tolerance_mm: float | None = None,
    spacing: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """The threshold of each label with the most hits of `pointing_recall`: choose it on validation data.

    Args:
        maps: (B, L, *S') signed maps of all validation cases.
        allowed: As for `pointing_recall`.
        label: As for `pointing_recall`.
        has_organs: As for `pointing_recall`.
        tolerance: As for `pointing_game`.
        tolerance_mm: As for `pointing_game`.
        spacing: As for `pointing_game`.

    Returns:
        (L,) one of the maxima that occur, or infinity (reject always); of equals the lowest. 0 without a known pair.

    Raises:
        InputError: What `pointing_game` refuses.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.0, 9.0]], [[0.0, 2.0]], [[0.0, 1.0]]])
        >>> allowed = torch.tensor([[[False, True]]]).expand(3, 1, 2)
        >>> rejection_thresholds(maps, allowed, torch.tensor([[1.0], [0.0], [0.0]]))
        tensor([9.], dtype=torch.float64)
    """
    hits = pointing_recall(maps, allowed, label, -math.inf, has_organs, tolerance, tolerance_mm, spacing)
    top = _tops(maps, hits)
    result = torch.zeros(maps.shape[1], dtype=hits.dtype, device=hits.device)
    for column in range(maps.shape[1]):
        played = ~hits[:, column].isnan()
        if bool(played.any()):
            present = label[:, column].to(hits.device)[played] == 1
            result[column] = _best(top[played, column], hits[played, column], present)
    return result


def _tops(maps: Tensor, like: Tensor) -> Tensor:
    """Maximum of each map (B, L), in the type of the scores `like`."""
    return maps.detach().flatten(2).amax(dim=2).to(like)


def _best(top: Tensor, hits: Tensor, present: Tensor) -> Tensor:
    """Threshold with the most hits; tops, hits without rejection and truth (n,)."""
    candidates = torch.cat([torch.unique(top), top.new_tensor([math.inf])])
    kept = top[None] >= candidates[:, None]
    right = torch.where(present, kept & (hits == 1), ~kept).sum(dim=1)
    return candidates[(right == right.max()).nonzero()[0, 0]]  # argmax promises none of the equals


def _thresholds(rejection: Rejection, labels: int) -> Tensor:
    values = torch.as_tensor(rejection, dtype=sum_dtype()).detach().cpu()
    if tuple(values.shape) not in ((), (labels,)) or bool(values.isnan().any()):
        raise InputError(
            f"rejection= expects one threshold or {labels}, one per label, got {tuple(values.shape)}: pass what "
            "rejection_thresholds() returned"
        )
    return values.expand(labels)
