"""ClassSensitivity against numpy's Pearson correlation, one pair of maps at a time."""

from __future__ import annotations

import importlib
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from camtrain import InputError
from camtrain.metrics import ClassSensitivity, EnergyInside, class_sensitivity

# The package shows the function under the file's name, so the module itself is fetched by import.
module = importlib.import_module("camtrain.metrics.class_sensitivity")


def _reference(maps, label=None):
    """Scores (B, L) and which pairs count, written from the definition."""
    maps = np.asarray(maps.double())
    scores, counted = np.full(maps.shape[:2], np.nan), np.zeros(maps.shape[:2], dtype=bool)
    for b, case in enumerate(maps.reshape(*maps.shape[:2], -1)):
        good = [k for k, m in enumerate(case) if np.isfinite(m).all() and m.min() < m.max()]
        for k, own in enumerate(case):
            counted[b, k] = not np.isnan(own).all() and (label is None or label[b, k] == 1)
            others = [np.corrcoef(own, case[j])[0, 1] for j in good if j != k] if k in good else []
            if counted[b, k] and others:
                scores[b, k] = np.mean(others)
    return scores, counted


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", [False, True])
def test_equals_the_loop(make_case, size, dtype, known):
    case = make_case(size=size, dtype=dtype, seed=len(size))
    label = case.label if known else None
    expected, counted = _reference(case.maps, label)
    np.testing.assert_allclose(class_sensitivity(case.maps, label), expected, atol=1e-12)
    metric = ClassSensitivity(7, "none")
    for part in (slice(0, 2), slice(2, 2), slice(2, 5)):
        metric.update(case.maps[part], None if label is None else label[part])
    lost = counted & np.isnan(expected)
    assert lost.any()
    assert metric.pairs.tolist() == counted.sum(0).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(metric.undefined_rate(), lost.sum(0) / counted.sum(0))
        means = np.nansum(expected, 0) / (counted & ~lost).sum(0)
    np.testing.assert_allclose(metric.compute(), means, atol=1e-12)
    np.testing.assert_allclose(metric.averaged("macro"), np.nanmean(means), atol=1e-12)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(expected), atol=1e-12)
    assert np.isnan(means[-1]) == known  # the last label is never present


def test_the_same_map_for_every_label_is_one_and_opposite_maps_are_minus_one():
    one = torch.randn(4, 5, 6)
    blind = torch.stack([one, 3 * one, one + 7])[None]
    torch.testing.assert_close(class_sensitivity(blind), torch.ones(1, 3, dtype=torch.float64), atol=1e-9, rtol=0)
    opposite = torch.stack([one, -2 * one])[None]
    torch.testing.assert_close(class_sensitivity(opposite), -torch.ones(1, 2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (class_sensitivity(torch.cat([blind, blind])) <= 1).all()


def test_a_map_that_is_alone_is_undefined_and_counted():
    single = ClassSensitivity(1)
    single.update(torch.randn(3, 1, 4, 5))
    assert single.compute().isnan()
    assert single.undefined_rate() == 1
    assert single.pairs.tolist() == [3]
    maps = torch.randn(1, 3, 4)
    maps[0, 1] = torch.nan  # not computed
    maps[0, 2] = 0.1  # constant
    metric = ClassSensitivity(3, "none")
    metric.update(maps)
    assert metric.pairs.tolist() == [1, 0, 1]
    assert metric.averaged("none").isnan().all()


@pytest.mark.parametrize("value", [0.1, 1e-30, 3e38, 16777217.0])
def test_constants_have_no_correlation_whatever_the_rounding(value):
    maps = torch.randn(1, 3, 1000)
    maps[0, 1] = value
    score = class_sensitivity(maps)[0]
    assert score[1].isnan()
    np.testing.assert_allclose(score[0], np.corrcoef(maps[0, 0], maps[0, 2])[0, 1], atol=1e-6)


@pytest.mark.parametrize("factor", [1e-300, 1e-38, 1e300])
def test_tiny_and_huge_maps_neither_vanish_nor_overflow(factor):
    maps = torch.randn(2, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(class_sensitivity(maps * factor), class_sensitivity(maps))


def test_a_large_offset_takes_no_digits():
    maps = torch.randn(1, 3, 500, dtype=torch.float64)
    expected = _reference(maps)[0]
    np.testing.assert_allclose(class_sensitivity(maps + 1e8), expected, atol=1e-6)


def test_absent_labels_are_compared_with_but_not_counted():
    maps = torch.randn(2, 3, 9)
    label = torch.tensor([[1.0, 0.0, torch.nan], [0.0, 0.0, 0.0]])
    score = class_sensitivity(maps, label)
    torch.testing.assert_close(score[0, 0], class_sensitivity(maps)[0, 0])
    assert score.isnan().sum() == 5


def test_big_grids_are_taken_in_parts(make_case, monkeypatch):
    case = make_case()
    whole = class_sensitivity(case.maps)
    for cells in (1, 200):
        monkeypatch.setattr(module, "_CELLS", cells)
        torch.testing.assert_close(class_sensitivity(case.maps), whole, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-20, 20))
def test_scale_order_of_labels_and_flips(seed, power):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 4, 3, 5, generator=generator)
    score = class_sensitivity(maps)
    torch.testing.assert_close(class_sensitivity(maps * 2.0**power), score)
    factors = torch.rand(2, 4, 1, 1, generator=generator) + 0.1
    torch.testing.assert_close(class_sensitivity(maps * factors), score, atol=1e-6, rtol=0)
    labels, cases = torch.randperm(4, generator=generator), torch.randperm(2, generator=generator)
    torch.testing.assert_close(class_sensitivity(maps[cases][:, labels]), score[cases][:, labels])
    torch.testing.assert_close(class_sensitivity(maps.flip(2, 3)), score)
    torch.testing.assert_close(class_sensitivity(maps[:1]), score[:1])  # no case knows the others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    maps = (torch.randn(2, 3, 5000) * 1000).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = class_sensitivity(maps)
    torch.testing.assert_close(score, class_sensitivity(maps.double()))
    assert score.dtype == torch.float64


def test_inputs_are_left_alone_and_inference_mode_is_fine(make_case):
    maps = make_case().maps.requires_grad_()
    before = maps.detach().clone()
    metric = ClassSensitivity(7)
    metric.update(maps)
    expected = metric.compute()
    assert not expected.requires_grad
    torch.testing.assert_close(maps.detach(), before, equal_nan=True)
    with torch.inference_mode():
        metric.reset()
        metric.update(make_case().maps)
        torch.testing.assert_close(metric.compute(), expected)
        metric.reset()
    metric.update(maps)
    torch.testing.assert_close(metric.compute(), expected)


def test_torchmetrics_habits(make_case):
    maps = make_case().maps
    metric = ClassSensitivity(7, "none")
    on_batch = metric(maps[:3])
    metric(maps[3:])
    assert metric.higher_is_better is False
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301 - our own bytes
        torch.testing.assert_close(copy.compute(), metric.compute(), equal_nan=True)
        copy.reset()
        copy.update(maps[:3])
        torch.testing.assert_close(copy.compute(), on_batch, equal_nan=True)
    torch.testing.assert_close(metric.averaged("micro"), class_sensitivity(maps).nanmean())


def test_collection_passes_each_score_what_it_takes(make_case):
    case = make_case()
    collection = MetricCollection({"energy": EnergyInside(7), "sensitivity": ClassSensitivity(7)})
    for label in (torch.zeros(5, 7), case.label):
        collection.update(maps=case.maps, allowed=case.allowed, label=label)
    torch.testing.assert_close(collection.compute()["sensitivity"], collection["sensitivity"].averaged("macro"))
    np.testing.assert_allclose(
        collection["sensitivity"].averaged("micro"), np.nanmean(_reference(case.maps, case.label)[0]), atol=1e-12
    )


def test_machines_without_float64(make_case, monkeypatch):
    case = make_case()
    expected = class_sensitivity(*case[::2])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    metric = ClassSensitivity(7)
    metric.update(*case[::2])
    got = class_sensitivity(*case[::2])
    assert torch.float64 not in {got.dtype, *(state.dtype for state in metric.metric_state.values())}
    torch.testing.assert_close(got.double(), expected, equal_nan=True, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("maps", "label", "says"),
    [
        (torch.rand(2, 3), None, r"maps of shape \(B, L, \*S\)"),
        (torch.ones(2, 3, 4, dtype=torch.long), None, "floating point"),
        (torch.rand(2, 3, 4, 0), None, "at least one cell"),
        (torch.rand(2, 4, 5), None, "made for 3 labels, got 4"),
        (torch.rand(2, 3, 5), torch.ones(2), r"\(2, 3\), got \(2,\)"),
        (torch.rand(2, 3, 5), torch.full((2, 3), 0.5), "got 0.5"),
    ],
)
def test_wrong_input_is_refused(maps, label, says):
    with pytest.raises(InputError, match=says):
        ClassSensitivity(3).update(maps, label)
