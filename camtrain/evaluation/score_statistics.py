"""Statistics of logits and truths beside the AUROC: average precision, calibration error, one row per patient, risk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from camtrain.evaluation.resampling import Bools, Floats
from camtrain.evaluation.statistics import (
    AUROC,
    EffectShare,
    _check_truth,
    _parts,
    _ratio,
    _to_arrays,
    present_and_absent,
)

_AREA_BLOCK = 1 << 16
BINS = 15


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """Area under the precision-recall curve as a sum: precision at each score, weighted by the recall that it adds.

    Cases of one score come in together, as in scikit-learn and torchmetrics. Unlike the AUROC it falls with the share
    of present cases: compare it between models, not between data sets.

    Args:
        scores: (n, L) logits or probabilities, NaN = not counted.
        truth: (n, L) 1, 0, or NaN = unknown.

    Raises:
        InputError: Unequal shapes, infinite scores, other truths.

    Example:
        >>> area = AveragePrecision([[0.9], [0.8], [0.1]], truth=[[1], [0], [1]])
        >>> area(np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])).round(4)  # no absent case: undefined
        array([[0.8333],
               [   nan]])
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

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        areas = np.full((len(weights), self.scores.shape[1]), np.nan)
        rows = max(1, _AREA_BLOCK // max(1, weights.shape[1]))
        for column, (score, present, absent) in enumerate(zip(self.scores.T, *(s.T for s in self.strata), strict=True)):
            counted = np.flatnonzero(present | absent)
            order = counted[np.argsort(-score[counted], kind="stable")]
            # The last case of each score: only there the curve has a point.
            ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)[: len(order)])
            for start in range(0, len(weights), rows):
                block = weights[start : start + rows][:, order]
                areas[start : start + rows, column] = _precision(block, present[order], ends)
        return areas


def _precision(weights: Floats, present: Bools, ends: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Floats:
    """(r, m) weights in falling order of scores -> (r,)."""
    if not len(ends):
        return np.full(len(weights), np.nan)
    right = np.cumsum(weights * present, axis=1)[:, ends]
    every = np.cumsum(weights, axis=1)[:, ends]
    added = np.diff(right, axis=1, prepend=0.0)
    precision = np.divide(right, every, out=np.zeros_like(right), where=every > 0)
    found = _ratio((added * precision).sum(axis=1), right[:, -1])
    # Without an absent case the curve says nothing.
    return np.where(every[:, -1] > right[:, -1], found, np.nan)


@dataclass(frozen=True, eq=False)
class CalibrationError:
    """Expected calibration error: mean over 15 bins of probability of |mean probability - share present|, by cases.

    Args:
        probabilities: (n, L) from 0 to 1, NaN = not counted.
        truth: (n, L) 1, 0, or NaN = unknown.

    Raises:
        InputError: Unequal shapes, other truths.

    Example:
        >>> CalibrationError([[0.9], [0.1]], truth=[[1], [0]])(np.ones((1, 2))).round(2)
        array([[0.1]])

    References:
        Naeini, Cooper, Hauskrecht: Obtaining well calibrated probabilities using Bayesian binning. AAAI 2015.
    """

    probabilities: Floats
    truth: Floats

    def __post_init__(self) -> None:
        _to_arrays(self)
        _check_truth(self.truth)

    @cached_property
    def strata(self) -> tuple[Bools, ...]:
        """The counted cases."""
        return (~np.isnan(self.probabilities) & ~np.isnan(self.truth),)

    @cached_property
    def columns(self) -> Floats:
        """For each bin: its counted cases, then for each bin the surplus of probability over presence."""
        (counted,) = self.strata
        # A bin holds its upper edge, as in torchmetrics: (0, 1/15], ...; 0 belongs to the first.
        place = np.clip(np.ceil(np.nan_to_num(self.probabilities) * BINS) - 1, 0, BINS - 1)
        inside = [(place == b) & counted for b in range(BINS)]
        surplus = np.nan_to_num(self.probabilities) - np.nan_to_num(self.truth)
        return np.concatenate([*inside, *(surplus * chosen for chosen in inside)], axis=1).astype(np.float64)

    def finish(self, sums: Floats, pool: Sequence[int] | None = None) -> Floats:
        """Errors from sums."""
        parts = _parts(sums, 2 * BINS, pool)
        return _ratio(np.abs(parts[BINS:]).sum(axis=0), parts[:BINS].sum(axis=0))

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        return self.finish(weights @ self.columns)


def one_row_per_patient(
    probabilities: Floats, truth: Floats, patients: Sequence[str | None]
) -> tuple[Floats, Floats] | None:
    """Probabilities and truths with one counted row per patient: the first of his or her scans stands for all.

    The patient's probability is the mean over the scans in which the label is known; the label is present where any
    scan has it. The other rows are NaN, so that cases keep their places and a bootstrap over patients draws each
    patient's one row.

    Args:
        probabilities: (n, L).
        truth: (n, L), NaN = unknown.
        patients: (n,) names; None or "" = a patient by itself.

    Returns:
        Two (n, L), or None when no patient has two scans.

    Example:
        >>> one_row_per_patient(np.array([[0.25], [0.75]]), np.array([[0.0], [1.0]]), ["p", "p"])
        (array([[0.5],
               [nan]]), array([[ 1.],
               [nan]]))
    """
    scans: dict[str, list[int]] = {}
    for row, patient in enumerate(patients):
        scans.setdefault(f"case {row}" if patient in (None, "") else f"patient {patient}", []).append(row)
    if len(scans) == len(patients):
        return None
    chance, label = (np.full(truth.shape, np.nan) for _ in range(2))
    for rows in scans.values():
        known = ~np.isnan(truth[rows]) & ~np.isnan(probabilities[rows])
        count = known.sum(axis=0)
        total = np.where(known, probabilities[rows], 0.0).sum(axis=0)
        chance[rows[0]] = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
        label[rows[0]] = np.where(count > 0, ((truth[rows] == 1) & known).any(axis=0), np.nan)
    return chance, label


@dataclass(frozen=True, eq=False)
class ShortcutRisk:
    """How far a network would fall if shortcuts turned: the mean of `EffectShare` and of 1 - AUROC, outside replaced.

    The share says how much of what moves the network lies outside the organs, the AUROC whether it then still tells
    present from absent. Either alone has its own noise: a share of two small effects, an AUROC of few cases. A network
    that moves under neither replacement has no share: there the lost AUROC stands alone.

    Args:
        after: (n, L) probabilities with everything outside the organs replaced, NaN = not measured.
        outside: (n, L) their absolute change.
        inside: (n, L) the absolute change with the organs replaced, NaN = not measured.
        truth: (n, L) 1, 0, or NaN = unknown.
        floor: See `EffectShare`.

    Raises:
        InputError: Unequal shapes, negative changes, other truths, a floor outside 0..1.

    Example:
        >>> risk = ShortcutRisk([[0.25], [0.5]], outside=[[0.5], [0.25]], inside=[[0.125], [0.125]], truth=[[1], [0]])
        >>> risk(np.ones((1, 2)))  # share 0.75, AUROC 0
        array([[0.875]])
    """

    after: Floats
    outside: Floats
    inside: Floats
    truth: Floats
    floor: float = 0.02

    def __post_init__(self) -> None:
        _to_arrays(self)
        _ = self._share

    @cached_property
    def _share(self) -> EffectShare:
        return EffectShare(self.outside, self.inside, self.truth, self.floor)

    @cached_property
    def _area(self) -> AUROC:
        return AUROC(np.where(np.logical_or.reduce(self._share.strata), self.after, np.nan), self.truth)

    @property
    def strata(self) -> tuple[Bools, ...]:
        """Present cases, absent cases, of which both changes were measured."""
        return self._area.strata

    def __call__(self, weights: Floats) -> Floats:
        """(R, n) weights -> (R, L)."""
        share, lost = self._share(weights), 1 - self._area(weights)
        return np.where(np.isnan(share), lost, (share + lost) / 2)
