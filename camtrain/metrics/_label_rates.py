"""Average precision and calibration error per label: the neighbours of `label_auroc`, of the same kept logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import sum_dtype

BINS = 15


def label_auprc(scores: Tensor, label: Tensor) -> Tensor:
    """Average precision of each label: precision at every threshold, weighted with the recall gained there.

    Args:
        scores: (B, L) logits or probabilities.
        label: (B, L), NaN = unknown.

    Returns:
        (L,); NaN where only one class is known or a score is NaN.

    Example:
        >>> label_auprc(torch.tensor([[0.9], [0.5], [0.1]]), torch.tensor([[1.0], [0.0], [1.0]]))
        tensor([0.8333], dtype=torch.float64)
    """
    return _each(scores, label, _average_precision, both_classes=True)


def label_calibration_error(scores: Tensor, label: Tensor) -> Tensor:
    """Expected calibration error of each label: mean gap of probability and share present, over 15 equal bins.

    Guo et al., ICML 2017, eq. 3; the probability is that of "present".

    Args:
        scores: (B, L) logits.
        label: (B, L), NaN = unknown.

    Returns:
        (L,); NaN where nothing is known or a score is NaN.

    Example:
        >>> label_calibration_error(torch.zeros(4, 1), torch.tensor([[1.0], [1.0], [1.0], [0.0]]))
        tensor([0.2500], dtype=torch.float64)
    """
    return _each(scores, label, _calibration_error, both_classes=False)


def _each(scores: Tensor, label: Tensor, rate: Callable[[Tensor, Tensor], Tensor], both_classes: bool) -> Tensor:
    found = torch.full((scores.shape[1],), torch.nan, dtype=sum_dtype(), device=scores.device)
    for column in range(scores.shape[1]):
        known = ~label[:, column].isnan()
        score, present = scores[known, column], label[known, column] == 1
        enough = len(present) and not (both_classes and (bool(present.all()) or not bool(present.any())))
        if enough and not bool(score.isnan().any()):
            found[column] = rate(score, present.to(sum_dtype()))
    return found


def _average_precision(score: Tensor, present: Tensor) -> Tensor:
    # Cases of equal scores pass a threshold together.
    _, place, size = torch.unique(score, return_inverse=True, return_counts=True)
    gained = torch.zeros(len(size), dtype=present.dtype, device=score.device).index_add_(0, place, present).flip(0)
    precision = gained.cumsum(0) / size.flip(0).cumsum(0)
    area: Tensor = (precision * gained).sum() / gained.sum()
    return area


def _calibration_error(score: Tensor, present: Tensor) -> Tensor:
    probability = score.to(present.dtype).sigmoid()
    edges = torch.linspace(0, 1, BINS + 1, dtype=present.dtype, device=score.device)
    place = (torch.bucketize(probability, edges, right=True) - 1).clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=present.dtype, device=score.device).index_add_(0, place, probability - present)
    return gaps.abs().sum() / len(present)
