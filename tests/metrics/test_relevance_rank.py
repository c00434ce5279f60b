"""RelevanceRank against every order in which ties could be broken."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain.metrics import RelevanceRank, relevance_rank

# The package shows the function under the file's name, so the module itself is fetched by import.
module = importlib.import_module("camtrain.metrics.relevance_rank")


def _score(volume, allowed):
    """Cells one by one, strongest first; the cells of one height share the places that are left."""
    if volume.max() <= 0:
        return np.nan
    cells = sorted(zip(volume.flatten().tolist(), allowed.flatten().tolist(), strict=True), key=lambda c: -c[0])
    places, inside = int(allowed.sum()), 0.0
    left = places
    for _, run in itertools.groupby(cells, key=lambda c: c[0]):
        level = [may for _, may in run]
        taken = min(left, len(level))
        inside += taken * sum(level) / len(level)
        left -= taken
    return inside / places


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_loop(make_case, reference, size, ties):
    case = make_case(size=size, seed=len(size))
    if ties:
        case = case._replace(maps=(case.maps * 1.5).round())
    expected, counted = reference(_score, *case)
    np.testing.assert_allclose(relevance_rank(*case), expected, atol=1e-12)
    metric = RelevanceRank(7, "micro")
    metric.update(*case)
    np.testing.assert_allclose(metric.compute(), np.nanmean(expected), atol=1e-12)
    assert metric.undefined_rate().item() == pytest.approx(np.isnan(expected[counted]).mean())
    share = case.allowed.flatten(2).double().mean(2).numpy()
    np.testing.assert_allclose(metric.chance(), share[counted].mean(), atol=1e-12)
    per_label = [share[counted[:, k], k].mean() if counted[:, k].any() else np.nan for k in range(7)]
    np.testing.assert_allclose(metric.chance("none"), per_label, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(heights=st.lists(st.integers(-1, 2), min_size=2, max_size=6), data=st.data())
def test_ties_score_the_mean_over_all_ways_to_break_them(heights, data):
    may = data.draw(st.lists(st.booleans(), min_size=len(heights), max_size=len(heights)).filter(any))
    scores = []
    for order in itertools.permutations(range(len(heights))):
        ranked = sorted(order, key=lambda cell: -heights[cell])  # stable: equal cells stay as the order has them
        scores.append(np.mean([may[cell] for cell in ranked[: sum(may)]]))
    expected = np.mean(scores) if max(heights) > 0 else np.nan
    maps, allowed = torch.tensor([[heights]], dtype=torch.float32), torch.tensor([[may]])
    np.testing.assert_allclose(relevance_rank(maps, allowed, torch.ones(1, 1)).item(), expected, atol=1e-12)


def test_a_region_that_covers_everything_scores_one_and_so_does_chance():
    maps = torch.randn(3, 4, 5, 6)
    metric = RelevanceRank(4)
    metric.update(maps, torch.ones_like(maps, dtype=torch.bool), torch.ones(3, 4))
    assert metric.compute() == 1
    assert metric.chance() == 1


def test_a_region_that_covers_nothing_does_not_count():
    metric = RelevanceRank(4)
    allowed = torch.zeros(3, 4, 5, 6, dtype=torch.bool)
    metric.update(torch.randn(3, 4, 5, 6), allowed, torch.ones(3, 4), has_organs=torch.ones(3, dtype=torch.bool))
    assert metric.pairs.tolist() == [0] * 4
    assert metric.compute().isnan()
    assert metric.chance().isnan()


def test_empty_maps_are_undefined_and_flat_ones_score_chance():
    maps = torch.stack([torch.zeros(8), -torch.rand(8), torch.full((8,), 2.0)])[:, None]
    allowed = (torch.arange(8) < 3).expand(3, 1, 8)
    score = relevance_rank(maps, allowed, torch.ones(3, 1))[:, 0]
    assert score[:2].isnan().all()
    assert score[2].item() == pytest.approx(3 / 8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cells=st.integers(2, 40))
def test_only_the_order_matters(seed, cells):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, cells, generator=generator, dtype=torch.float64)
    maps[..., 0] = 3.0
    allowed = torch.rand(2, 3, cells, generator=generator) < 0.5
    allowed[..., -1] = True
    bent = torch.where(maps > 0, maps**3, 7 * maps)
    given_maps, bent_maps = (relevance_rank(m, allowed, torch.ones(2, 3)) for m in (maps, bent))
    torch.testing.assert_close(bent_maps, given_maps, equal_nan=True)


def test_a_random_order_scores_chance():
    generator = torch.Generator().manual_seed(0)
    metric = RelevanceRank(1)
    allowed = (torch.arange(50) < 15).expand(4000, 1, 50)
    metric.update(torch.rand(4000, 1, 50, generator=generator), allowed, torch.ones(4000, 1))
    assert metric.compute().item() == pytest.approx(metric.chance().item(), abs=0.01)


@pytest.mark.parametrize("ties", [1.0, 100.0])
def test_selecting_and_sorting_find_the_same_cell(ties):
    maps = (torch.randn(9, 31) * ties).round()
    places = torch.tensor([1, 2, 3, 10, 15, 20, 29, 30, 31])
    torch.testing.assert_close(module._by_sorting(maps, places), module._by_selection(maps, places))


def test_big_grids_are_taken_in_parts(make_case, monkeypatch):
    case = make_case()
    whole = relevance_rank(*case)
    for cells in (1, 150):
        monkeypatch.setattr(module, "_CELLS", cells)
        torch.testing.assert_close(relevance_rank(*case), whole, equal_nan=True)
