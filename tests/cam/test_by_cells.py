"""Maps cell by cell are those of the loop over labels, and nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from by_cells_tools import GRIDS, KINDS, B, K, L, Tail, activations, ask, assert_cells_equal_loop, by_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.networks.nets import DenseNet
from torch import nn

import camtrain as ct
from camtrain.cam import engine
from camtrain.cam.by_cells import cheaper_by_cells, hires_cam_by_cells
from camtrain.cam.engine import attention_maps_by


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_cells_equal_the_loop(kind, grid, dtype):
    source = activations(*GRIDS[grid], dtype=dtype)
    assert_cells_equal_loop(source, Tail(kind, len(GRIDS[grid])).to(dtype)(source.clone()))


def test_softmax_attention_within_a_sample_and_a_skip_to_the_logits():
    source, query = activations(), torch.randn(L, K, dtype=torch.float64)
    tokens = source.flatten(2)
    weights = torch.softmax(tokens.transpose(1, 2) @ tokens, dim=2)
    logits = (tokens @ weights).amax(dim=2) @ query.T + tokens.square().mean(dim=2) @ query.T
    assert_cells_equal_loop(source, logits)


def test_activations_in_any_layout_of_memory():
    source = activations(2, 3).detach().to(memory_format=torch.channels_last).requires_grad_()
    assert_cells_equal_loop(source, Tail("conv", 2).double()(source))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 6), st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from(KINDS), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_any_selection(batch, labels, grid, kind, seed):
    source = activations(*grid, batch=batch)
    if kind == "instancenorm" and np.prod(grid) == 1:
        kind = "mlp"  # torch refuses to normalise one value
    logits = Tail(kind, len(grid), labels).double()(source)
    mask = torch.rand(batch, labels, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert_cells_equal_loop(source, logits, mask)


@pytest.mark.parametrize(
    "labels",
    [
        [4, 0, 4], torch.tensor([[1, 2], [2, 0], [8, 8]]),
        torch.arange(L) % 3 == 0, torch.arange(B * L).view(B, L) % 4 == 0,
    ],
    ids=["columns", "per sample", "mask", "mask per sample"],
)  # fmt: skip
def test_selected_labels(labels):
    source = activations()
    assert_cells_equal_loop(source, Tail("conv").double()(source), labels)


def test_some_samples():
    source = activations()
    logits = Tail("conv").double()(source)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0, 0]]).bool()
    found = assert_cells_equal_loop(source, logits, mask, slice(1, 3))
    whole = ask(source, logits)[1:3]
    torch.testing.assert_close(found[mask], whole[mask])
    assert found[~mask].isnan().all()


def test_explain_takes_cells_on_a_small_densenet():
    torch.manual_seed(0)
    model = DenseNet(3, 1, 70, init_features=4, growth_rate=3, block_config=(2, 2, 2), bn_size=1).eval()
    image = torch.randn(2, 1, 32, 16, 48)
    with mock.patch("torch.autograd.grad", wraps=torch.autograd.grad) as grad:
        found = ct.explain(model, image, layer="features.transition2")
    cells = found[0, 0].numel()
    assert cells == 6
    assert grad.call_count <= cells + 4
    with mock.patch.object(engine, "cheaper_by_cells", return_value=False):
        torch.testing.assert_close(found, ct.explain(model, image, layer="features.transition2"), rtol=1e-4, atol=1e-7)


def test_many_cells_or_few_labels_take_the_loop():
    tail = Tail("mlp", labels=40).double()
    few, many = activations(2, 2), activations(5, 8)
    assert cheaper_by_cells(few, tail(few), passes=40)
    assert not cheaper_by_cells(few, tail(few), passes=12)
    assert not cheaper_by_cells(many, tail(many), passes=40)
    assert not cheaper_by_cells(few.detach().to("meta"), tail(few), passes=40)
    with_convolution = Tail("conv", 2, labels=40).double()
    assert not cheaper_by_cells(few, with_convolution(few), passes=21)
    assert cheaper_by_cells(few, with_convolution(few), passes=40)


@pytest.mark.parametrize(("groups", "cheaper"), [(1, True), (2, False), (8, True)])
def test_convolutions_in_groups_of_several_channels_take_the_loop(groups, cheaper):
    """Those of ResNeXt cost up to sixteen passes for each cell; depthwise ones do not."""
    source = torch.rand(2, 8, 2, 2, 2, requires_grad=True)
    features = torch.nn.Conv3d(8, 8, 3, padding=1, groups=groups)(source).tanh()
    logits = torch.nn.Linear(8, 80)(features.flatten(2).mean(dim=2))
    assert cheaper_by_cells(source, logits, passes=80) == cheaper


def test_what_is_no_product_has_its_price():
    source = torch.rand(2, 8, 2, 2, 2, requires_grad=True)
    tail = torch.nn.LSTM(8, 8, batch_first=True)
    logits = torch.nn.Linear(8, 80)(tail(source.flatten(2).transpose(1, 2))[0][:, -1])
    assert not cheaper_by_cells(source, logits, passes=40)
    assert cheaper_by_cells(source, torch.nn.Linear(8, 80)(source.flatten(2).mean(dim=2).tanh()), passes=40)


@pytest.mark.parametrize(
    "asked",
    [{"methods": ["gradcam"]}, {"methods": ["hirescam", "layercam"]}, {"create_graph": True}, {"reshape": lambda a: a}],
    ids=["another method", "two methods", "a loss", "reshape"],
)
def test_everything_else_takes_the_loop(asked):
    source = activations()
    logits = Tail("mlp").double()(source)
    with mock.patch.object(engine, "hires_cam_by_cells") as cells:
        attention_maps_by(source, logits, **{"methods": ["hirescam"], "create_graph": False, **asked})
    cells.assert_not_called()


# What is left behind, and where it is called from


def test_nothing_is_left_behind_and_the_graph_stays_usable():
    source, tail = activations(), Tail("conv").double()
    logits = tail(source)
    state = torch.get_rng_state()
    assert by_cells(source, logits) is not None
    assert torch.equal(state, torch.get_rng_state())
    assert source.grad is None
    assert all(p.grad is None for p in tail.parameters())
    assert not source._backward_hooks
    logits.sum().backward()
    assert source.grad.abs().sum() > 0


def test_the_second_graph_is_freed_at_once():
    source, tail = activations(), Tail("conv").double()
    logits = tail(source)
    gc.collect()
    gc.disable()
    try:
        maps = by_cells(source, logits)
        alive = [weakref.ref(t) for t in (source, logits, maps)]
        del source, logits, maps
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_tensors_of_monai():
    source = MetaTensor(activations(dtype=torch.float32).detach()).requires_grad_()
    logits = Tail("mlp")(source)
    assert type(logits) is MetaTensor
    assert type(assert_cells_equal_loop(source, logits)) is torch.Tensor


def test_validation_under_inference_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, K, 3, stride=3), nn.ReLU(), Tail("conv", 2, labels=60)).eval()
    image = torch.randn(2, 1, 6, 9)
    with torch.inference_mode(), mock.patch.object(engine, "hires_cam_by_cells", wraps=hires_cam_by_cells) as cells:
        found = ct.explain(model, image, layer="1")
    assert cells.call_count == 1
    torch.testing.assert_close(found, ct.explain(model, image, layer="1"))
