"""SamePlace: peaks outside the region that share a place, against a count by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from camtrain.metrics import SamePlace, same_place

SIZE = (16, 9, 5)


def make(seed, batch=6, labels=3, size=SIZE):
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, labels, *size, generator=rng)
    allowed = torch.rand(batch, labels, *size, generator=rng) < 0.3
    label = (torch.rand(batch, labels, generator=rng) < 0.7).float()
    return maps, allowed, label


def by_hand(cases, labels):
    """Per label and pooled: the share of peaks that lie outside, in the block where most of these lie."""
    seen, total = {n: Counter() for n in range(labels)}, Counter()
    for maps, allowed, label in cases:
        for b, n in np.argwhere(label.numpy() == 1):
            one = maps[b, n].numpy()
            if not allowed[b, n].any() or one.max() <= 0:
                continue
            total[n] += 1
            at = np.unravel_index(one.argmax(), one.shape)
            if not allowed[b, n][at]:
                along = [min({3: 8, 2: 22, 1: 512}[one.ndim], s) for s in one.shape]
                seen[n][tuple(i * k // s for i, k, s in zip(at, along, one.shape, strict=True))] += 1
    each = [max(seen[n].values(), default=0) / total[n] if total[n] else np.nan for n in range(labels)]
    pooled = sum(seen.values(), Counter())
    return each, max(pooled.values(), default=0) / sum(total.values())


@pytest.mark.parametrize("size", [SIZE, (7, 30), (11,)])
def test_against_a_count_by_hand(size):
    cases = [make(seed, size=size) for seed in range(4)]
    cases[0][0][0] = -1.0  # no positive cell, no peak
    cases[1][0][:, :, 0] += 30.0  # many peaks in one place
    metric = SamePlace(3, "none")
    for case in cases:
        metric.update(*case)
    each, pooled = by_hand(cases, 3)
    assert metric.averaged("none").tolist() == pytest.approx(each)
    assert metric.pooled().item() == pytest.approx(pooled)
    assert metric.undefined_rate("micro") > 0
    assert same_place(*cases[1]).tolist() == pytest.approx(by_hand(cases[1:2], 3)[0])
    assert max(each) > 0.1


def test_peaks_inside_do_not_count_and_nothing_gives_nan():
    maps = torch.zeros(4, 1, 8, 8)
    maps[:, 0, 2, 3] = 1.0
    allowed = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    allowed[:, 0, 2, 3] = True
    assert same_place(maps, allowed, torch.ones(4, 1)).tolist() == [0.0]
    assert same_place(maps, ~allowed, torch.ones(4, 1)).tolist() == [1.0]
    assert same_place(maps, allowed, torch.zeros(4, 1)).isnan().all()
    assert SamePlace(2).pooled().isnan()
