"""PointingRecall against a loop written from the protocol, and thresholds against trying every one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from camtrain import InputError
from camtrain.metrics import PointingRecall, pointing_game, pointing_recall, rejection_thresholds

SIZE = (3, 4, 2)


def case(batch=6, labels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, labels, *SIZE, generator=generator)
    allowed = torch.rand(batch, labels, *SIZE, generator=generator) < 0.4
    label = (torch.rand(batch, labels, generator=generator) < 0.5).float()
    label[1, 2] = torch.nan
    maps[2, 1] = torch.nan
    return maps, allowed, label


def slow(maps, allowed, label, least):
    """One pair after the other."""
    score = np.full(label.shape, np.nan)
    for b, k in np.ndindex(*label.shape):
        truth, values = float(label[b, k]), maps[b, k].numpy()
        if math.isnan(truth) or np.isnan(values).all():
            continue
        rejects = values.max() < least[k]
        if truth == 0:
            score[b, k] = rejects
        else:
            score[b, k] = not rejects and values.max() > 0 and bool(allowed[b, k].numpy()[values == values.max()][0])
    return score


@pytest.mark.parametrize("least", [[1.5, 2.0, 1.0, -math.inf], [math.inf] * 4, [0.0] * 4])
def test_against_a_loop(least):
    found = pointing_recall(*case(), least)
    np.testing.assert_array_equal(found.numpy(), slow(*case(), least))
    metric = PointingRecall(4, least, "none")
    for part in zip(*(t.split(4) for t in case()), strict=True):
        metric.update(*part)
    torch.testing.assert_close(metric.compute(), found.nanmean(dim=0), equal_nan=True)
    label = torch.where(found.isnan(), torch.nan, case()[2])
    torch.testing.assert_close(metric.rejecting_all(), (label == 0).sum(0) / (~label.isnan()).sum(0).double())


def test_rejecting_everything_scores_the_absent_labels():
    metric = PointingRecall(4, math.inf)
    metric.update(*case())
    torch.testing.assert_close(metric.compute(), metric.rejecting_all())


def test_without_rejection_present_labels_play_the_pointing_game():
    maps, allowed, label = case()
    present = label == 1
    found = pointing_recall(maps, allowed, label, -math.inf)
    torch.testing.assert_close(found[present], pointing_game(maps, allowed, label)[present], equal_nan=True)
    assert not found[(label == 0) & ~found.isnan()].any()


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_the_best_of_all(seed):
    given = case(batch=9, seed=seed)
    chosen = rejection_thresholds(*given)
    best = np.nansum(slow(*given, chosen.tolist()), axis=0)
    tops = given[0].flatten(2).amax(2).numpy()
    for k in range(4):
        tried = [-math.inf, math.inf, *np.unique(tops[~np.isnan(tops[:, k]) & ~np.isnan(given[2][:, k].numpy()), k])]
        hits = [np.nansum(slow(*given, [t] * 4)[:, k]) for t in tried]
        assert best[k] == max(hits)
        equals = [t for t, h in zip(tried, hits, strict=True) if h == max(hits) and t > -math.inf]
        assert chosen[k].item() == min(equals)


def test_tolerance_in_mm_reaches_as_far_as_in_the_pointing_game():
    maps, allowed, label = case()
    spacing = torch.tensor([2.0, 3.0, 5.0])
    near = {"tolerance_mm": 3.1, "spacing": spacing}
    found, game = pointing_recall(maps, allowed, label, -math.inf, **near), pointing_game(maps, allowed, label, **near)
    present = label == 1
    torch.testing.assert_close(found[present], game[present], equal_nan=True)
    assert game.nansum() > pointing_game(maps, allowed, label).nansum()
    metric = PointingRecall(4, -math.inf, "none", tolerance_mm=3.1)
    metric.update(maps, allowed, label, spacing=spacing)
    torch.testing.assert_close(metric.compute(), found.nanmean(dim=0), equal_nan=True)


def test_bad_input():
    maps, allowed, label = case()
    with pytest.raises(InputError, match="one threshold or 4"):
        pointing_recall(maps, allowed, label, [1.0, 2.0])
    with pytest.raises(InputError, match="one threshold or 4"):
        PointingRecall(4, [math.nan] * 4)
    with pytest.raises(InputError, match="made for 3 labels, got 4"):
        PointingRecall(3).update(maps, allowed, label)
    with pytest.raises(InputError, match="needs spacing="):
        pointing_recall(maps, allowed, label, tolerance_mm=4.0)
