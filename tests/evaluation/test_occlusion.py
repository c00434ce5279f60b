"""Occlusion maps against a loop over patches, and their grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from camtrain import InputError
from camtrain.evaluation import occlusion, occlusion_map, pool_to_patches
from camtrain.evaluation.occlusion import patch_starts

SIZES = {1: (11,), 2: (7, 5), 3: (6, 4, 5)}
PATCHES = {1: (4,), 2: (3, 2), 3: (3, 2, 4)}
STRIDES = {1: (3,), 2: (2, 2), 3: (2, 1, 3)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def net(rank, seed=0):
    """Not linear, two channels in, three labels out, with a batch norm whose statistics could be disturbed."""
    torch.manual_seed(seed)
    cells = int(np.prod([n - 2 for n in SIZES[rank]]))
    return nn.Sequential(
        CONVS[rank](2, 4, 3), NORMS[rank](4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * cells, 3)
    )


def image_of(rank, batch=2):
    return torch.rand(batch, 2, *SIZES[rank], generator=torch.Generator().manual_seed(rank))


def slow(model, image, patch, stride, nothing):
    """One forward per patch, corners found by walking until the image ends."""
    corners = []
    for n, p, s in zip(image.shape[2:], patch, stride, strict=True):
        axis, at = [], 0
        while at + p < n:
            axis.append(at)
            at += s
        corners.append([*axis, n - p])
    result = torch.zeros(len(image), 3, *map(len, corners))
    model.eval()
    with torch.no_grad():
        whole = model(image)
        for place in itertools.product(*(range(len(c)) for c in corners)):
            hidden = image.clone()
            hole = tuple(slice(c[i], c[i] + p) for c, i, p in zip(corners, place, patch, strict=True))
            for case in range(len(image)):
                for channel in range(2):
                    hidden[(case, channel, *hole)] = nothing[(case, channel, *hole)]
            result[(slice(None), slice(None), *place)] = whole - model(hidden)
    return result


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["air", "mean", 0.3, "own"])
def test_against_a_loop(rank, kind):
    model, image = net(rank), image_of(rank)
    if kind == "own":
        given = nothing = torch.rand(image.shape, generator=torch.Generator().manual_seed(9))
    else:
        given = kind
        level = image.flatten(2).mean(2) if kind == "mean" else torch.full((2, 2), 0.0 if kind == "air" else kind)
        nothing = level.reshape(2, 2, *[1] * rank).expand_as(image)
    expected = slow(net(rank), image, PATCHES[rank], STRIDES[rank], nothing)
    found = occlusion_map(model, image, PATCHES[rank], STRIDES[rank], given, chunk=5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float(expected.abs().max()) > 0.01


def test_a_linear_model_gives_the_sum_of_its_contributions():
    weight = torch.randn(1, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    model[1].weight.data.copy_(weight)
    image = torch.rand(3, 1, 3, 4, dtype=torch.float64)
    found = occlusion_map(model, image, patch=(3, 2), stride=(1, 2), baseline="air")
    assert found.shape == (3, 1, 1, 2)
    assert found.dtype == torch.float64
    expected = (weight.reshape(1, 1, 3, 4) * image).sum(2).unfold(2, 2, 2).sum(3)[:, :, None]
    torch.testing.assert_close(found, expected)


def test_chunks_and_memory_change_nothing(monkeypatch):
    model, image = net(3), image_of(3)
    whole = occlusion_map(model, image, (3, 2, 4), (2, 1, 3))
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    torch.testing.assert_close(occlusion_map(model, image, (3, 2, 4), (2, 1, 3), chunk=3), whole)
    assert max(seen) == 3
    seen.clear()
    monkeypatch.setattr(occlusion, "AT_ONCE", 2 * image[0].nbytes)
    torch.testing.assert_close(occlusion_map(model, image, (3, 2, 4), (2, 1, 3), chunk=100), whole)
    assert max(seen) == 2


def test_the_model_and_the_image_are_left_as_they_were():
    model, image = net(2).train(), image_of(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copy, state = image.clone(), torch.get_rng_state()
    found = occlusion_map(model, image, 2)
    assert model.training
    assert all(m.training for m in model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(image, copy)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.requires_grad
    assert not any(m._forward_hooks for m in model)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_pooling_against_a_loop(rank):
    coarse = torch.randn(2, 3, *(n // 2 for n in SIZES[rank]), generator=torch.Generator().manual_seed(rank))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
    fine = functional.interpolate(coarse, SIZES[rank], mode=mode)
    found = pool_to_patches(coarse, SIZES[rank], PATCHES[rank], STRIDES[rank])
    corners = patch_starts(SIZES[rank], PATCHES[rank], STRIDES[rank])
    for place in itertools.product(*(range(len(c)) for c in corners)):
        hole = tuple(slice(c[i], c[i] + p) for c, i, p in zip(corners, place, PATCHES[rank], strict=True))
        expected = fine[(slice(None), slice(None), *hole)].flatten(2).mean(2).double()
        torch.testing.assert_close(found[(slice(None), slice(None), *place)], expected, atol=1e-5, rtol=1e-5)


def test_maps_and_occlusion_lie_on_one_grid():
    found = occlusion_map(net(3), image_of(3), 3)
    assert pool_to_patches(torch.rand(2, 3, 2, 2, 2), SIZES[3], 3).shape == found.shape


def test_every_voxel_is_hidden_at_least_once():
    for n, p, s in itertools.product(range(2, 9), range(1, 5), range(1, 5)):
        if p <= n and s <= p:
            (starts,) = patch_starts((n,), p, s)
            assert {v for a in starts for v in range(a, a + p)} == set(range(n))
            assert starts == sorted(set(starts))
            assert starts[-1] + p == n


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patch": 8}, "must fit into the image"),
        ({"patch": 2, "stride": 3}, "leaves voxels out"),
        ({"patch": 0}, "patch= expects voxels"),
        ({"patch": (2, 2, 2)}, "one for each of 2 axes"),
        ({"patch": 2, "stride": 1.5}, "stride= expects voxels"),
        ({"patch": 2, "chunk": 0}, "chunk= expects"),
        ({"patch": 2, "baseline": "aair"}, "expected a baseline"),
        ({"patch": 2, "baseline": torch.zeros(1, 1, 3)}, "shape of the image"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(InputError, match=says):
        occlusion_map(net(2), image_of(2), **options)
