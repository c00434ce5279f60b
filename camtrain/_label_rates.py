"""Scores of the logits per label, as torchmetrics has them, and how the logits of a split are kept until then."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

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
    if name == "auprc":
        return _average_precision(probability, label)
    found = torch.full((label.shape[1],), torch.nan, dtype=probability.dtype, device=probability.device)
    for column in range(label.shape[1]):
        known = ~label[:, column].isnan()
        given, truth = probability[known, column], label[known, column].long()
        enough = len(truth) and (name == "calibration_error" or 0 < int(truth.sum()) < len(truth))
        if enough and not bool(given.isnan().any()):
            found[column] = _rate(name, given, truth)
    return found


def add_block(blocks: list[Tensor], fresh: Tensor) -> None:
    """Append to a list of flat tensors, joining neighbours so that n batches leave about log2(n) tensors.

    A small tensor kept of every batch lies between the large ones of the network, and the C allocator cannot join what
    is freed around it: with DenseNet121 the process grew by the size of the images, batch after batch.

    Args:
        blocks: Changed in place; together, in order, they hold all values.
        fresh: (N,) a tensor of its own, no view of somebody else's.

    Example:
        >>> blocks = []
        >>> for number in range(7):
        ...     add_block(blocks, torch.tensor([number]))
        >>> [block.tolist() for block in blocks]
        [[0, 1, 2, 3], [4, 5], [6]]
    """
    # Each block is at least twice the next, so that there are few of them whatever the sizes of the batches.
    while blocks and len(blocks[-1]) < 2 * len(fresh):
        fresh = torch.cat([blocks.pop(), fresh])
    blocks.append(fresh)


def _average_precision(score: Tensor, label: Tensor) -> Tensor:
    """(L,) sum of precision x gain of recall over the thresholds, of all labels at once.

    A library's function takes one label after the other, 20 ms for 80, and sums in float32.
    """
    known = ~label.isnan()
    undefined = (score.isnan() & known).any(dim=0)
    # Unknown cases come last: no probability is below zero.
    ordered, order = score.masked_fill(~known | score.isnan(), -1.0).sort(dim=0, descending=True)
    hits = ((label == 1) & known).gather(0, order).long().cumsum(dim=0)  # whole numbers: exact, and so on a GPU
    rank = torch.arange(1, len(score) + 1, device=score.device)[:, None]
    # Cases with one score stand or fall together: only the last of them is a threshold.
    threshold = rank <= known.sum(dim=0)
    threshold[:-1] &= ordered[:-1] != ordered[1:]
    upto = torch.where(threshold, hits, 0).cummax(dim=0).values
    before = torch.cat([torch.zeros_like(upto[:1]), upto[:-1]])
    area = torch.where(threshold, ((hits - before) * hits).to(score.dtype) / rank, 0.0).sum(dim=0)
    present = hits[-1:].sum(dim=0)
    undefined |= (present == 0) | (present == known.sum(dim=0))
    return (area / present).masked_fill(undefined, torch.nan)


def _rate(name: str, probability: Tensor, truth: Tensor) -> Tensor:
    if name == "calibration_error":
        found: Tensor = binary_calibration_error(probability, truth, n_bins=BINS, norm="l1")
        return found
    # Their order is all that counts: ranks in place of numbers that float32 may not tell apart.
    ranks = torch.unique(probability, return_inverse=True)[1]
    scores = (ranks + 1).double() / (len(ranks) + 1)
    area: Tensor = binary_auroc(scores, truth)
    return area
