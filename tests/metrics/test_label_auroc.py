"""LabelAUROC against torchmetrics and against all pairs of cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc

from camtrain import InputError
from camtrain.metrics import LabelAUROC, label_auroc


def _pairs(score, truth):
    """Share of (present, absent) pairs in the right order, ties count half."""
    present, absent = score[truth == 1], score[truth == 0]
    if not len(present) or not len(absent):
        return np.nan
    return np.mean([1.0 if p > a else 0.5 if p == a else 0.0 for p, a in itertools.product(present, absent)])


def _batch(cases=40, labels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(cases, labels, generator=generator).mul(3).round(decimals=0)  # many ties
    label = (torch.rand(cases, labels, generator=generator) < 0.4).float()
    label[::7, 1] = torch.nan
    label[:, 2], label[:, 3], label[:, 4] = 0, 1, torch.nan
    return scores, label


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cases=st.integers(1, 30))
def test_equals_counting_pairs(seed, cases):
    scores, label = _batch(cases, seed=seed)
    expected = [_pairs(scores[:, k].numpy(), label[:, k].numpy()) for k in range(6)]
    np.testing.assert_allclose(label_auroc(scores, label), expected, atol=1e-12)


def test_equals_torchmetrics():
    scores, label = _batch(200)
    probabilities = scores.sigmoid()
    for k in (0, 1, 5):
        known = ~label[:, k].isnan()
        theirs = binary_auroc(probabilities[known, k], label[known, k].long())
        assert label_auroc(probabilities, label)[k].item() == pytest.approx(theirs.item(), abs=1e-6)
        assert label_auroc(scores, label)[k].item() == pytest.approx(theirs.item(), abs=1e-6)


def test_batches_add_up_and_undefined_labels_are_left_out():
    scores, label = _batch()
    metric = LabelAUROC(6)
    for rows in torch.arange(40).split(7):
        metric.update(scores[rows], label[rows])
    expected = label_auroc(scores, label)
    torch.testing.assert_close(metric.averaged("none"), expected, equal_nan=True)
    torch.testing.assert_close(metric.compute(), expected.nanmean())
    assert expected[2:5].isnan().all()
    assert metric.undefined_rate() == 0.5
    assert metric.pairs.tolist() == (~label.isnan()).sum(0).tolist()


@pytest.mark.parametrize("sizes", [[4] * 100, [3, 3, 2, 3, 1] * 20, list(range(20, 0, -1))])
def test_many_batches_leave_few_tensors_and_keep_their_order(sizes):
    """One small tensor per batch would keep the allocator from joining what the network has freed around it."""
    scores, label = _batch(sum(sizes))
    metric, most = LabelAUROC(6), 0
    for rows in torch.arange(sum(sizes)).split(sizes):
        given = scores[rows].clone(), label[rows].clone()
        metric.update(*given)
        most = max(most, len(metric.scores), len(metric.labels))
        for tensor in given:
            tensor.fill_(torch.nan)  # what the user does to a batch later does not reach the scores
    assert most <= math.log2(sum(sizes)) + 1
    kept = metric.rows()
    torch.testing.assert_close(kept[0], scores, rtol=0, atol=0)
    torch.testing.assert_close(kept[1], label, rtol=0, atol=0, equal_nan=True)


def test_large_logits_keep_their_order():
    # A sigmoid in float32 makes these equal.
    assert label_auroc(torch.tensor([[30.0], [40.0]]), torch.tensor([[0.0], [1.0]])).item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores(dtype):
    scores, label = _batch()
    torch.testing.assert_close(label_auroc(scores.to(dtype), label), label_auroc(scores, label), equal_nan=True)


def test_nan_score_leaves_its_label_undefined():
    scores, label = _batch()
    scores[3, 0] = torch.nan
    label[3, 0] = 1
    area = label_auroc(scores, label)
    assert area[0].isnan()
    assert not area[5].isnan()


def test_without_data_there_is_no_area():
    metric = LabelAUROC(3)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    assert metric.averaged("none").isnan().tolist() == [True] * 3
    assert metric.undefined_rate() == 1


@pytest.mark.parametrize(
    ("scores", "label", "says"),
    [
        (torch.zeros(2, 3, 1), torch.zeros(2, 3), r"scores of shape \(B, L\)"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), "floating point"),
        (torch.zeros(2, 4), torch.zeros(2, 4), "made for 3 labels, got 4"),
        (torch.zeros(2, 3), torch.zeros(2, 2), r"\(2, 3\), got \(2, 2\)"),
        (torch.zeros(2, 3), torch.full((2, 3), 0.5), "0, 1 or NaN .*got 0.5"),
    ],
)
def test_wrong_input_is_refused(scores, label, says):
    with pytest.raises(InputError, match=says):
        LabelAUROC(3).update(scores, label)


def test_micro_is_refused():
    with pytest.raises(InputError, match="no common scale"):
        LabelAUROC(3, average="micro")
    with pytest.raises(InputError, match="no common scale"):
        LabelAUROC(3).averaged("micro")
