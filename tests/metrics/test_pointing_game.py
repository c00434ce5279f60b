"""PointingGame against a walk over all cells."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from camtrain import InputError
from camtrain.metrics import PointingGame, pointing_game


def _score(volume, allowed, radius=0.0, spacing=None):
    top = volume.max()
    peaks = [cell for cell in itertools.product(*map(range, volume.shape)) if volume[cell] == top]
    if top <= 0 or len(peaks) > 1:
        return 0.0
    step = spacing or [1.0] * volume.ndim
    for cell in itertools.product(*map(range, volume.shape)):
        distance = math.sqrt(sum(((i - j) * s) ** 2 for i, j, s in zip(cell, peaks[0], step, strict=True)))
        if allowed[cell] and distance <= radius + 1e-6:
            return 1.0
    return 0.0


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("radius", [0, 0.9, 1, 1.5, 2])
def test_equals_the_walk(make_case, reference, size, radius):
    case = make_case(size=size)
    case.allowed[:, :, 1:] &= torch.rand(case.allowed[:, :, 1:].shape) < 0.2
    expected, _ = reference(lambda m, a: _score(m, a, radius), *case)
    np.testing.assert_array_equal(pointing_game(*case, tolerance=radius), expected)
    metric = PointingGame(7, "micro", tolerance=radius)
    metric.update(*case)
    assert metric.compute().item() == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("radius", [0.0, 2.1, 5.0])
def test_millimetres_follow_the_spacing(make_case, reference, radius):
    case, spacing = make_case(), (0.7, 4.0, 1.3)
    expected, _ = reference(lambda m, a: _score(m, a, radius, spacing), *case)
    np.testing.assert_array_equal(pointing_game(*case, tolerance_mm=radius, spacing=spacing), expected)
    per_case = torch.tensor([spacing]).repeat(5, 1)
    np.testing.assert_array_equal(pointing_game(*case, tolerance_mm=radius, spacing=per_case), expected)


def test_each_case_has_its_own_spacing():
    maps = torch.tensor([[[0.0, 0.0, 0.0, 9.0]]] * 3)
    allowed = torch.tensor([[[True, False, False, False]]]).expand(3, 1, 4)
    spacing = torch.tensor([[0.7], [0.71], [torch.nan]])
    scores = pointing_game(maps, allowed, torch.ones(3, 1), tolerance_mm=2.1, spacing=spacing)
    assert scores[:2].flatten().tolist() == [1, 0]
    assert scores[2].isnan()
    metric = PointingGame(1, tolerance_mm=2.1)
    metric.update(maps, allowed, torch.ones(3, 1), spacing=spacing)
    assert metric.compute() == 0.5
    assert metric.undefined_rate().item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("volume", [[0.0, 0.0, 0.0], [-1.0, -2.0, -3.0], [5.0, 5.0, 1.0]])
def test_empty_and_tied_maps_are_misses(volume):
    score = pointing_game(torch.tensor([[volume]]), torch.ones(1, 1, 3, dtype=torch.bool), torch.ones(1, 1))
    assert score.item() == 0


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: PointingGame(1, tolerance=-1), "0 cells or more, got -1"),
        (lambda: PointingGame(1, tolerance_mm=float("nan")), "0 mm or more"),
        (lambda: PointingGame(1, tolerance=1, tolerance_mm=3), "got both"),
    ],
)
def test_wrong_radius_is_refused(build, says):
    with pytest.raises(InputError, match=says):
        build()


@pytest.mark.parametrize(
    ("spacing", "says"),
    [(None, "needs spacing="), ([1.0, 1.0], r"shape \(3,\) or \(5, 3\)"), ([1.0, 0.0, 1.0], "above 0 mm, got 0")],
)
def test_wrong_spacing_is_refused(make_case, spacing, says):
    with pytest.raises(InputError, match=says):
        PointingGame(7, tolerance_mm=3).update(*make_case(), spacing=spacing)
