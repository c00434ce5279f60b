"""SumToScore: does the sum of a map give back the logit that it explains?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import average_labels, check_num_labels, sum_dtype, synced

# Signs of label pairs that are held at once.
_SIGNS = 1 << 20


class SumAgreement(NamedTuple):
    """What `sum_to_score` finds, NaN where undefined.

    Attributes:
        l1: (B,) mean over labels of |sum(map) - logit|.
        kendall_tau: (B,) Kendall's tau-b between sums and logits over the labels of a case.
        gap: (B, L) |sum(map) - logit|.
        bias_share: (B, L) (logit - sum) / (|logit| + |sum|), in [-1, 1].
        computed: (B, L) bool, False where the map was not computed.
    """

    l1: Tensor
    kendall_tau: Tensor
    gap: Tensor
    bias_share: Tensor
    computed: Tensor


class SumToScore(Metric):
    """Agreement of the sum of each map with its logit, over all labels of a case (Respond-CAM, Zhao et al., 2018).

    The protocol of that paper's first table: per case, L1 is the mean over labels of |sum(map) - logit|, and Kendall's
    tau compares the order of the sums with that of the logits; mean and standard deviation (over N) over cases. What
    a map leaves out is mostly the bias of the layers behind it; the bias share says how much of the two
    numbers is the difference: (logit - sum) / (|logit| + |sum|), 0 for a map that explains all, 1 for one that sums to
    nothing, -1 where everything in the map is taken back by what it leaves out. Truths play no part.

    Labels whose map was not computed are left out. Undefined, and counted by `undefined_rate()`: broken maps (an
    infinite value, or NaN in some cells) and infinite or NaN logits; tau where fewer than two labels are left or all
    sums or all logits are equal; the share where sum and logit are 0. A case that lost labels is scored by the rest.

    As input to `update`: maps (B, L, *S') signed and not normalised, NaN in every cell where not computed; logits
    (B, L).

    Args:
        num_labels: L.
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = SumToScore(num_labels=2)
        >>> metric.update(torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), logits=torch.tensor([[3.5, -1.5]]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'l1': 0.5, 'l1_std': 0.0, 'kendall_tau': 1.0, 'kendall_tau_std': 0.0, 'bias_share': -0.062}
        >>> metric.l1_per_label()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    cases: Tensor
    counted: Tensor
    gap: Tensor
    gaps: Tensor
    bias: Tensor
    biases: Tensor
    moments: Tensor

    def __init__(self, num_labels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels = check_num_labels(num_labels)
        self.add_state("cases", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in ("counted", "gaps", "biases"):
            self.add_state(name, torch.zeros(num_labels, dtype=torch.long), dist_reduce_fx="sum")
        for name in ("gap", "bias"):
            self.add_state(name, torch.zeros(num_labels, dtype=sum_dtype()), dist_reduce_fx="sum")
        # Rows: L1, tau. Columns: number, mean, sum of squared deviations; these add up without cancellation.
        self.add_state("moments", torch.zeros(2, 3, dtype=sum_dtype()), dist_reduce_fx=_merge)

    def update(self, maps: Tensor, logits: Tensor) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes or types break the contract.
        """
        found = _agreement(maps, logits, self.num_labels)
        # Never in place: Lightning may reset a metric under inference mode, whose tensors refuse it later.
        self.cases = self.cases + found.computed.any(dim=1).sum()
        self.counted = self.counted + found.computed.sum(dim=0)
        self.gaps = self.gaps + (~found.gap.isnan()).sum(dim=0)
        self.gap = self.gap + found.gap.nansum(dim=0).to(self.gap.dtype)
        self.biases = self.biases + (~found.bias_share.isnan()).sum(dim=0)
        self.bias = self.bias + found.bias_share.nansum(dim=0).to(self.bias.dtype)
        batch = torch.stack([_moments(found.l1), _moments(found.kendall_tau)])
        self.moments = _merge(torch.stack([self.moments, batch.to(self.moments.dtype)]))

    def compute(self) -> dict[str, Tensor]:
        """Means and standard deviations over cases, and the mean bias share over pairs; NaN where none has a value."""
        number, mean, square = self.moments.unbind(1)
        mean = torch.where(number > 0, mean, torch.nan)
        spread = torch.where(number > 0, (square / number.clamp(min=1)).sqrt(), torch.nan)
        return {
            "l1": mean[0],
            "l1_std": spread[0],
            "kendall_tau": mean[1],
            "kendall_tau_std": spread[1],
            "bias_share": average_labels(self.bias, self.biases, "micro"),
        }

    def l1_per_label(self) -> Tensor:
        """Mean |sum(map) - logit| of each label (L,), NaN for labels without any (all processes must ask together)."""
        with synced(self):
            return average_labels(self.gap, self.gaps, "none")

    def bias_share_per_label(self) -> Tensor:
        """Mean bias share of each label (L,), NaN for labels without any (all processes must ask together)."""
        with synced(self):
            return average_labels(self.bias, self.biases, "none")

    def undefined_rate(self) -> dict[str, Tensor]:
        """What has no value (all processes must ask together); NaN where nothing was counted.

        Returns:
            `"l1"` and `"bias_share"`, as shares of the computed maps; `"kendall_tau"`, as a share of the cases with
            a computed map.
        """
        with synced(self):
            whole, cases = self.counted, self.cases
            lost = {"l1": whole - self.gaps, "bias_share": whole - self.biases}
            rates = {name: average_labels(value.to(sum_dtype()), whole, "micro") for name, value in lost.items()}
            return rates | {"kendall_tau": average_labels(cases - self.moments[1, 0], cases, "none")}

    @property
    def pairs(self) -> Tensor:
        """Computed maps per label (L,), undefined ones included (all processes must ask together)."""
        with synced(self):
            return self.counted.clone()


def sum_to_score(maps: Tensor, logits: Tensor) -> SumAgreement:
    """Agreement of the sum of each map with its logit, per case and per pair; functional twin of `SumToScore`.

    Args:
        maps: (B, L, *S') signed maps, NaN in every cell where not computed.
        logits: (B, L).

    Returns:
        Values per case and per pair, NaN where undefined.

    Raises:
        InputError: Shapes or types break the contract.

    Example:
        >>> import torch
        >>> sum_to_score(torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), torch.tensor([[3.5, 4.0]])).kendall_tau
        tensor([-1.], dtype=torch.float64)
    """
    return _agreement(maps, logits)


def kendall_tau(first: Tensor, second: Tensor, known: Tensor) -> Tensor:
    """Kendall's tau-b along the last axis, (concordant - discordant) / sqrt(untied in one x untied in the other).

    Args:
        first: (C, L) finite where known.
        second: (C, L) finite where known.
        known: (C, L) bool: entries that take part.

    Returns:
        (C,) in [-1, 1], NaN where fewer than two entries take part or one side is constant.

    Example:
        >>> import torch
        >>> kendall_tau(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3).bool())
        tensor([0.3333], dtype=torch.float64)
    """
    taus = [first.new_empty(0, dtype=sum_dtype())]
    step = max(1, _SIGNS // max(1, first.shape[1] ** 2))
    for a, b, use in zip(*(torch.split(t, step) for t in (first, second, known)), strict=True):
        both = use[:, :, None] & use[:, None, :]
        signs = [_signs(side).masked_fill(~both, 0).to(sum_dtype()) for side in (a, b)]
        untied = [side.square().sum(dim=(1, 2)) for side in signs]
        agreed = (signs[0] * signs[1]).sum(dim=(1, 2))
        taus.append(agreed / (untied[0] * untied[1]).sqrt())
    return torch.cat(taus)


def _signs(values: Tensor) -> Tensor:
    """(C, L, L) int8: is entry i above (1), below (-1) or level with (0) entry j?"""
    left, right = values[:, :, None], values[:, None, :]
    return (left > right).to(torch.int8) - (left < right).to(torch.int8)


def _agreement(maps: Tensor, logits: Tensor, num_labels: int | None = None) -> SumAgreement:
    _check(maps, logits, num_labels)
    flat = maps.detach().as_subclass(Tensor).flatten(2)
    dtype = sum_dtype()
    total, score = flat.sum(dim=2, dtype=dtype), logits.detach().as_subclass(Tensor).to(dtype)
    # A finite sum has finite terms: only the others need a second look.
    computed, odd = torch.ones_like(total, dtype=torch.bool), ~total.isfinite()
    computed[odd] = ~flat[odd].isnan().all(dim=1)
    known = ~odd & score.isfinite()
    gap = torch.where(known, (total - score).abs(), torch.nan)
    # Halved, so that two huge numbers do not overflow; 0/0 is NaN of itself.
    size = total.abs() / 2 + score.abs() / 2
    return SumAgreement(
        l1=gap.nanmean(dim=1),
        kendall_tau=kendall_tau(total, score, known),
        gap=gap,
        bias_share=torch.where(known, (score / 2 - total / 2) / size, torch.nan),
        computed=computed,
    )


def _moments(values: Tensor) -> Tensor:
    """Number, mean and sum of squared deviations of the values (B,) that are not NaN, (3,)."""
    values = values[~values.isnan()]
    if not len(values):
        return values.new_zeros(3)
    mean = values.mean()
    return torch.stack([mean.new_tensor(len(values)), mean, (values - mean).square().sum()])


def _merge(parts: Tensor) -> Tensor:
    """Moments of the union of n sets, (n, 2, 3) -> (2, 3) (Chan et al., 1979)."""
    number, mean, square = parts.unbind(-1)
    together = number.sum(dim=0)
    middle = (number * mean).sum(dim=0) / together.clamp(min=1)
    spread = (square + number * (mean - middle).square()).sum(dim=0)
    return torch.stack([together, middle, spread], dim=-1)


def _check(maps: Tensor, logits: Tensor, num_labels: int | None) -> None:
    if maps.ndim < 3 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise InputError(
            f"expected maps of shape (B, L, *S) in floating point with at least one cell, "
            f"got {tuple(maps.shape)} in {maps.dtype}: pass what explain() or tap.maps() returned"
        )
    if logits.shape != maps.shape[:2] or not logits.is_floating_point():
        raise InputError(
            f"expected logits of shape (B, L) = {tuple(maps.shape[:2])} in floating point, "
            f"got {tuple(logits.shape)} in {logits.dtype}: pass the outputs of the same forward, before any sigmoid"
        )
    if num_labels is not None and maps.shape[1] != num_labels:
        raise InputError(
            f"this metric was made for {num_labels} labels, got {maps.shape[1]}: "
            "set num_labels to the number of network outputs"
        )
