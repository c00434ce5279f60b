"""Weak segmentation against slow references written from the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from camtrain import InputError
from camtrain.metrics import mask_iou
from camtrain.reporting import dice, segment, segmentation_level

maps = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 4), st.integers(1, 3)),
              elements=st.integers(-20, 20).map(float))  # fmt: skip


def slow_mean_std(values, factor):
    """Cell by cell: Lee et al. 2021, numpy's std."""
    cells = [float(v) for v in values.ravel()]
    mean = sum(cells) / len(cells)
    std = math.sqrt(sum((c - mean) ** 2 for c in cells) / len(cells))
    return mean + factor * std


def slow_otsu(values):
    """The threshold, of all values, with the least variance within the two sides (Otsu 1979)."""
    cells = values.ravel()
    best, least = cells.max(), math.inf
    for level in sorted(set(cells.tolist()))[:-1]:
        low, high = cells[cells <= level], cells[cells > level]
        within = len(low) * low.var() + len(high) * high.var()
        if within < least - 1e-9:
            best, least = level, within
    return best, least


@settings(max_examples=60, deadline=None)
@given(maps, st.sampled_from([("mean", 0), ("mean+std", 1), ("mean+2std", 2), ("mean + 0.5*std", 0.5)]))
def test_mean_and_std(values, rule):
    text, factor = rule
    level = slow_mean_std(values, factor)
    if np.ptp(values) == 0:
        assert not segment(values, text).any()
        return
    assert segmentation_level(values, text) == pytest.approx(level, abs=1e-9)
    clear = np.abs(values - level) > 1e-9
    np.testing.assert_array_equal(segment(values, text)[clear], (values > level)[clear])


@settings(max_examples=60, deadline=None)
@given(maps)
def test_otsu(values):
    _, least = slow_otsu(values)
    above = segment(values, "otsu")
    if np.ptp(values) == 0:
        assert not above.any()
        return
    assert above.any()
    assert not above.all()
    within = sum(part.size * part.var() for part in (values[above], values[~above]))
    assert within == pytest.approx(least, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rule", ["mean+std", "mean+2*std", "otsu"])
def test_scaling_and_shifting_change_nothing_but_a_relu_does(rule):
    values = np.random.default_rng(0).normal(size=(5, 4, 6))
    np.testing.assert_array_equal(segment(values, rule), segment(7.5 * values - 3, rule))
    assert (segment(values, rule) != segment(values.clip(min=0), rule)).any()


def test_is_the_mask_that_mask_iou_scores():
    import torch

    rng = np.random.default_rng(1)
    values, truth = rng.normal(size=(5, 4, 6)), rng.random((5, 4, 6)) < 0.3
    above = segment(values)
    score = mask_iou(torch.from_numpy(values)[None, None], torch.from_numpy(truth)[None, None], torch.ones(1, 1))
    assert float(score) == pytest.approx((above & truth).sum() / (above | truth).sum())


def test_maps_that_are_not_finite_mark_nothing():
    assert not segment(np.array([1.0, np.nan, 5.0])).any()
    assert not segment(np.array([1.0, np.inf, 5.0]), "otsu").any()
    assert not segment(np.full(1000, 0.1, np.float32)).any()


def test_otsu_of_extreme_scales():
    assert segment(np.array([0.0, 1e-300, 9e-300]), "otsu").tolist() == [False, False, True]
    assert segment(np.array([0.0, 1e300, -1e300]), "otsu").sum() in (1, 2)


@pytest.mark.parametrize("rule", ["", "std", "mean+", "mean+xstd", "mean-std", "mean+-1std", "median", "mean+2", None])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(InputError, match="rule of a segmentation"):
        segment(np.arange(3.0), rule)


def test_empty_maps_are_refused():
    with pytest.raises(InputError, match="empty"):
        segmentation_level(np.zeros((0, 3)))


def test_dice():
    a, b = np.array([1, 1, 0, 0, 1], bool), np.array([0, 1, 1, 0, 0], bool)
    assert dice(a, b) == pytest.approx(2 * 1 / (3 + 2))
    assert dice(a, a) == 1.0
    assert dice(a, ~a) == 0.0
    assert math.isnan(dice(np.zeros(3, bool), np.zeros(3, bool)))
    with pytest.raises(InputError, match="one shape"):
        dice(a, b[:4])
