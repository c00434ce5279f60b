"""ShortcutReliance: does the network use what lies outside the organs of a label?"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from camtrain._errors import InputError
from camtrain._label_rates import add_block
from camtrain.metrics._pair_metric import (
    Average,
    average_labels,
    check_average,
    check_num_labels,
    sum_dtype,
    synced,
)
from camtrain.metrics._pairs import check_label
from camtrain.metrics.label_auroc import label_auroc

FLOOR = 0.02
"""A network that moves less than this under both replacements says nothing, and is not called honest for it."""


class Reliance(NamedTuple):
    """How far the probabilities of each label move when a part of the image is replaced.

    Attributes:
        outside_effect: (L,) mean absolute change when all but the label's organs is replaced; NaN where not measured.
        inside_effect: (L,) the same when the organs are replaced.
        share: (L,) outside / (outside + inside); NaN where both effects are under the floor, or not measured.
    """

    outside_effect: Tensor
    inside_effect: Tensor
    share: Tensor


class ShortcutReliance(Metric):
    """Share of a network's reaction that comes from outside the label's organs; lower is better.

    Maps say where cells look, and a cell may have seen the whole scan. This measure asks the network itself: replace
    everything outside the label's organs, then everything inside, and see how far the probability moves.

        effect = mean over {present, absent} of the mean over those cases of |probability after - before|
        share = outside_effect / (outside_effect + inside_effect)

    Present and absent cases weigh the same, so that the effect of a rare finding is not that of its absence; a class
    without a measured case is left out, and the other one stands alone. A label whose two effects are both under
    `floor` is undefined and counted by `undefined_rate()`: one effect alone can be cheated by a network that says
    nothing. Effects depend on what the replacement is: report it, and use more than one.

    `risk()` takes in besides whether the network still tells present from absent once the outside is replaced (these
    probabilities are kept of every case, as float32):

        risk = mean of share and 1 - AUROC with the outside replaced; the latter alone where there is no share

    Averaged over cases of the opposite truth and a blur as replacements it ranked the networks of
    docs/results/shortcut_study.md best as a turned shortcut did.

    As input to `update`: before, outside, inside (B, L) probabilities of the untouched image, with everything outside
    replaced and with everything inside replaced; NaN in outside or inside = this pair was not measured (then neither
    effect counts it, so that both stand for the same cases); label (B, L), NaN = unknown, does not count.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (mean over the labels that have a value) or `"micro"` (all pairs pooled as if they
            were of one label).
        floor: Smallest effect, of which a label needs at least one.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: No number of labels, no averaging, or a floor outside 0..1.

    Example:
        >>> import torch
        >>> metric = ShortcutReliance(num_labels=2, average="none")
        >>> before = torch.tensor([[0.75, 0.5], [0.25, 0.5]])
        >>> outside = torch.tensor([[0.25, 0.5], [0.5, 0.5]])
        >>> inside = torch.tensor([[0.5, 0.5], [0.25, 0.5]])
        >>> metric.update(before, outside, inside, label=torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        >>> metric.compute()["share"]
        tensor([0.7500,    nan], dtype=torch.float64)
        >>> metric.undefined_rate()
        tensor([0., 1.], dtype=torch.float64)
        >>> metric.risk("none")  # present scores below absent once the outside is gone; the second ties
        tensor([0.8750, 0.5000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    outside_moved: Tensor
    inside_moved: Tensor
    measured: Tensor
    known: Tensor
    scores: list[Tensor]
    truths: list[Tensor]

    def __init__(self, num_labels: int, average: Average = "macro", floor: float = FLOOR, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels = check_num_labels(num_labels)
        self.average = check_average(average)
        self.floor = _check_floor(floor)
        # One column per truth: absent, present.
        for name in ("outside_moved", "inside_moved"):
            self.add_state(name, torch.zeros(num_labels, 2, dtype=sum_dtype()), dist_reduce_fx="sum")
        for name in ("measured", "known"):
            self.add_state(name, torch.zeros(num_labels, 2, dtype=torch.long), dist_reduce_fx="sum")
        for name in ("scores", "truths"):
            self.add_state(name, [], dist_reduce_fx="cat")
        # Keeps metrics of different floors apart in a MetricCollection, which merges those of equal states.
        self.add_state("settings", torch.tensor([self.floor], dtype=sum_dtype()), dist_reduce_fx="max")

    def update(self, before: Tensor, outside: Tensor, inside: Tensor, label: Tensor) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types, label values or probabilities break the contract.
        """
        sums = _sums(before, outside, inside, label, self.num_labels)
        # Never in place: Lightning may reset a metric under inference mode, whose tensors refuse it later.
        self.outside_moved = self.outside_moved + sums.outside
        self.inside_moved = self.inside_moved + sums.inside
        self.measured = self.measured + sums.measured
        self.known = self.known + sums.known
        # Flat, because torchmetrics lets a process without data take part with an empty flat tensor of float32.
        measured = torch.where(inside.isnan(), torch.nan, outside)
        add_block(self.scores, measured.detach().flatten().to(self.device, torch.float32, copy=True))
        add_block(self.truths, label.detach().flatten().to(self.device, torch.float32, copy=True))

    def compute(self) -> dict[str, Tensor]:
        """`outside_effect`, `inside_effect` and `share` with the averaging given at construction."""
        return {name: _averaged(value, self.average) for name, value in self._reliance(self.average)._asdict().items()}

    def per_label(self) -> Reliance:
        """Both effects and the share of every label, (L,) each (all processes must call it together)."""
        with synced(self):
            return self._reliance("none")

    def averaged(self, average: Average) -> Tensor:
        """The share with another averaging (all processes must call it together).

        Args:
            average: `"none"` gives (L,) even for one label, where `compute()` may be squeezed by torchmetrics.

        Returns:
            (L,) or a scalar; NaN where no label has a share.
        """
        with synced(self):
            return _averaged(self._reliance(check_average(average)).share, average)

    def risk(self, average: Literal["none", "macro"] = "macro") -> Tensor:
        """Mean of share and 1 - AUROC with the outside replaced (all processes must call it together).

        Args:
            average: `"none"` gives (L,), `"macro"` the mean over the labels that have a value; areas of several labels
                cannot be pooled.

        Returns:
            (L,) or a scalar; NaN where present or absent cases were not measured.

        Raises:
            InputError: Another averaging.
        """
        if average not in ("none", "macro"):
            raise InputError(
                f"expected average as 'none' or 'macro', got {average!r}: areas of labels cannot be pooled"
            )
        with synced(self):
            share = self._reliance("none").share
            flat = [dim_zero_cat(state) if len(state) else share.new_zeros(0) for state in (self.scores, self.truths)]
        scores, truths = (each.reshape(-1, self.num_labels) for each in flat)
        # A pair that was not measured is no case of the area; only a score that is NaN of itself makes it undefined.
        lost = 1 - label_auroc(scores.nan_to_num(0.0), torch.where(scores.isnan(), torch.nan, truths))
        return _averaged(torch.where(share.isnan(), lost, (share + lost) / 2), average)

    def undefined_rate(self, average: Average | None = None) -> Tensor:
        """Share of the measured labels whose two effects are both under the floor (all processes together).

        Args:
            average: `"none"` gives 0 or 1 per label (NaN: not measured), `"macro"` and `"micro"` the mean over the
                measured labels; None takes the averaging of the metric.

        Returns:
            (L,) or a scalar; NaN where nothing was measured.
        """
        average = check_average(average or self.average)
        with synced(self):
            found = self._reliance("none")
        undefined = torch.where(found.outside_effect.isnan(), torch.nan, found.share.isnan().to(sum_dtype()))
        return undefined if average == "none" else undefined.nanmean()

    def unmeasured_rate(self, average: Average | None = None) -> Tensor:
        """Share of the known pairs that were not measured (all processes must call it together).

        Args:
            average: None takes the averaging of the metric.

        Returns:
            (L,) or a scalar; NaN where no label is known.
        """
        with synced(self):
            missing = (self.known - self.measured).sum(dim=1).to(sum_dtype())
            return average_labels(missing, self.known.sum(dim=1), check_average(average or self.average))

    @property
    def pairs(self) -> Tensor:
        """Measured pairs per label (L,) (all processes must ask together)."""
        with synced(self):
            return self.measured.sum(dim=1)

    def _reliance(self, average: Average) -> Reliance:
        """(L,), or (1,) for all pairs pooled."""
        sums = _Sums(self.outside_moved, self.inside_moved, self.measured, self.known)
        if average == "micro":
            sums = _Sums(*(t.sum(dim=0, keepdim=True) for t in sums))
        return _effects(sums, self.floor)


def shortcut_reliance(before: Tensor, outside: Tensor, inside: Tensor, label: Tensor, floor: float = FLOOR) -> Reliance:
    """Effects and share of each label; functional twin of `ShortcutReliance`.

    Args:
        before: (B, L) probabilities of the untouched image.
        outside: (B, L) with everything outside the label's organs replaced, NaN = not measured.
        inside: (B, L) with everything inside replaced, NaN = not measured.
        label: (B, L), NaN = unknown.
        floor: Smallest effect, of which a label needs at least one to have a share.

    Returns:
        `outside_effect`, `inside_effect` and `share`, (L,) each.

    Raises:
        InputError: Shapes, types, label values or probabilities break the contract.

    Example:
        >>> import torch
        >>> before, label = torch.tensor([[0.875]]), torch.tensor([[1.0]])
        >>> shortcut_reliance(before, torch.tensor([[0.125]]), torch.tensor([[0.625]]), label).share
        tensor([0.7500], dtype=torch.float64)
    """
    return _effects(_sums(before, outside, inside, label), _check_floor(floor))


class _Sums(NamedTuple):
    """Per label and truth (L, 2), absent first: sums of absolute changes, measured pairs, known pairs."""

    outside: Tensor
    inside: Tensor
    measured: Tensor
    known: Tensor


def _sums(before: Tensor, outside: Tensor, inside: Tensor, label: Tensor, num_labels: int | None = None) -> _Sums:
    _check(before, outside, inside, label, num_labels)
    label = label.to(before.device)
    # Differences of half-precision probabilities, and sums over many cases, are exact enough in float64 only.
    start, without_outside, without_inside = (t.detach().to(sum_dtype()) for t in (before, outside, inside))
    moved = [(after.to(start.device) - start).abs() for after in (without_outside, without_inside)]
    known = torch.stack([label == 0, label == 1], dim=2)
    measured = known & ~(moved[0] + moved[1]).isnan()[:, :, None]
    totals = [torch.where(measured, m[:, :, None], 0.0).sum(dim=0) for m in moved]
    return _Sums(totals[0], totals[1], measured.sum(dim=0), known.sum(dim=0))


def _effects(sums: _Sums, floor: float) -> Reliance:
    # The mean over the classes that have a measured case.
    outside, inside = (
        torch.where(sums.measured > 0, total / sums.measured.clamp(min=1), torch.nan).nanmean(dim=1)
        for total in (sums.outside, sums.inside)
    )
    moves = ((outside >= floor) | (inside >= floor)) & (outside + inside > 0)
    return Reliance(outside, inside, torch.where(moves, outside / (outside + inside), torch.nan))


def _averaged(values: Tensor, average: Average) -> Tensor:
    """(L,) as it is, or the mean of those that have a value; pooled sums have one entry."""
    return values if average == "none" else values.nanmean()


def _check_floor(floor: float) -> float:
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise InputError(f"expected floor as a change of probability from 0 to 1, got {floor!r}: take {FLOOR}")
    return float(floor)


def _check(before: Tensor, outside: Tensor, inside: Tensor, label: Tensor, num_labels: int | None) -> None:
    named = {"before": before, "outside": outside, "inside": inside}
    for name, value in named.items():
        if value.ndim != 2 or not value.is_floating_point() or value.shape != before.shape:
            raise InputError(
                f"expected {name} as probabilities (B, L) in floating point, all three of one shape, got "
                f"{tuple(value.shape)} in {value.dtype} (before is {tuple(before.shape)})"
            )
        odd = value[(value < 0) | (value > 1)]
        if odd.numel():
            raise InputError(
                f"expected probabilities from 0 to 1 in {name}, got {odd[0].item():g}: pass sigmoid(logits)"
            )
    if bool(before.isnan().any()):
        raise InputError("before holds NaN: every image has a probability, only outside and inside may be unmeasured")
    check_label(label, (before.shape[0], before.shape[1]), num_labels)
