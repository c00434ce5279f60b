"""ChannelSparseness: does a label rest on a few channels of a layer, or a little on all of them?"""

from __future__ import annotations

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


class ChannelSparseness(LabelMetric):
    r"""Gini index of a label's channel weights, |w|: 0 where all channels count alike, 1 - 1/K where one alone counts.

    With :math:`|w|` in ascending order (Hurley & Rickard, Comparing measures of sparsity, 2009),

    .. math:: G = 1 - 2 \sum_{k=1}^{K} \frac{|w|_{(k)}}{\sum |w|} \cdot \frac{K - k + 1/2}{K}.

    Relevance-CAM (Lee et al., CVPR 2021) argues with sparse weights at every depth; `curve()` is the picture it argues
    with, `effective_share()` the same thing as a share of channels. Sparse is not correct: it describes a layer
    and a method, and is no score to rank networks by. Weights that are all zero, or partly NaN or infinite, are
    undefined and counted by `undefined_rate()`.

    As input to `update`: weights (B, L, K) as `camtrain.channel_weights` returns them, NaN in all channels where not
    computed; label (B, L), NaN = unknown, optional: with it, only present labels count.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        num_channels: K, needed for `curve()`. None: told by the first update.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: num_channels is no positive integer.

    Example:
        >>> import torch
        >>> metric = ChannelSparseness(num_labels=1, num_channels=4)
        >>> metric.update(torch.tensor([[[0.0, -2.0, 0.0, 0.0]]]))
        >>> metric.compute(), metric.effective_share()
        (tensor(0.7500, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
        >>> metric.curve()
        tensor([1., 0., 0., 0.], dtype=torch.float64)
    """

    # Neither way: see above.
    higher_is_better = None
    channels: Tensor
    channel_gini: Tensor
    channel_share: Tensor
    channel_curve: Tensor

    def __init__(
        self, num_labels: int, average: Average = "macro", num_channels: int | None = None, **kwargs: Any
    ) -> None:
        if num_channels is not None and (
            isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1
        ):
            raise InputError(f"expected num_channels as a positive integer or None, got {num_channels!r}")
        super().__init__(num_labels, average, settings=(num_channels or 0,), **kwargs)
        self.num_channels = num_channels
        self.add_state("channels", torch.tensor(num_channels or 0), dist_reduce_fx=_same_channels)
        self._add_sum("channel_gini")
        self._add_sum("channel_share")
        if num_channels is not None:
            self._add_sum("channel_curve", num_channels)

    def update(self, weights: Tensor, label: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract, or K is another one than before.
        """
        counted = _counted(weights, label, self.num_labels)
        self.channels = _same_channels(torch.stack([self.channels, self.channels.new_tensor(weights.shape[2])]))
        heights, column = _heights(weights[counted]), counted.nonzero(as_tuple=True)[1]
        lost = heights[:, 0].isnan()
        self._count(lost, column)
        heights, column = heights[~lost], column[~lost]
        self._sum_up("channel_gini", _gini(heights), column)
        self._sum_up("channel_share", _effective_share(heights), column)
        if self.num_channels is not None:
            self._sum_up("channel_curve", heights, column)

    def effective_share(self, average: Average | None = None) -> Tensor:
        """Mean of (sum |w|)^2 / (K sum w^2), the share of channels that do the work (all processes must ask together).

        Args:
            average: None takes the averaging of the metric.

        Returns:
            (L,) or a scalar in [1/K, 1]; NaN where no pair has one.
        """
        with synced(self):
            count = self.counted - self.undefined
            return average_labels(self.channel_share, count, check_average(average or self.average))

    def curve(self) -> Tensor:
        """Selectivity: mean over pairs of |w| / max |w| in descending order (all processes must ask together).

        Returns:
            (K,) from 1 downwards; NaN where no pair has weights.

        Raises:
            InputError: The metric was made without `num_channels`.
        """
        if self.num_channels is None:
            raise InputError("the curve needs the number of channels beforehand: make the metric with num_channels=")
        with synced(self):
            count = (self.counted - self.undefined).sum()
            return torch.where(count > 0, self.channel_curve.sum(dim=0) / count.clamp(min=1), torch.nan)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.channel_gini, self.counted - self.undefined


def channel_sparseness(weights: Tensor, label: Tensor | None = None) -> Tensor:
    """Gini index of each label's channel weights; functional twin of `ChannelSparseness`.

    Args:
        weights: (B, L, K), NaN in all channels where not computed.
        label: (B, L), NaN = unknown, optional: score present labels only.

    Returns:
        (B, L) in [0, 1 - 1/K], NaN where the pair does not count, or its weights are all zero or broken.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> channel_sparseness(torch.tensor([[[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0]]]))
        tensor([[0.0000, 0.7500]], dtype=torch.float64)
    """
    counted = _counted(weights, label)
    scores = torch.full(counted.shape, torch.nan, dtype=sum_dtype(), device=weights.device)
    scores[counted] = _gini(_heights(weights[counted]))
    return scores


def _counted(weights: Tensor, label: Tensor | None, num_labels: int | None = None) -> Tensor:
    """(B, L) bool."""
    if weights.ndim != 3 or not weights.is_floating_point() or not weights.shape[2]:
        raise InputError(
            f"expected weights of shape (B, L, K) in floating point with at least one channel, "
            f"got {tuple(weights.shape)} in {weights.dtype}: pass what channel_weights() returned"
        )
    return counted_pairs(~weights.as_subclass(Tensor).isnan().all(dim=2), label, num_labels)


def _heights(weights: Tensor) -> Tensor:
    """|w| / max |w| in descending order for weights (P, K), NaN where they are all zero or broken."""
    size = weights.detach().as_subclass(Tensor).to(sum_dtype()).abs().sort(dim=1, descending=True).values
    top = size.amax(dim=1, keepdim=True)  # NaN if one is
    return torch.where((top > 0) & top.isfinite(), size / top, torch.nan)


def _gini(heights: Tensor) -> Tensor:
    """(P,) for heights (P, K) in descending order: the j-th of them from the top weighs (j - 1/2) / K."""
    channels = heights.shape[1]
    place = (torch.arange(channels, device=heights.device).to(heights.dtype) + 0.5) / channels
    return (1 - 2 * (heights * place).sum(dim=1) / heights.sum(dim=1)).clamp(min=0)


def _effective_share(heights: Tensor) -> Tensor:
    """(P,)."""
    return heights.sum(dim=1).square() / (heights.shape[1] * heights.square().sum(dim=1))


def _same_channels(numbers: Tensor) -> Tensor:
    """The one number of channels among (n,), where 0 stands for not known yet."""
    known = torch.unique(numbers[numbers > 0])
    if len(known) > 1:
        raise InputError(
            f"expected weights of one layer, got {' and '.join(map(str, known.tolist()))} channels: "
            "make one ChannelSparseness for each layer"
        )
    return numbers.amax(dim=0)
