"""ShortcutReliance against a loop over pairs, and what must not change it."""

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
from camtrain.metrics import ShortcutReliance, shortcut_reliance


def _loop(before, outside, inside, label, floor=0.02):
    """(outside effect, inside effect, share) of each label, one pair after the other."""
    rows = []
    for column in range(label.shape[1]):
        moved = {0: [], 1: []}
        for case in range(label.shape[0]):
            truth, start = label[case, column].item(), before[case, column].item()
            ends = outside[case, column].item(), inside[case, column].item()
            if not math.isnan(truth) and not any(map(math.isnan, ends)):
                moved[int(truth)].append([abs(end - start) for end in ends])
        means = [np.mean(m, axis=0) for m in moved.values() if m]
        out, within = np.mean(means, axis=0) if means else (np.nan, np.nan)
        defined = out >= floor or within >= floor
        rows.append((out, within, out / (out + within) if defined else np.nan))
    return np.array(rows).T


def _batch(cases=13, labels=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    before, outside, inside = (torch.rand(cases, labels, generator=generator) for _ in range(3))
    label = (torch.rand(cases, labels, generator=generator) < 0.3).float()
    label[torch.rand(label.shape, generator=generator) < 0.1] = torch.nan
    outside[torch.rand(label.shape, generator=generator) < 0.1] = torch.nan
    inside[torch.rand(label.shape, generator=generator) < 0.1] = torch.nan
    if labels > 4:
        outside[:, 1] = before[:, 1] + (0.5 - before[:, 1]) / 50  # moves less than the floor
        inside[:, 1] = before[:, 1]
        label[:, 2] = label[:, 2] * 0  # no present case
        label[:, 3] = torch.nan
        outside[:, 4] = torch.nan
    return [t.to(dtype) for t in (before, outside, inside)] + [label]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cases=st.integers(1, 12), labels=st.integers(1, 7))
def test_equals_the_loop(seed, cases, labels):
    batch = _batch(cases, labels, seed)
    found = shortcut_reliance(*batch)
    np.testing.assert_allclose(torch.stack(found), _loop(*batch), atol=1e-12)
    assert all(t.shape == (labels,) for t in found)


def test_class_equals_twin_in_any_batches():
    batch = _batch(23)
    metric = ShortcutReliance(6)
    for rows in torch.arange(23).split(5):
        metric.update(*(t[rows] for t in batch))
    expected = shortcut_reliance(*batch)
    for got, wanted in zip(metric.per_label(), expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    torch.testing.assert_close(metric.averaged("none"), expected.share, equal_nan=True)
    torch.testing.assert_close(metric.averaged("macro"), expected.share.nanmean())
    torch.testing.assert_close(metric.compute(), {k: v.nanmean() for k, v in expected._asdict().items()})
    plain = ShortcutReliance(6, average="none")
    plain.update(*batch)
    torch.testing.assert_close(plain.compute(), expected._asdict(), equal_nan=True)


def test_micro_pools_all_pairs_as_one_label():
    batch = _batch(23)
    pooled = shortcut_reliance(*(t.reshape(-1, 1) for t in batch))
    metric = ShortcutReliance(6, average="micro")
    metric.update(*batch)
    torch.testing.assert_close(metric.compute(), {k: v[0] for k, v in pooled._asdict().items()})
    torch.testing.assert_close(metric.averaged("micro"), pooled.share[0])


def test_undefined_and_unmeasured_are_told_apart():
    batch = _batch(40)
    metric = ShortcutReliance(6)
    metric.update(*batch)
    _, outside, inside, label = batch
    measured = ~(outside + inside + label).isnan()
    assert metric.pairs.tolist() == measured.sum(0).tolist()
    rates = metric.undefined_rate("none")
    assert rates.isnan().tolist() == [False, False, False, True, True, False]
    assert rates[[0, 1, 2, 5]].tolist() == [0, 1, 0, 0]
    assert metric.undefined_rate() == metric.undefined_rate("micro") == 0.25
    missing = ((~label.isnan()) & ~measured).sum(0) / (~label.isnan()).sum(0)
    torch.testing.assert_close(metric.unmeasured_rate("none"), missing.double(), equal_nan=True, atol=1e-7, rtol=0)
    total = (~label.isnan()).sum()
    assert metric.unmeasured_rate("micro").item() == pytest.approx(((total - measured.sum()) / total).item())


def test_a_network_that_says_nothing_has_no_share():
    same = torch.full((9, 3), 0.4)
    label = (torch.arange(27).reshape(9, 3) % 2).float()
    for floor in (0.02, 0.0):
        metric = ShortcutReliance(3, floor=floor)
        metric.update(same, same, same, label)
        assert metric.compute()["share"].isnan()
        assert metric.undefined_rate() == 1
        assert metric.compute()["outside_effect"] == 0


@pytest.mark.parametrize(("moved", "defined"), [(0.015, False), (0.025, True)])
@pytest.mark.parametrize("side", [0, 1])
def test_one_effect_over_the_floor_is_enough(moved, defined, side):
    before = torch.full((2, 1), 0.5)
    sides = [before, before]
    sides[side] = before + moved
    share = shortcut_reliance(before, *sides, torch.tensor([[1.0], [0.0]])).share
    assert share.isnan().item() is not defined
    if defined:
        assert share.item() == 1 - side


def test_absent_and_present_cases_weigh_the_same():
    before = torch.zeros(100, 1)
    label = torch.zeros(100, 1)
    label[0] = 1
    outside, inside = before.clone(), before.clone()
    outside[0], inside[1:] = 0.8, 0.4
    found = shortcut_reliance(before, outside, inside, label)
    assert [t.item() for t in found] == pytest.approx([0.4, 0.2, 2 / 3])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), times=st.integers(2, 5))
def test_more_of_the_same_absent_cases_change_nothing(seed, times):
    batch = _batch(9, 1, seed)
    absent = (batch[3] == 0)[:, 0]
    more = [torch.cat([t] + [t[absent]] * times) for t in batch]
    torch.testing.assert_close(
        torch.stack(shortcut_reliance(*more)), torch.stack(shortcut_reliance(*batch)), equal_nan=True
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), labels=st.integers(1, 5))
def test_exchanging_the_sides_and_turning_probabilities_round(seed, labels):
    before, outside, inside, label = _batch(8, labels, seed)
    here, there = (shortcut_reliance(before, *sides, label) for sides in ((outside, inside), (inside, outside)))
    torch.testing.assert_close(here.share, 1 - there.share, equal_nan=True)
    torch.testing.assert_close(here.outside_effect, there.inside_effect, equal_nan=True)
    shares = here.share[~here.share.isnan()]
    assert ((shares >= 0) & (shares <= 1)).all()
    turned = shortcut_reliance(1 - before, 1 - outside, 1 - inside, label)
    torch.testing.assert_close(torch.stack(turned), torch.stack(here), equal_nan=True, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_double(dtype):
    batch = _batch(500, 3, dtype=dtype)
    expected = shortcut_reliance(*(t.double() for t in batch))
    metric = ShortcutReliance(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(*batch)
        torch.testing.assert_close(metric.per_label(), expected, atol=1e-12, rtol=0)


def test_one_case_and_one_label_keep_their_axis():
    metric = ShortcutReliance(1, average="none")
    metric.update(*(torch.tensor([[v]]) for v in (0.9, 0.1, 0.7, 1.0)))
    assert metric.averaged("none").shape == (1,)
    assert metric.averaged("none").item() == pytest.approx(0.8)


def test_without_data_there_is_no_share():
    metric = ShortcutReliance(3)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute()["share"].isnan()
    assert metric.undefined_rate().isnan()
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    assert metric.pairs.tolist() == [0, 0, 0]


def test_inputs_are_left_alone_and_need_no_graph():
    batch = _batch()
    batch[0].requires_grad_()
    copies = [t.detach().clone() for t in batch]
    metric = ShortcutReliance(6)
    metric.update(*batch)
    assert not metric.outside_moved.requires_grad
    for left, copy in zip(batch, copies, strict=True):
        torch.testing.assert_close(left.detach(), copy, equal_nan=True)


def test_reset_under_inference_mode_pickle_and_collections():
    batch = _batch()
    pair = MetricCollection({"strict": ShortcutReliance(6, floor=0.5), "usual": ShortcutReliance(6)})
    nothing = [torch.full((1, 6), 0.5)] * 3 + [torch.full((1, 6), torch.nan)]
    with torch.inference_mode():
        pair.update(*nothing)
        pair.reset()
    pair.update(*nothing)
    pair.update(*batch)
    usual = pickle.loads(pickle.dumps(pair["usual"]))  # noqa: S301
    torch.testing.assert_close(usual.averaged("none"), shortcut_reliance(*batch).share, equal_nan=True)
    strict = pair["strict"].averaged("none")
    torch.testing.assert_close(strict, shortcut_reliance(*batch, floor=0.5).share, equal_nan=True)
    assert strict.isnan().sum() > usual.averaged("none").isnan().sum()
    assert set(pair.compute()) >= {"strict_share", "usual_outside_effect"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"before": torch.rand(2, 3, 1)}, r"before as probabilities \(B, L\).*got \(2, 3, 1\)"),
        ({"outside": torch.rand(2, 4)}, r"outside .*\(2, 4\) .*before is \(2, 3\)"),
        ({"inside": torch.zeros(2, 3, dtype=torch.long)}, "floating point.*int64"),
        ({"before": torch.full((2, 3), 1.5)}, "0 to 1 in before, got 1.5: pass sigmoid"),
        ({"inside": torch.full((2, 3), -2.0)}, "0 to 1 in inside, got -2"),
        ({"outside": torch.full((2, 3), torch.inf)}, "0 to 1 in outside, got inf"),
        ({"before": torch.full((2, 3), torch.nan)}, "before holds NaN"),
        ({"label": torch.zeros(2, 2)}, r"label of shape \(B, L\) = \(2, 3\)"),
        ({"label": torch.full((2, 3), 0.5)}, "no soft labels"),
    ],
)
def test_wrong_input_is_refused(change, says):
    inputs = {name: torch.full((2, 3), 0.5) for name in ("before", "outside", "inside")}
    inputs = inputs | {"label": torch.ones(2, 3)} | change
    with pytest.raises(InputError, match=says):
        shortcut_reliance(**inputs)
    with pytest.raises(InputError, match=says):
        ShortcutReliance(3).update(**inputs)


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="made for 4 labels, got 6"):
        ShortcutReliance(4).update(*_batch())
    for floor in (-0.1, 1.5, True, "0.02", torch.nan):
        with pytest.raises(InputError, match="floor as a change of probability"):
            ShortcutReliance(3, floor=floor)
    with pytest.raises(InputError, match="nearest: macro"):
        ShortcutReliance(3, average="makro")


def test_risk_is_half_share_and_half_lost_area_in_any_batches():
    before, outside, inside, label = _batch()
    outside[0, 0], inside[1, 1] = torch.nan, torch.nan
    metric = ShortcutReliance(before.shape[1])
    for rows in (slice(0, 3), slice(3, None)):
        metric.update(before[rows], outside[rows], inside[rows], label[rows])
    share = shortcut_reliance(before, outside, inside, label).share
    expected = []
    for column in range(before.shape[1]):
        rows = ~(outside + inside)[:, column].isnan()
        up, down = (outside[rows & (label[:, column] == truth), column].float() for truth in (1, 0))
        wins = [float(a > b) + 0.5 * float(a == b) for a in up for b in down]
        lost = 1 - sum(wins) / len(wins) if wins else float("nan")
        expected.append(lost if share[column].isnan() else (float(share[column]) + lost) / 2)
    found = metric.risk("none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert share[1].isnan()  # moves under nothing
    assert found[1] == expected[1]
    assert metric.risk() == found.nanmean()
    metric.reset()
    assert metric.risk("none").isnan().all()
    with pytest.raises(InputError, match="pooled"):
        metric.risk("micro")
