"""ChannelSparseness against the Gini index as a mean of differences, one pair at a time."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MetricCollection

import camtrain
from camtrain import InputError
from camtrain.metrics import ChannelSparseness, channel_sparseness


def _gini(weights):
    """Half of the mean absolute difference between any two channels, relative to the mean."""
    size = np.abs(weights.astype(float))
    if not np.isfinite(size).all() or size.max() == 0:
        return np.nan
    return np.abs(size[:, None] - size[None]).mean() / (2 * size.mean())


def _effective(weights):
    size = np.abs(weights.astype(float))
    return size.sum() ** 2 / (len(size) * (size**2).sum())


def _weights(batch=4, labels=3, channels=11, seed=0, dtype=torch.float32):
    weights = torch.randn(batch, labels, channels, generator=torch.Generator().manual_seed(seed)) ** 3
    weights[1, 0] = torch.nan  # not computed
    weights[1, 1] = 0.0
    weights[1, 2, 4] = torch.nan
    weights[2, 2, 3] = -torch.inf
    weights[3, 1] = -0.25
    return weights.to(dtype)


def _label():
    return torch.tensor([[1.0, 0, 1], [1, 1, 1], [torch.nan, 1, 1], [0, 1, 0]])


def _reference(function, weights, label=None):
    weights = np.asarray(weights.float())
    table, counted = np.full(weights.shape[:2], np.nan), np.zeros(weights.shape[:2], dtype=bool)
    for at in np.ndindex(weights.shape[:2]):
        counted[at] = not np.isnan(weights[at]).all() and (label is None or label[at] == 1)
        if counted[at] and not np.isnan(_gini(weights[at])):
            table[at] = function(weights[at])
    return table, counted


@pytest.mark.parametrize("known", [False, True])
def test_equals_the_loop(known):
    weights, label = _weights(), _label() if known else None
    gini, counted = _reference(_gini, weights, label)
    effective = _reference(_effective, weights, label)[0]
    np.testing.assert_allclose(channel_sparseness(weights, label), gini, atol=1e-12)
    metric = ChannelSparseness(3, "none", num_channels=11)
    for part in (slice(0, 1), slice(1, 1), slice(1, 4)):
        metric.update(weights[part], None if label is None else label[part])
    means = np.array([np.nanmean(column) for column in gini.T])
    np.testing.assert_allclose(metric.compute(), means, atol=1e-12)
    np.testing.assert_allclose(metric.averaged("macro"), means.mean(), atol=1e-12)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(gini), atol=1e-12)
    np.testing.assert_allclose(metric.effective_share(), np.nanmean(effective, 0), atol=1e-12)
    np.testing.assert_allclose(metric.effective_share("micro"), np.nanmean(effective), atol=1e-12)
    assert metric.pairs.tolist() == counted.sum(0).tolist()
    np.testing.assert_allclose(metric.undefined_rate(), (counted & np.isnan(gini)).sum(0) / counted.sum(0))
    sizes = np.abs(np.asarray(weights))[~np.isnan(gini)]
    curve = (-np.sort(-sizes, axis=1) / sizes.max(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(metric.curve(), curve, atol=1e-6)


def test_the_two_ends_of_the_scale():
    one = torch.zeros(1, 2, 8)
    one[0, 0, 5] = -3.0
    one[0, 1] = 2.0
    metric = ChannelSparseness(2, "none")
    metric.update(one)
    assert metric.compute().tolist() == [pytest.approx(1 - 1 / 8), 0.0]
    assert metric.effective_share().tolist() == [pytest.approx(1 / 8), 1.0]
    assert channel_sparseness(torch.tensor([[[4.0]]])).item() == 0


def test_weights_of_a_network_as_the_engine_returns_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2))
    wanted = torch.tensor([[True, False], [True, True]])
    weights = camtrain.channel_weights(model, torch.rand(2, 1, 5, 6, 7), "cam", labels=wanted)
    metric = ChannelSparseness(2, "none", num_channels=6)
    metric.update(weights)
    assert metric.pairs.tolist() == [2, 1]
    expected = [_gini(row.detach().numpy()) for row in model[4].weight]
    np.testing.assert_allclose(metric.compute(), expected, atol=1e-6)
    assert metric.curve()[0] == 1
    assert (metric.curve().diff() <= 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 30), power=st.integers(-20, 20))
def test_scale_signs_order_and_bounds(seed, channels, power):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, channels, generator=generator)
    score = channel_sparseness(weights)
    assert (score >= 0).all()
    assert (score <= 1 - 1 / channels + 1e-12).all()
    torch.testing.assert_close(channel_sparseness(weights * 2.0**power), score)
    torch.testing.assert_close(channel_sparseness(-weights), score)
    mixed = weights[:, :, torch.randperm(channels, generator=generator)]
    torch.testing.assert_close(channel_sparseness(mixed), score)
    labels = torch.randperm(3, generator=generator)
    torch.testing.assert_close(channel_sparseness(weights[:, labels]), score[:, labels])
    # Every channel twice: neither measure of concentration changes.
    torch.testing.assert_close(channel_sparseness(weights.repeat(1, 1, 2)), score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    weights = (torch.rand(2, 3, 500) * 60_000).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric = ChannelSparseness(3, "none", num_channels=500)
        metric.update(weights)
    np.testing.assert_allclose(metric.compute(), _reference(_gini, weights)[0].mean(0), atol=1e-9)


def test_nothing_to_count_is_no_score():
    metric = ChannelSparseness(2, num_channels=3)
    metric.update(torch.full((2, 2, 3), torch.nan))
    metric.update(torch.rand(2, 2, 3), torch.zeros(2, 2))
    metric.update(torch.rand(0, 2, 3))
    assert metric.compute().isnan()
    assert metric.effective_share().isnan()
    assert metric.undefined_rate().isnan()
    assert metric.curve().isnan().all()


def test_one_metric_is_for_one_layer():
    metric = ChannelSparseness(3)
    metric.update(_weights())
    with pytest.raises(InputError, match="one layer, got 5 and 11 channels"):
        metric.update(torch.rand(2, 3, 5))
    with pytest.raises(InputError, match="one layer, got 5 and 11 channels"):
        metric(torch.rand(2, 3, 5))
    with pytest.raises(InputError, match="num_channels="):
        metric.curve()
    metric.reset()
    metric.update(torch.rand(2, 3, 5))
    fixed = ChannelSparseness(3, num_channels=11)
    with pytest.raises(InputError, match="5 and 11"):
        fixed.update(torch.rand(2, 3, 5))


def test_torchmetrics_habits():
    weights = _weights().requires_grad_()
    metric, alone = (ChannelSparseness(3, "none", num_channels=11) for _ in range(2))
    on_batch = metric(weights[:2])
    alone.update(weights[:2])
    torch.testing.assert_close(on_batch, alone.compute())
    metric(weights[2:])
    alone.update(weights[2:])
    torch.testing.assert_close(metric.compute(), alone.compute())
    torch.testing.assert_close(metric.curve(), alone.curve())
    assert not metric.compute().requires_grad
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301 - our own bytes
        torch.testing.assert_close(copy.curve(), metric.curve())
        copy.reset()
        copy.update(weights[:2])
        torch.testing.assert_close(copy.compute(), on_batch)


def test_inference_mode_before_and_after():
    metric = ChannelSparseness(3, num_channels=11)
    metric.update(_weights())
    expected = metric.compute()
    with torch.inference_mode():
        metric.reset()
        metric.update(_weights())
        torch.testing.assert_close(metric.compute(), expected)
        metric.reset()
    metric.update(_weights())
    torch.testing.assert_close(metric.compute(), expected)


def test_collection_keeps_two_settings_apart():
    both = {"plain": ChannelSparseness(3), "curve": ChannelSparseness(3, num_channels=11)}
    collection = MetricCollection(both)
    collection.update(torch.full((1, 3, 11), torch.nan))
    collection.update(_weights())
    assert collection["curve"].curve().shape == (11,)
    torch.testing.assert_close(collection.compute()["plain"], collection.compute()["curve"])


def test_machines_without_float64(monkeypatch):
    expected = channel_sparseness(_weights())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    metric = ChannelSparseness(3, num_channels=11)
    metric.update(_weights())
    answers = [metric.compute(), metric.effective_share(), metric.curve(), *metric.metric_state.values()]
    assert torch.float64 not in {answer.dtype for answer in answers}
    torch.testing.assert_close(metric.averaged("micro").double(), expected.nanmean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("weights", "label", "says"),
    [
        (torch.rand(2, 3), None, r"weights of shape \(B, L, K\)"),
        (torch.rand(2, 3, 4, 5), None, r"got \(2, 3, 4, 5\)"),
        (torch.ones(2, 3, 4, dtype=torch.long), None, "floating point"),
        (torch.rand(2, 3, 0), None, "at least one channel"),
        (torch.rand(2, 4, 5), None, "made for 3 labels, got 4"),
        (torch.rand(2, 3, 5), torch.full((2, 3), 0.5), "got 0.5"),
    ],
)
def test_wrong_input_is_refused(weights, label, says):
    with pytest.raises(InputError, match=says):
        ChannelSparseness(3).update(weights, label)


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_wrong_number_of_channels_is_refused(number):
    with pytest.raises(InputError, match="num_channels as a positive integer"):
        ChannelSparseness(3, num_channels=number)
