"""Statistics of weighted cases and their bootstrap intervals, against resamplings written out case by case."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain import InputError
from camtrain.evaluation.intervals import Average, interval, intervals
from camtrain.evaluation.resampling import Units, bootstrap_weights
from camtrain.evaluation.score_statistics import ShortcutRisk
from camtrain.evaluation.statistics import AUROC, Effect, EffectShare, Mean, SumStatistic, counted, each_array
from camtrain.metrics.label_auroc import label_auroc
from camtrain.metrics.shortcut_reliance import ShortcutReliance

NAN = np.nan


def with_gaps(rng, shape, gaps=0.3):
    return np.where(rng.random(shape) < gaps, NAN, rng.random(shape))


def truths(rng, shape):
    return rng.choice([0.0, 1.0, NAN], p=[0.5, 0.3, 0.2], size=shape)


def plain_mean(values, pool=None):
    pairs = [v for v in values.ravel() if not np.isnan(v)]
    return sum(pairs) / len(pairs) if pairs else NAN


def plain_effect(changes, truth, classes):
    """`classes`: which truths there are in all of the data."""
    means = []
    for cls in classes:
        chosen = [c for c, t in zip(changes, truth, strict=True) if t == cls and not np.isnan(c)]
        if not chosen:
            return NAN
        means.append(sum(chosen) / len(chosen))
    return sum(means) / len(means) if means else NAN


def classes_of(changes, truth):
    return [cls for cls in (0, 1) if ((truth == cls) & ~np.isnan(changes)).any()]


def plain_share(outside, inside, truth, floor, classes):
    both = ~np.isnan(outside) & ~np.isnan(inside)
    out, into = (plain_effect(np.where(both, x, NAN), truth, classes) for x in (outside, inside))
    if np.isnan(out) or max(out, into) < floor or out + into == 0:
        return NAN
    return out / (out + into)


def plain_area(scores, truth):
    ups = [s for s, t in zip(scores, truth, strict=True) if t == 1 and not np.isnan(s)]
    downs = [s for s, t in zip(scores, truth, strict=True) if t == 0 and not np.isnan(s)]
    if not ups or not downs:
        return NAN
    return sum((u > d) + (u == d) / 2 for u in ups for d in downs) / (len(ups) * len(downs))


def drawn_cases(weights):
    """A row of multiplicities as a list of case numbers."""
    return np.repeat(np.arange(len(weights)), weights.astype(int))


def check(statistic, units, plain, repeats=12, seed=0):
    """Every statistic under weights equals the plain formula on the drawn cases."""
    weights = np.concatenate([np.ones((1, len(units))), bootstrap_weights(units, repeats, seed)])
    got = statistic(weights)
    for row, values in zip(weights, got, strict=True):
        cases = drawn_cases(row)
        expected = [plain(cases, label) for label in range(got.shape[1])]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-15)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 14), labels=st.integers(1, 4))
@settings(max_examples=25)
def test_statistics_equal_plain_formulas_on_drawn_cases(seed, n, labels):
    rng = np.random.default_rng(seed)
    shape = (n, labels)
    units = Units.of([str(i) for i in range(n)], [rng.choice(["p", "q", None]) for _ in range(n)])
    values, inside, truth = with_gaps(rng, shape), with_gaps(rng, shape), truths(rng, shape)
    scores = np.round(with_gaps(rng, shape) * 4)  # many ties
    check(Mean(values), units, lambda c, k: plain_mean(values[c, k]))
    check(AUROC(scores, truth), units, lambda c, k: plain_area(scores[c, k], truth[c, k]))
    check(
        Effect(values, truth),
        units,
        lambda c, k: plain_effect(values[c, k], truth[c, k], classes_of(values[:, k], truth[:, k])),
    )
    both = np.where(np.isnan(inside), NAN, values)
    check(
        EffectShare(values, inside, truth, floor=0.3),
        units,
        lambda c, k: plain_share(values[c, k], inside[c, k], truth[c, k], 0.3, classes_of(both[:, k], truth[:, k])),
    )


def test_blocks_of_the_areas_do_not_change_them(monkeypatch):
    rng = np.random.default_rng(0)
    statistic = AUROC(rng.random((30, 2)), rng.integers(0, 2, (30, 2)))
    weights = bootstrap_weights(Units.of([str(i) for i in range(30)]), 50)
    whole = statistic(weights)
    monkeypatch.setattr("camtrain.evaluation.statistics._AREA_BLOCK", 100)
    np.testing.assert_array_equal(statistic(weights), whole)


def test_area_equals_the_metric():
    rng = np.random.default_rng(1)
    scores, truth = np.round(rng.normal(size=(60, 5)), 1), truths(rng, (60, 5))
    truth[:, 4] = 1  # one class only
    expected = label_auroc(torch.tensor(scores), torch.tensor(truth))
    np.testing.assert_allclose(AUROC(scores, truth)(np.ones((1, 60)))[0], expected.numpy(), rtol=1e-12)


def test_share_equals_the_metric_in_all_averages():
    rng = np.random.default_rng(2)
    n, labels = 40, 6
    before, outside, inside = (rng.random((n, labels)) for _ in range(3))
    outside[rng.random((n, labels)) < 0.2] = NAN
    inside[rng.random((n, labels)) < 0.2] = NAN
    truth = truths(rng, (n, labels))
    before[:, 1] = outside[:, 1] = inside[:, 1] = 0.5  # constant: undefined
    truth[:, 2] = 1  # one class only
    outside[:, 3] = NAN  # never measured
    metric = ShortcutReliance(labels)
    metric.update(*(torch.tensor(x) for x in (before, outside, inside, truth)))
    ours = EffectShare(abs(outside - before), abs(inside - before), truth)
    wanted = {"macro": Average(), "micro": Average("micro")}
    every = {"share": ours, "out": ours.outside_effect, "in": ours.inside_effect}
    got = intervals(every, Units.of([str(i) for i in range(n)]), repeats=2, averages=wanted)
    for key, expected in zip(("out", "in", "share"), metric.per_label(), strict=True):
        np.testing.assert_allclose([row.mean for row in got[key].labels], expected, rtol=1e-12)
    for average in ("macro", "micro"):
        assert got["share"].averages[average].mean == pytest.approx(float(metric.averaged(average)), rel=1e-12)
    assert [row.n for row in got["share"].labels] == metric.pairs.tolist()


def test_risk_is_half_share_and_half_lost_area_under_any_weights():
    rng = np.random.default_rng(3)
    n, labels = 25, 4
    before, after, within = (rng.random((n, labels)) for _ in range(3))
    after[:5, 0] = within[5:8, 1] = NAN
    truth = truths(rng, (n, labels))
    outside, inside = abs(after - before), abs(within - before)
    measured = ~np.isnan(outside + inside)
    area = AUROC(np.where(measured, after, NAN), truth)
    weights = rng.integers(0, 3, (7, n)).astype(float)
    outside[:, 3] = inside[:, 3] = 0.001  # says nothing: no share
    risk = ShortcutRisk(after, outside, inside, truth)
    share, lost = EffectShare(outside, inside, truth)(weights), 1 - area(weights)
    assert np.isnan(share[:, 3]).all()
    expected = np.where(np.isnan(share), lost, (share + lost) / 2)
    np.testing.assert_allclose(risk(weights), expected, rtol=1e-12)
    assert (counted(risk) == (measured & ~np.isnan(truth))).all()
    worst = ShortcutRisk([[0.1], [0.9]], [[0.8], [0.8]], [[0.0], [0.0]], [[1.0], [0.0]])
    assert worst(np.ones((1, 2)))[0, 0] == 1
    with pytest.raises(InputError, match="floor"):
        ShortcutRisk([[0.1]], [[0.1]], [[0.1]], [[1.0]], floor=2)


def test_floor_is_under_both_effects():
    truth = [[1.0, 1.0, 1.0]]
    share = EffectShare([[0.019, 0.021, 0.0]], [[0.019, 0.0, 0.0]], truth)
    np.testing.assert_allclose(share(np.ones((1, 1)))[0], [NAN, 1.0, NAN])
    np.testing.assert_allclose(
        EffectShare([[0.0, 1e-9]], [[0.0, 0.0]], [[1.0, 1.0]], floor=0)(np.ones((1, 1)))[0], [NAN, 1.0]
    )


def test_a_class_that_a_resampling_misses_makes_it_undefined():
    effect = Effect([[0.5], [0.1], [0.3]], [[1.0], [0.0], [0.0]])
    np.testing.assert_allclose(effect(np.array([[1.0, 1, 1], [0, 2, 1], [3, 0, 0]]))[:, 0], [0.35, NAN, NAN])


def test_pooled_effects_of_a_group_leave_out_a_class_that_the_group_lacks():
    changes, truth = np.array([[0.5, 0.1, 0.3], [0.3, 0.2, 0.3]]), np.array([[1.0, 1.0, 0.0], [1.0, NAN, 0.0]])
    averages = {"present": Average("micro", (0, 1)), "both": Average("micro")}
    table = intervals({0: Effect(changes, truth)}, Units.of(["a", "b"]), repeats=2, averages=averages)[0]
    assert table.averages["present"].mean == pytest.approx(0.3)
    assert table.averages["both"].mean == pytest.approx((0.3 + 0.3) / 2)
    changes[0, 2] = 0.9
    table = intervals({0: Effect(changes, truth)}, Units.of(["a", "b"]), repeats=2, averages=averages)[0]
    assert table.averages["both"].mean == pytest.approx((0.3 + 0.6) / 2)


def test_averages():
    values = np.array([[1.0, 0.0, NAN, 0.5], [0.5, NAN, NAN, NAN], [NAN, NAN, NAN, 1.0]])
    averages = {
        "macro": Average(),
        "micro": Average("micro"),
        "g": Average("macro", (1, 3)),
        "gm": Average("micro", (0, 2)),
    }
    table = intervals({"k": Mean(values)}, Units.of(["a", "b", "c"]), repeats=9, averages=averages)["k"]
    assert [row.mean for row in table.labels] == pytest.approx([0.75, 0.0, NAN, 0.75], nan_ok=True)
    expected = {"macro": 0.5, "micro": 3.0 / 5, "g": 0.375, "gm": 0.75}
    assert {name: row.mean for name, row in table.averages.items()} == pytest.approx(expected)
    assert [row.n for row in table.labels] == [2, 1, 0, 2]
    assert {name: row.n for name, row in table.averages.items()} == {"macro": 5, "micro": 5, "g": 3, "gm": 2}
    assert table.averages["gm"].units == 2


def test_averages_under_resampling_equal_drawn_cases():
    rng = np.random.default_rng(3)
    values = with_gaps(rng, (9, 4), gaps=0.6)
    values[:, 2] = NAN
    units, averages = Units.of(list("abcdefghi")), {"macro": Average(), "micro": Average("micro", (0, 1, 2))}
    repeats = 400
    table = intervals({0: Mean(values)}, units, repeats, averages=averages, seed=5)[0]
    macros, micros = [], []
    for row in bootstrap_weights(units, repeats, seed=5):
        drawn = values[drawn_cases(row)]
        macros.append(plain_mean(np.array([plain_mean(column) for column in drawn.T])))
        micros.append(plain_mean(drawn[:, :3]))
    for name, found in (("macro", macros), ("micro", micros)):
        got = table.averages[name]
        assert (got.low, got.high) == pytest.approx(tuple(np.nanquantile(found, [0.025, 0.975])))
        assert got.undefined_repeats == pytest.approx(np.isnan(found).mean())


def test_macro_average_of_resamplings_leaves_out_labels_undefined_in_the_data():
    # The second label is under the floor in the data, but not in all resamplings.
    outside = np.array([[0.5, 0.0]] * 5 + [[0.5, 0.08]])
    share = EffectShare(outside, np.array([[0.5, 0.0]] * 6), np.ones((6, 2)))
    table = intervals({0: share}, Units.of(list("abcdef")), repeats=500)[0]
    assert np.isnan(table.labels[1].mean)
    assert np.isnan(table.labels[1].low)
    assert 0 < table.labels[1].undefined_repeats < 1
    assert (table.averages["macro"].low, table.averages["macro"].high) == (0.5, 0.5)


def test_areas_have_no_micro_average_and_sums_do():
    rng = np.random.default_rng(0)
    area = AUROC(rng.random((9, 2)), rng.integers(0, 2, (9, 2)))
    assert list(intervals({0: area}, Units.of(list("abcdefghi")), repeats=2)[0].averages) == ["macro"]
    assert not isinstance(area, SumStatistic)
    assert isinstance(Mean(np.ones((2, 1))), SumStatistic)


def test_interval_of_one_unit_is_nan():
    values = np.array([[1.0, 1.0, NAN], [2.0, NAN, NAN], [3.0, NAN, NAN]])
    rows = interval(Mean(values), Units.of(list("abc")), repeats=50)
    assert rows[0].low < 2 < rows[0].high
    assert (rows[1].mean, rows[1].n, rows[1].units) == (1.0, 1, 1)
    assert np.isnan([rows[1].low, rows[1].high, rows[2].mean, rows[2].low]).all()
    assert rows[2].undefined_repeats == 1.0
    one_patient = interval(Mean(values), Units.of(list("abc"), ["p"] * 3), repeats=50)[0]
    assert one_patient.n == 3
    assert one_patient.units == 1
    assert np.isnan(one_patient.low)


def test_area_interval_needs_two_units_of_each_class():
    truth = np.array([[1, 1], [0, 1], [0, 0], [0, 0]], dtype=float)
    rows = interval(AUROC(np.arange(8).reshape(4, 2), truth), Units.of(list("abcd")), repeats=300)
    assert np.isnan(rows[0].low)
    assert rows[0].mean == 0
    assert rows[0].undefined_repeats == pytest.approx((3 / 4) ** 4 + (1 / 4) ** 4, abs=0.1)
    assert (rows[1].low, rows[1].high) == (0, 0)


def test_undefined_repeats_are_left_out_and_counted():
    values = np.full((10, 1), NAN)
    values[:2, 0] = [1.0, 2.0]
    row = interval(Mean(values), Units.of([str(i) for i in range(10)]), repeats=4000)[0]
    assert row.undefined_repeats == pytest.approx(0.8**10, abs=0.02)
    assert (row.low, row.high) == (1, 2)


def test_interval_equals_scipy():
    rng = np.random.default_rng(4)
    values = rng.exponential(size=40)
    ours = interval(Mean(values[:, None]), Units.of([str(i) for i in range(40)]), repeats=20_000, level=0.9)[0]
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=0
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_patients_widen_the_interval():
    rng = np.random.default_rng(5)
    values = np.repeat(rng.normal(size=20), 5)[:, None]
    ids, patients = [str(i) for i in range(100)], [f"p{i // 5}" for i in range(100)]
    by_case, by_patient = (interval(Mean(values), Units.of(ids, p))[0] for p in (None, patients))
    ratio = (by_patient.high - by_patient.low) / (by_case.high - by_case.low)
    assert ratio == pytest.approx(5**0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["normal", "binary", "area", "patients"])
def test_95_percent_intervals_cover_in_95_percent_of_samples(kind):
    # 400 labels are 400 independent samples of the same size.
    rng, n, samples = np.random.default_rng(6), 80, 400
    patients, shape = None, (n, samples)
    if kind == "normal":
        statistic, true = Mean(rng.normal(3.0, 2.0, shape)), 3.0
    elif kind == "binary":
        statistic, true = Mean((rng.random(shape) < 0.3).astype(float)), 0.3
    elif kind == "patients":
        patients = [f"p{i // 2}" for i in range(n)]
        statistic, true = Mean(np.repeat(rng.normal(size=(n // 2, samples)), 2, axis=0)), 0.0
    else:
        truth = np.broadcast_to(np.arange(n)[:, None] % 2, shape)
        statistic, true = AUROC(rng.normal(size=shape) + truth, truth), scipy.stats.norm.cdf(1 / 2**0.5)
    rows = interval(statistic, Units.of([str(i) for i in range(n)], patients), repeats=1000)
    covered = np.mean([row.low <= true <= row.high for row in rows])
    assert 0.90 <= covered <= 0.98


def test_progress_and_shared_draws(monkeypatch):
    monkeypatch.setattr("camtrain.evaluation.intervals.bootstrap_chunks", lambda *a: iter(np.split(weights, 5)))
    rng = np.random.default_rng(7)
    units = Units.of([str(i) for i in range(8)])
    weights = bootstrap_weights(units, 20)
    said = []
    both = {"a": Mean(rng.random((8, 2))), "b": Mean(rng.random((8, 2)))}
    tables = intervals(both, units, repeats=20, progress=lambda done, total: said.append((done, total)))
    assert said == [(4, 20), (8, 20), (12, 20), (16, 20), (20, 20)]
    monkeypatch.undo()
    assert intervals({"b": both["b"]}, units, repeats=20)["b"] == tables["b"]


def test_each_array_keeps_other_fields():
    share = EffectShare(np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 2)), floor=0.5)
    less = each_array(lambda array: array[:2], share)
    assert less.floor == 0.5
    assert less.truth.shape == (2, 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mean(np.ones(3)), r"Mean expects values of shape \(cases, labels\)"),
        (lambda: Mean([[np.inf]]), "Mean got Inf in values"),
        (lambda: Effect([[0.5]], [[2.0]]), "expected truth 0, 1 or NaN = unknown, got 2"),
        (lambda: Effect([[-0.5]], [[1.0]]), "expected absolute changes, got -0.5"),
        (lambda: Effect([[0.5]], [[1.0, 0.0]]), r"Effect expects truth .* got \(1, 2\) beside \(1, 1\)"),
        (lambda: EffectShare([[0.5]], [[0.5]], [[1.0]], floor=2), "expected floor .* got 2"),
        (lambda: EffectShare([[0.5]], [[-0.5]], [[1.0]]), "expected absolute changes"),
        (lambda: AUROC([[0.5]], [[0.25]]), "expected truth 0, 1"),
        (lambda: interval(Mean([[1.0]]), Units.of(["a", "b"])), "expected 2 cases for None, .* got 1"),
        (lambda: interval(Mean([[1.0]]), Units.of(["a"]), level=95), "confidence level between 0 and 1, got 95"),
        (lambda: interval(Mean([[1.0]]), Units.of(["a"]), repeats=0), "at least one resampling"),
        (
            lambda: intervals({0: Mean([[1.0]])}, Units.of(["a"]), averages={"lungs": Average("macro", (0, 3))}),
            r"average 'lungs' expects columns of labels from 0 to 0, got \[3\]",
        ),
        (
            lambda: intervals({0: Mean([[1.0]])}, Units.of(["a"]), averages={"none": Average("macro", ())}),
            "average 'none' expects columns .* got none",
        ),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(InputError, match=says):
        make()
