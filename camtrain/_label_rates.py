"""Scores of the logits per label: average precision, ROC area, calibration error; torchmetrics says what they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
)

RATES = ("auroc", "auprc", "calibration_error")
BINS = 15


def label_rates(name: str, probability: Tensor, label: Tensor) -> Tensor:
    """A score of each label over the cases in which it is known.

    Args:
        name: `"auroc"`, `"auprc"` (average precision) or `"calibration_error"` (Guo et al., ICML 2017, eq. 3: mean gap
            of probability and share present, over 15 equal bins; the probability is that of "present").
        probability: (cases, L), best in float64: the sigmoid of large logits would tie in float32, and ties cost area.
        label: (cases, L), NaN = unknown.

    Returns:
        (L,) of the probability's dtype; NaN where known cases are of one class only (of the calibration error: where
        there is none), or where a probability is NaN.

    Example:
        >>> probability = torch.tensor([[0.9], [0.5], [0.1]], dtype=torch.float64)
        >>> label_rates("auprc", probability, torch.tensor([[1.0], [0.0], [1.0]]))
        tensor([0.8333], dtype=torch.float64)
    """
    found = torch.full((label.shape[1],), torch.nan, dtype=probability.dtype, device=probability.device)
    for column in range(label.shape[1]):
        known = ~label[:, column].isnan()
        given, truth = probability[known, column], label[known, column].long()
        enough = len(truth) and (name == "calibration_error" or 0 < int(truth.sum()) < len(truth))
        if enough and not bool(given.isnan().any()):
            found[column] = _rate(name, given, truth)
    return found


def _rate(name: str, probability: Tensor, truth: Tensor) -> Tensor:
    if name == "calibration_error":
        found: Tensor = binary_calibration_error(probability, truth, n_bins=BINS, norm="l1")
        return found
    # Their order is all that counts: ranks in place of numbers that float32 may not tell apart.
    ranks = torch.unique(probability, return_inverse=True)[1]
    scores = (ranks + 1).double() / (len(ranks) + 1)
    area: Tensor = (binary_auroc if name == "auroc" else binary_average_precision)(scores, truth)
    return area
