"""From a numerator and a denominator per label to one number, over the processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from camtrain.losses.forms import nothing


def over_processes(denominator: Tensor, figures: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sums over the processes, in one collective that every process enters at every call.

    Args:
        denominator: (L,) detached.
        figures: (n,) detached, same dtype.

    Returns:
        Both summed over the processes, and the number of processes: the factor that makes DDP's mean of gradients
        the gradient of (sum of numerators) / (sum of denominators). Without a distributed run: as given, and 1.

    Example:
        >>> over_processes(torch.ones(2), torch.zeros(1))
        (tensor([1., 1.]), tensor([0.]), 1)
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return denominator, figures, 1
    flat = torch.cat([denominator, figures])
    dist.all_reduce(flat)
    return flat[: len(denominator)], flat[len(denominator) :], dist.get_world_size()


def ratio_of_sums(numerator: Tensor, denominator: Tensor, weights: Tensor | None) -> Tensor:
    """One ratio over all labels, as in the paper: every cell weighs the same.

    Args:
        numerator: (L,) with graph.
        denominator: (L,) >= 0.
        weights: (L,) >= 0, or None for 1.

    Returns:
        Scalar; 0 with a graph where there is nothing to divide by.

    Example:
        >>> ratio_of_sums(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), None)
        tensor(0.5000)
    """
    if weights is not None:
        numerator, denominator = numerator * weights, denominator * weights
    return _divide(numerator.sum(), denominator.sum())


def mean_of_ratios(numerator: Tensor, denominator: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the labels' own ratios, over the labels that have something: every label weighs the same.

    Args:
        numerator: (L,) with graph.
        denominator: (L,) >= 0.
        weights: (L,) >= 0, or None for 1.

    Returns:
        Scalar; 0 with a graph where no label has anything.

    Example:
        >>> mean_of_ratios(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0]), None)
        tensor(0.6250)
    """
    counts = (~nothing(denominator)).to(denominator.dtype)
    counts = counts if weights is None else counts * weights
    return _divide((_divide(numerator, denominator) * counts).sum(), counts.sum())


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and the numerator itself (which is 0, with its graph) where there is nothing."""
    return numerator / torch.where(nothing(denominator), 1.0, denominator)
