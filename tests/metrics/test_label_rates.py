"""Average precision of all labels at once, against torchmetrics and against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_average_precision

from camtrain._label_rates import label_rates


def counted(score, truth):
    """Over the thresholds from the highest score down: precision there, times the recall gained."""
    known = ~np.isnan(truth)
    score, truth = score[known], truth[known] == 1
    if not 0 < truth.sum() < len(truth) or np.isnan(score).any():
        return math.nan
    area, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        above = score >= threshold
        now = truth[above].sum() / truth.sum()
        area += (now - recall) * truth[above].mean()
        recall = now
    return area


@given(st.integers(0, 10_000), st.integers(0, 25), st.sampled_from([0, 2, 4]))
def test_equals_counting(seed, cases, levels):
    rng = np.random.default_rng(seed)
    score, label = rng.random((cases, 5)), (rng.random((cases, 5)) < 0.4).astype(float)
    score = np.round(score * levels) / levels if levels else score  # ties
    label[rng.random(label.shape) < 0.2] = np.nan
    score[(rng.random(score.shape) < 0.01)] = np.nan
    found = label_rates("auprc", torch.from_numpy(score), torch.from_numpy(label))
    wanted = [counted(s, t) for s, t in zip(score.T, label.T, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchmetrics(dtype):
    rng = torch.Generator().manual_seed(0)
    score = torch.rand(300, 7, generator=rng).to(dtype)
    label = (torch.rand(300, 7, generator=rng) < 0.3).float()
    found = label_rates("auprc", score, label)
    assert found.dtype == dtype
    wanted = [binary_average_precision(s, t.long()) for s, t in zip(score.T, label.T, strict=True)]
    torch.testing.assert_close(found.float(), torch.stack(wanted), atol=1e-6, rtol=0)


def test_a_probability_of_nothing_is_told_from_unknown_cases():
    score = torch.tensor([[0.0, 0.5, 0.0, 0.9]]).T.double()
    label = torch.tensor([[1.0, 0.0, torch.nan, 1.0]]).T
    assert label_rates("auprc", score, label).item() == pytest.approx(0.5 + 0.5 * 2 / 3)
