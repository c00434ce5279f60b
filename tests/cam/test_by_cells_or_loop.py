"""Where maps cell by cell would be other numbers than those of the loop over labels, the loop is taken."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from by_cells_tools import B, K, L, Tail, activations, ask, assert_cells_equal_loop, assert_loop_is_taken, by_cells
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import camtrain as ct

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


@pytest.mark.parametrize("far", [1, 25, 32, 63])
def test_no_shift_of_a_large_batch_is_overlooked(far):
    """Too little for the sum of the maps to tell, in float32; two rounds of 32 weights are in the batch."""
    source = activations(2, batch=64, dtype=torch.float32)
    assert_loop_is_taken(source, Tail("mlp", 1)(source + 1e-5 * source.roll(far, 0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixing_in_labels_of_a_small_scale_is_not_overlooked(dtype):
    """A millionth of the others: in a plain sum of all labels float32 does not see them."""
    source = activations(2, 2, dtype=dtype)
    hidden = source.flatten(2).mean(dim=2).tanh()
    small = 1e-6 * hidden.detach().softmax(dim=0) * hidden.sum(dim=0)
    assert_loop_is_taken(source, torch.cat([Tail("mlp").to(dtype)(source), small], dim=1))


def test_a_wrong_backward_in_labels_of_a_small_scale_is_not_overlooked():
    source = activations(2, 2)
    hooked = 1e-6 * source.flatten(2).mean(dim=2).tanh()
    hooked.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    assert_loop_is_taken(source, torch.cat([Tail("mlp").double()(source), hooked], dim=1))


def test_labels_of_any_scale_are_mapped():
    source = activations(2, 2)
    scales = torch.tensor([1e-9, 1e-6, 1e-3, 1.0, 1e3, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert_cells_equal_loop(source, Tail("mlp").double()(source) * scales)


# Backward passes without a derivative, or with a wrong one


@pytest.mark.parametrize("error", [TypeError, AssertionError, ValueError])
def test_a_hook_that_takes_no_gradient_with_a_graph_takes_the_loop(error):
    def hook(gradient):
        if gradient.requires_grad:
            raise error

    source = activations()
    value = source * 1.0
    value.register_hook(hook)
    assert_loop_is_taken(source, Tail("mlp").double()(value))


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


# Memory, and what is said


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["torch", "allocator"],
)
def test_where_memory_ends_the_loop_goes_on_with_less(error):
    source, grad = activations(), torch.autograd.grad

    def scarce(*args, **options):
        if options.get("create_graph"):
            raise error
        return grad(*args, **options)

    with mock.patch("torch.autograd.grad", scarce):
        assert_loop_is_taken(source, Tail("mlp").double()(source))


def test_why_the_loop_was_taken_is_in_the_log(caplog):
    source = activations()
    with caplog.at_level(logging.DEBUG, logger="camtrain.cam.by_cells"):
        by_cells(source, Tail("batchnorm training").double()(source))
    assert "samples mix" in caplog.text
