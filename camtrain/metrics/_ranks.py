"""Rank correlation over cells, for metrics and for the comparison of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from camtrain.metrics._pair_metric import sum_dtype


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation over the last axis, ties at their average rank.

    Args:
        a: (..., N).
        b: The same shape.

    Returns:
        (...) in -1..1, NaN where one side is constant or has a cell that is NaN or infinite.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 3.0, 2.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    left, right = (_centred_ranks(values.detach()) for values in (a, b))
    covariance = (left * right).sum(dim=-1)
    spread = (left.square().sum(dim=-1) * right.square().sum(dim=-1)).sqrt()
    # Rounding may put the quotient of two equal rank lists an ulp beyond 1.
    rho = (covariance / spread).clamp(-1, 1)
    finite = torch.isfinite(a.detach()).all(dim=-1) & torch.isfinite(b.detach()).all(dim=-1)
    return torch.where(finite & (spread > 0), rho, torch.nan)


def _centred_ranks(values: Tensor) -> Tensor:
    """Average ranks less their mean, (..., N)."""
    # Infinity and NaN only hold their places here: the result is undefined anyway.
    ordered, order = values.sort(dim=-1)
    place = torch.arange(values.shape[-1], dtype=sum_dtype(), device=values.device).expand(values.shape)
    step = ordered.diff(dim=-1) != 0
    edge = torch.ones_like(step[..., :1])
    # First and last place of the run of equal values that each place belongs to.
    first = torch.where(torch.cat([edge, step], dim=-1), place, 0.0).cummax(dim=-1).values
    last = torch.where(torch.cat([step, edge], dim=-1), place, torch.inf).flip(-1).cummin(dim=-1).values.flip(-1)
    ranks = torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(-1, order, (first + last) / 2)
    return ranks - (values.shape[-1] - 1) / 2
