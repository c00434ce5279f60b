"""InsertionAUC and DeletionAUC against areas and curves known in closed form."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from camtrain import InputError
from camtrain.metrics import DeletionAUC, InsertionAUC, deletion_auc, insertion_auc

SCORES = {"insertion": (InsertionAUC, insertion_auc), "deletion": (DeletionAUC, deletion_auc)}
both = pytest.mark.parametrize("name", SCORES)


def _case(batch=4, labels=3, points=6, seed=0):
    rng = np.random.default_rng(seed)
    curve = rng.random((batch, labels, points))
    share = np.sort(rng.random((batch, labels, points)), axis=2)
    share[..., 0], share[..., -1] = 0, 1
    label = (rng.random((batch, labels)) < 0.7).astype(float)
    if batch > 2:
        label[0, 0] = np.nan
        label[:, -1] = 0
        label[1:3, :2] = 1
        curve[1, 0] = np.nan
        share[1, 0] = np.nan
        curve[2, 1, 2] = np.nan
        share[2, 0, 2] = share[2, 0, 1]
    return torch.tensor(curve), torch.tensor(share), torch.tensor(label)


def _loop(curve, share, label, at):
    """Areas (B, L), which pairs count, and curves at `at`, by numpy."""
    curve, share, label = (t.numpy() for t in (curve, share, label))
    area, counted = np.full(label.shape, np.nan), np.zeros(label.shape, bool)
    lines = np.full((*label.shape, len(at)), np.nan)
    for b, k in np.ndindex(label.shape):
        counted[b, k] = label[b, k] == 1 and not np.isnan(curve[b, k]).all()
        if counted[b, k] and not np.isnan(curve[b, k]).any():
            y, x = curve[b, k], share[b, k]
            area[b, k] = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))
            lines[b, k] = np.interp(at, x, y)
    return area, counted, lines


def _mean(values):
    """Over axis 0, NaN where there is nothing."""
    known = ~np.isnan(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


@both
def test_equals_the_loop(name):
    kind, twin = SCORES[name]
    case = _case()
    area, counted, lines = _loop(*case, np.linspace(0, 1, 9))
    np.testing.assert_allclose(twin(*case), area, atol=1e-15)
    metric = kind(3, num_points=9)
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update(*(t[rows] for t in case))
    np.testing.assert_allclose(metric.averaged("none"), _mean(area), atol=1e-15)
    np.testing.assert_allclose(metric.compute(), np.nanmean(_mean(area)), atol=1e-15)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(area), atol=1e-15)
    np.testing.assert_allclose(metric.curve(), _mean(lines), atol=1e-14)
    np.testing.assert_allclose(metric.curve("macro"), np.nanmean(_mean(lines), axis=0), atol=1e-14)
    np.testing.assert_allclose(metric.curve("micro"), _mean(lines.reshape(-1, 9)), atol=1e-14)
    assert metric.pairs.tolist() == counted.sum(0).tolist()
    assert metric.undefined_rate("micro").item() == pytest.approx((np.isnan(area) & counted).sum() / counted.sum())


@both
def test_areas_known_in_closed_form(name):
    twin = SCORES[name][1]
    share = torch.linspace(0, 1, 1001, dtype=torch.float64)
    curve = torch.stack([torch.full_like(share, 0.3), share, 1 - share, share**2])[None]
    expected = torch.tensor([[0.3, 0.5, 0.5, 1 / 3]]).double()
    torch.testing.assert_close(twin(curve, share, torch.ones(1, 4)), expected, atol=1e-6, rtol=0)


@both
def test_uneven_shares_weigh_by_their_width(name):
    curve, share = torch.tensor([[[1.0, 1.0, 0.0]]]), torch.tensor([0.0, 0.9, 1.0])
    assert SCORES[name][1](curve, share, torch.ones(1, 1)).item() == pytest.approx(0.95)


@both
def test_common_shares_are_read_exactly(name):
    curve, share = torch.rand(3, 2, 5, dtype=torch.float64), torch.linspace(0, 1, 5)
    metric = SCORES[name][0](2, num_points=5)
    metric.update(curve, share, torch.ones(3, 2))
    torch.testing.assert_close(metric.curve(), curve.mean(dim=0), atol=1e-12, rtol=0)


@both
@pytest.mark.parametrize(
    ("share", "curve", "expected"),
    [
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0]),
        ([0.0, 0.0, 1.0], [0.2, 0.6, 1.0], [0.6, 0.7, 0.8, 0.9, 1.0]),
        ([0.0, 1.0, 1.0], [0.0, 0.4, 1.0], [0.0, 0.1, 0.2, 0.3, 1.0]),
    ],
)
def test_a_jump_is_read_behind_it(name, share, curve, expected):
    metric = SCORES[name][0](1, num_points=5)
    metric.update(torch.tensor([[curve]]), torch.tensor(share), torch.ones(1, 1))
    np.testing.assert_allclose(metric.curve()[0], expected, atol=1e-7)


@both
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), points=st.integers(2, 9), cut=st.floats(0.01, 0.99))
def test_a_point_on_a_straight_line_changes_nothing(name, seed, points, cut):
    curve, share, label = _case(1, 1, points, seed)
    at = torch.tensor(np.interp(cut, share[0, 0], curve[0, 0]))
    place = int((share[0, 0] < cut).sum())
    longer = torch.cat([curve[..., :place], at.reshape(1, 1, 1), curve[..., place:]], dim=2)
    wider = torch.cat([share[..., :place], torch.full((1, 1, 1), cut), share[..., place:]], dim=2)
    twin = SCORES[name][1]
    torch.testing.assert_close(twin(longer, wider, label), twin(curve, share, label), equal_nan=True)


@both
def test_nothing_to_count_is_no_score(name):
    metric = SCORES[name][0](2, num_points=3)
    metric.update(torch.rand(3, 2, 4), torch.linspace(0, 1, 4), torch.zeros(3, 2))
    metric.update(torch.full((3, 2, 4), torch.nan), torch.full((3, 2, 4), torch.nan), torch.ones(3, 2))
    metric.update(torch.rand(0, 2, 4), torch.linspace(0, 1, 4), torch.ones(0, 2))
    assert metric.compute().isnan()
    assert metric.curve().isnan().all()
    assert metric.pairs.tolist() == [0, 0]


@both
def test_torchmetrics_habits(name):
    case = _case()
    metric = SCORES[name][0](3, "none")
    first = metric(*case)
    with torch.inference_mode():
        metric.reset()
    for again in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301 - our own bytes
        again.reset()
        again.update(*case)
        torch.testing.assert_close(again.compute(), first, equal_nan=True)
    assert not metric.state_dict()
    assert metric.higher_is_better is (name == "insertion")


def test_a_collection_keeps_them_apart():
    metrics = {"insertion": InsertionAUC(3), "deletion": DeletionAUC(3), "coarse": DeletionAUC(3, num_points=5)}
    collection = MetricCollection({k: v.clone() for k, v in metrics.items()})
    for metric in (collection, *metrics.values()):
        metric.update(*_case()[:2], torch.zeros(4, 3))
        metric.update(*_case())
    for name, value in collection.compute().items():
        torch.testing.assert_close(value, metrics[name].compute(), msg=name)
    torch.testing.assert_close(collection["coarse"].curve(), metrics["coarse"].curve(), equal_nan=True)


@both
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"curve": torch.rand(2, 3)}, r"curve of shape \(B, L, T\)"),
        ({"curve": torch.rand(2, 3, 1)}, "at least two points"),
        ({"curve": torch.full((2, 3, 4), 7.0)}, "in 0..1 for curve, got 7"),
        ({"share": torch.rand(3)}, r"share of shape \(2, 3, 4\) or \(4,\)"),
        ({"share": torch.tensor([0.0, 40.0, 70.0, 100.0])}, "not voxel counts or per cent"),
        ({"share": torch.tensor([0.0, 0.7, 0.4, 1.0])}, "never fall"),
        ({"share": torch.tensor([0.0, 0.2, torch.nan, 1.0])}, "never fall"),
        ({"label": torch.ones(3, 2)}, r"\(2, 3\), got \(3, 2\)"),
        ({"label": torch.ones(2, 3) / 2}, "got 0.5"),
    ],
)
def test_wrong_input_is_refused(name, change, says):
    good = {"curve": torch.rand(2, 3, 4), "share": torch.tensor([0.0, 0.2, 0.7, 1.0]), "label": torch.ones(2, 3)}
    with pytest.raises(InputError, match=says):
        SCORES[name][0](3).update(**good | change)


@both
def test_wrong_settings_are_refused(name):
    for points in (1, True, 2.5):
        with pytest.raises(InputError, match="num_points"):
            SCORES[name][0](3, num_points=points)
    with pytest.raises(InputError, match="made for 4 labels, got 3"):
        SCORES[name][0](4).update(torch.rand(2, 3, 4), torch.linspace(0, 1, 4), torch.ones(2, 3))
    with pytest.raises(InputError, match="expected average"):
        SCORES[name][0](3).curve("mean")
