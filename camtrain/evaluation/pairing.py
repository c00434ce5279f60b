"""Bringing the numbers of two models onto the same cases and labels, so that they can be compared pair by pair."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from scipy.stats import rankdata

from camtrain._errors import InputError, nearest
from camtrain.evaluation.intervals import Average, available, defined, fill_macro, raw_rows, rows_of_sums
from camtrain.evaluation.resampling import Floats, Ints, Units
from camtrain.evaluation.score_statistics import AveragePrecision, ShortcutRisk
from camtrain.evaluation.statistics import AUROC, Statistic, SumStatistic, counted, each_array

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Scored(Generic[K]):
    """What was measured of one model.

    Attributes:
        ids: Name of each case (n).
        labels: Name of each label (L).
        statistics: Key -> statistic (n, L); (n, 1) for a number of the case and not of a label, which has no averages.
        patients: Patient of each case, None = unknown; may be known to one of two models only.
    """

    ids: Sequence[str]
    labels: Sequence[str]
    statistics: Mapping[K, Statistic]
    patients: Sequence[str | None] | None = None


@dataclass(frozen=True, eq=False)
class Pair:
    """One statistic of two models over the pairs of case and label that both have.

    Attributes:
        a: Of the first model.
        b: Of the second.
        lost: (L,) pairs that only one of them has.
        averages: Those that the statistic has.
    """

    a: Statistic
    b: Statistic
    lost: Ints
    averages: Mapping[str, Average]

    @staticmethod
    def of(a: Statistic, b: Statistic, averages: Mapping[str, Average], key: object) -> Pair:
        """Both statistics without the pairs that one of them lacks.

        Raises:
            InputError: Other truths, another kind of statistic or another floor.
        """
        _check_alike(a, b, key)
        in_a, in_b = counted(a), counted(b)
        both = in_a & in_b
        kept_a, kept_b = (each_array(lambda array: np.where(both, array, np.nan), s) for s in (a, b))
        # An area knows ranks only, so that a swap of raw scores between two scales would test the scales.
        kept_a, kept_b = (_ranked(s) for s in (kept_a, kept_b))
        return Pair(kept_a, kept_b, (in_a ^ in_b).sum(axis=0), available(a, averages))

    @property
    def rows(self) -> int:
        """L + A."""
        return len(self.lost) + len(self.averages)

    @cached_property
    def values(self) -> tuple[Floats, Floats, Floats]:
        """(L + A,) of a, of b, and b - a; macro averages are over the labels that both have a value for."""
        every = np.ones((1, counted(self.a).shape[0]))
        a, b = raw_rows(self.a, every, self.averages), raw_rows(self.b, every, self.averages)
        labels = defined(a[0] + b[0], self.averages)
        # The mean of the differences is the difference of the means, and stays right for labels undefined in a draw.
        difference = fill_macro(b - a, self.averages, labels)
        a, b = fill_macro(a, self.averages, labels), fill_macro(b, self.averages, labels)
        return a[0], b[0], difference[0]

    def differences(self, weights: Floats) -> Floats:
        """(R, n) weights of cases -> (R, L + A) b - a."""
        return self._filled(raw_rows(self.b, weights, self.averages) - raw_rows(self.a, weights, self.averages))

    def swapped(self, swaps: Floats) -> Floats:
        """(R, n), 1 = the two models' numbers of this case change places -> (R, L + A) b - a."""
        if isinstance(self.a, SumStatistic) and isinstance(self.b, SumStatistic):
            moved = swaps @ (self.b.columns - self.a.columns)
            sums = self.a.columns.sum(axis=0) + moved, self.b.columns.sum(axis=0) - moved
            a, b = (rows_of_sums(self.a, each, self.averages) for each in sums)
            return self._filled(b - a)
        # A swap chooses n of the 2n rows of both models: weights 0 and 1.
        first, second = np.concatenate([1 - swaps, swaps], axis=1), np.concatenate([swaps, 1 - swaps], axis=1)
        if isinstance(self._stacked, AUROC):
            return self._filled(self._with_averages(_area_differences(self._stacked, first)))
        return self._filled(self._with_averages(self._stacked(second) - self._stacked(first)))

    def _with_averages(self, values: Floats) -> Floats:
        """Columns for the macro averages beside those of the labels."""
        return np.concatenate([values, np.full((len(values), len(self.averages)), np.nan)], axis=1)

    @cached_property
    def _stacked(self) -> Statistic:
        return each_array(lambda *arrays: np.concatenate(arrays), self.a, self.b)

    def _filled(self, rows: Floats) -> Floats:
        return fill_macro(rows, self.averages, defined(self.values[2], self.averages))


def _ranked(statistic: Statistic) -> Statistic:
    """An area of mid-ranks, which is the same; any other statistic as it is."""
    if isinstance(statistic, ShortcutRisk):
        kept = np.where(counted(statistic), statistic.after, np.nan)
        return replace(statistic, after=rankdata(kept, axis=0, nan_policy="omit"))
    if not isinstance(statistic, AUROC | AveragePrecision):
        return statistic
    kept = np.where(counted(statistic), np.asarray(statistic.scores), np.nan)
    return type(statistic)(rankdata(kept, axis=0, nan_policy="omit"), statistic.truth)


def _area_differences(stacked: AUROC, first: Floats) -> Floats:
    """Area over the rows that `first` (R, 2n) leaves minus area over those that it chooses -> (R, L).

    With K[p, q] = 1 where present row p scores above absent row q (ties half) and weights w of the chosen rows, the
    areas are w' K w and (1 - w)' K (1 - w), over the same number of pairs: what is quadratic in w cancels, and the
    rest is a sum over rows. No sorting per swap is needed.
    """
    present, absent = (stratum.sum(axis=0) / 2 for stratum in stacked.strata)
    wins: Floats = stacked.wins.sum(axis=0) / 2 - first @ stacked.wins
    pairs = present * absent
    found: Floats = np.divide(wins, pairs, out=np.full(wins.shape, np.nan), where=pairs > 0)
    return found


def aligned(a: Scored[K], b: Scored[K]) -> tuple[list[str], Units, dict[K, tuple[Statistic, Statistic]]]:
    """Both models on the cases that both have, in the first one's order, with the labels in the first one's order.

    Returns:
        The shared ids, their units, and the two statistics of every key that both have.

    Raises:
        InputError: No case, label set or key in common, other patients of the same case, repeated ids, or arrays that
            do not fit ids and labels.

    Example:
        >>> from camtrain.evaluation.statistics import Mean
        >>> first = Scored(["x", "y"], ["nodule", "mass"], {"iou": Mean([[1, 2], [3, 4]])})
        >>> second = Scored(["y", "z"], ["mass", "nodule"], {"iou": Mean([[5, 6], [7, 8]])})
        >>> ids, units, pairs = aligned(first, second)
        >>> ids, pairs["iou"][0].values, pairs["iou"][1].values
        (['y'], array([[3., 4.]]), array([[6., 5.]]))
    """
    for which, scored in (("first", a), ("second", b)):
        _check_fits(scored, which)
    _check_labels(a.labels, b.labels)
    keys = [key for key in a.statistics if key in b.statistics]
    if not keys:
        raise InputError(
            f"expected a measure that both models have; the first has {_some(a.statistics)}, "
            f"the second {_some(b.statistics)}: evaluate both with the same methods, layers and measures"
        )
    row_of = {name: row for row, name in enumerate(b.ids)}
    rows_a = [row for row, name in enumerate(a.ids) if name in row_of]
    ids = [a.ids[row] for row in rows_a]
    if not ids:
        raise InputError(
            f"expected cases that both models have scored, got none in common: the first has {_some(a.ids)}, "
            f"the second {_some(b.ids)}; evaluate both on the same data"
        )
    rows_b = [row_of[name] for name in ids]
    columns_b = np.array([list(b.labels).index(name) for name in a.labels])

    def of_a(array: Floats) -> Floats:
        return array[rows_a]

    def of_b(array: Floats) -> Floats:
        return array[rows_b][:, columns_b if array.shape[1] == len(columns_b) else slice(None)]

    pairs = {key: (each_array(of_a, a.statistics[key]), each_array(of_b, b.statistics[key])) for key in keys}
    return ids, Units.of(ids, _patients(a, rows_a, b, rows_b)), pairs


def _patients(a: Scored[Any], rows_a: list[int], b: Scored[Any], rows_b: list[int]) -> list[str | None]:
    """The patient of each shared case, from whichever model knows it."""
    found = []
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        of_a = a.patients[row_a] if a.patients is not None else None
        of_b = b.patients[row_b] if b.patients is not None else None
        if of_a and of_b and of_a != of_b:
            raise InputError(
                f"case {a.ids[row_a]!r} belongs to patient {of_a!r} in the first evaluation and to {of_b!r} in the "
                "second: evaluate both on the same data"
            )
        found.append(of_a or of_b)
    return found


def _check_fits(scored: Scored[Any], which: str) -> None:
    for what, names in (("case", scored.ids), ("label", scored.labels)):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError(f"{what} {name!r} stands twice in the {which} evaluation: keep one of them")
            seen.add(name)
    if scored.patients is not None and len(scored.patients) != len(scored.ids):
        raise InputError(
            f"expected one patient for each of {len(scored.ids)} cases of the {which} evaluation, "
            f"got {len(scored.patients)}: use None for unknown"
        )
    for key, statistic in scored.statistics.items():
        shape = statistic.strata[0].shape
        if shape[0] != len(scored.ids) or shape[1] not in (1, len(scored.labels)):
            raise InputError(
                f"expected {len(scored.ids)} cases x {len(scored.labels)} labels for {key!r} of the {which} "
                f"evaluation, got {shape[0]} x {shape[1]}"
            )


def _check_labels(first: Sequence[str], second: Sequence[str]) -> None:
    missing = [name for name in first if name not in set(second)]
    extra = [name for name in second if name not in set(first)]
    if not missing and not extra:
        return
    said = [f"only the {which} has {_some(names)}" for which, names in (("first", missing), ("second", extra)) if names]
    hint = nearest(missing[0], extra) if missing and extra else ""
    raise InputError(
        f"expected two models with the same labels, but {' and '.join(said)}{hint}: compare models of the same labels"
    )


def _check_alike(a: Statistic, b: Statistic, key: object) -> None:
    if type(a) is not type(b) or counted(a).shape != counted(b).shape:
        first, second = (f"{type(s).__name__} of {counted(s).shape[1]} columns" for s in (a, b))
        raise InputError(f"{key!r} is {first} in the first evaluation and {second} in the second: evaluate both alike")
    if getattr(a, "floor", None) != getattr(b, "floor", None):
        raise InputError(f"{key!r} has another floor in the second evaluation: compare under the same one")
    truths = getattr(a, "truth", None), getattr(b, "truth", None)
    if truths[0] is not None and truths[1] is not None:
        known = ~np.isnan(truths[0]) & ~np.isnan(truths[1])
        odd = int((known & (truths[0] != truths[1])).sum())
        if odd:
            raise InputError(
                f"{odd} pairs of case and label have another truth in the second evaluation than in the first "
                f"({key!r}): evaluate both with the same label file"
            )


def _some(names: Iterable[object], most: int = 5) -> str:
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) + more) or "none"
