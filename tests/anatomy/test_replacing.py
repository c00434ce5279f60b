"""Replacing a part of an image: what is kept is untouched, and the seam is where it should be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain import InputError
from camtrain.anatomy.replacing import grow, replace_inside, replace_outside

SIZES = [(11,), (5, 8), (4, 3, 6)]


def _case(size, seed=0, batch=3, channels=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(batch, channels, *size, generator=generator).to(dtype) for _ in range(2))
    region = torch.rand(batch, 1, *size, generator=generator) < 0.15
    return image, other, region


def _slow(image, other, kept, seam):
    """Voxel by voxel: the share of the replacement from the distance to the nearest kept voxel."""
    result = np.empty(image.shape)
    for b in range(len(image)):
        home = np.argwhere(kept[b, 0].numpy())
        for place in itertools.product(*map(range, image.shape[2:])):
            steps = min((int(np.abs(h - place).max()) for h in home), default=seam + 1)
            share = min(steps / (seam + 1), 1.0)
            at = (b, slice(None), *place)
            result[at] = (1 - share) * image[at].numpy() + share * other[at].numpy()
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seam", [0, 1, 2, 5])
def test_equals_the_loop_over_voxels(size, seam):
    image, other, region = _case(size, dtype=torch.float64)
    np.testing.assert_allclose(replace_outside(image, other, region, seam), _slow(image, other, region, seam))
    np.testing.assert_allclose(replace_inside(image, other, region, seam), _slow(image, other, ~region, seam))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), seam=st.integers(0, 3), size=st.sampled_from(SIZES))
def test_what_is_kept_is_kept_to_the_bit(seed, seam, size):
    image, other, region = _case(size, seed)
    other[:, :, 0] = torch.inf
    kept, before = region.expand_as(image), (image.clone(), other.clone(), region.clone())
    outside, inside = replace_outside(image, other, region, seam), replace_inside(image, other, region, seam)
    assert torch.equal(outside[kept], image[kept])
    assert torch.equal(inside[~kept], image[~kept])
    for left, copy in zip((image, other, region), before, strict=True):
        assert torch.equal(left, copy)


@pytest.mark.parametrize("seam", [0, 2])
def test_regions_of_nothing_and_everything(seam):
    image, other, region = _case((4, 3, 6))
    nothing, everything = torch.zeros_like(region), torch.ones_like(region)
    assert torch.equal(replace_outside(image, other, everything, seam), image)
    assert torch.equal(replace_outside(image, other, nothing, seam), other)
    assert torch.equal(replace_inside(image, other, everything, seam), other)
    assert torch.equal(replace_inside(image, other, nothing, seam), image)


def test_a_hard_border_splits_the_image():
    image, other, region = _case((5, 8))
    both = replace_outside(image, other, region, 0) + replace_inside(image, other, region, 0)
    torch.testing.assert_close(both, image + other)


def test_samples_do_not_touch_and_flips_commute():
    image, other, region = _case((4, 3, 6))
    whole = replace_outside(image, other, region, 2)
    for b in range(3):
        part = slice(b, b + 1)
        assert torch.equal(replace_outside(image[part], other[part], region[part], 2), whole[part])
    flipped = replace_outside(image.flip(2, 4), other.flip(2, 4), region.flip(2, 4), 2)
    assert torch.equal(flipped, whole.flip(2, 4))


def test_an_axis_of_one_voxel():
    image, other = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    region = torch.tensor([[[[True, False, False, False]]]])
    assert replace_outside(image, other, region, 1).flatten().tolist() == [0, 0.5, 1, 1]


def test_the_dtype_is_that_of_the_image_and_a_view_will_do():
    image, _, region = _case((5, 8), dtype=torch.float16)
    replaced = replace_outside(image, torch.zeros(1, 1, 1, 1).expand_as(image), region, 1)
    assert replaced.dtype == torch.float16
    assert replaced.is_contiguous()


@pytest.mark.parametrize("replace", [replace_outside, replace_inside])
def test_wrong_input_is_refused(replace):
    image, other, region = _case((5, 8))
    with pytest.raises(InputError, match=r"one shape .*\(3, 2, 5, 8\).* and \(3, 2, 5, 7\)"):
        replace(image, other[..., :7], region)
    with pytest.raises(InputError, match=r"region as bool \(3, 1, 5, 8\), got torch.float32"):
        replace(image, other, region.float())
    with pytest.raises(InputError, match=r"got torch.bool \(3, 2, 5, 8\)"):
        replace(image, other, region.expand_as(image))
    for seam in (-1, 0.5, True):
        with pytest.raises(InputError, match="whole number of voxels"):
            replace(image, other, region, seam)


@pytest.mark.parametrize(("size", "voxels"), [((9,), [2]), ((7, 11), [0, 5]), ((6, 9, 30), [1, 20, 13])])
def test_grow_reaches_so_many_voxels_along_each_axis(size, voxels):
    rng = torch.Generator().manual_seed(0)
    region = torch.rand(2, 1, *size, generator=rng) < 0.03
    before = region.clone()
    grown = grow(region, voxels)
    wanted = torch.zeros_like(region)
    for place in region.nonzero().tolist():
        box = [slice(max(0, at - v), at + v + 1) for at, v in zip(place[2:], voxels, strict=True)]
        wanted[(place[0], 0, *box)] = True
    assert torch.equal(grown, wanted)
    assert torch.equal(region, before)
