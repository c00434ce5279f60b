"""Two models on the same cases: paired differences with intervals, and permutation tests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from camtrain.evaluation.intervals import (
    AVERAGES,
    Average,
    Progress,
    check_level,
    columns_of,
    counts,
    defined,
    percentiles,
)
from camtrain.evaluation.pairing import Pair, Scored, aligned
from camtrain.evaluation.resampling import Floats, Units, bootstrap_chunks, swap_chunks, swaps_are_exact
from camtrain.evaluation.statistics import Statistic

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """One row of a comparison; everything is over the pairs that both models have.

    Attributes:
        a: Value of the first model.
        b: Value of the second.
        difference: b - a; of a macro average over the labels that both have a value for.
        low: Lower end of the bootstrap interval of the difference; NaN where fewer than two units count.
        high: Upper end.
        p: Two-sided permutation p-value; NaN where there is no difference to test.
        p_holm: The same adjusted by Holm's method over the labels of this table; of an average: p.
        n: Pairs compared.
        units: Units compared.
        lost: Pairs that only one of the two models has.
        undefined_repeats: Share of the bootstrap repeats that gave no value and were left out.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int
    units: int
    lost: int
    undefined_repeats: float


@dataclass(frozen=True)
class DifferenceTable:
    """The rows of one statistic.

    Attributes:
        labels: One per label (L), in the order of the first model.
        averages: Name -> row.
    """

    labels: tuple[Difference, ...]
    averages: Mapping[str, Difference]


@dataclass(frozen=True)
class Comparison(Generic[K]):
    """Two models, b against a.

    Attributes:
        labels: Names of the rows' labels, in the order of the first model.
        tables: Key -> table, of the keys that both have.
        left_out: Keys that one of them has.
        cases: Cases that both have.
        only_a: Cases that only the first has; they were dropped.
        only_b: Cases that only the second has.
        units: Units that were resampled and swapped.
        exact: All swaps were tried, so that p-values are exact.
    """

    labels: tuple[str, ...]
    tables: Mapping[K, DifferenceTable]
    left_out: tuple[K, ...]
    cases: int
    only_a: int
    only_b: int
    units: int
    exact: bool


def compare(
    a: Scored[K],
    b: Scored[K],
    repeats: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    averages: Mapping[str, Average] = AVERAGES,
    progress: Progress | None = None,
) -> Comparison[K]:
    """Paired comparison of two models on the cases that both have scored.

    The interval is a percentile bootstrap of b - a in which both models see the same resampled units. The p-value
    belongs to the hypothesis that it does not matter which model a number came from: for every unit the two models'
    numbers are swapped or not, and p is the share of such swaps with a difference at least as large as the observed
    one, (1 + hits) / (1 + repeats) for random swaps (Phipson and Smyth 2010), hits / 2^units when all are tried. Swaps
    that give no value are left out. A pair that is undefined in one model counts for neither, and is `lost`.

    Args:
        a: The first model.
        b: The second; labels may be in another order.
        repeats: Of the bootstrap, and of the permutations.
        level: Confidence.
        seed: Of both.
        averages: Name -> average.
        progress: Called with the resamplings done and their number (bootstrap and swaps).

    Returns:
        The rows of every key that both have.

    Raises:
        InputError: No case, label set or key in common, other truths or patients of the same case, repeated ids.

    Example:
        >>> from camtrain.evaluation.statistics import Mean
        >>> ids = [f"case{i}" for i in range(6)]
        >>> first = Scored(ids, ["nodule"], {"energy": Mean(np.full((6, 1), 0.25))})
        >>> second = Scored(ids[::-1], ["nodule"], {"energy": Mean(np.full((6, 1), 0.75))})
        >>> row = compare(first, second).tables["energy"].labels[0]
        >>> row.difference, row.low, row.high, row.p
        (0.5, 0.5, 0.5, 0.03125)
    """
    check_level(level)
    ids, units, both = aligned(a, b)
    pairs = {
        key: Pair.of(first, second, averages if _per_label(first, a.labels) else {}, key)
        for key, (first, second) in both.items()
    }
    exact = swaps_are_exact(units, repeats)
    swaps = 2**units.count if exact else repeats
    told = None if progress is None else _Told(progress, repeats + swaps)
    drawn = _collected(pairs, Pair.differences, bootstrap_chunks(units, repeats, seed), repeats, told)
    swapped = _collected(pairs, Pair.swapped, swap_chunks(units, repeats, seed), swaps, told)
    return Comparison(
        labels=tuple(a.labels),
        tables={key: _table(pair, drawn[key], swapped[key], exact, units, level) for key, pair in pairs.items()},
        left_out=tuple(key for key in dict.fromkeys([*a.statistics, *b.statistics]) if key not in pairs),
        cases=len(ids),
        only_a=len(a.ids) - len(ids),
        only_b=len(b.ids) - len(ids),
        units=units.count,
        exact=exact,
    )


def holm(p: Sequence[float] | Floats) -> Floats:
    """Adjusted p-values of one family (Holm 1979): rejecting those under alpha keeps the family-wise error at alpha.

    Args:
        p: (m,) p-values, NaN = no test, which does not count into the family.

    Returns:
        (m,) at most 1, NaN where p is.

    Example:
        >>> holm([0.01, 0.04, np.nan, 0.03])
        array([0.03, 0.06,  nan, 0.06])
    """
    values = np.asarray(p, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    adjusted = np.full(values.shape, np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return adjusted


def permutation_p(observed: Floats, swapped: Floats, exact: bool) -> Floats:
    """Two-sided p-values from differences under swaps.

    Args:
        observed: (M,) differences.
        swapped: (R, M) differences under swaps, NaN = undefined, left out.
        exact: Are these all swaps, the identity among them?

    Returns:
        (M,), NaN where the observed difference is.

    Example:
        >>> permutation_p(np.array([1.0]), np.array([[1.0], [-1.0], [0.5], [-0.5]]), exact=True)
        array([0.5])
    """
    there = ~np.isnan(swapped)
    size = np.where(there, np.abs(swapped), 0.0)
    # Sums of the same numbers in another order differ in the last digits: ties must stay ties.
    tiny = 1e-10 * np.maximum(size.max(axis=0), np.abs(observed))
    hits = (there & (size >= np.abs(observed) - tiny)).sum(axis=0)
    extra = 0 if exact else 1
    total = there.sum(axis=0) + extra
    return np.where(np.isnan(observed) | (total == 0), np.nan, (hits + extra) / np.maximum(total, 1))


def _per_label(statistic: Statistic, labels: Sequence[str]) -> bool:
    return bool(statistic.strata[0].shape[1] == len(labels))


@dataclass
class _Told:
    """Progress over several rounds of chunks."""

    progress: Progress
    total: int
    done: int = 0

    def more(self, rows: int) -> None:
        self.done += rows
        self.progress(self.done, self.total)


def _collected(
    pairs: Mapping[K, Pair],
    rows_of: Callable[[Pair, Floats], Floats],
    chunks: Iterator[Floats],
    total: int,
    told: _Told | None,
) -> dict[K, Floats]:
    """(total, L + A) rows of every pair, every chunk drawn once."""
    found = {key: np.empty((total, pair.rows)) for key, pair in pairs.items()}
    done = 0
    for chunk in chunks:
        for key, pair in pairs.items():
            found[key][done : done + len(chunk)] = rows_of(pair, chunk)
        done += len(chunk)
        if told is not None:
            told.more(len(chunk))
    return found


def _table(pair: Pair, drawn: Floats, swapped: Floats, exact: bool, units: Units, level: float) -> DifferenceTable:
    a, b, difference = pair.values
    labels = len(pair.lost)
    n, of_units, enough = counts(pair.a, pair.averages, units, defined(difference, pair.averages))
    sure = enough & ~np.isnan(difference)
    low, high = (np.where(sure, ends, np.nan) for ends in percentiles(drawn, level))
    p = permutation_p(difference, swapped, exact)
    adjusted = np.concatenate([holm(p[:labels]), p[labels:]])
    lost = [*pair.lost, *(pair.lost[columns_of(average, labels)].sum() for average in pair.averages.values())]
    undefined = np.isnan(drawn).mean(axis=0)
    columns = [
        *(numbers.tolist() for numbers in (a, b, difference, low, high, p, adjusted)),
        n,
        of_units,
        map(int, lost),
        undefined.tolist(),
    ]
    rows = [Difference(*row) for row in zip(*columns, strict=True)]
    return DifferenceTable(tuple(rows[:labels]), dict(zip(pair.averages, rows[labels:], strict=True)))
