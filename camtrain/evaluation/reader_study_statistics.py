"""Statistics of a reader study, as pure functions of arrays: proportions, crossed resampling, agreement, guessing."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.stats import norm

from camtrain._errors import InputError
from camtrain.evaluation.comparing import permutation_p
from camtrain.evaluation.intervals import check_level, percentiles
from camtrain.evaluation.resampling import Floats, Units, bootstrap_weights, swap_chunks, swaps_are_exact

Scale = Literal["nominal", "ordinal", "interval"]
# Readers and tasks are drawn from two generators: one seed would tie the draws together.
_OF_READERS = 1_000_003


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): within 0..1, and of some width for 0 and n hits too.

    It takes the answers as independent, which those of several readers on the same tasks are not.

    Args:
        hits: Successes.
        n: Trials.
        level: Confidence.

    Returns:
        Lower and upper end; NaN without trials.

    Raises:
        InputError: More hits than trials, or a level outside 0..1.

    Example:
        >>> [round(end, 3) for end in wilson(8, 10)]
        [0.49, 0.943]
    """
    check_level(level)
    if not 0 <= hits <= n:
        raise InputError(f"expected 0 to {n} hits among {n} trials, got {hits}")
    if n == 0:
        return np.nan, np.nan
    z = float(norm.ppf((1 + level) / 2))
    share, weight = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / weight
    half = z / weight * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not push the ends of 0 and n hits past them.
    return max(0.0, min(share, float(middle - half))), min(1.0, max(share, float(middle + half)))


def guessing_tail(hits: int, chances: Floats) -> float:
    """How often guessing gets at least so many hits: the upper tail of the Poisson binomial distribution, exact.

    Args:
        hits: Right answers.
        chances: (n,) chance level of each answer: 1 / number of choices.

    Returns:
        A one-sided p-value; 1 for no answers.

    Example:
        >>> guessing_tail(2, np.array([0.5, 0.5])), guessing_tail(1, np.array([0.5, 0.25]))
        (0.25, 0.625)
    """
    mass = np.ones(1)
    for chance in np.asarray(chances, dtype=np.float64):
        mass = np.append(mass, 0.0) * (1 - chance) + np.append(0.0, mass) * chance
    return float(min(1.0, mass[max(0, hits) :].sum()))


def mean_interval(
    values: Floats, units: Units, repeats: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean answer, readers and cases drawn independently (Owen 2007, "pigeonhole").

    A single reader is not drawn: the interval then speaks about this reader on other cases. With several readers it
    speaks about other readers on other cases, and errs on the wide side. Few readers or cases make it unsure.

    Args:
        values: (readers, tasks), NaN = not answered.
        units: What is drawn of the tasks: their cases, or patients.
        repeats: R.
        level: Confidence.
        seed: Of the resampling.

    Returns:
        Lower and upper end; NaN where fewer than two units were answered.

    Raises:
        InputError: Another number of tasks than units tell, no repeats, a level outside 0..1.

    Example:
        >>> mean_interval(np.array([[1.0, 1.0, 1.0]]), Units.of(["a", "b", "c"]))
        (1.0, 1.0)
    """
    check_level(level)
    values = checked_answers(values, units)
    answered = ~np.isnan(values)
    if units.having(np.atleast_1d(answered.any(axis=0))).sum() < 2:
        return np.nan, np.nan
    drawn = bootstrap_weights(units, repeats, seed)
    readers = np.flatnonzero(answered.any(axis=1))
    of_readers = np.zeros((repeats, len(values)))
    if len(readers) < 2:
        of_readers[:, readers] = 1.0
    else:
        names = Units.of([str(r) for r in readers])
        of_readers[:, readers] = bootstrap_weights(names, repeats, seed + _OF_READERS)
    total = ((of_readers @ np.where(answered, values, 0.0)) * drawn).sum(axis=1)
    count = ((of_readers @ answered.astype(np.float64)) * drawn).sum(axis=1)
    means = np.divide(total, count, out=np.full(repeats, np.nan), where=count > 0)
    low, high = percentiles(means[:, None], level)
    return float(low[0]), float(high[0])


def flip_test(values: Floats, units: Units, repeats: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value that signed answers are centred at 0: the signs of each case's answers are flipped as one.

    With one answer of -1, 0 or 1 per case and all flips tried, this is the exact sign (McNemar) test.

    Args:
        values: (readers, tasks) differences or signed scores, NaN = not answered.
        units: Cases, or patients.
        repeats: Random flips; all flips are tried where these are no more.
        seed: Of the flips.

    Returns:
        p; NaN without answers.

    Example:
        >>> flip_test(np.array([[1.0, 1.0, 1.0, 0.0]]), Units.of(["a", "b", "c", "d"]))
        0.25
    """
    values = checked_answers(values, units)
    if not (~np.isnan(values)).any():
        return np.nan
    of_tasks = np.nansum(values, axis=0)
    flipped = [(1 - 2 * swaps) @ of_tasks for swaps in swap_chunks(units, repeats, seed)]
    exact = swaps_are_exact(units, repeats)
    return float(permutation_p(of_tasks.sum()[None], np.concatenate(flipped)[:, None], exact)[0])


def krippendorff(values: Floats, scale: Scale = "nominal") -> float:
    """Krippendorff's alpha: 1 = all readers agree, 0 = as much as by chance, below 0 = less.

    1 - observed / expected disagreement of the coincidence matrix (Krippendorff 2011, "Computing Krippendorff's
    alpha-reliability"); missing answers are allowed.

    Args:
        values: (readers, tasks) codes, NaN = not answered.
        scale: `nominal`: any difference counts the same; `ordinal`: the answers between two values count;
            `interval`: the squared difference.

    Returns:
        Alpha; NaN where no task has two answers, or all answers are the same.

    Raises:
        InputError: An unknown scale.

    Example:
        >>> krippendorff(np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]))
        1.0
    """
    levels = np.unique(values[~np.isnan(values)])
    counts = np.stack([(values == level).sum(axis=0) for level in levels]) if len(levels) else np.zeros((0, 1))
    paired = counts[:, counts.sum(axis=0) >= 2].astype(np.float64)
    if not paired.size:
        return np.nan
    answers = paired.sum(axis=0)
    together = (paired / (answers - 1)) @ paired.T - np.diag((paired / (answers - 1)).sum(axis=1))
    totals = together.sum(axis=1)
    distance = _distance(levels, totals, scale)
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - (together * distance).sum() / expected) if expected > 0 else np.nan


def _distance(levels: Floats, totals: Floats, scale: str) -> Floats:
    """(V, V) squared distances between values."""
    if scale == "nominal":
        return 1.0 - np.eye(len(levels))
    if scale == "interval":
        return np.asarray((levels[:, None] - levels[None, :]) ** 2)
    if scale == "ordinal":
        # Answers from one value up to the other, half of those at either end.
        middle = np.cumsum(totals) - totals / 2
        return np.asarray((middle[:, None] - middle[None, :]) ** 2)
    raise InputError(f"scale= expects nominal, ordinal or interval, got {scale!r}")


def checked_answers(values: Floats, units: Units) -> Floats:
    """(readers, tasks) float64.

    Raises:
        InputError: Not so, or other tasks than the units are of.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(units):
        raise InputError(f"expected answers of shape (readers, {len(units)}), got {values.shape}")
    return values
