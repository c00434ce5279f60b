"""Values with bootstrap intervals: rows for every label and every average, many statistics on the same resamplings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from camtrain._errors import InputError
from camtrain.evaluation.resampling import Bools, Floats, Units, bootstrap_chunks
from camtrain.evaluation.statistics import Statistic, SumStatistic, counted

K = TypeVar("K")
Progress = Callable[[int, int], None]
"""Called with the resamplings done and their number."""


@dataclass(frozen=True)
class Average:
    """How labels become one number.

    Attributes:
        kind: `"macro"`: mean over the labels that have a value; `"micro"`: all pairs pooled as if of one label, which
            areas under the ROC curve do not have.
        columns: The labels of a group; None = all.
    """

    kind: Literal["macro", "micro"] = "macro"
    columns: tuple[int, ...] | None = None


AVERAGES: Mapping[str, Average] = {"macro": Average("macro"), "micro": Average("micro")}


@dataclass(frozen=True)
class Interval:
    """One number and how sure it is.

    Attributes:
        mean: The value over all cases; NaN where undefined.
        low: Lower end; NaN where fewer than two units count.
        high: Upper end.
        n: Counted cases of a label; counted pairs of an average (of a macro average: those of labels with a value).
        units: Counted units: cases, or patients where they are known.
        undefined_repeats: Share of the resamplings that gave no value and were left out.
    """

    mean: float
    low: float
    high: float
    n: int
    units: int
    undefined_repeats: float


@dataclass(frozen=True)
class IntervalTable:
    """The rows of one statistic.

    Attributes:
        labels: One interval per label (L).
        averages: Name -> interval, of the averages that the statistic has.
    """

    labels: tuple[Interval, ...]
    averages: Mapping[str, Interval]


def intervals(
    statistics: Mapping[K, Statistic],
    units: Units,
    repeats: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    averages: Mapping[str, Average] = AVERAGES,
    progress: Progress | None = None,
) -> dict[K, IntervalTable]:
    """Percentile bootstrap intervals (Efron 1979) of many statistics of the same cases.

    Every resampling is drawn once and serves all statistics, so that they can be compared repeat by repeat. Memory:
    the resampled rows, `len(statistics) x repeats x (L + averages)` numbers, and one block of weights.

    A macro average, resampled or not, is over the labels that have a value in the data (and in the resampling). An
    interval is NaN where fewer than two units count (of an AUROC: two present and two absent ones). Percentile
    intervals of few cases are too narrow, and those of equal values have no width: look at `units`.

    Args:
        statistics: Any key -> statistic; all of the same cases in the same order.
        units: What is drawn.
        repeats: R.
        level: Confidence.
        seed: Of the resampling.
        averages: Name -> average; those that a statistic does not have are left out of its table.
        progress: Called after every block.

    Returns:
        Key -> table.

    Raises:
        InputError: Other cases than those of the units, unknown columns, no repeats, a level outside 0..1.

    Example:
        >>> from camtrain.evaluation.statistics import AUROC, Mean
        >>> ids, patients = ["a", "b", "c", "d"], ["p", "p", "q", None]
        >>> tables = intervals(
        ...     {
        ...         ("hirescam", "energy_inside"): Mean([[0.5, 0.25], [0.75, np.nan], [0.5, 0.25], [0.25, 1.0]]),
        ...         ("", "auroc"): AUROC([[2.0, 1.0], [1.0, 3.0], [0.0, 0.0], [1.0, 2.0]], truth=np.eye(4, 2)),
        ...     },
        ...     Units.of(ids, patients),
        ...     averages={"macro": Average(), "micro": Average("micro"), "lungs": Average("macro", (1,))},
        ... )
        >>> tables["hirescam", "energy_inside"].labels[0]
        Interval(mean=0.5, low=0.25, high=0.625, n=4, units=3, undefined_repeats=0.0)
        >>> tables["hirescam", "energy_inside"].averages["lungs"].mean, tables["", "auroc"].averages["macro"].mean
        (0.5, 1.0)
        >>> list(tables["", "auroc"].averages)
        ['macro', 'lungs']
    """
    check_level(level)
    for name, statistic in statistics.items():
        check_cases(statistic, units, name)
    wanted = {key: available(statistic, averages) for key, statistic in statistics.items()}
    all_cases = np.ones((1, len(units)))
    points = {key: _rows(s, all_cases, wanted[key], None) for key, s in statistics.items()}
    drawn = {key: np.empty((repeats, rows.shape[1])) for key, rows in points.items()}
    done = 0
    for weights in bootstrap_chunks(units, repeats, seed):
        for key, statistic in statistics.items():
            labels = defined(points[key][0], wanted[key])
            drawn[key][done : done + len(weights)] = _rows(statistic, weights, wanted[key], labels)
        done += len(weights)
        if progress is not None:
            progress(done, repeats)
    return {key: _table(s, points[key][0], drawn[key], wanted[key], units, level) for key, s in statistics.items()}


def interval(
    statistic: Statistic, units: Units, repeats: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[Interval, ...]:
    """`intervals` of one statistic: one per label.

    Example:
        >>> from camtrain.evaluation.statistics import Mean
        >>> interval(Mean([[0.0], [1.0]]), Units.of(["a", "b"]))
        (Interval(mean=0.5, low=0.0, high=1.0, n=2, units=2, undefined_repeats=0.0),)
    """
    return intervals({None: statistic}, units, repeats, level, seed, averages={})[None].labels


def available(statistic: Statistic, averages: Mapping[str, Average]) -> dict[str, Average]:
    """The averages that a statistic has: one without sums cannot pool the pairs of several labels."""
    labels = counted(statistic).shape[1]
    for name, average in averages.items():
        outside = [c for c in average.columns or () if not 0 <= c < labels]
        if outside or average.columns == ():
            raise InputError(
                f"average {name!r} expects columns of labels from 0 to {labels - 1}, got {outside or 'none'}"
            )
    return {name: a for name, a in averages.items() if a.kind == "macro" or isinstance(statistic, SumStatistic)}


def raw_rows(statistic: Statistic, weights: Floats, averages: Mapping[str, Average]) -> Floats:
    """(R, L + A) values of labels and averages; macro averages are left NaN, for `fill_macro`."""
    if isinstance(statistic, SumStatistic):
        return rows_of_sums(statistic, weights @ statistic.columns, averages)
    values = statistic(weights)
    return np.concatenate([values, np.full((len(values), len(averages)), np.nan)], axis=1)


def rows_of_sums(statistic: SumStatistic, sums: Floats, averages: Mapping[str, Average]) -> Floats:
    """`raw_rows` from the weighted sums."""
    values = statistic.finish(sums)
    pooled = [
        statistic.finish(sums, average.columns or range(values.shape[1]))
        if average.kind == "micro"
        else np.full((len(sums), 1), np.nan)
        for average in averages.values()
    ]
    return np.concatenate([values, *pooled], axis=1)


def fill_macro(rows: Floats, averages: Mapping[str, Average], labels: Bools | None = None) -> Floats:
    """Write the macro averages into raw rows (R, L + A), over those of `labels` (L,) that have a value in a row."""
    first = rows.shape[1] - len(averages)
    for column, average in enumerate(averages.values(), start=first):
        if average.kind == "macro":
            chosen = columns_of(average, first)
            values = rows[:, chosen if labels is None else chosen[labels[chosen]]]
            there = ~np.isnan(values)
            count = there.sum(axis=1)
            total = np.where(there, values, 0.0).sum(axis=1)
            rows[:, column] = np.divide(total, count, out=np.full(len(rows), np.nan), where=count > 0)
    return rows


def columns_of(average: Average, labels: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The labels of an average."""
    return np.array(average.columns if average.columns is not None else range(labels), dtype=np.int64)


def defined(row: Floats, averages: Mapping[str, Average]) -> Bools:
    """(L + A,) values -> (L,): the labels that have one."""
    found: Bools = ~np.isnan(row[: len(row) - len(averages)])
    return found


def percentiles(values: Floats, level: float) -> tuple[Floats, Floats]:
    """Ends of the central interval of each column (R, M) -> (M,) twice, NaN left out, linear between values."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    last = (~np.isnan(values)).sum(axis=0) - 1
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        place = share * np.maximum(last, 0)
        lower = np.floor(place).astype(np.int64)
        upper = np.minimum(lower + 1, np.maximum(last, 0))
        below, above = (np.take_along_axis(ordered, p[None], axis=0)[0] for p in (lower, upper))
        ends.append(below + (above - below) * (place - lower))
    return ends[0], ends[1]


def counts(
    statistic: Statistic, averages: Mapping[str, Average], units: Units, labels: Bools
) -> tuple[list[int], list[int], Bools]:
    """Per row (L + A): counted cases or pairs, counted units, and whether every stratum has two units.

    Args:
        statistic: Of n cases.
        averages: A.
        units: Of these cases.
        labels: (L,) those that have a value; macro averages count no others.
    """
    n = counted(statistic).sum(axis=0)
    strata = [units.having(stratum) for stratum in statistic.strata]
    groups = [np.array([c]) for c in range(len(n))]
    for average in averages.values():
        chosen = columns_of(average, len(n))
        groups.append(chosen[labels[chosen]] if average.kind == "macro" else chosen)
    of_groups = [np.stack([s[:, group].any(axis=1) for s in strata]) for group in groups]
    enough = np.array([bool((of.sum(axis=1) >= 2).all()) for of in of_groups])
    return [int(n[g].sum()) for g in groups], [int(of.any(axis=0).sum()) for of in of_groups], enough


def check_level(level: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        InputError: Outside 0..1.
    """
    if not 0 < level < 1:
        raise InputError(f"expected a confidence level between 0 and 1, got {level!r}: 0.95 is usual")


def check_cases(statistic: Statistic, units: Units, name: object) -> None:
    """Refuse a statistic of other cases.

    Raises:
        InputError: Their number differs.
    """
    cases = len(statistic.strata[0])
    if cases != len(units):
        raise InputError(f"expected {len(units)} cases for {name!r}, as there are ids, got {cases}: align them by id")


def _rows(statistic: Statistic, weights: Floats, averages: Mapping[str, Average], labels: Bools | None) -> Floats:
    return fill_macro(raw_rows(statistic, weights, averages), averages, labels)


def _table(
    statistic: Statistic, point: Floats, drawn: Floats, averages: Mapping[str, Average], units: Units, level: float
) -> IntervalTable:
    low, high = percentiles(drawn, level)
    n, of_units, enough = counts(statistic, averages, units, defined(point, averages))
    sure = enough & ~np.isnan(point)
    undefined = np.isnan(drawn).mean(axis=0)
    rows = [
        Interval(float(value), float(a), float(b), cases, some, float(share))
        for value, a, b, cases, some, share in zip(
            point, np.where(sure, low, np.nan), np.where(sure, high, np.nan), n, of_units, undefined, strict=True
        )
    ]
    labels = len(rows) - len(averages)
    return IntervalTable(tuple(rows[:labels]), dict(zip(averages, rows[labels:], strict=True)))
