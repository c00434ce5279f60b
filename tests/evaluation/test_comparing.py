"""Paired comparison of two models, against scipy's permutation test and slow swaps of raw numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats

from camtrain import InputError
from camtrain.evaluation.comparing import compare, holm, permutation_p
from camtrain.evaluation.intervals import Average
from camtrain.evaluation.pairing import Pair, Scored, aligned
from camtrain.evaluation.resampling import Units, bootstrap_weights, swap_chunks
from camtrain.evaluation.score_statistics import ShortcutRisk
from camtrain.evaluation.statistics import AUROC, Effect, EffectShare, Mean

NAN = np.nan
ONE = {"macro": Average()}


def names(n, start=0):
    return [f"case{i}" for i in range(start, start + n)]


def labels(n):
    return [f"label{i}" for i in range(n)]


def scored(statistic, **other):
    n, width = statistic.strata[0].shape
    return Scored(**{"ids": names(n), "labels": labels(width), "statistics": {"it": statistic}, **other})


def rows(a, b, **options):
    return compare(scored(a), scored(b), **options).tables["it"].labels


def two(kind, n, width, seed, gaps=0.2):
    """A statistic of two models, with a real difference, ties and gaps."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0.0, 1.0, NAN], p=[0.5, 0.4, 0.1], size=(n, width))
    truth[0], truth[1] = 0, 1

    def numbers(shift):
        found = np.round(np.abs(rng.normal(size=(n, width)) + shift), 1)
        found[2:] = np.where(rng.random((n - 2, width)) < gaps, NAN, found[2:])
        return found

    makers = {
        "mean": lambda shift: Mean(numbers(shift)),
        "effect": lambda shift: Effect(numbers(shift), truth),
        "share": lambda shift: EffectShare(numbers(shift), numbers(0), truth),
        "area": lambda shift: AUROC(numbers(shift) * np.where(truth == 1, 1 + shift, 1), truth),
    }
    return makers[kind](0), makers[kind](0.5)


KINDS = ["mean", "effect", "share", "area"]


@dataclass(frozen=True, eq=False)
class Slow:
    """Hides from the comparison that a statistic has a fast path."""

    of: object

    @property
    def strata(self):
        return self.of.strata

    def __call__(self, weights):
        return self.of(weights)


def swapped_by_hand(a, b, swap):
    """Both statistics with the raw rows of swapped cases exchanged."""
    fields = [name for name in vars(a) if isinstance(getattr(a, name), np.ndarray)]
    chosen = swap[:, None] == 1
    new = [
        type(a)(**{name: np.where(chosen, getattr(y, name), getattr(x, name)) for name in fields if name != "floor"})
        for x, y in ((a, b), (b, a))
    ]
    return new[1](np.ones((1, len(swap))))[0] - new[0](np.ones((1, len(swap))))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_swaps_equal_exchanged_raw_numbers(kind, seed):
    a, b = two(kind, n=9, width=3, seed=seed)
    pair = Pair.of(a, b, ONE, "it")
    swaps = np.random.default_rng(seed).integers(0, 2, (20, 9)).astype(float)
    got = pair.swapped(swaps)
    clean = [
        type(s)(**{k: v for k, v in vars(s).items() if k in type(s).__dataclass_fields__}) for s in (pair.a, pair.b)
    ]
    expected = np.array([swapped_by_hand(*clean, swap) for swap in swaps])
    np.testing.assert_allclose(got[:, :3], expected, atol=1e-12)
    np.testing.assert_allclose(got[:, 3], np.nanmean(expected[:, ~np.isnan(pair.values[2][:3])], axis=1), atol=1e-12)


def test_areas_under_swaps_are_linear_and_equal_the_general_path():
    a, b = two("area", n=40, width=4, seed=3)
    pair = Pair.of(a, b, {}, "it")
    slow = Pair(pair.a, pair.b, pair.lost, {})
    slow.__dict__["_stacked"] = Slow(pair._stacked)
    swaps = np.random.default_rng(0).integers(0, 2, (50, 40)).astype(float)
    np.testing.assert_allclose(pair.swapped(swaps), slow.swapped(swaps), atol=1e-12)


@pytest.mark.parametrize("kind", ["mean", "area"])
def test_exact_p_equals_scipy(kind):
    n = 9
    a, b = two(kind, n=n, width=2, seed=5, gaps=0)
    got = rows(a, b)
    raw = {"mean": "values", "area": "scores"}[kind]
    for column in range(2):
        x, y = getattr(a, raw)[:, column], getattr(b, raw)[:, column]
        if kind == "mean":
            statistic = np.mean
        else:
            truth = a.truth[:, column]
            x, y = (scipy.stats.rankdata(each) for each in (x, y))  # an area knows no scale

            def statistic(x, truth=truth):
                return AUROC(x[:, None], truth[:, None])(np.ones((1, n)))[0, 0]

        theirs = scipy.stats.permutation_test(
            (x, y), lambda x, y, f=statistic: f(y) - f(x), permutation_type="samples", n_resamples=10**4
        )
        # scipy doubles the smaller tail; the distribution is symmetric, so that is the two-sided share.
        assert got[column].difference == pytest.approx(theirs.statistic)
        assert got[column].p == pytest.approx(theirs.pvalue)


def test_areas_do_not_depend_on_the_scale_of_the_logits():
    a, b = two("area", n=30, width=2, seed=7, gaps=0)
    shifted = AUROC(2.0**-10 * np.asarray(b.scores), b.truth)  # exact, so that no ties appear
    for one, other in zip(rows(a, b), rows(a, shifted), strict=True):
        assert one.p == other.p
        assert one.difference == pytest.approx(other.difference)


def test_random_p_equals_scipy():
    rng = np.random.default_rng(6)
    x = rng.normal(size=40)
    y = x + rng.normal(0.25, 0.8, size=40)
    got = rows(Mean(x[:, None]), Mean(y[:, None]), repeats=20_000)[0]
    theirs = scipy.stats.permutation_test(
        (x, y), lambda x, y: np.mean(y - x), permutation_type="samples", n_resamples=20_000, rng=0
    )
    assert 0.01 < theirs.pvalue < 0.3
    assert got.p == pytest.approx(theirs.pvalue, abs=0.01)
    assert got.p * 20_001 == pytest.approx(round(got.p * 20_001))


@pytest.mark.parametrize("kind", KINDS)
def test_type_one_error_is_the_level(kind):
    # 400 labels are 400 independent experiments without a difference.
    rng, n, width = np.random.default_rng(8), 30, 400
    truth = np.broadcast_to((np.arange(n) % 2)[:, None], (n, width)).astype(float)
    case = rng.normal(size=(n, width)) + truth  # both models see the same case

    def numbers():
        return np.abs(case + rng.normal(size=(n, width)))

    make = {
        "mean": lambda: Mean(numbers()),
        "effect": lambda: Effect(numbers(), truth),
        "share": lambda: EffectShare(numbers(), numbers(), truth),
        "area": lambda: AUROC(numbers(), truth),
    }[kind]
    p = np.array([row.p for row in rows(make(), make(), repeats=400)])
    # Binomial(400, level): within 3 standard deviations.
    assert abs((p <= 0.05).mean() - 0.05) < 0.033
    assert abs((p <= 0.5).mean() - 0.5) < 0.075


def test_swapping_cases_instead_of_patients_would_be_too_sure():
    rng, width = np.random.default_rng(9), 300
    per_patient = np.repeat(rng.normal(size=(15, width)), 4, axis=0)  # four equal scans each
    a, b = Mean(np.zeros((60, width))), Mean(per_patient)
    patients = [f"p{i // 4}" for i in range(60)]
    honest = compare(scored(a, patients=patients), scored(b), repeats=400)
    naive = compare(scored(a), scored(b), repeats=400)
    assert (honest.units, naive.units) == (15, 60)
    share = [np.mean([row.p <= 0.05 for row in c.tables["it"].labels]) for c in (honest, naive)]
    assert share[0] < 0.09
    assert share[1] > 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_interval_uses_the_same_draws_for_both(kind):
    a, b = two(kind, n=25, width=2, seed=10, gaps=0)
    got = rows(a, b, repeats=300, seed=4)
    weights = bootstrap_weights(Units.of(names(25)), 300, seed=4)
    differences = b(weights) - a(weights)
    for column, row in enumerate(got):
        assert (row.low, row.high) == pytest.approx(tuple(np.nanquantile(differences[:, column], [0.025, 0.975])))
        assert row.undefined_repeats == np.isnan(differences[:, column]).mean()


def test_equal_models_differ_by_nothing():
    a, _ = two("share", n=30, width=3, seed=11)
    for row in rows(a, a):
        assert (row.difference, row.low, row.high, row.p, row.p_holm, row.lost) == (0, 0, 0, 1, 1, 0)


def test_exchanging_the_models_changes_the_sign_only():
    a, b = two("area", n=30, width=3, seed=12)
    for one, other in zip(rows(a, b), rows(b, a), strict=True):
        assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
        assert (one.p, one.a, one.b) == (other.p, other.b, other.a)


def test_only_shared_cases_are_compared_by_id():
    a = scored(Mean([[1.0], [2.0], [3.0], [9.0]]), ids=["w", "x", "y", "z"])
    b = scored(Mean([[3.5], [1.5], [2.5], [7.0], [7.0]]), ids=["y", "w", "x", "v", "u"])
    got = compare(a, b)
    row = got.tables["it"].labels[0]
    assert (got.cases, got.only_a, got.only_b, got.exact) == (3, 1, 2, True)
    assert (row.a, row.b, row.difference, row.n, row.units) == (2.0, 2.5, 0.5, 3, 3)
    assert row.p == 2 / 8


def test_pairs_undefined_in_one_model_are_lost_and_counted():
    a = Mean([[1.0, 1.0], [NAN, 1.0], [NAN, NAN], [2.0, 3.0]])
    b = Mean([[2.0, NAN], [5.0, NAN], [NAN, NAN], [4.0, 4.0]])
    table = compare(scored(a), scored(b)).tables["it"]
    first, second = table.labels
    assert (first.a, first.b, first.n, first.lost) == (1.5, 3.0, 2, 1)
    assert (second.a, second.b, second.n, second.lost) == (3.0, 4.0, 1, 2)
    assert second.p == 1.0
    assert np.isnan(second.low)
    macro, micro = table.averages["macro"], table.averages["micro"]
    assert (macro.difference, macro.n, macro.lost) == (1.25, 3, 3)
    assert micro.difference == pytest.approx((1 + 2 + 1) / 3)


def test_nothing_left_is_nan():
    row = rows(Mean([[1.0], [NAN], [1.0]]), Mean([[NAN], [1.0], [NAN]]))[0]
    assert (row.n, row.lost) == (0, 3)
    assert np.isnan([row.a, row.difference, row.low, row.p, row.p_holm]).all()


def test_average_rows_have_their_own_test():
    rng = np.random.default_rng(13)
    a = rng.normal(size=(8, 5))
    b = a + rng.normal(0.2, 0.5, size=(8, 5))
    table = compare(scored(Mean(a)), scored(Mean(b))).tables["it"]
    signs = np.array(list(itertools.product([1, -1], repeat=8)))
    permuted = signs @ (b - a).mean(axis=1) / 8
    expected = (np.abs(permuted) >= abs(permuted[0]) - 1e-12).mean()
    for row in table.averages.values():
        assert row.difference == pytest.approx((b - a).mean())
        assert row.p == row.p_holm == pytest.approx(expected)


def test_labels_in_another_order_are_aligned():
    values = np.arange(6.0).reshape(2, 3)
    a = scored(Mean(values), labels=["p", "q", "r"])
    b = scored(Mean(values[:, ::-1]), labels=["r", "q", "p"])
    assert [row.difference for row in compare(a, b).tables["it"].labels] == [0, 0, 0]


def test_numbers_of_whole_cases_have_one_row_and_no_averages():
    a = Scored(names(3), ["p", "q"], {"tau": Mean([[0.0], [0.5], [1.0]]), "only_a": Mean(np.ones((3, 2)))})
    b = Scored(names(3), ["q", "p"], {"tau": Mean([[0.5], [1.0], [1.5]])})
    got = compare(a, b)
    assert [row.difference for row in got.tables["tau"].labels] == [0.5]
    assert got.tables["tau"].averages == {}
    assert got.left_out == ("only_a",)


def test_patients_may_be_known_to_one_model_only():
    a = scored(Mean(np.ones((5, 1))), patients=["p", None, "p", "", None])
    b = scored(Mean(np.ones((5, 1))), patients=[None, "q", "p", "q", None])
    assert aligned(a, b)[1].index.tolist() == [0, 1, 0, 1, 2]


def test_macro_averages_of_both_models_are_over_the_same_labels():
    # The second label moves in the first model only, under the floor in the other: no share to compare.
    a = EffectShare([[0.5, 0.4]] * 3, [[0.5, 0.1]] * 3, np.ones((3, 2)))
    b = EffectShare([[0.6, 0.0]] * 3, [[0.2, 0.0]] * 3, np.ones((3, 2)))
    table = compare(scored(a), scored(b)).tables["it"]
    macro = table.averages["macro"]
    assert (macro.a, macro.b, macro.difference, macro.n) == pytest.approx((0.5, 0.75, 0.25, 3))
    assert table.labels[1].a == pytest.approx(0.8)
    assert np.isnan([table.labels[1].b, table.labels[1].difference, table.labels[1].p]).all()


def test_progress_ends_at_the_total():
    said = []
    rng = np.random.default_rng(0)
    a, b = (Mean(rng.random((20, 1))) for _ in "ab")
    compare(scored(a), scored(b), repeats=50, progress=lambda done, total: said.append((done, total)))
    assert said[-1] == (100, 100)
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_undefined_swaps_are_left_out_of_p():
    swapped = np.array([[1.0], [NAN], [-1.0], [0.5]])
    assert permutation_p(np.array([1.0]), swapped, exact=True) == pytest.approx(2 / 3)
    assert permutation_p(np.array([1.0]), swapped, exact=False) == pytest.approx(3 / 4)
    assert np.isnan(permutation_p(np.array([NAN]), swapped, exact=False))


def test_ties_stay_ties_whatever_the_order_of_a_sum():
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last digit, and so may sums over swaps.
    a, b = np.zeros((4, 1)), np.array([[0.1], [0.2], [0.3], [0.0]])
    row = rows(Mean(a), Mean(b - a))[0]
    sizes = [abs(s @ b[:, 0]) for s in np.array(list(itertools.product([1, -1], repeat=4)))]
    assert row.p == np.mean(np.round(sizes, 9) >= 0.6)


def test_holm_by_hand_and_bounds():
    p = np.array([0.01, 0.02, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.04, 0.04, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0
    assert np.isnan(holm([NAN])).all()
    rng = np.random.default_rng(14)
    for _ in range(50):
        p = rng.random(rng.integers(1, 8)) ** 3
        # Step-down by hand: stop at the first p above alpha / (tests left).
        for alpha in (0.01, 0.05, 0.3):
            rejected = set()
            for left, index in zip(range(len(p), 0, -1), np.argsort(p), strict=True):
                if p[index] > alpha / left:
                    break
                rejected.add(int(index))
            assert set(np.flatnonzero(holm(p) <= alpha).tolist()) == rejected


def test_holm_family_is_the_labels_of_one_table():
    rng = np.random.default_rng(15)
    a = rng.normal(size=(30, 4))
    b = a + rng.normal(0.3, 0.7, size=(30, 4))
    got = rows(Mean(a), Mean(b))
    assert [row.p_holm for row in got] == holm([row.p for row in got]).tolist()


def test_swaps_of_the_test_are_those_of_units():
    units = Units.of(names(12), [f"p{i % 3}" for i in range(12)])
    assert len(np.concatenate(list(swap_chunks(units, 50)))) == 8


ONES = Mean(np.ones((2, 2)))
TRUTH = np.array([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (scored(ONES), scored(ONES, ids=["x", "y"]), "got none in common: the first has case0, case1, the second x, y"),
        (
            scored(ONES, labels=["nodule", "mass"]),
            scored(ONES, labels=["nodules", "mass"]),
            "same labels, but only the first has nodule and only the second has nodules; nearest: nodules",
        ),
        (scored(ONES), scored(Mean(np.ones((2, 3)))), "only the second has label2"),
        (scored(ONES), scored(ONES, statistics={"that": ONES}), "first has it, the second that: evaluate both"),
        (scored(ONES, ids=["x", "x"]), scored(ONES), "case 'x' stands twice in the first evaluation"),
        (scored(ONES), scored(ONES, labels=["x", "x"]), "label 'x' stands twice in the second evaluation"),
        (scored(ONES), scored(ONES, ids=names(3)), "expected 3 cases x 2 labels for 'it' of the second .* got 2 x 2"),
        (scored(ONES, patients=["p"]), scored(ONES), "one patient for each of 2 cases of the first evaluation, got 1"),
        (
            scored(ONES, patients=["p", "q"]),
            scored(ONES, patients=["p", "r"]),
            "'case1' belongs to patient 'q' in the first evaluation and to 'r'",
        ),
        (
            scored(AUROC(TRUTH, TRUTH)),
            scored(AUROC(TRUTH, 1 - TRUTH)),
            "4 pairs of case and label have another truth in the second",
        ),
        (scored(AUROC(TRUTH, TRUTH)), scored(ONES), "AUROC of 2 columns in the first evaluation and Mean of 2"),
        (scored(EffectShare(TRUTH, TRUTH, TRUTH)), scored(EffectShare(TRUTH, TRUTH, TRUTH, 0.1)), "another floor"),
    ],
)
def test_bad_input(a, b, says):
    with pytest.raises(InputError, match=says):
        compare(a, b)


def test_bad_level_is_refused():
    with pytest.raises(InputError, match="confidence level"):
        compare(scored(ONES), scored(ONES), level=1)


def test_risks_of_two_scales_are_compared_by_ranks():
    """Probabilities of the second model are those of the first, squeezed: nothing differs, whatever changes places."""
    rng = np.random.default_rng(0)
    after, outside, inside = (rng.random((30, 2)) for _ in range(3))
    after[0, 0] = np.nan
    outside[0, 0] = np.nan
    truth = (rng.random((30, 2)) < 0.4).astype(float)
    a, b = (ShortcutRisk(scores, outside, inside, truth) for scores in (after, 0.9 + after / 100))
    pair = Pair.of(a, b, {}, "risk")
    every = np.ones((1, 30))
    for found, given in zip(pair.values, (a, b), strict=False):
        np.testing.assert_allclose(found, given(every)[0])
    swaps = rng.integers(0, 2, (20, 30)).astype(float)
    np.testing.assert_allclose(pair.swapped(swaps), 0, atol=1e-12)
