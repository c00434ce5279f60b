"""What the scores per label share: counts, averages over labels and groups of them, sums over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from camtrain._errors import InputError, nearest
from camtrain.metrics._pairs import Pairs, check_label, select_pairs

Average = Literal["none", "macro", "micro"]


class LabelMetric(Metric, ABC):
    """Base of the scores that are sums per label: what is counted, what is undefined, and every average of them.

    Args:
        num_labels: L.
        average: `"none"` (L,), `"macro"` the mean over the labels that have a score, `"micro"` the mean over all pairs.
        settings: Numbers that tell two differently configured metrics of one class apart.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    counted: Tensor
    undefined: Tensor

    def __init__(
        self, num_labels: int, average: Average = "macro", settings: Sequence[float] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_labels = check_num_labels(num_labels)
        self.average = check_average(average)
        for name in ("counted", "undefined"):
            self.add_state(name, torch.zeros(num_labels, dtype=torch.long), dist_reduce_fx="sum")
        # MetricCollection merges metrics whose states are equal after the first batch, and a batch without any pair
        # leaves zeros in all of them. Sums named after their metric, and this constant, keep different scores apart.
        self.add_state("settings", torch.tensor(settings, dtype=sum_dtype()), dist_reduce_fx="max")

    @abstractmethod
    def _totals(self) -> tuple[Tensor, Tensor]:
        """Per label: the sum of the defined scores (L,), and the number of pairs it stands for (L,)."""

    def compute(self) -> Tensor:
        """The score with the averaging given at construction; NaN where no pair has a score."""
        return average_labels(*self._totals(), self.average)

    def averaged(self, average: Average) -> Tensor:
        """The score with another averaging, from the same states (all processes must call it together).

        Args:
            average: `"none"` gives (L,) even for one label, where `compute()` is squeezed by torchmetrics.

        Returns:
            (L,) or a scalar; NaN where no pair has a score.
        """
        with synced(self):
            return average_labels(*self._totals(), check_average(average))

    def grouped(self, groups: Mapping[str, Sequence[int]], average: Average = "micro") -> dict[str, Tensor]:
        """The score of groups of labels, from the same states (all processes must call it together).

        Args:
            groups: Name of a group -> its columns. Groups may share labels.
            average: Within a group; `"none"` gives one value per column, in the order asked for.

        Returns:
            Name of a group -> scalar, or (columns,) for `"none"`; NaN where no pair of the group has a score.

        Raises:
            InputError: An empty group, or a column that does not exist or is named twice.
        """
        for name, columns in groups.items():
            _check_group(name, columns, self.num_labels)
        how = check_average(average)
        with synced(self):
            total, count = self._totals()
        return {name: average_labels(total[list(at)], count[list(at)], how) for name, at in groups.items()}

    def undefined_rate(self, average: Average | None = None) -> Tensor:
        """Share of the counted pairs whose score is undefined (all processes must call it together).

        Args:
            average: None takes the averaging of the metric.

        Returns:
            (L,) or a scalar; NaN where no pair was counted.
        """
        with synced(self):
            return average_labels(self.undefined.to(sum_dtype()), self.counted, check_average(average or self.average))

    @property
    def pairs(self) -> Tensor:
        """Counted pairs per label (L,), undefined ones included (all processes must ask together)."""
        with synced(self):
            return self.counted.clone()

    def _add_sum(self, name: str, *size: int) -> None:
        """Register a sum (L, *size) over pairs."""
        default = torch.zeros(self.num_labels, *size, dtype=sum_dtype())
        self.add_state(name, default, dist_reduce_fx="sum")

    def _count(self, lost: Tensor, label: Tensor) -> None:
        """Count pairs: `lost` (P,) bool tells the undefined ones, `label` (P,) their columns."""
        # Never in place: Lightning may reset a metric under inference mode, whose tensors refuse it later.
        self.counted = self.counted.index_add(0, label, torch.ones_like(label))
        self.undefined = self.undefined.index_add(0, label, lost.long())

    def _sum_up(self, name: str, values: Tensor, label: Tensor) -> None:
        """Add `values` (P, *size), none of them NaN, to the sum called `name`."""
        total: Tensor = getattr(self, name)
        setattr(self, name, total.index_add(0, label, values.to(total.dtype)))


class PairMetric(LabelMetric, ABC):
    """Base of the scores that judge maps against allowed regions; the extension point of this room.

    A new score is one file with two functions and a class: a private function from `Pairs` to scores (P,), NaN where
    undefined; the public twin that spreads them to (B, L); and a subclass that records them in `_add` and hands out
    its sums in `_totals`. The arguments are those of `LabelMetric`.
    """

    def update(self, maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract.
        """
        self._add(select_pairs(maps, allowed, label, has_organs, self.num_labels))

    @torch.no_grad()
    def update_pairs(self, pairs: Pairs) -> None:
        """Add the pairs of one batch, which `select_pairs` has chosen once for several metrics."""
        self._update_count += 1
        self._computed = None
        self._add(pairs)

    @abstractmethod
    def _add(self, pairs: Pairs) -> None:
        """Record the scores of these pairs."""

    def _record(self, name: str, score: Tensor, pairs: Pairs) -> None:
        """Count the pairs, and add their defined scores (P,) or (P, T) to the sum called `name`."""
        score = pairs.mark(score)
        self._count(score.isnan() if score.ndim == 1 else score[:, 0].isnan(), pairs.label)
        self._sum_up(name, score.nan_to_num(0.0), pairs.label)


class ChanceMetric(PairMetric, ABC):
    """Base of the scores for which a map that knows nothing gets the region's share of the grid."""

    allowed_share: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("allowed_share")

    def chance(self, average: Average | None = None) -> Tensor:
        """Mean allowed share of the grid over the counted pairs: what an evenly spread or randomly ordered map scores.

        Args:
            average: None takes the averaging of the metric.

        Returns:
            (L,) or a scalar; NaN where no pair was counted. All processes must call it together.
        """
        with synced(self):
            return average_labels(self.allowed_share, self.counted, check_average(average or self.average))

    def _record(self, name: str, score: Tensor, pairs: Pairs) -> None:
        super()._record(name, score, pairs)
        self._sum_up("allowed_share", pairs.allowed.sum(dim=1).to(sum_dtype()) / pairs.allowed.shape[1], pairs.label)


@contextmanager
def synced(metric: Metric) -> Iterator[None]:
    """Join the states of all processes inside the block, as torchmetrics does around `compute` alone."""
    already = metric._is_synced
    with metric.sync_context(dist_sync_fn=metric.dist_sync_fn, should_sync=not already, should_unsync=not already):
        yield


def average_labels(total: Tensor, count: Tensor, average: Average) -> Tensor:
    """Turn per-label sums into a score.

    Args:
        total: (L,) sum of the defined scores.
        count: (L,) number of pairs behind each sum.
        average: See `LabelMetric`.

    Returns:
        (L,) for `"none"`, else a scalar; NaN where the count is 0.
    """
    if average == "micro":
        total, count = total.sum(), count.sum()
    mean = torch.where(count > 0, total / count.clamp(min=1), torch.nan)
    return mean.nanmean() if average == "macro" else mean


def sum_dtype() -> torch.dtype:
    """float64, or float32 on machines with an Apple GPU, which has no float64."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


def check_average(average: str) -> Average:
    """`average` if it is one of the known words.

    Raises:
        InputError: It is not.
    """
    known = get_args(Average)
    for word in known:
        if word == average:
            found: Average = word
            return found
    raise InputError(f"expected average none, macro or micro, got {average!r}{nearest(str(average), known)}")


def check_num_labels(num_labels: int) -> int:
    """`num_labels` if it is a positive integer.

    Raises:
        InputError: It is not.
    """
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
        raise InputError(f"expected num_labels as a positive integer, got {num_labels!r}: the number of outputs")
    return num_labels


def counted_pairs(computed: Tensor, label: Tensor | None, num_labels: int | None = None) -> Tensor:
    """Which pairs a score without allowed regions counts.

    Args:
        computed: (B, L) bool.
        label: (B, L), NaN = unknown: only present labels count. None: all count.
        num_labels: The L that the metric was made for.

    Returns:
        (B, L) bool.

    Raises:
        InputError: Wrong labels, or another number of them.
    """
    shape = tuple(computed.shape)
    # Without truths there is nothing to count by, but the number of labels has to fit all the same.
    check_label(torch.ones(shape) if label is None else label, shape, num_labels)
    return computed if label is None else computed & (label == 1).to(computed.device)


def _check_group(name: str, columns: Sequence[int], num_labels: int) -> None:
    if not len(columns):
        raise InputError(f"group {name!r} has no labels: name at least one column, or leave the group out")
    for at in columns:
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < num_labels:
            raise InputError(
                f"group {name!r} names column {at!r}, expected integers in 0..{num_labels - 1}: "
                "the positions of its labels among the outputs"
            )
    if len(set(columns)) < len(columns):
        raise InputError(f"group {name!r} names a column twice in {list(columns)}: each label counts once in a group")
