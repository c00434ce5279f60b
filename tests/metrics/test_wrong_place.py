"""WrongPlace against a loop in numpy, and against networks whose contributions are known."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MetricCollection

import camtrain as ct
from camtrain import InputError
from camtrain.metrics import EnergyInside, WrongPlace, wrong_place


def _reference(maps, contributions, label=None, tolerance=0.0):
    """Shares (B, L) and which pairs count, cell by cell."""
    maps, contributions = np.asarray(maps.double()), np.asarray(contributions.double())
    scores, counted = np.full(maps.shape[:2], np.nan), np.zeros(maps.shape[:2], dtype=bool)
    for at in np.ndindex(maps.shape[:2]):
        shown, truth = maps[at].ravel(), contributions[at].ravel()
        counted[at] = not (np.isnan(shown).all() or np.isnan(truth).all()) and (label is None or label[at] == 1)
        if not counted[at] or not (np.isfinite(shown).all() and np.isfinite(truth).all()):
            continue
        mass = [max(0.0, value) for value in shown]
        wrong = sum(m for m, c in zip(mass, truth, strict=True) if c <= tolerance * np.abs(truth).max())
        if sum(mass) > 0:
            scores[at] = wrong / sum(mass)
    return scores, counted


def _contributions(like, seed=9):
    found = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)
    found[0, 1] = torch.nan  # not computed
    found[3, 2].view(-1)[0] = torch.inf
    found[4, 0] = -found[4, 0].abs()
    found[4, 3].view(-1)[:5] = 0
    return found


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_equals_the_loop(make_case, size, known, tolerance):
    case = make_case(size=size, seed=len(size))
    truth, label = _contributions(case.maps), case.label if known else None
    expected, counted = _reference(case.maps, truth, label, tolerance)
    np.testing.assert_allclose(wrong_place(case.maps, truth, label, tolerance), expected, atol=1e-6)
    metric = WrongPlace(7, "none", tolerance)
    for part in (slice(0, 2), slice(2, 2), slice(2, 5)):
        metric.update(case.maps[part], truth[part], None if label is None else label[part])
    lost = counted & np.isnan(expected)
    assert lost.any()
    assert metric.pairs.tolist() == counted.sum(0).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(metric.undefined_rate(), lost.sum(0) / counted.sum(0))
        means = np.nansum(expected, 0) / (counted & ~lost).sum(0)
    np.testing.assert_allclose(metric.compute(), means, atol=1e-6)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(expected), atol=1e-6)


def _net(head, channels=3):
    net = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), *head)
    return net.double()


def test_hirescam_is_never_in_a_wrong_place_and_gradcam_is_behind_a_flatten_head():
    torch.manual_seed(0)
    net, image = _net([nn.Flatten(), nn.Linear(3 * 30, 4)]), torch.randn(6, 1, 5, 6, dtype=torch.float64)
    exact = ct.explain(net, image, "hirescam", "1")
    assert (wrong_place(exact, exact) == 0).all()
    found = wrong_place(ct.explain(net, image, "gradcam", "1"), exact)
    assert found.nanmean() > 0.1
    # What "wrong" means, by experiment: without such a cell the logit is no lower.
    activations = net[1](net[0](image))
    for cell in range(30):
        without = activations.flatten(2).clone()
        without[..., cell] = 0
        fall = net(image) - net[3](without.flatten(1))
        torch.testing.assert_close(exact.flatten(2)[..., cell], fall, check_dtype=False, atol=1e-5, rtol=1e-5)


def test_behind_a_pool_gradcam_is_in_no_wrong_place():
    torch.manual_seed(0)
    net, image = _net([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)]), torch.randn(6, 1, 5, 6).double()
    found = wrong_place(ct.explain(net, image, "gradcam", "1"), ct.explain(net, image, "hirescam", "1"))
    assert (found[~found.isnan()] < 1e-6).all()
    assert (~found.isnan()).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-40, 40))
def test_scales_order_and_flips(seed, power):
    generator = torch.Generator().manual_seed(seed)
    maps, truth = torch.randn(2, 2, 4, 3, 5, generator=generator)
    score = wrong_place(maps, truth)
    torch.testing.assert_close(wrong_place(maps * 2.0**power, truth), score, equal_nan=True)
    torch.testing.assert_close(wrong_place(maps, truth * 2.0**power), score, equal_nan=True)
    torch.testing.assert_close(wrong_place(maps.flip(2), truth.flip(2)), score, equal_nan=True)
    labels = torch.randperm(4, generator=generator)
    torch.testing.assert_close(wrong_place(maps[:, labels], truth[:, labels]), score[:, labels], equal_nan=True)
    other = wrong_place(maps, -truth)  # no contribution is 0 here: what was right is wrong now
    torch.testing.assert_close(other, 1 - score, equal_nan=True, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    maps, truth = (torch.randn(2, 3, 5000) * 1000).to(dtype), torch.randn(2, 3, 5000).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = wrong_place(maps, truth)
    torch.testing.assert_close(found, wrong_place(maps.double(), truth.double()), atol=1e-2, rtol=0)


def test_nothing_to_count_is_no_score(make_case):
    case = make_case()
    metric = WrongPlace(7)
    metric.update(case.maps, case.maps, torch.zeros(5, 7))
    metric.update(torch.full_like(case.maps, torch.nan), case.maps)
    metric.update(case.maps[:0], case.maps[:0])
    assert metric.compute().isnan()
    assert metric.pairs.tolist() == [0] * 7


def test_torchmetrics_habits(make_case):
    case = make_case()
    truth = _contributions(case.maps)
    metric = WrongPlace(7, "none")
    on_batch = metric(case.maps[:3], truth[:3])
    metric(case.maps[3:], truth[3:])
    assert metric.higher_is_better is False
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301 - our own bytes
        torch.testing.assert_close(copy.compute(), metric.compute(), equal_nan=True)
        copy.reset()
        copy.update(case.maps[:3], truth[:3])
        torch.testing.assert_close(copy.compute(), on_batch, equal_nan=True)
    with torch.inference_mode():
        metric.reset()
        metric.update(case.maps, truth)
        metric.reset()
    metric.update(case.maps.requires_grad_(), truth)
    assert not metric.compute().requires_grad


def test_collection_passes_each_score_what_it_takes(make_case):
    case = make_case()
    kinds = {"energy": EnergyInside(7), "strict": WrongPlace(7), "tolerant": WrongPlace(7, tolerance=0.3)}
    collection = MetricCollection(kinds)
    for label in (torch.zeros(5, 7), case.label):
        collection.update(maps=case.maps, allowed=case.allowed, contributions=_contributions(case.maps), label=label)
    found = collection.compute()
    alone = WrongPlace(7)
    alone.update(case.maps, _contributions(case.maps), case.label)
    torch.testing.assert_close(found["strict"], alone.compute())
    assert found["tolerant"] > found["strict"]


def test_machines_without_float64(make_case, monkeypatch):
    case = make_case()
    expected = wrong_place(case.maps, _contributions(case.maps))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    metric = WrongPlace(7)
    metric.update(case.maps, _contributions(case.maps))
    got = wrong_place(case.maps, _contributions(case.maps))
    assert torch.float64 not in {got.dtype, *(state.dtype for state in metric.metric_state.values())}
    torch.testing.assert_close(got.double(), expected, equal_nan=True, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("maps", "contributions", "says"),
    [
        (torch.rand(2, 3), torch.rand(2, 3), r"maps of shape \(B, L, \*S\)"),
        (torch.ones(2, 3, 4, dtype=torch.long), torch.rand(2, 3, 4), "floating point"),
        (torch.rand(2, 3, 4, 0), torch.rand(2, 3, 4, 0), "at least one cell"),
        (torch.rand(2, 3, 4), torch.rand(2, 3, 5), "contributions of the shape of maps"),
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.long), "in torch.int64: pass HiResCAM"),
        (torch.rand(2, 4, 5), torch.rand(2, 4, 5), "made for 3 labels, got 4"),
    ],
)
def test_wrong_input_is_refused(maps, contributions, says):
    with pytest.raises(InputError, match=says):
        WrongPlace(3).update(maps, contributions)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_wrong_tolerance_is_refused(tolerance):
    with pytest.raises(InputError, match=r"tolerance in \[0, 1\)"):
        WrongPlace(3, tolerance=tolerance)
    with pytest.raises(InputError, match=r"tolerance in \[0, 1\)"):
        wrong_place(torch.rand(1, 1, 2), torch.rand(1, 1, 2), tolerance=tolerance)
