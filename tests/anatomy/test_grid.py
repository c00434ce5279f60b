"""Regions on the map's grid against a reference that cuts every voxel by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from camtrain import InputError
from camtrain._grid import MODES, occupancy, to_grid

ABDOMEN = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen" / "organs.nii.gz"
needs_abdomen = pytest.mark.skipif(not ABDOMEN.exists(), reason="the abdominal CT is not on this machine")


def cut(region, size):
    """Occupancy of every cell in exact fractions: each voxel is cut by hand into the cells that it overlaps."""
    region = np.asarray(region)
    filled = {cell: Fraction(0) for cell in itertools.product(*map(range, size))}
    volume = Fraction(1)
    for voxels, cells in zip(region.shape, size, strict=True):
        volume *= Fraction(voxels, cells)
    for voxel in zip(*np.nonzero(region), strict=True):
        shares = []
        for k, voxels, cells in zip(voxel, region.shape, size, strict=True):
            width = Fraction(voxels, cells)
            axis = {}
            for i in range(cells):
                overlap = min(Fraction(int(k) + 1), (i + 1) * width) - max(Fraction(int(k)), i * width)
                if overlap > 0:
                    axis[i] = overlap
            shares.append(axis)
        for cell in itertools.product(*shares):
            part = Fraction(1)
            for axis, i in zip(shares, cell, strict=True):
                part *= axis[i]
            filled[cell] += part
    return {cell: value / volume for cell, value in filled.items()}


def by_hand(region, size, rule):
    """(B, N, *S') from `cut`, with a rule (occupancy, best occupancy) -> bool."""
    result = torch.zeros(*region.shape[:2], *size, dtype=torch.bool)
    for b, n in itertools.product(*map(range, region.shape[:2])):
        share = cut(region[b, n], size)
        best = max(share.values())
        for cell, value in share.items():
            result[(b, n, *cell)] = rule(value, best)
    return result


SHAPES = [
    ((8,), (2,)),
    ((7,), (3,)),
    ((3,), (6,)),
    ((3,), (5,)),
    ((6, 9), (4, 3)),
    ((5, 8, 6), (2, 3, 6)),
    ((4, 2, 7), (3, 4, 1)),
]


def scattered(shape, share, seed=0):
    return torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_fill_and_any_are_the_hand_cut_cells(shape, size, share):
    region = scattered(shape, share)
    quarter = Fraction(1, 4)
    fill = by_hand(region, size, lambda v, best: v > 0 and v >= min(quarter, best / 2))
    assert torch.equal(to_grid(region, size), fill)
    assert torch.equal(to_grid(region, size, "any"), by_hand(region, size, lambda v, best: v > 0))


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_occupancy_is_the_exact_share(shape, size):
    region = scattered(shape, 0.4)
    got = occupancy(region, size)
    assert got.dtype == torch.float32
    for cell, value in cut(region[1, 2], size).items():
        assert got[(1, 2, *cell)].item() == pytest.approx(float(value), abs=1e-6)
    assert torch.allclose(got.flatten(2).mean(2), region.float().flatten(2).mean(2), atol=1e-6)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_the_authors_ways_are_their_interpolate_calls(shape, size):
    region = scattered(shape, 0.3)
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    nearest = functional.interpolate(region.float(), size=size, mode="nearest") != 0
    assert torch.equal(to_grid(region, size, "nearest"), nearest)
    assert torch.equal(
        to_grid(region, size, "trilinear"), functional.interpolate(region.float(), size=size, mode=linear) != 0
    )
    if all(n >= m for n, m in zip(shape, size, strict=True)):
        area = functional.interpolate(region.float(), size=size, mode="area") != 0
        assert torch.equal(to_grid(region, size, "any"), area)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "trilinear"])  # which blurs by design
def test_whole_factors_repeat_voxels(mode):
    region = scattered((3, 2, 4), 0.5)
    larger = to_grid(region, (6, 2, 12), mode)
    assert torch.equal(larger, region.repeat_interleave(2, 2).repeat_interleave(3, 4))
    assert torch.equal(to_grid(region, (3, 2, 4), mode), region)


def test_the_threshold_is_a_quarter_or_half_of_the_best_cell():
    line = torch.zeros(1, 1, 16, dtype=torch.bool)
    line[..., [0, 1, 2, 3, 4, 8, 9]] = True  # cells of 4: 4/4, 1/4, 2/4, 0
    assert to_grid(line, (4,)).flatten().tolist() == [True, True, True, False]
    wide = torch.zeros(1, 1, 32, dtype=torch.bool)
    wide[..., [0, 1, 2, 8]] = True  # cells of 8: 3/8, 1/8 (below both 1/4 and half of the best), 0, 0
    assert to_grid(wide, (4,)).flatten().tolist() == [True, False, False, False]
    thin = torch.zeros(1, 1, 64, dtype=torch.bool)
    thin[..., [0, 1, 16]] = True  # cells of 16: 2/16 and 1/16 = half of the best
    assert to_grid(thin, (4,)).flatten().tolist() == [True, True, False, False]


@st.composite
def regions(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    size = tuple(draw(st.integers(1, 9)) for _ in shape)
    share = draw(st.sampled_from([0.02, 0.2, 0.7]))
    return scattered(shape, share, seed=draw(st.integers(0, 10_000))), size


@settings(max_examples=60, deadline=None)
@given(regions())
def test_no_region_vanishes_and_none_appears(case):
    region, size = case
    assert torch.equal(to_grid(region, size).flatten(2).any(2), region.flatten(2).any(2))


@settings(max_examples=60, deadline=None)
@given(regions(), st.integers(0, 2))
def test_flips_commute(case, axis):
    region, size = case
    axis = 2 + axis % len(size)
    for mode in ("fill", "any"):
        assert torch.equal(to_grid(region.flip(axis), size, mode), to_grid(region, size, mode).flip(axis))


@settings(max_examples=60, deadline=None)
@given(regions(), st.integers(0, 10_000))
def test_more_voxels_never_mean_less_occupancy(case, seed):
    region, size = case
    more = region | scattered(region.shape[2:], 0.2, seed)
    assert (occupancy(more, size) >= occupancy(region, size)).all()
    assert (to_grid(more, size, "any") >= to_grid(region, size, "any")).all()
    assert (to_grid(region, size) <= to_grid(region, size, "any")).all()


def test_samples_and_organs_do_not_depend_on_each_other():
    region = scattered((9, 8, 7), 0.05)
    alone = torch.stack([torch.cat([to_grid(r[None, None], (3, 3, 2))[0] for r in sample]) for sample in region])
    assert torch.equal(to_grid(region, (3, 3, 2)), alone)


def test_autocast_and_low_matmul_precision_change_nothing():
    region = scattered((30, 31, 32), 0.5)
    expected = occupancy(region, (2, 3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(occupancy(region, (2, 3, 4)), expected)


def test_errors_name_the_argument():
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="mode= expects fill, nearest, trilinear, any, got 'nearst'; nearest: nearest"):
        to_grid(region, (2, 2), "nearst")
    with pytest.raises(InputError, match=r"expected 2 positive cell numbers .* got size=\(2,\)"):
        to_grid(region, (2,))
    with pytest.raises(InputError, match=r"got size=\(2, 0\): pass the spatial shape of the maps"):
        occupancy(region, (2, 0))
    with pytest.raises(InputError, match="expected a bool region"):
        to_grid(region.float(), (2, 2))
    with pytest.raises(InputError, match="one to three spatial axes"):
        to_grid(torch.zeros(1, 1, 2, 2, 2, 2, dtype=torch.bool), (1, 1, 1, 1), "trilinear")


@needs_abdomen
@pytest.mark.parametrize(("stride", "nearest", "half"), [(8, 29, 16), (16, 12, 6), (32, 3, 1)])
def test_all_41_organs_of_a_real_abdomen_survive(stride, nearest, half):
    """The comparison figures of the design hold for ceil(size / stride) cells and torch's adaptive area windows."""
    import nibabel as nib

    organs = torch.from_numpy(np.asarray(nib.load(ABDOMEN).dataobj).astype(np.int32))[None, None]
    ids = torch.unique(organs)[1:]
    assert len(ids) == 41
    region = torch.cat([organs == i for i in ids], dim=1)
    size = [math.ceil(n / stride) for n in organs.shape[2:]]

    def kept(cells):
        return int(cells.flatten(2).any(2).sum())

    assert kept(to_grid(region, size)) == 41
    assert kept(to_grid(region, size, "any")) == 41
    assert kept(to_grid(region, size, "nearest")) == nearest
    assert kept(functional.interpolate(region.float(), size=size, mode="area") >= 0.5) == half


@pytest.mark.parametrize("size", [(2, 3, 5), (4, 6, 5), (8, 2, 1)])
def test_large_volumes_are_summed_in_parts(size, monkeypatch):
    region = torch.rand(2, 3, 8, 6, 10, generator=torch.Generator().manual_seed(0)) < 0.2
    whole = occupancy(region, size)
    monkeypatch.setattr("camtrain._grid.AT_ONCE", 70)
    assert torch.equal(occupancy(region, size), whole)
