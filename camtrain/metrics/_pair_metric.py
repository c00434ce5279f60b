"""What every score over (map, allowed region) pairs shares: counts, averages over labels, sums over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from camtrain._errors import InputError, nearest
from camtrain.metrics._pairs import Pairs

Average = Literal["none", "macro", "micro"]


class PairMetric(Metric, ABC):
    """Base of the scores that judge maps against allowed regions; the extension point of this room.

    A new score is one file with two functions and a class: a private function from `Pairs` to scores (P,), NaN where
    undefined; the public twin that spreads them to (B, L); and a subclass that records them in `update` and hands out
    its sums in `_totals`.

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

    def _record(self, name: str, score: Tensor, pairs: Pairs) -> None:
        """Count the pairs, and add their defined scores (P,) or (P, T) to the sum called `name`."""
        score = pairs.mark(score)
        lost = score.isnan() if score.ndim == 1 else score[:, 0].isnan()
        # Never in place: Lightning may reset a metric under inference mode, whose tensors refuse it later.
        self.counted = self.counted.index_add(0, pairs.label, torch.ones_like(pairs.label))
        self.undefined = self.undefined.index_add(0, pairs.label, lost.long())
        self._accumulate(name, score.nan_to_num(0.0), pairs)

    def _accumulate(self, name: str, values: Tensor, pairs: Pairs) -> None:
        total: Tensor = getattr(self, name)
        setattr(self, name, total.index_add(0, pairs.label, values.to(total.dtype)))


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
        average: See `PairMetric`.

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
