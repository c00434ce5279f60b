"""Crop, padding, turns and geometry of RAD-ChestCT volumes, against slow references with every size different."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from camtrain.data.rad_chestct_transforms import (
    Crop,
    Turn,
    affine_of,
    central_crop,
    lung_crop,
    random_turn,
    windowed,
)

SHAPES = [(7, 9, 12), (10, 5, 8), (11, 6, 15), (4, 13, 9)]
SIZE = (8, 7, 11)


def slow_centre(volume, size):
    """Pad all short axes by the half (rounded down) first, then cut all long ones by the half first."""
    for axis, wanted in enumerate(size):
        short = max(0, wanted - volume.shape[axis])
        pads = [(0, 0)] * 3
        pads[axis] = (int(short / 2.0), short - int(short / 2.0))
        volume = np.pad(volume, pads, constant_values=volume.min())
    for axis, wanted in enumerate(size):
        first = int((volume.shape[axis] - wanted) / 2.0)
        volume = np.take(volume, range(first, first + wanted), axis=axis)
    return volume


@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_equals_padding_then_cutting(shape):
    volume = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    made = central_crop(shape, SIZE).of(volume, volume.min())
    assert np.array_equal(made, slow_centre(volume, SIZE))
    assert made.dtype == np.int16


@pytest.mark.parametrize("seed", range(20))
def test_around_the_lungs_everything_lies_within_the_volume(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(5, 30, 3))
    box = tuple(tuple(sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in shape)
    crop = lung_crop(shape, SIZE, box)
    for start, n, m, (first, last) in zip(crop.start, shape, SIZE, box, strict=True):
        if n < m:
            assert start == -((m - n) // 2)
            continue
        assert 0 <= start <= n - m
        ideal = (first + last - m) / 2
        # As near to the middle of the lungs as the edges let it.
        assert abs(start - min(max(ideal, 0), n - m)) <= 0.5


def positions(volume, affine):
    """World position of the voxel with each value (all values different)."""
    found = {}
    for index in np.ndindex(*volume.shape):
        found[int(volume[index])] = tuple(np.round((affine @ [*index, 1])[:3], 6).tolist())
    return found


@pytest.mark.parametrize("flip", [None, 0, 1, 2])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_every_voxel_keeps_its_place_in_the_world(flip, quarters):
    volume = np.arange(3 * 4 * 6).reshape(3, 4, 6)
    affine = affine_of(0.8)
    before = positions(volume, affine)
    crop = Crop((1, -1, 2), (2, 5, 3))
    part = crop.of(volume, -1)
    turn = Turn(flip, quarters)
    after = positions(turn.of(part), turn.affine(crop.affine(affine), part.shape))
    after.pop(-1)
    assert len(after) == 2 * 4 * 3
    assert all(before[value] == place for value, place in after.items())


def test_axes_of_the_files():
    """Index 0 runs downwards, 1 to the back, 2 to the left; the world runs to the right, the front and up."""
    steps = affine_of()[:3, :3].T
    np.testing.assert_allclose(steps, [[0, 0, -0.8], [0, -0.8, 0], [-0.8, 0, 0]])


def test_turns_are_drawn_as_the_authors_draw_them():
    torch.manual_seed(0)
    turns = [random_turn((9, 8, 8)) for _ in range(4000)]
    flips = [turn.flip for turn in turns]
    quarters = [turn.quarters for turn in turns]
    assert abs(flips.count(None) / 4000 - 1 / 2) < 0.03
    for axis in range(3):
        assert abs(flips.count(axis) / 4000 - 1 / 6) < 0.03
    assert abs(quarters.count(0) / 4000 - 1 / 2) < 0.03
    for k in (1, 2, 3):
        assert abs(quarters.count(k) / 4000 - 1 / 6) < 0.03
    together = sum(t.flip is not None and t.quarters > 0 for t in turns)
    assert abs(together / 4000 - 1 / 4) < 0.03
    assert {random_turn((9, 8, 7)).quarters for _ in range(100)} == {0, 2}  # the shape of the slices stays


def test_window():
    hu = np.array([-2000, -1000, -100, 800, 3000], dtype=np.int16)
    torch.testing.assert_close(windowed(hu, (-1000, 800), 0.449), torch.tensor([-0.449, -0.449, 0.051, 0.551, 0.551]))
    assert hu[0] == -2000  # not in place
