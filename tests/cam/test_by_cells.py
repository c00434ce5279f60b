"""Maps cell by cell are those of the loop over labels, or the loop is taken."""

from __future__ import annotations

import gc
import logging
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.networks.nets import DenseNet
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import camtrain as ct
from camtrain.cam import engine
from camtrain.cam.by_cells import cheaper_by_cells, hires_cam_by_cells
from camtrain.cam.engine import attention_maps_by
from camtrain.cam.selection import select

B, L, K = 3, 9, 5
GRIDS = {"1d": (4,), "2d": (2, 3), "3d": (2, 1, 3)}


def activations(*grid, batch=B, dtype=torch.float64):
    drawn = torch.randn(batch, K, *(grid or GRIDS["3d"]), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return drawn.requires_grad_()


def ask(source, logits, labels=None, samples=None, cells=True):
    """Maps with the gate forced open or shut."""
    with mock.patch.object(engine, "cheaper_by_cells", return_value=cells):
        return attention_maps_by(source, logits, ["hirescam"], labels, False, samples=samples)["hirescam"]


def by_cells(source, logits):
    return hires_cam_by_cells(source, logits, select(None, *logits.shape, logits.device))


def assert_cells_equal_loop(source, logits, labels=None, samples=None):
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if source.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    with mock.patch.object(engine, "hires_cam_by_cells", wraps=hires_cam_by_cells) as asked:
        found = ask(source, logits, labels, samples)
    assert asked.call_count == 1
    assert by_cells(source, logits) is not None
    wanted = ask(source, logits, labels, samples, cells=False)
    assert (found.shape, found.dtype, found.requires_grad) == (wanted.shape, wanted.dtype, False)
    torch.testing.assert_close(found, wanted, equal_nan=True, **tolerance)
    return found


def assert_loop_is_taken(source, logits):
    assert by_cells(source, logits) is None
    torch.testing.assert_close(ask(source, logits), ask(source, logits, cells=False), rtol=0, atol=0, equal_nan=True)


class Tail(nn.Module):
    """What lies behind the layer; `kind` names its middle."""

    def __init__(self, kind, rank=3, labels=L):
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
        self.middle = {
            "mlp": nn.Identity(),
            "conv": nn.Sequential(conv(K, K, 3, padding=1), nn.ReLU(inplace=True)),
            "silu": nn.Sequential(conv(K, K, 1), nn.SiLU()),
            "batchnorm": nn.Sequential(norm(K), nn.GELU()).eval(),
            "batchnorm training": nn.Sequential(norm(K), nn.GELU()),
            "instancenorm": instance(K, affine=True),
            "groupnorm": nn.GroupNorm(1, K),
            "dropout": nn.Sequential(nn.Dropout(0.4), nn.Tanh()),
        }[kind]
        self.head = nn.Sequential(nn.Linear(K, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, labels))

    def forward(self, value):
        return self.head((value + self.middle(value)).flatten(2).mean(dim=2))


KINDS = ["mlp", "conv", "silu", "batchnorm", "instancenorm", "groupnorm", "dropout"]


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


# Samples that mix


def trace(value):
    """Little, but more than rounding."""
    return 100 * torch.finfo(value.dtype).eps


@pytest.mark.parametrize(
    "mix",
    [
        lambda f: torch.softmax(0.1 * f @ f.T, dim=1) @ f,
        lambda f: f - f.mean(dim=0),
        lambda f: f.roll(1, dims=0) + f,
        lambda f: torch.cat([f[:1], f[1:] + trace(f) * f[:1]]),
        lambda f: torch.cat([f[:-1] + trace(f) * f[-1:], f[-1:]]),
        lambda f: f.cumsum(dim=0),
    ],
    ids=["attention", "centred", "rolled", "a trace of the first", "a trace of the last", "summed"],
)
def test_samples_that_mix_take_the_loop(mix):
    for dtype in (torch.float64, torch.float32):
        source = activations(dtype=dtype)
        assert_loop_is_taken(source, Tail("mlp").to(dtype)(mix(source.flatten(1)).view_as(source)))


def test_batchnorm_in_training_mode_takes_the_loop():
    source = activations()
    logits = Tail("batchnorm training").double()(source)
    assert_loop_is_taken(source, logits)


def test_a_batch_of_one_cannot_mix():
    source = activations(batch=1)
    assert_cells_equal_loop(source, Tail("batchnorm training").double()(source))


def test_samples_are_told_apart_in_large_batches():
    for batch in (40, 300):
        source = activations(2, batch=batch, dtype=torch.float32)
        tail = Tail("mlp")
        assert_cells_equal_loop(source, tail(source))
        # So far apart their weights are the same.
        assert_loop_is_taken(source, tail(source + 0.1 * source.roll(32, dims=0)))


# Backward passes without a derivative, or with a wrong one


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class InNumpy(Once):
    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.detach().numpy().copy())


class Refusing(Once):
    @staticmethod
    def backward(ctx, gradient):
        if gradient.requires_grad:
            raise TypeError("only plain tensors")
        return gradient.clone()


@pytest.mark.parametrize("function", [Once, InNumpy, Refusing])
def test_custom_functions_take_the_loop(function):
    source = activations()
    assert_loop_is_taken(source, Tail("mlp").double()(function.apply(source)))


def test_what_lies_before_the_layer_does_not_matter():
    source = Once.apply(activations())
    assert_cells_equal_loop(source, Tail("mlp").double()(source))


def test_an_operator_without_second_derivative_takes_the_loop():
    source = activations(4)
    tokens = source.transpose(1, 2)[:, None]
    attended = F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2)
    with mock.patch("torch.autograd.grad", side_effect=NotImplementedError("derivative is not implemented")):
        assert by_cells(source, Tail("mlp", 1).double()(attended)) is None
    ask(source, Tail("mlp", 1).double()(attended))  # whatever torch can do here, the maps come


@pytest.mark.parametrize(
    "hook",
    [
        lambda g: g.clamp(min=0),
        lambda g: g.clamp(-1e-3, 1e-3),
        lambda g: g / g.abs().amax(),
        lambda g: g.detach(),
        lambda g: g - 0.5 * g.detach(),
        lambda g: g * (g.abs() >= g.abs().median(dim=1, keepdim=True).values),
    ],
    ids=["guided", "clipped", "normalised", "constant", "half constant", "largest half"],
)
def test_hooks_that_are_not_linear_take_the_loop(hook):
    source = activations()
    hidden = Tail("conv").double().middle(source).flatten(2).mean(dim=2)
    hidden.register_hook(hook)
    assert_loop_is_taken(source, Tail("mlp").double().head(hidden))


def test_linear_hooks_count_as_in_the_loop():
    source = activations()
    hidden = source.flatten(2).mean(dim=2)
    hidden.register_hook(lambda g: -3 * g)
    assert_cells_equal_loop(source, Tail("mlp").double().head(hidden))


def test_checkpointed_tails():
    source = activations()
    tail = Tail("dropout").double()
    torch.manual_seed(5)
    found = assert_cells_equal_loop(source, checkpoint(tail, source, use_reentrant=False))
    torch.manual_seed(5)
    torch.testing.assert_close(found, ask(source, tail(source), cells=False))
    with pytest.raises(ct.InputError, match="use_reentrant"):
        ask(source, checkpoint(tail, source, use_reentrant=True))


def test_a_graph_that_is_gone_or_never_was_is_told_as_before():
    source = activations()
    logits = Tail("mlp").double()(source)
    logits.sum().backward()
    with pytest.raises(ct.InputError, match=r"ask for maps before backward\(\)"):
        ask(source, logits)
    with pytest.raises(ct.InputError, match="do not depend"):
        ask(activations(), Tail("mlp").double()(activations()))


@pytest.mark.slow
def test_a_compiled_tail_takes_the_loop():
    torch._dynamo.reset()
    source = activations()
    assert_loop_is_taken(source, torch.compile(Tail("mlp").double(), backend="aot_eager")(source))
    torch._dynamo.reset()


def test_half_precision_takes_the_loop(caplog):
    caplog.set_level(logging.DEBUG, logger="camtrain.cam.by_cells")
    source = activations(dtype=torch.float32)
    tail = Tail("mlp")
    assert_loop_is_taken(source, tail.bfloat16()(source.bfloat16()).float())
    assert_loop_is_taken(source, tail.float()(source).bfloat16())
    reduced = source.detach().bfloat16().requires_grad_()
    assert_loop_is_taken(reduced, tail.bfloat16()(reduced))
    tail.float()
    inside = source.bfloat16().tanh().float()
    assert_loop_is_taken(source, tail(inside))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tail(source)
    assert_loop_is_taken(source, mixed)
    assert all("bfloat16" in record.getMessage() for record in caplog.records)


def test_a_large_graph_behind_few_cells_takes_the_loop():
    source = activations()
    logits = Tail("mlp").double()(source)
    with mock.patch("camtrain.cam.by_cells._MOST", 10):
        assert_loop_is_taken(source, logits)


# Not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_what_is_not_finite_stays_where_the_loop_leaves_it(kind, value, caplog):
    caplog.set_level(logging.DEBUG, logger="camtrain.cam.by_cells")
    source = activations()
    with torch.no_grad():
        source[1, 2, 0, 0, 1] = value
    assert_loop_is_taken(source, Tail(kind).double()(source))
    assert "not finite" in caplog.text


@pytest.mark.parametrize("shape", [(B, K, 0), (0, K, 2), (B, 0, 2)])
def test_nothing_to_map_takes_the_loop(shape):
    source = torch.zeros(shape, requires_grad=True)
    logits = source.sum(dim=(1, 2))[:, None].tanh().expand(-1, L)
    assert_loop_is_taken(source, logits)


def test_a_slope_that_is_not_finite_takes_the_loop():
    source = activations()
    with torch.no_grad():
        source[1, 2, 0, 0, 1] = 0
    logits = Tail("mlp").double()(source.abs().sqrt())
    assert logits.isfinite().all()
    assert ask(source, logits, cells=False).isnan().any()
    assert_loop_is_taken(source, logits)


# What is left behind, memory, and what is said


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


def test_an_end_of_memory_is_for_the_caller():
    source = activations()
    logits = Tail("mlp").double()(source)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with mock.patch("torch.autograd.grad", side_effect=error), pytest.raises(RuntimeError, match="memory"):
            by_cells(source, logits)


def test_why_the_loop_was_taken_is_in_the_log(caplog):
    source = activations()
    with caplog.at_level(logging.DEBUG, logger="camtrain.cam.by_cells"):
        by_cells(source, Tail("batchnorm training").double()(source))
    assert "samples mix" in caplog.text


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
