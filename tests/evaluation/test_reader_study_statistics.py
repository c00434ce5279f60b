"""Statistics of a reader study against scipy, against published numbers, and against slow references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, binomtest, norm

from camtrain._errors import InputError
from camtrain.evaluation.intervals import interval
from camtrain.evaluation.reader_study_statistics import (
    flip_test,
    guessing_tail,
    krippendorff,
    mean_interval,
    wilson,
)
from camtrain.evaluation.resampling import Units, bootstrap_weights
from camtrain.evaluation.statistics import Mean

NAN = np.nan
# The worked example of Krippendorff (2011), four observers, twelve units.
WORKED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (3, 7), (7, 7), (61, 100), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(hits, n, level):
    theirs = binomtest(hits, n).proportion_ci(level, method="wilson")
    assert wilson(hits, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_without_trials_or_with_too_many_hits():
    assert np.isnan(wilson(0, 0)).all()
    with pytest.raises(InputError, match="0 to 3 hits"):
        wilson(4, 3)
    with pytest.raises(InputError, match="between 0 and 1"):
        wilson(1, 3, level=95)


def test_guessing_is_binomial_where_chances_are_equal():
    for hits in range(10):
        assert guessing_tail(hits, np.full(9, 0.25)) == pytest.approx(binom.sf(hits - 1, 9, 0.25), abs=1e-12)


def test_guessing_with_unequal_chances_by_all_outcomes():
    chances = np.array([0.5, 0.25, 0.2, 1 / 3, 0.5])
    for hits in range(6):
        slow = sum(
            np.prod(np.where(outcome, chances, 1 - chances))
            for outcome in itertools.product([0, 1], repeat=5)
            if sum(outcome) >= hits
        )
        assert guessing_tail(hits, chances) == pytest.approx(slow)


def test_one_reader_is_the_bootstrap_of_cases():
    rng = np.random.default_rng(3)
    values = (rng.random((1, 23)) < 0.6).astype(float)
    values[0, 4] = NAN
    units = Units.of([str(i // 2) for i in range(23)])
    theirs = interval(Mean(values.T), units, repeats=500, seed=5)[0]
    assert mean_interval(values, units, repeats=500, seed=5) == pytest.approx((theirs.low, theirs.high))


def test_several_readers_are_drawn_with_the_cases():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(3, 11))
    values[0, 2] = values[2, 7] = NAN
    units = Units.of([str(i // 2) for i in range(11)])
    low, high = mean_interval(values, units, repeats=300, seed=9)
    of_cases = bootstrap_weights(units, 300, 9)
    of_readers = bootstrap_weights(Units.of(["a", "b", "c"]), 300, 9 + 1_000_003)
    means = []
    for r in range(300):
        total = count = 0.0
        for reader, task in itertools.product(range(3), range(11)):
            if not np.isnan(values[reader, task]):
                weight = of_readers[r, reader] * of_cases[r, task]
                total += weight * values[reader, task]
                count += weight
        means.append(total / count)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    alone = mean_interval(np.nanmean(values, axis=0)[None], units, repeats=300, seed=9)
    assert high - low > alone[1] - alone[0]


def test_a_reader_without_answers_changes_nothing():
    values = np.array([[1.0, 0.0, 1.0, 1.0]])
    units = Units.of(list("abcd"))
    more = np.concatenate([values, np.full((1, 4), NAN)])
    assert mean_interval(values, units, 200) == mean_interval(more, units, 200)


def test_too_few_cases_have_no_interval():
    assert np.isnan(mean_interval(np.array([[1.0, NAN]]), Units.of(["a", "b"]), 50)).all()
    with pytest.raises(InputError, match=r"shape \(readers, 3\)"):
        mean_interval(np.ones((1, 2)), Units.of(["a", "b", "c"]), 50)


@pytest.mark.parametrize(("plus", "minus", "ties"), [(7, 1, 2), (3, 3, 0), (9, 0, 1)])
def test_flips_of_single_answers_are_the_sign_test(plus, minus, ties):
    values = np.array([[1.0] * plus + [-1.0] * minus + [0.0] * ties])
    units = Units.of([str(i) for i in range(values.shape[1])])
    p = binomtest(max(plus, minus), plus + minus).pvalue
    assert flip_test(values, units, repeats=4096) == pytest.approx(p)


def test_random_flips_come_near_all_flips():
    values = np.random.default_rng(0).normal(0.5, 1, (2, 10))
    units = Units.of([str(i) for i in range(10)])
    assert flip_test(values, units, repeats=1000) == pytest.approx(flip_test(values, units, repeats=1024), abs=0.05)


def test_cases_are_flipped_as_one():
    values = np.array([[1.0, 1.0, 1.0, 1.0]])
    assert flip_test(values, Units.of(["a", "a", "a", "a"])) == 1.0
    assert flip_test(values, Units.of(["a", "a", "b", "b"])) == 0.5
    assert np.isnan(flip_test(np.full((1, 2), NAN), Units.of(["a", "b"])))


@pytest.mark.parametrize(("scale", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(scale, alpha):
    assert krippendorff(WORKED, scale) == pytest.approx(alpha, abs=6e-4)


def slow_alpha(values, distance):
    """Over all pairs of answers, as the definition says."""
    columns = [[v for v in column if not np.isnan(v)] for column in values.T]
    columns = [c for c in columns if len(c) >= 2]
    everything = [v for c in columns for v in c]
    n = len(everything)
    observed = sum(distance(a, b) / (len(c) - 1) for c in columns for a, b in itertools.permutations(c, 2)) / n
    expected = sum(distance(a, b) for a, b in itertools.permutations(everything, 2)) / (n * (n - 1))
    return 1 - observed / expected


@pytest.mark.parametrize(
    ("scale", "distance"), [("nominal", lambda a, b: float(a != b)), ("interval", lambda a, b: (a - b) ** 2)]
)
def test_alpha_against_all_pairs(scale, distance):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 4, (3, 15)).astype(float)
    values[rng.random((3, 15)) < 0.3] = NAN
    assert krippendorff(values, scale) == pytest.approx(slow_alpha(values, distance))


def test_alpha_where_there_is_none():
    assert np.isnan(krippendorff(np.array([[1.0, 2.0, 3.0]])))
    assert np.isnan(krippendorff(np.ones((3, 4))))
    assert np.isnan(krippendorff(np.full((2, 2), NAN)))
    with pytest.raises(InputError, match="nominal, ordinal or interval"):
        krippendorff(WORKED, "ratio")


def test_intervals_cover_as_often_as_they_say():
    """One reader: other cases. Several readers with habits of their own: other readers and cases, erring wide."""
    rng = np.random.default_rng(0)
    units = Units.of([str(i) for i in range(40)])
    alone = crossed = guessed = 0
    # Habits of readers and difficulty of cases have variance 0.25 each.
    truth = quad(lambda z: norm.pdf(z) / (1 + np.exp(-(0.6 + np.sqrt(0.5) * z))), -9, 9)[0]
    for trial in range(300):
        hits = (rng.random((1, 40)) < 0.65).astype(float)
        low, high = wilson(int(hits.sum()), 40)
        alone += low <= 0.65 <= high
        logit = 0.6 + rng.normal(0, 0.5, (8, 1)) + rng.normal(0, 0.5, (1, 40))
        answers = (rng.random((8, 40)) < 1 / (1 + np.exp(-logit))).astype(float)
        low, high = mean_interval(answers, units, repeats=300, seed=trial)
        crossed += low <= truth <= high
        guesses = (rng.random(30) < 0.25).sum()
        guessed += guessing_tail(int(guesses), np.full(30, 0.25)) <= 0.05
    assert 0.92 <= alone / 300 <= 0.98
    assert 0.90 <= crossed / 300 <= 0.99
    assert guessed / 300 <= 0.08
