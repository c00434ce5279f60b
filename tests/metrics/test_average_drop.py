"""AverageDrop and AverageIncrease against a loop written from the definitions of Grad-CAM++."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from camtrain import InputError
from camtrain.metrics import AverageDrop, AverageIncrease, average_drop, average_increase

SCORES = {
    "drop": (AverageDrop, average_drop, lambda p, o: max(0.0, p - o) / p),
    "increase": (AverageIncrease, average_increase, lambda p, o: float(p < o)),
}
both = pytest.mark.parametrize("name", SCORES)


def _case(batch=5, labels=4, seed=0, dtype=torch.float64):
    """Probabilities with unknown and absent labels, tiny and equal ones, and pairs that were not computed."""
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.rand(2, batch, labels, generator=generator).to(dtype)
    label = (torch.rand(batch, labels, generator=generator) < 0.7).float()
    if batch > 2 and labels > 3:
        label[0, 0] = torch.nan
        label[:, -1] = 0
        label[1] = 1
        before[1, 0], after[1, 0] = 0.9, torch.nan
        before[1, 1] = after[1, 1] = 0.75
        before[1, 2] = 0.01
        label[2, 0], before[2, 0], after[2, 0] = 1, 0.0, 0.5
    return before, after, label


def _loop(score, before, after, label, least=0.5):
    table, counted = np.full(label.shape, np.nan), np.zeros(label.shape, bool)
    for b in range(label.shape[0]):
        for k in range(label.shape[1]):
            p, o = before[b, k].item(), after[b, k].item()
            counted[b, k] = label[b, k] == 1 and not math.isnan(o)
            if counted[b, k] and p >= least and p > 0:
                table[b, k] = score(p, o)
    return table, counted


@both
@pytest.mark.parametrize("least", [0.0, 0.5, 0.7])
def test_equals_the_loop(name, least):
    kind, twin, score = SCORES[name]
    case = _case()
    table, counted = _loop(score, *case, least)
    np.testing.assert_allclose(twin(*case, min_probability=least), table, atol=1e-15)
    metric = kind(4, "none", min_probability=least)
    for rows in (slice(0, 2), slice(2, 5)):
        metric.update(*(t[rows] for t in case))
    per_label = np.array([c[~np.isnan(c)].mean() if (~np.isnan(c)).any() else np.nan for c in table.T])
    np.testing.assert_allclose(metric.compute(), per_label, atol=1e-15)
    np.testing.assert_allclose(metric.averaged("macro"), np.nanmean(per_label), atol=1e-15)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(table), atol=1e-15)
    assert metric.pairs.tolist() == counted.sum(0).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(metric.undefined_rate(), (np.isnan(table) & counted).sum(0) / counted.sum(0))


def test_hand_computed():
    before, after = torch.tensor([[0.8, 0.5, 0.6]]), torch.tensor([[0.2, 0.5, 0.9]])
    torch.testing.assert_close(average_drop(before, after, torch.ones(1, 3)), torch.tensor([[0.75, 0, 0]]).double())
    # Equal is no increase.
    assert average_increase(before, after, torch.ones(1, 3)).tolist() == [[0, 0, 1]]


@both
def test_pairs_asked_for_without_an_answer_are_undefined(name):
    kind = SCORES[name][0]
    before, after = torch.tensor([[0.9, 0.9, 0.9]]), torch.tensor([[torch.nan, torch.nan, 0.1]])
    metric = kind(3, "none")
    metric.update(before, after, torch.ones(1, 3), asked=torch.tensor([[True, False, False]]))
    assert metric.pairs.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(metric.undefined_rate(), [1, np.nan, 0])
    assert metric.compute().isnan().tolist() == [True, True, False]


@both
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 6), labels=st.integers(1, 4))
def test_shares_in_bounds_and_exclusive(name, seed, batch, labels):
    before, after, label = _case(batch, labels, seed)
    score = SCORES[name][1](before, after, label, min_probability=0.0)
    known = score[~score.isnan()]
    assert ((known >= 0) & (known <= 1)).all()
    drop, rise = (t(before, after, label, min_probability=0.0) for t in (average_drop, average_increase))
    assert not ((drop > 0) & (rise > 0)).any()


@both
def test_half_precision_is_scored_in_full(name):
    case = _case(dtype=torch.float16)
    expected = SCORES[name][1](case[0].double(), case[1].double(), case[2])
    torch.testing.assert_close(SCORES[name][1](*case), expected, equal_nan=True)


@both
def test_nothing_to_count_is_no_score(name):
    metric = SCORES[name][0](2)
    metric.update(torch.rand(3, 2), torch.full((3, 2), torch.nan), torch.ones(3, 2))
    metric.update(torch.rand(3, 2), torch.rand(3, 2), torch.zeros(3, 2))
    metric.update(torch.rand(0, 2), torch.rand(0, 2), torch.ones(0, 2))
    assert metric.compute().isnan()
    assert metric.undefined_rate().isnan()
    assert metric.pairs.tolist() == [0, 0]


@both
def test_torchmetrics_habits(name):
    case = _case()
    metric = SCORES[name][0](4, "none")
    first = metric(*case)
    with torch.inference_mode():
        metric.reset()
    for again in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301 - our own bytes
        again.reset()
        again.update(*case)
        torch.testing.assert_close(again.compute(), first, equal_nan=True)
    assert not metric.state_dict()
    assert metric.higher_is_better is (name == "increase")


def test_a_collection_keeps_them_apart():
    case = _case()
    metrics = {"drop": AverageDrop(4), "rise": AverageIncrease(4), "all": AverageDrop(4, min_probability=0.1)}
    collection = MetricCollection({k: v.clone() for k, v in metrics.items()})
    for metric in (collection, *metrics.values()):
        metric.update(case[0], case[1], torch.zeros(5, 4))
        metric.update(*case)
    for name, value in collection.compute().items():
        torch.testing.assert_close(value, metrics[name].compute(), msg=name)


@both
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"before": torch.rand(2, 3, 4)}, r"one shape \(B, L\)"),
        ({"after": torch.rand(2, 4)}, r"got after of shape \(2, 4\)"),
        ({"after": torch.ones(2, 3, dtype=torch.long)}, "floating point"),
        ({"before": torch.full((2, 3), 3.5)}, "probabilities in 0..1 for before, got 3.5"),
        ({"after": torch.full((2, 3), -2.0)}, "for after, got -2: pass the sigmoid"),
        ({"label": torch.ones(2)}, r"\(2, 3\), got \(2,\)"),
        ({"label": torch.full((2, 3), 0.25)}, "got 0.25"),
        ({"asked": torch.ones(2, 3)}, "asked as bool"),
        ({"asked": torch.ones(2, dtype=torch.bool)}, "asked as bool"),
    ],
)
def test_wrong_input_is_refused(name, change, says):
    good = {"before": torch.rand(2, 3), "after": torch.rand(2, 3), "label": torch.ones(2, 3)}
    with pytest.raises(InputError, match=says):
        SCORES[name][0](3).update(**good | change)


@both
def test_wrong_settings_are_refused(name):
    kind, twin, _ = SCORES[name]
    for least in (-0.1, 1.5, True, "half", torch.nan):
        with pytest.raises(InputError, match=r"min_probability in 0\.\.1"):
            kind(3, min_probability=least)
        with pytest.raises(InputError, match="min_probability"):
            twin(torch.rand(1, 1), torch.rand(1, 1), torch.ones(1, 1), min_probability=least)
    with pytest.raises(InputError, match="made for 4 labels, got 3"):
        kind(4).update(torch.rand(2, 3), torch.rand(2, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="nearest: macro"):
        kind(3, "marco")
