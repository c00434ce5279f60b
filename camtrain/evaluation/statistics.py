"""Numbers per case to one number per label, as functions of case weights: one code for values and resamplings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.evaluation.resampling import Bools, Floats

# Numbers of one block of the areas: a block and its running sums should stay in the cache.
_AREA_BLOCK = 1 << 16


@runtime_checkable
class Statistic(Protocol):
    """What bootstrap and comparison work on: a frozen dataclass whose array fields are all (n, L)."""

    @property
    def strata(self) -> tuple[Bools, ...]:
        """Disjoint (n, L) masks of the cases that count; the statistic needs cases in each of them."""
        ...

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights of cases -> (R, L), NaN where undefined under that weighting."""
        ...


@runtime_checkable
class SumStatistic(Statistic, Protocol):
    """A statistic of weighted sums: only these, `weights @ columns`, depend on n."""

    @property
    def columns(self) -> Floats:
        """(n, P * L): P numbers per case and label, label fastest."""
        ...

    def finish(self, sums: Floats, pool: Sequence[int] | None = None) -> Floats:
        """(R, P * L) sums -> (R, L); with `pool`, (R, 1) with all pairs of these labels taken as of one label."""
        ...


@dataclass(frozen=True, eq=False)
class Mean:
    """Mean over the cases that count.

    Args:
        values: (n, L), NaN = undefined or not counted.

    Raises:
        InputError: No (n, L) array, or infinite values.

    Example:
        >>> mean = Mean([[1.0, 4.0], [0.0, np.nan]])
        >>> mean(np.array([[1.0, 1.0], [0.0, 2.0]]))
        array([[0.5, 4. ],
               [0. , nan]])
    """

    values: Floats

    def __post_init__(self) -> None:
        _to_arrays(self)

    @cached_property
    def strata(self) -> tuple[Bools, ...]:
        """The counted cases."""
        return (~np.isnan(self.values),)

    @cached_property
    def columns(self) -> Floats:
        """Values, 0 where not counted; counts."""
        (counted,) = self.strata
        return np.concatenate([np.where(counted, self.values, 0.0), counted], axis=1)

    def finish(self, sums: Floats, pool: Sequence[int] | None = None) -> Floats:
        """Means from sums."""
        total, count = _parts(sums, 2, pool)
        return _ratio(total, count)

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        return self.finish(weights @ self.columns)


@dataclass(frozen=True, eq=False)
class Effect:
    """How far probabilities move: mean of the mean over present cases and the mean over absent ones.

    A class without a case is left out, and the other one stands alone. A resampling that draws no case of a class
    that there is has no value: it would measure something else.

    Args:
        changes: (n, L) absolute changes, NaN = not measured.
        truth: (n, L) 1, 0, or NaN = unknown.

    Raises:
        InputError: Unequal shapes, negative changes, other truths.

    Example:
        >>> Effect([[0.5], [0.25], [0.75]], truth=[[1], [0], [0]])(np.ones((1, 3)))
        array([[0.5]])
    """

    changes: Floats
    truth: Floats

    def __post_init__(self) -> None:
        _to_arrays(self)
        _check_truth(self.truth)
        _check_changes(self.changes)

    @cached_property
    def strata(self) -> tuple[Bools, ...]:
        """The measured cases with a known truth."""
        present, absent = self._classes
        return (present | absent,)

    @cached_property
    def _classes(self) -> tuple[Bools, Bools]:
        measured = ~np.isnan(self.changes)
        return (self.truth == 1) & measured, (self.truth == 0) & measured

    @cached_property
    def columns(self) -> Floats:
        """Changes of present cases, of absent ones; numbers of either."""
        sums = [np.where(chosen, self.changes, 0.0) for chosen in self._classes]
        return np.concatenate([*sums, *self._classes], axis=1)

    def finish(self, sums: Floats, pool: Sequence[int] | None = None) -> Floats:
        """Effects from sums."""
        moved = _parts(sums, 4, pool)
        means = [_ratio(moved[0], moved[2]), _ratio(moved[1], moved[3])]
        there: Bools = np.stack([chosen.any(axis=0) for chosen in self._classes])
        if pool is not None:
            there = np.logical_or.reduce(there[:, list(pool)], axis=1, keepdims=True)
        total = np.where(there[:, None], means, 0.0).sum(axis=0)
        return _ratio(total, there.sum(axis=0).astype(np.float64))

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        return self.finish(weights @ self.columns)


@dataclass(frozen=True, eq=False)
class EffectShare:
    """Reliance on what lies outside the organs: outside effect / (outside effect + inside effect).

    The same definition as `camtrain.metrics.shortcut_reliance`: a pair counts when both changes were measured, and a
    label whose two effects are under the floor is undefined.

    Args:
        outside: (n, L) absolute change of the probability with everything outside the organs replaced, NaN = not
            measured.
        inside: The same with the organs replaced.
        truth: (n, L) 1, 0, or NaN = unknown.
        floor: Smallest effect, of which a label needs at least one.

    Raises:
        InputError: Unequal shapes, negative changes, other truths, a floor outside 0..1.

    Example:
        >>> EffectShare([[0.75]], [[0.25]], truth=[[1]])(np.ones((1, 1)))
        array([[0.75]])
        >>> EffectShare([[0.015]], [[0.001]], truth=[[1]])(np.ones((1, 1)))
        array([[nan]])
    """

    outside: Floats
    inside: Floats
    truth: Floats
    floor: float = 0.02

    def __post_init__(self) -> None:
        _to_arrays(self)
        _check_truth(self.truth)
        _check_changes(self.outside)
        _check_changes(self.inside)
        if not 0 <= self.floor <= 1:
            raise InputError(f"expected floor as a change of probability from 0 to 1, got {self.floor!r}: take 0.02")

    @cached_property
    def outside_effect(self) -> Effect:
        """The outside effect alone, over the pairs that count here."""
        return Effect(np.where(np.isnan(self.inside), np.nan, self.outside), self.truth)

    @cached_property
    def inside_effect(self) -> Effect:
        """The inside effect alone, over the pairs that count here."""
        return Effect(np.where(np.isnan(self.outside), np.nan, self.inside), self.truth)

    @property
    def strata(self) -> tuple[Bools, ...]:
        """The cases of known truth of which both changes were measured."""
        return self.outside_effect.strata

    @cached_property
    def columns(self) -> Floats:
        """Those of the outside effect, then those of the inside effect."""
        return np.concatenate([self.outside_effect.columns, self.inside_effect.columns], axis=1)

    def finish(self, sums: Floats, pool: Sequence[int] | None = None) -> Floats:
        """Shares from sums."""
        half = sums.shape[1] // 2
        outside = self.outside_effect.finish(sums[:, :half], pool)
        inside = self.inside_effect.finish(sums[:, half:], pool)
        moves = (outside >= self.floor) | (inside >= self.floor)
        return np.where(moves, _ratio(outside, outside + inside), np.nan)

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        return self.finish(weights @ self.columns)


@dataclass(frozen=True, eq=False)
class AUROC:
    """Area under the ROC curve: the weighted chance that a present case scores above an absent one, ties half.

    Exact: scores are sorted once, then each weighting costs one running sum over the absent cases.

    Args:
        scores: (n, L) logits or probabilities, NaN = not counted.
        truth: (n, L) 1, 0, or NaN = unknown.

    Raises:
        InputError: Unequal shapes, infinite scores, other truths.

    Example:
        >>> area = AUROC([[0.9], [0.1], [0.9]], truth=[[1], [0], [0]])
        >>> area(np.array([[1.0, 1.0, 1.0], [1.0, 3.0, 1.0], [2.0, 0.0, 0.0]]))
        array([[0.75 ],
               [0.875],
               [  nan]])
    """

    scores: Floats
    truth: Floats

    def __post_init__(self) -> None:
        _to_arrays(self)
        _check_truth(self.truth)

    @cached_property
    def strata(self) -> tuple[Bools, ...]:
        """Present cases, absent cases."""
        return present_and_absent(self.scores, self.truth)

    @cached_property
    def _ladders(self) -> list[_Ladder]:
        present, absent = self.strata
        return [_ladder(score, p, a) for score, p, a in zip(self.scores.T, present.T, absent.T, strict=True)]

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        areas = np.empty((len(weights), len(self._ladders)))
        rows = max(1, _AREA_BLOCK // max(1, weights.shape[1]))
        for start in range(0, len(weights), rows):
            block = weights[start : start + rows]
            for column, ladder in enumerate(self._ladders):
                areas[start : start + rows, column] = _area(block, *ladder)
        return areas

    @cached_property
    def wins(self) -> Floats:
        """(n, L): cases of the other class that each case is rightly ordered against, ties half; 0 if not counted."""
        won = np.zeros(self.scores.shape)
        for column, (score, present, absent) in enumerate(zip(self.scores.T, *(s.T for s in self.strata), strict=True)):
            for chosen, others, sign in ((present, absent, 1), (absent, present, -1)):
                ladder = np.sort(sign * score[others])
                places = (np.searchsorted(ladder, sign * score[chosen], side=side) for side in ("left", "right"))
                won[chosen, column] = sum(places) / 2
        return won


_Ladder = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp] | None]


def _ladder(score: Floats, present: Bools, absent: Bools) -> _Ladder:
    """Present cases, absent cases by score, and for each present case the absent ones below it and up to it."""
    ups, downs = np.flatnonzero(present), np.flatnonzero(absent)
    downs = downs[np.argsort(score[downs], kind="stable")]
    below, up_to = (np.searchsorted(score[downs], score[ups], side=side) for side in ("left", "right"))
    return ups, downs, below, None if np.array_equal(below, up_to) else up_to


def _area(
    weights: Floats,
    ups: npt.NDArray[np.intp],
    downs: npt.NDArray[np.intp],
    below: npt.NDArray[np.intp],
    up_to: npt.NDArray[np.intp] | None,
) -> Floats:
    """(r, n) weights -> (r,)."""
    running = np.zeros((len(weights), len(downs) + 1))
    np.cumsum(np.take(weights, downs, axis=1), axis=1, out=running[:, 1:])
    beaten = np.take(running, below, axis=1)
    if up_to is not None:
        beaten = (beaten + np.take(running, up_to, axis=1)) / 2
    present = np.take(weights, ups, axis=1)
    return _ratio(np.einsum("rp,rp->r", present, beaten), present.sum(axis=1) * running[:, -1])


S = TypeVar("S", bound=Statistic)


def each_array(function: Callable[..., Any], *statistics: S) -> S:
    """A statistic whose arrays are `function` of the arrays of these, field by field; other fields from the first.

    Example:
        >>> each_array(lambda a, b: np.concatenate([a, b]), Mean([[1.0]]), Mean([[2.0]])).values
        array([[1.],
               [2.]])
    """
    named = {f.name: [getattr(s, f.name) for s in statistics] for f in dataclasses.fields(statistics[0])}  # type: ignore[arg-type]
    arrays = {name: function(*of) for name, of in named.items() if isinstance(of[0], np.ndarray)}
    changed: S = dataclasses.replace(statistics[0], **arrays)  # type: ignore[type-var]
    return changed


def counted(statistic: Statistic) -> Bools:
    """(n, L): the pairs that enter the statistic."""
    pairs: Bools = np.logical_or.reduce(statistic.strata)
    return pairs


def _to_arrays(statistic: Any) -> None:
    """Array fields as float64 (n, L), checked."""
    fields = [f.name for f in dataclasses.fields(statistic) if f.name != "floor"]
    for name in fields:
        array = np.asarray(getattr(statistic, name), dtype=np.float64)
        first = np.asarray(getattr(statistic, fields[0]))
        if array.ndim != 2 or array.shape != first.shape:
            raise InputError(
                f"{type(statistic).__name__} expects {name} of shape (cases, labels), the same for all, "
                f"got {array.shape} beside {first.shape}"
            )
        if np.isinf(array).any():
            raise InputError(
                f"{type(statistic).__name__} got Inf in {name}: mark what is undefined by NaN, so that it is counted"
            )
        object.__setattr__(statistic, name, array)


def present_and_absent(scores: Floats, truth: Floats) -> tuple[Bools, Bools]:
    """(n, L) each: cases that have the label, cases that have not; none that is not counted or unknown."""
    known = ~np.isnan(scores)
    return (truth == 1) & known, (truth == 0) & known


def _check_truth(truth: Floats) -> None:
    odd = truth[~np.isnan(truth) & (truth != 0) & (truth != 1)]
    if odd.size:
        raise InputError(f"expected truth 0, 1 or NaN = unknown, got {odd[0]:g}")


def _check_changes(changes: Floats) -> None:
    if (changes < 0).any():
        raise InputError(f"expected absolute changes, got {changes[changes < 0][0]:g}: pass abs(after - before)")


def _parts(sums: Floats, parts: int, pool: Sequence[int] | None) -> Floats:
    """(R, P * L) -> (P, R, L), or (P, R, 1) summed over the labels of the pool."""
    split = np.moveaxis(sums.reshape(len(sums), parts, -1), 1, 0)
    return split if pool is None else split[:, :, list(pool)].sum(axis=2, keepdims=True)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Quotient, NaN where below is 0."""
    above, below = np.broadcast_arrays(above, below)
    quotient: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return quotient
