"""EnergyInside against two sums in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain.metrics import EnergyInside, energy_inside


def _score(volume, allowed):
    inside = total = 0.0
    for value, may in zip(volume.flatten().tolist(), allowed.flatten().tolist(), strict=True):
        total += max(value, 0.0)
        inside += max(value, 0.0) * may
    return inside / total if total else np.nan


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
def test_equals_the_loop(make_case, reference, size):
    case = make_case(size=size)
    expected, counted = reference(_score, *case)
    np.testing.assert_allclose(energy_inside(*case), expected, atol=1e-12)
    metric = EnergyInside(7, "micro")
    metric.update(*case)
    np.testing.assert_allclose(metric.compute(), np.nanmean(expected), atol=1e-12)
    share = case.allowed.flatten(2).double().mean(2).numpy()
    np.testing.assert_allclose(metric.chance(), share[counted].mean(), atol=1e-12)
    assert metric.undefined_rate().item() == pytest.approx(np.isnan(expected[counted]).mean())


def test_chance_per_label_and_over_labels(make_case, reference):
    case = make_case()
    counted = reference(_score, *case)[1]
    metric = EnergyInside(7)
    metric.update(*case)
    share = case.allowed.flatten(2).double().mean(2).numpy()
    per_label = [share[counted[:, k], k].mean() if counted[:, k].any() else np.nan for k in range(7)]
    np.testing.assert_allclose(metric.chance("none"), per_label, atol=1e-12)
    np.testing.assert_allclose(metric.chance(), np.nanmean(per_label), atol=1e-12)


def test_even_map_scores_chance():
    allowed = torch.rand(3, 2, 6, 5) < 0.4
    allowed[..., 0] = True
    metric = EnergyInside(2)
    metric.update(torch.full((3, 2, 6, 5), 0.7), allowed, torch.ones(3, 2))
    torch.testing.assert_close(metric.compute(), metric.chance())


def test_allowed_everywhere_is_one():
    maps = torch.randn(3, 4, 5, 6)
    assert (energy_inside(maps, torch.ones_like(maps, dtype=torch.bool), torch.ones(3, 4)) == 1).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cells=st.integers(2, 40))
def test_inside_and_outside_make_the_whole(seed, cells):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, cells, generator=generator)
    allowed = torch.rand(2, 3, cells, generator=generator) < 0.5
    allowed[..., 0], allowed[..., -1] = True, False
    both = energy_inside(maps, allowed, torch.ones(2, 3)) + energy_inside(maps, ~allowed, torch.ones(2, 3))
    torch.testing.assert_close(both[~both.isnan()], torch.ones_like(both[~both.isnan()]))


def test_half_precision_sums_do_not_overflow():
    maps = torch.full((1, 1, 200_000), 60_000.0, dtype=torch.float16)
    allowed = torch.zeros(1, 1, 200_000, dtype=torch.bool)
    allowed[..., :50_000] = True
    assert energy_inside(maps, allowed, torch.ones(1, 1)).item() == pytest.approx(0.25, abs=1e-9)
