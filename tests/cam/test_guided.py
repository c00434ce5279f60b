"""Guided backprop and Guided Grad-CAM: against the rule by hand and captum; who asks what, traces, wrong input."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from captum.attr import GuidedBackprop, GuidedGradCam
from guided_tools import MODES, SIZES, B, C, L, Net, graph, image
from monai.networks.nets import DenseNet
from torch import nn

import camtrain as ct
from camtrain.cam.guided_gates import find_gates, guiding


def by_hand(model, x, label):
    """Forward with operators, backward by Springenberg's rule: pieces of a plain backward between clamps."""
    stages = [model.one, model.two, lambda f: model.hidden(f.flatten(2).mean(dim=2))]
    values, outputs = x, []
    for stage in stages:
        start = values.detach().requires_grad_()
        before = stage(start)
        outputs.append((start, before))
        values = before.detach().clamp(min=0)
    gradient = model.fc.weight[label].expand(len(x), -1)
    for start, before in reversed(outputs):
        gradient = gradient * (gradient > 0) * (before > 0)
        (gradient,) = torch.autograd.grad(before, start, gradient)
    return gradient.detach().sum(dim=1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equals_the_rule_by_hand(rank):
    model, x = Net(rank).double(), image(rank)
    maps = ct.explain(model, x, "guided_backprop", "one")
    assert maps.shape == (B, L, *SIZES[rank])
    assert maps.dtype == torch.float64
    plain = torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), x)[0].sum(dim=1)
    for label in range(L):
        torch.testing.assert_close(maps[:, label], by_hand(model, x, label), rtol=1e-10, atol=1e-13)
    assert not torch.allclose(maps[:, 1], plain), "the rule makes a difference on this net"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_guided_gradcam_is_the_product(rank):
    model, x = Net(rank).double(), image(rank)
    coarse = ct.explain(model, x, "gradcam", "act2").clamp(min=0)
    up = nn.functional.interpolate(coarse, x.shape[2:], mode=MODES[rank], align_corners=False)
    fine = ct.explain(model, x, "guided_backprop")
    both = ct.explain(model, x, "guided_gradcam", "act2")
    torch.testing.assert_close(both, up * fine, rtol=1e-10, atol=1e-15)
    assert (both[up == 0] == 0).all()
    assert both.any()


# against captum ------------------------------------------------------------------------------------------------------


def assert_equals_captum(model, x, layer, labels, rtol=1e-10, atol=1e-13):
    module = dict(model.named_modules())[layer]
    fine = ct.explain(model, x, "guided_backprop", layer, labels=labels)
    both = ct.explain(model, x, "guided_gradcam", layer, labels=labels)
    assert fine.shape == both.shape == (len(x), len(labels), *x.shape[2:])
    for j, label in enumerate(labels):
        theirs = GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=label)
        torch.testing.assert_close(fine[:, j], theirs.detach().sum(dim=1), rtol=rtol, atol=atol)
        theirs = GuidedGradCam(model, module).attribute(
            x.clone().requires_grad_(), target=label, interpolate_mode=MODES[x.ndim - 2]
        )
        torch.testing.assert_close(both[:, j], theirs.detach().sum(dim=1), rtol=rtol, atol=atol)
    assert fine.any()
    assert both.any()


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equals_captum(rank):
    assert_equals_captum(Net(rank).double(), image(rank), "act2", range(L))


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_equals_captum_on_a_densenet():
    torch.manual_seed(0)
    model = DenseNet(3, C, L, init_features=4, growth_rate=3, block_config=(2, 2), bn_size=1).double().eval()
    x = torch.randn(2, C, 20, 24, 17, dtype=torch.float64)
    assert_equals_captum(model, x, "class_layers.relu", [2, 0])


# who asks what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["guided_backprop", "guided_gradcam"])
def test_labels_targets_samples(method):
    model, x = Net().double(), image()
    full = ct.explain(model, x, method, "act2")
    torch.testing.assert_close(ct.explain(model, x, method, "act2", labels=[3, 0]), full[:, [3, 0]])
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    maps = ct.explain(model, x, method, "act2", labels=mask)
    assert maps[~mask].isnan().all()
    torch.testing.assert_close(maps[mask], full[mask])
    own = torch.tensor([[3, 1], [0, 0], [2, 3]])
    expected = torch.stack([full[b, own[b]] for b in range(B)])
    torch.testing.assert_close(ct.explain(model, x, method, "act2", labels=own), expected)
    target = ct.explain(model, x, method, "act2", target=lambda y: y[:, 2])
    torch.testing.assert_close(target[:, 0], full[:, 2])
    each = [ct.explain(model, x[b : b + 1], method, "act2") for b in range(B)]
    torch.testing.assert_close(torch.cat(each), full)
    assert ct.explain(model, x, method, "act2", labels=[]).shape == (B, 0, *SIZES[3])
    none = ct.explain(model, x, method, "act2", labels=torch.zeros(B, L).bool())
    assert none.shape == full.shape
    assert none.isnan().all()


def test_guided_backprop_needs_no_layer():
    """Not even one that could be chosen: a re-used module is ambiguous for maps of layers only."""

    class Shared(Net):
        def forward(self, image):
            self.act2 = self.act3 = self.act1
            return super().forward(image)

    x = image()
    maps = ct.explain(Shared().double(), x, "guided_backprop", "act1")
    torch.testing.assert_close(maps, ct.explain(Net().double(), x, "guided_backprop", "input"))
    with pytest.raises(ct.InputError, match="ran 3 times"):
        ct.explain(Shared().double(), x, "guided_gradcam", "act1")


def test_layers_and_sizes():
    model, x = Net().double(), image()
    both = ct.explain(model, x, "guided_gradcam", layer=["act1", "act2"])
    for name in both:
        torch.testing.assert_close(both[name], ct.explain(model, x, "guided_gradcam", name))
    fine = ct.explain(model, x, "guided_backprop", layer=["act1", "act2"])
    assert fine["act1"].equal(fine["act2"])
    assert fine["act1"].data_ptr() != fine["act2"].data_ptr()
    assert ct.explain(model, x, "guided_backprop", size=(4, 5, 6)).shape == (B, L, 4, 5, 6)
    assert ct.explain(model, x, "guided_gradcam").shape == (B, L, *SIZES[3])


def test_one_forward_and_the_least_backwards():
    from unittest import mock

    model, x = Net().double(), image()
    for method, passes in (("guided_backprop", 2), ("guided_gradcam", 4)):
        calls = []
        handle = model.register_forward_hook(lambda *a, c=calls: c.append(1))
        with mock.patch("torch.autograd.grad", wraps=torch.autograd.grad) as grad:
            ct.explain(model, x, method, "act2", labels=[0, 2])
        handle.remove()
        assert (len(calls), grad.call_count) == (1, passes)


@pytest.mark.parametrize("method", ["guided_backprop", "guided_gradcam"])
def test_reduced_precision(method):
    model, x = Net().eval(), image(dtype=torch.float32)
    exact = ct.explain(model, x, method, "act2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ct.explain(model, x, method, "act2")
    half = ct.explain(Net().bfloat16().eval(), x.bfloat16(), method, "act2")
    for low in (mixed, half):
        assert low.dtype == torch.float32
        # A sign that rounding turns opens or shuts a gate: more than bfloat16's own error.
        assert (low - exact).norm() < 0.15 * exact.norm()


# traces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", ["guided_backprop", "guided_gradcam"])
def test_no_trace(method, mode):
    model, x = Net(act=nn.ReLU, inplace=True).train(), image(dtype=torch.float32)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.one.weight.requires_grad_(False)
    expected = ct.explain(model, x, method, "act2")
    rng, kept = torch.get_rng_state(), x.clone()
    with mode():
        maps = ct.explain(model, x, method, "act2")
    torch.testing.assert_close(maps, expected)
    assert not maps.requires_grad
    assert not maps.is_inference()
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, kept)
    assert x.grad is None
    assert model.fc.weight.grad.eq(1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n != "fc.weight")
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize("method", ["guided_backprop", "guided_gradcam"])
def test_an_exception_in_the_middle(method):
    class Failing(Net):
        def forward(self, image):
            self.act2(self.two(self.act1(self.one(image))))
            raise ValueError("the user's own error")

    model = Failing().train()
    with pytest.raises(ValueError, match="the user's own error"):
        ct.explain(model, image(dtype=torch.float32), method, "act2")
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gates_open_again():
    """Plain gradients before and after guided ones from the same graph; also after an error in between."""
    for act in (nn.ReLU, nn.SiLU):
        y, leaf = graph(Net(act=act).double(), image())
        plain = lambda y=y, leaf=leaf: torch.autograd.grad(y[:, 0].sum(), leaf, retain_graph=True)[0]  # noqa: E731
        before = plain()
        with guiding(find_gates(y, leaf)):
            assert not torch.equal(plain(), before)
        assert torch.equal(plain(), before)
        context = guiding(find_gates(y, leaf))
        context.__enter__()
        context.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert torch.equal(plain(), before)


@pytest.mark.parametrize("options", [{}, {"approximate": True}])
def test_no_graph_is_kept(options):
    class Token:
        pass

    def mark(module, inputs, output):
        token = output.grad_fn.metadata["token"] = Token()
        alive.append(weakref.ref(token))

    model, x = Net(act=nn.SiLU if options else nn.ReLU).double(), image()
    alive = []
    for module in (model, model.act1):
        module.register_forward_hook(mark)
    gc.disable()
    try:
        for method in ("guided_backprop", "guided_gradcam"):
            ct.explain(model, x, method, "act2", **options)
        assert len(alive) == 4
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


# wrong input ---------------------------------------------------------------------------------------------------------


def test_wrong_options():
    model, x = Net(), image(dtype=torch.float32)
    with pytest.raises(ct.InputError, match="approximate= expects True or False, got 'yes'"):
        ct.explain(model, x, "guided_backprop", approximate="yes")
    with pytest.raises(ct.InputError, match=r"aproximate=.*nearest: approximate"):
        ct.explain(model, x, "guided_gradcam", aproximate=True)


@pytest.mark.parametrize("cut", ["detach", "no_grad", "round"])
def test_no_way_to_the_image(cut):
    class Cut(Net):
        def forward(self, image):
            if cut == "no_grad":
                with torch.no_grad():
                    features = self.one(image)
            else:
                features = self.one(image.detach() if cut == "detach" else image.long().to(image))
            return self.fc(self.act3(self.hidden(self.act2(self.two(self.act1(features))).flatten(2).mean(dim=2))))

    with pytest.raises(ct.InputError, match="no gradient reaches the image"):
        ct.explain(Cut(), image(dtype=torch.float32), "guided_backprop")
