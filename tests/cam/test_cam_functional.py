"""The formulas against loops written from the papers, and their first and second derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from camtrain.cam.functional import cam, grad_cam, grad_cam_pp, hires_cam, layer_cam, respond_cam, xgrad_cam

FORMULAS = [hires_cam, grad_cam, grad_cam_pp, layer_cam, respond_cam, xgrad_cam]
GRIDS = [(5,), (3, 4), (2, 3, 4)]


def a_pair(grid, batch=2, channels=3, signed=False, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    activations = torch.rand(batch, channels, *grid, generator=rng, dtype=torch.float64) + 0.1
    if signed:
        activations = activations - 0.6
    gradients = torch.randn(batch, channels, *grid, generator=rng, dtype=torch.float64)
    return activations.to(dtype), gradients.to(dtype)


def cells(tensor):
    return list(itertools.product(*(range(size) for size in tensor.shape[2:])))


def by_cell(activations, gradients, contribution):
    """One number per sample and cell, summed over channels in plain python."""
    maps = torch.zeros(activations.shape[0], *activations.shape[2:], dtype=activations.dtype)
    for b in range(activations.shape[0]):
        for k in range(activations.shape[1]):
            A = {c: activations[(b, k, *c)].item() for c in cells(activations)}
            G = {c: gradients[(b, k, *c)].item() for c in cells(activations)}
            for c in A:
                maps[(b, *c)] += contribution(A, G, c)
    return maps


def slow_hires(A, G, c):
    return A[c] * G[c]


def slow_grad(A, G, c):
    return sum(G.values()) / len(G) * A[c]


def slow_layer(A, G, c):
    return A[c] * max(G[c], 0.0)


def slow_respond(A, G, c):
    total = sum(A.values())
    return 0.0 if total == 0 else sum(A[i] * G[i] for i in A) / total * A[c]


def slow_plus_plus(A, G, c):
    """Literally: alpha = G^2 / (2 G^2 + sum(A) G^3), weight = sum of alpha * ReLU(G)."""
    total = sum(A.values())
    weight = sum(g**2 / (2 * g**2 + total * g**3) * max(g, 0.0) for g in G.values() if g != 0)
    return weight * A[c]


SLOW = {
    hires_cam: slow_hires,
    grad_cam: slow_grad,
    layer_cam: slow_layer,
    respond_cam: slow_respond,
    xgrad_cam: slow_respond,
    grad_cam_pp: slow_plus_plus,
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_formula_equals_the_loop_of_its_paper(formula, grid):
    activations, gradients = a_pair(grid)
    expected = by_cell(activations, gradients, SLOW[formula])
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(formula(activations, gradients), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_cam_takes_the_weight_behind_global_average_pooling(grid):
    activations, _ = a_pair(grid)
    weight = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.3]], dtype=torch.float64)
    positions = activations[0, 0].numel()
    gradients = (weight / positions).reshape(2, 3, *[1] * len(grid)).expand_as(activations)
    expected = sum(weight[:, k].reshape(2, *[1] * len(grid)) * activations[:, k] for k in range(3))
    torch.testing.assert_close(cam(activations, gradients), expected)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("formula", [*FORMULAS, cam])
def test_can_be_differentiated_twice(formula, grid):
    activations, gradients = a_pair(grid, channels=2)
    gradients = gradients + 0.05 * gradients.sign()  # away from the kink of the inner ReLU
    inputs = (activations.requires_grad_(), gradients.requires_grad_())
    assert gradcheck(formula, inputs)
    assert gradgradcheck(formula, inputs, fast_mode=activations.numel() > 20)


def test_xgrad_cam_is_respond_cam():
    activations, gradients = a_pair((3, 4), signed=True)
    assert torch.equal(xgrad_cam(activations, gradients), respond_cam(activations, gradients))


@given(seed=st.integers(0, 2**16), grid=st.sampled_from(GRIDS), channels=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_respond_cam_and_hires_cam_have_one_sum(seed, grid, channels):
    activations, gradients = a_pair(grid, channels=channels, seed=seed)
    space = tuple(range(1, activations.ndim - 1))
    respond, hires = (f(activations, gradients).sum(dim=space) for f in (respond_cam, hires_cam))
    torch.testing.assert_close(respond, hires)


def test_a_dead_channel_has_no_say_in_respond_cam_and_no_gradient_is_nan():
    activations, gradients = a_pair((3, 4))
    activations[:, 1] = 0
    activations.requires_grad_()
    maps = respond_cam(activations, gradients)
    alive = respond_cam(activations[:, [0, 2]], gradients[:, [0, 2]])
    torch.testing.assert_close(maps, alive)
    (slope,) = torch.autograd.grad(maps.square().sum(), activations)
    assert slope.isfinite().all()


def test_a_channel_whose_signed_sum_vanishes_cannot_drown_respond_cam():
    """Pre-activation output: |weight| of a thousand times the gradient's at most."""
    activations = torch.tensor([[[1.0, -1.0, 1.0, -1.0 + 1e-7]]])
    gradients = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    maps = respond_cam(activations, gradients)
    assert maps.isfinite().all()
    assert maps.abs().max() <= 1000 * gradients.abs().max() * activations.abs().max()


@pytest.mark.parametrize("formula", FORMULAS)
def test_signed_layers_give_finite_maps(formula):
    activations, gradients = a_pair((2, 3, 4), signed=True, dtype=torch.float32)
    assert formula(activations, gradients).isfinite().all()
    pole = torch.tensor([[[-1.0, -1.0]]])  # sum(A) G = -2, the pole of Grad-CAM++
    assert formula(pole, torch.ones_like(pole)).isfinite().all()


@pytest.mark.parametrize("formula", [*FORMULAS, cam])
def test_zero_activations_give_zero_maps(formula):
    _, gradients = a_pair((3, 4))
    assert torch.equal(formula(torch.zeros_like(gradients), gradients), torch.zeros(2, 3, 4, dtype=torch.float64))


def test_zero_gradients_give_zero_grad_cam_pp_where_the_literal_formula_is_nan():
    activations, gradients = a_pair((3, 4))
    assert torch.equal(grad_cam_pp(activations, torch.zeros_like(gradients)), torch.zeros(2, 3, 4, dtype=torch.float64))


def test_tiny_gradients_do_not_underflow_in_grad_cam_pp():
    """G^3 of 1e-15 is no float32 number; the weight is G / 2 all the same."""
    activations = torch.ones(1, 1, 4)
    maps = grad_cam_pp(activations, torch.full((1, 1, 4), 1e-15))
    torch.testing.assert_close(maps, torch.full((1, 4), 2e-15), rtol=1e-5, atol=0)


@pytest.mark.parametrize("formula", [hires_cam, grad_cam, layer_cam, respond_cam])
def test_samples_do_not_mix(formula):
    activations, gradients = a_pair((3, 4), batch=5)
    whole = formula(activations, gradients)
    alone = torch.cat([formula(activations[b : b + 1], gradients[b : b + 1]) for b in range(5)])
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)
