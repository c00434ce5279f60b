"""SumToScore against loops, numpy and scipy's Kendall tau."""

from __future__ import annotations

import importlib
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torchmetrics import MetricCollection

from camtrain import InputError
from camtrain.metrics import EnergyInside, SumToScore, sum_to_score

# The package shows the function under the file's name, so the module itself is fetched by import.
module = importlib.import_module("camtrain.metrics.sum_to_score")


def _logits(seed=0, batch=5, labels=7):
    """Coarse, so that some tie."""
    return torch.randn(batch, labels, generator=torch.Generator().manual_seed(seed)).mul(3).round().div(2)


def _reference(maps, logits):
    """Per case and per pair, written from the definition."""
    maps, logits = np.asarray(maps.double()), np.asarray(logits.double())
    batch, labels = logits.shape
    gap, share = np.full((batch, labels), np.nan), np.full((batch, labels), np.nan)
    computed = np.array([[not np.isnan(m).all() for m in case] for case in maps])
    l1, tau = np.full(batch, np.nan), np.full(batch, np.nan)
    for b in range(batch):
        sums, scores = [], []
        for k in range(labels):
            if not np.isfinite(maps[b, k]).all() or not np.isfinite(logits[b, k]):
                continue
            total, score = math.fsum(maps[b, k].flatten()), logits[b, k]
            gap[b, k] = abs(total - score)
            if abs(total) + abs(score) > 0:
                share[b, k] = (score - total) / (abs(score) + abs(total))
            sums.append(total)
            scores.append(score)
        if sums:
            l1[b] = np.nanmean(gap[b])
        if len(sums) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tau[b] = kendalltau(sums, scores, variant="b").statistic
    return l1, tau, gap, share, computed


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loop(make_case, size, dtype):
    maps, logits = make_case(size=size, dtype=dtype, seed=len(size)).maps, _logits()
    maps = maps.div(4).mul(8).round().div(8) if size == (13,) else maps  # ties among the sums too
    logits[3, 1], logits[3, 2] = torch.inf, torch.nan
    maps[4] = torch.nan
    maps[4, 5] = 1.0  # one label computed: no order
    found = sum_to_score(maps, logits)
    for got, expected in zip(found, _reference(maps, logits), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-9)
    assert found.kendall_tau.isnan().tolist() == [False, False, False, False, True]
    assert found.gap[1, 1] == logits[1, 1].abs()  # the map that is zero everywhere


def test_the_class_takes_means_over_cases_and_pairs(make_case):
    metric, parts = SumToScore(7), []
    for seed, batch in ((3, 4), (4, 1), (5, 0), (6, 6)):
        maps, logits = torch.randn(batch, 7, 3, 4, generator=torch.Generator().manual_seed(seed)), _logits(seed, batch)
        if batch > 1:
            maps[1] = torch.nan
            maps[0, 2:] = torch.nan
            maps[0, 0, 0, 0] = torch.inf  # one label is left: a distance, no order
        metric.update(maps, logits)
        parts.append(
            _reference(maps, logits) if batch else tuple(np.zeros((0, *e)) for e in ((), (), (7,), (7,), (7,)))
        )
    l1, tau, gap, share, computed = (np.concatenate(part) for part in zip(*parts, strict=True))
    got = metric.compute()
    assert set(got) == {"l1", "l1_std", "kendall_tau", "kendall_tau_std", "bias_share"}
    assert {value.dtype for value in got.values()} == {torch.float64}
    for name, values in (("l1", l1), ("kendall_tau", tau)):
        np.testing.assert_allclose(got[name], np.nanmean(values), atol=1e-12)
        np.testing.assert_allclose(got[f"{name}_std"], np.nanstd(values), atol=1e-12)
    np.testing.assert_allclose(got["bias_share"], np.nanmean(share), atol=1e-12)
    np.testing.assert_allclose(metric.l1_per_label(), np.nanmean(gap, 0), atol=1e-12)
    np.testing.assert_allclose(metric.bias_share_per_label(), np.nanmean(share, 0), atol=1e-12)
    cases = computed.any(axis=1)
    assert metric.pairs.tolist() == computed.sum(0).tolist()
    rates = metric.undefined_rate()
    assert rates["l1"].item() == pytest.approx(np.isnan(gap[computed.astype(bool)]).mean())
    assert rates["bias_share"].item() == pytest.approx(np.isnan(share[computed.astype(bool)]).mean())
    assert rates["kendall_tau"].item() == pytest.approx(np.isnan(tau[cases.astype(bool)]).mean())
    assert min(rate.item() for rate in rates.values()) > 0


def test_a_map_that_lacks_only_the_bias_says_so():
    maps = torch.rand(3, 4, 5, 6, dtype=torch.float64)
    total = maps.sum(dim=(2, 3))
    metric = SumToScore(4)
    metric.update(maps, total)
    answers = metric.compute()
    assert answers["l1"].item() == pytest.approx(0, abs=1e-12)
    assert answers["kendall_tau"].item() == pytest.approx(1)
    assert answers["bias_share"].item() == pytest.approx(0, abs=1e-12)
    moved = sum_to_score(maps, total + 2)
    torch.testing.assert_close(moved.gap, torch.full((3, 4), 2.0, dtype=torch.float64))
    torch.testing.assert_close(moved.bias_share, 2 / (2 * total + 2))
    assert (sum_to_score(0 * maps, total).bias_share == 1).all()
    assert (sum_to_score(maps, torch.zeros(3, 4)).bias_share == -1).all()
    assert sum_to_score(0 * maps, torch.zeros(3, 4)).bias_share.isnan().all()


def test_a_constant_side_has_no_order():
    maps, logits = torch.randn(2, 4, 5), torch.ones(2, 4)
    assert sum_to_score(maps, logits).kendall_tau.isnan().all()
    assert sum_to_score(torch.ones(2, 4, 5), torch.randn(2, 4)).kendall_tau.isnan().all()
    one = SumToScore(1)
    one.update(torch.randn(3, 1, 5), torch.randn(3, 1))
    assert one.compute()["kendall_tau"].isnan()
    assert one.compute()["kendall_tau_std"].isnan()
    assert one.undefined_rate()["kendall_tau"] == 1
    assert one.l1_per_label().shape == (1,)


def test_nothing_to_count_is_no_score():
    metric = SumToScore(3)
    metric.update(torch.full((2, 3, 5), torch.nan), torch.randn(2, 3))
    metric.update(torch.zeros(0, 3, 5), torch.zeros(0, 3))
    assert all(value.isnan() for value in metric.compute().values())
    assert all(value.isnan() for value in metric.undefined_rate().values())
    assert metric.l1_per_label().isnan().all()
    assert metric.pairs.tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), labels=st.integers(1, 9), levels=st.integers(1, 9))
def test_tau_is_scipys(seed, labels, levels):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(levels, (2, 3, labels), generator=generator).double()
    got = module.kendall_tau(first, second, torch.ones(3, labels, dtype=torch.bool))
    for tau, a, b in zip(got.tolist(), first.tolist(), second.tolist(), strict=True):
        expected = np.nan
        if len(set(a)) > 1 and len(set(b)) > 1:
            expected = kendalltau(a, b, variant="b").statistic
        np.testing.assert_allclose(tau, expected, atol=1e-12)


def test_many_labels_are_taken_in_parts(make_case, monkeypatch):
    maps, logits = make_case().maps, _logits()
    whole = sum_to_score(maps, logits)
    for signs in (1, 100):
        monkeypatch.setattr(module, "_SIGNS", signs)
        torch.testing.assert_close(sum_to_score(maps, logits), whole, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-20, 20))
def test_scale_order_of_labels_and_flips(seed, power):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    found = sum_to_score(maps, logits)
    factor = 2.0**power
    scaled = sum_to_score(maps * factor, logits * factor)
    torch.testing.assert_close(scaled.gap, found.gap * factor)
    torch.testing.assert_close(scaled.kendall_tau, found.kendall_tau)
    torch.testing.assert_close(scaled.bias_share, found.bias_share)
    labels, cases = torch.randperm(4, generator=generator), torch.randperm(3, generator=generator)
    moved = sum_to_score(maps[cases][:, labels], logits[cases][:, labels])
    torch.testing.assert_close(moved.gap, found.gap[cases][:, labels])
    torch.testing.assert_close(moved.kendall_tau, found.kendall_tau[cases])
    torch.testing.assert_close(sum_to_score(maps.flip(2, 3), logits).gap, found.gap)


def test_half_precision_sums_do_not_overflow():
    maps = torch.full((1, 2, 200_000), 60_000.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sum_to_score(maps, torch.zeros(1, 2, dtype=torch.float16))
    assert found.l1.item() == 200_000 * 60_000


def test_huge_values_do_not_overflow_the_share():
    maps = torch.full((1, 1, 2), 7e307, dtype=torch.float64)
    share = sum_to_score(maps, torch.full((1, 1), -1.4e308, dtype=torch.float64)).bias_share
    assert share.item() == pytest.approx(-1)


def test_standard_deviation_survives_a_large_mean():
    metric = SumToScore(1)
    for value in (1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3):
        metric.update(torch.zeros(1, 1, 1), torch.full((1, 1), value, dtype=torch.float64))
    assert metric.compute()["l1_std"].item() == pytest.approx(np.std([0, 1, 2, 3]), rel=1e-9)


def test_torchmetrics_habits(make_case):
    maps, logits = make_case().maps, _logits()
    before = maps.clone()
    metric, alone = SumToScore(7), SumToScore(7)
    on_batch = metric(maps[:3].requires_grad_(), logits[:3])
    alone.update(maps[:3], logits[:3])
    torch.testing.assert_close(on_batch, alone.compute())
    metric(maps[3:], logits[3:])
    alone.update(maps[3:], logits[3:])
    torch.testing.assert_close(metric.compute(), alone.compute())
    assert not metric.compute()["l1"].requires_grad
    torch.testing.assert_close(maps, before, equal_nan=True)
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301 - our own bytes
        torch.testing.assert_close(copy.compute(), metric.compute())
        copy.reset()
        copy.update(maps[:3], logits[:3])
        torch.testing.assert_close(copy.compute(), on_batch)


def test_inference_mode_before_and_after(make_case):
    maps, logits = make_case().maps, _logits()
    metric = SumToScore(7)
    metric.update(maps, logits)
    expected = metric.compute()
    with torch.inference_mode():
        metric.reset()
        metric.update(maps, logits)
        torch.testing.assert_close(metric.compute(), expected)
        metric.reset()
    metric.update(maps, logits)
    torch.testing.assert_close(metric.compute(), expected)


def test_collection(make_case):
    case = make_case()
    collection = MetricCollection({"energy": EnergyInside(7), "sum": SumToScore(7)})
    collection.update(maps=case.maps, allowed=case.allowed, label=case.label, logits=_logits())
    assert {"energy", "l1", "kendall_tau", "bias_share"} <= set(collection.compute())


def test_machines_without_float64(make_case, monkeypatch):
    maps, logits = make_case().maps, _logits()
    expected = sum_to_score(maps, logits)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    metric = SumToScore(7)
    metric.update(maps, logits)
    answers = [*metric.compute().values(), *metric.undefined_rate().values(), *metric.metric_state.values()]
    assert torch.float64 not in {answer.dtype for answer in answers}
    torch.testing.assert_close(metric.compute()["l1"].double(), expected.l1.nanmean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("maps", "logits", "says"),
    [
        (torch.rand(2, 3), torch.rand(2, 3), r"maps of shape \(B, L, \*S\)"),
        (torch.ones(2, 3, 4, dtype=torch.long), torch.rand(2, 3), "floating point"),
        (torch.rand(2, 3, 4, 0), torch.rand(2, 3), "at least one cell"),
        (torch.rand(2, 3, 5), torch.rand(2, 4), r"\(2, 3\) in floating point, got \(2, 4\)"),
        (torch.rand(2, 3, 5), torch.ones(2, 3).long(), "got .* in torch.int64"),
        (torch.rand(2, 4, 5), torch.rand(2, 4), "made for 3 labels, got 4"),
    ],
)
def test_wrong_input_is_refused(maps, logits, says):
    with pytest.raises(InputError, match=says):
        SumToScore(3).update(maps, logits)
