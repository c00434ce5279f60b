from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain import InputError
from camtrain.metrics import region_preference


def slow(maps, regions, label):
    """Pair by pair, voxel by voxel."""
    batch, labels = label.shape
    found = np.full((batch, labels), np.nan)
    for s in range(batch):
        for a in range(labels):
            values = maps[s, a].ravel()
            if label[s, a] != 1 or not np.isfinite(values).all():
                continue
            wins = []
            for b in range(labels):
                if b == a or label[s, b] != 1:
                    continue
                at, bt = regions[s, a].ravel(), regions[s, b].ravel()
                mine = [v for v, x, y in zip(values, at, bt, strict=True) if x and not y]
                theirs = [v for v, x, y in zip(values, at, bt, strict=True) if y and not x]
                if mine and theirs:
                    first, second = sum(mine) / len(mine), sum(theirs) / len(theirs)
                    wins.append(0.5 if math.isclose(first, second, abs_tol=1e-9) else float(first > second))
            if wins:
                found[s, a] = sum(wins) / len(wins)
    return found


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_against_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    shape = (3, 4, 5, 2, 3)
    maps = rng.integers(-3, 4, shape).astype(np.float64)
    maps[0, 1, 0, 0, 0] = rng.choice([0.0, np.nan, np.inf])
    regions = rng.random(shape) < rng.choice([0.05, 0.3, 0.9])
    label = rng.choice([0.0, 1.0, 1.0, np.nan], (3, 4))
    got = region_preference(*(torch.from_numpy(x) for x in (maps, regions, label)))
    np.testing.assert_allclose(got.numpy(), slow(maps, regions, label))


def test_one_map_for_all_labels_gets_one_half():
    """Each unordered pair is won once, whatever the map and the places are."""
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(6, 1, 4, 5, 3, generator=generator).expand(-1, 4, -1, -1, -1)
    regions = torch.rand(6, 4, 4, 5, 3, generator=generator) < 0.2
    assert float(region_preference(one, regions, torch.ones(6, 4)).mean()) == pytest.approx(0.5)


def test_perfect_opposite_and_flat_maps():
    regions = torch.zeros(1, 3, 9, dtype=torch.bool)
    regions[0, 0, :3], regions[0, 1, 2:5], regions[0, 2, 6:] = True, True, True
    label = torch.ones(1, 3)
    assert region_preference(regions.float(), regions, label).tolist() == [[1, 1, 1]]
    assert region_preference(-regions.float(), regions, label).tolist() == [[0, 0, 0]]
    assert region_preference(torch.full((1, 3, 9), 0.1), regions, label).tolist() == [[0.5, 0.5, 0.5]]


def test_undefined_pairs():
    maps, regions = torch.rand(1, 2, 4), torch.tensor([[[True, True, False, False]] * 2])
    assert region_preference(maps, regions, torch.ones(1, 2)).isnan().all(), "the same voxels"
    assert region_preference(maps, regions, torch.tensor([[1.0, 0.0]])).isnan().all(), "one finding"
    assert region_preference(maps, regions, torch.tensor([[1.0, torch.nan]])).isnan().all(), "one known finding"


def test_half_precision_and_scale():
    maps, regions = torch.rand(2, 3, 6), torch.rand(2, 3, 6) < 0.5
    expected = region_preference(maps.half().double(), regions, torch.ones(2, 3))
    torch.testing.assert_close(region_preference(maps.half(), regions, torch.ones(2, 3)), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("maps", "regions", "label", "words"),
    [
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), "expected maps"),
        (torch.ones(2, 3, 4).int(), torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 3), "floating point"),
        (torch.rand(2, 3, 4), torch.ones(2, 3, 5, dtype=torch.bool), torch.ones(2, 3), "size='image'"),
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3), "as bool"),
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 2), "expected label"),
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), torch.full((2, 3), 0.5), "soft"),
    ],
)
def test_bad_input(maps, regions, label, words):
    with pytest.raises(InputError, match=words):
        region_preference(maps, regions, label)
