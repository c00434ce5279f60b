"""LabelAUROC: area under the ROC curve per label, exact, with unknown labels left out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from camtrain._errors import InputError
from camtrain._label_rates import add_block
from camtrain.metrics._pair_metric import average_labels, check_num_labels, sum_dtype, synced
from camtrain.metrics._pairs import check_label


class LabelAUROC(Metric):
    """Area under the ROC curve of each label: the chance that a present case scores above an absent one.

    Computed from ranks (Mann-Whitney), ties count half, no binning, and no sigmoid on the way that could make ties of
    large logits. A label with known cases of one class only is undefined (NaN, and counted by `undefined_rate()`), and
    so is a label with NaN among its scores. There is no micro average: scores of different labels have no common scale.

    As input to `update`: scores (B, L), logits or probabilities, kept as float32; label (B, L), NaN = unknown.

    Args:
        num_labels: L.
        average: `"none"` or `"macro"` (mean over the labels that have an area).
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: Another averaging.

    Example:
        >>> import torch
        >>> metric = LabelAUROC(num_labels=2, average="none")
        >>> scores = torch.tensor([[0.9, 2.0], [0.1, 0.0], [0.4, 1.0], [0.5, 5.0]])
        >>> metric.update(scores, label=torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, torch.nan]]))
        >>> metric.compute()
        tensor([0.7500, 1.0000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_labels: int, average: Literal["none", "macro"] = "macro", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels = check_num_labels(num_labels)
        self.average = _check_average(average)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, label: Tensor) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract.
        """
        _check(scores, label, self.num_labels)
        # Flat, because torchmetrics lets a process without data take part with an empty flat tensor.
        both = list(self.scores), list(self.labels)
        for blocks, fresh in zip(both, (scores, label), strict=True):
            add_block(blocks, fresh.detach().flatten().to(torch.float32, copy=True))
        self.scores, self.labels = both  # together or, where memory ends on the way, not at all

    def compute(self) -> Tensor:
        """The area with the averaging given at construction; NaN where no label has one."""
        return self._averaged(self.average)

    def averaged(self, average: Literal["none", "macro"]) -> Tensor:
        """The area with another averaging (all processes must call it together).

        Args:
            average: `"none"` gives (L,) even for one label, where `compute()` is squeezed by torchmetrics.

        Returns:
            (L,) or a scalar; NaN where no label has an area.
        """
        with synced(self):
            return self._averaged(_check_average(average))

    def undefined_rate(self) -> Tensor:
        """Share of the labels without an area (all processes must call it together)."""
        return self.averaged("none").isnan().to(sum_dtype()).mean()

    @property
    def pairs(self) -> Tensor:
        """Known (case, label) pairs per label (L,) (all processes must ask together)."""
        with synced(self):
            return (~self._all()[1].isnan()).sum(dim=0)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Scores and labels of all cases so far, (cases, L) each (all processes must call it together)."""
        with synced(self):
            return self._all()

    def _averaged(self, average: Literal["none", "macro"]) -> Tensor:
        area = label_auroc(*self._all())
        return average_labels(area.nan_to_num(0.0), (~area.isnan()).long(), average)

    def _all(self) -> tuple[Tensor, Tensor]:
        """Scores and labels of all cases so far, (cases, L) each."""
        flat = [
            dim_zero_cat(state) if len(state) else torch.zeros(0, device=self.device)
            for state in (self.scores, self.labels)
        ]
        return flat[0].reshape(-1, self.num_labels), flat[1].reshape(-1, self.num_labels)


def label_auroc(scores: Tensor, label: Tensor) -> Tensor:
    """Area under the ROC curve of each label; functional twin of `LabelAUROC`.

    Args:
        scores: (B, L) logits or probabilities.
        label: (B, L), NaN = unknown.

    Returns:
        (L,), NaN where only one class is known or a score is NaN.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> label_auroc(torch.tensor([[0.9], [0.1], [0.9]]), torch.tensor([[1.0], [0.0], [0.0]]))
        tensor([0.7500], dtype=torch.float64)
    """
    _check(scores, label)
    areas = [_auroc(score, truth) for score, truth in zip(scores.unbind(1), label.unbind(1), strict=True)]
    return torch.stack(areas) if areas else torch.zeros(0, dtype=sum_dtype(), device=scores.device)


def _auroc(score: Tensor, truth: Tensor) -> Tensor:
    """Scalar: the mean rank of the present cases, moved and scaled to [0, 1]."""
    known = ~truth.isnan()
    score, present = score[known], truth[known] == 1
    undefined = torch.tensor(torch.nan, dtype=sum_dtype(), device=score.device)
    positives = present.sum()
    negatives = len(present) - positives
    if not bool((positives > 0) & (negatives > 0) & ~score.isnan().any()):
        return undefined
    _, place, size = torch.unique(score, return_inverse=True, return_counts=True)
    rank = size.cumsum(0).to(sum_dtype()) - (size - 1) / 2
    beaten: Tensor = rank[place][present].sum() - positives * (positives + 1) / 2
    return beaten / (positives * negatives)


def _check(scores: Tensor, label: Tensor, num_labels: int | None = None) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise InputError(
            f"expected scores of shape (B, L) in floating point, got {tuple(scores.shape)} in {scores.dtype}: "
            "pass logits or probabilities, one column per label"
        )
    check_label(label, (scores.shape[0], scores.shape[1]), num_labels)


def _check_average(average: str) -> Literal["none", "macro"]:
    if average == "none":
        return "none"
    if average == "macro":
        return "macro"
    raise InputError(
        f"expected average none or macro for an area under the ROC curve, got {average!r}: "
        "scores of different labels have no common scale"
    )
