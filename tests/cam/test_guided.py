"""Guided backprop and Guided Grad-CAM: against captum where captum is right, against hand-written passes elsewhere."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from captum.attr import GuidedBackprop, GuidedGradCam
from monai.networks.nets import DenseNet, EfficientNetBN, ResNet, SEResNet50
from torch import nn
from torch.utils.checkpoint import checkpoint

import camtrain as ct
from camtrain.cam.guided_gates import find_gates, guiding

B, C, L = 3, 2, 4
SIZES = {1: (11,), 2: (11, 8), 3: (7, 10, 8)}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Net(nn.Module):
    """Two convolutions and two ReLUs, each its own module, as captum needs it."""

    def __init__(self, rank=3, act=nn.ReLU, **arguments):
        super().__init__()
        torch.manual_seed(rank)
        conv = CONVS[rank - 1]
        self.one, self.two = conv(C, 5, 3, padding=1), conv(5, 6, 3, stride=2)
        self.act1, self.act2, self.act3 = act(**arguments), act(**arguments), act(**arguments)
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, L)

    def forward(self, image):
        features = self.act2(self.two(self.act1(self.one(image))))
        return self.fc(self.act3(self.hidden(features.flatten(2).mean(dim=2))))


def image(rank=3, batch=B, dtype=torch.float64):
    torch.manual_seed(9)
    return torch.randn(batch, C, *SIZES[rank], dtype=dtype)


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


# every ReLU is found -------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """The weights of `Net`, with ReLU written in another way."""

    def __init__(self, relu, **arguments):
        super().__init__()
        self.net = Net(**arguments).double()
        self.relu = relu

    def forward(self, image):
        net = self.net
        features = self.relu(net.two(self.relu(net.one(image))))
        return net.fc(self.relu(net.hidden(features.flatten(2).mean(dim=2))))


RELUS = {
    "function": nn.functional.relu,
    "function, in place": lambda t: nn.functional.relu(t, inplace=True),
    "method": lambda t: t.relu(),
    "method, in place": lambda t: t.relu_(),
    "one module re-used": nn.ReLU(),
    "one module re-used, in place": nn.ReLU(inplace=True),
    "clamp": lambda t: t.clamp(min=0),
    "clamp, in place": lambda t: t.clamp_(min=0.0),
    "clamp_min": lambda t: t.clamp_min(0),
    "threshold": lambda t: nn.functional.threshold(t, 0, 0),
    "threshold, in place": lambda t: nn.functional.threshold(t, 0, 0, inplace=True),
    "relu6": nn.ReLU6(),
    "relu6, in place": nn.ReLU6(inplace=True),
}


@pytest.mark.parametrize("relu", RELUS)
def test_any_way_to_write_relu(relu):
    x = image()
    expected = ct.explain(Net().double(), x, "guided_backprop")
    model = Written(RELUS[relu])
    assert len(find_gates(*graph(model, x))) == 3
    torch.testing.assert_close(ct.explain(model, x, "guided_backprop"), expected)
    both = ct.explain(model, x, "guided_gradcam", "net.two", labels=[1])
    torch.testing.assert_close(both, ct.explain(Net().double(), x, "guided_gradcam", "two", labels=[1]))


def graph(model, x):
    leaf = x.clone().requires_grad_()
    return model(leaf.clone()), leaf


def test_clamp_at_zero_gates_as_relu_does():
    """Exactly zero activations: clamp lets the gradient pass there, ReLU does not."""

    class Zeros(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.relu = relu

        def forward(self, image):
            return self.relu(image).sum(dim=(1, 2))[:, None]

    x = torch.tensor([[[0.0, 1.0, -1.0]]])
    for relu in (torch.relu, lambda t: t.clamp(min=0)):
        assert ct.explain(Zeros(relu), x, "guided_backprop", "input").flatten().tolist() == [0, 1, 0]


def test_windowing_inside_the_model_is_no_relu():
    class Windowed(Net):
        def forward(self, image):
            return super().forward(image.clamp(0, 1))

    x = image()
    maps = ct.explain(Windowed().double(), x, "guided_backprop")
    inside = ((x > 0) & (x < 1)).double()
    # The windowed image as the leaf: the same gates, and the clamp's own gradient is 1 inside the window.
    model = Net().double()
    leaf = x.clamp(0, 1).requires_grad_()
    y = model(leaf)
    with guiding(find_gates(y, leaf)):
        expected = torch.autograd.grad(y[:, 2].sum(), leaf)[0]
    torch.testing.assert_close(maps[:, 2], (expected * inside).sum(dim=1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpointed_part_is_seen():
    class Checkpointed(Net):
        def forward(self, image):
            part = lambda t: self.act2(self.two(self.act1(self.one(t))))  # noqa: E731
            features = checkpoint(part, image, use_reentrant=self.reentrant)
            return self.fc(self.act3(self.hidden(features.flatten(2).mean(dim=2))))

    for act, options in ((nn.ReLU, {}), (nn.SiLU, {"approximate": True})):
        plain, model, x = Net(act=act).double(), Checkpointed(act=act).double(), image()
        model.reentrant = False
        for method in ("guided_backprop", "guided_gradcam"):
            maps = ct.explain(model, x, method, "act2", **options)
            torch.testing.assert_close(maps, ct.explain(plain, x, method, "act2", **options))
        model.reentrant = True
        with pytest.raises(ct.InputError, match="use_reentrant=False"):
            ct.explain(model, x, "guided_backprop", **options)


def test_custom_functions_are_named():
    class Mystery(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clone()

    class Holder(Net):
        def forward(self, image):
            return Mystery.apply(super().forward(image))

    x = image()
    with pytest.warns(UserWarning, match="custom autograd function Mystery") as caught:
        maps = ct.explain(Holder().double(), x, "guided_backprop")
    assert caught[0].filename == __file__
    torch.testing.assert_close(maps, ct.explain(Net().double(), x, "guided_backprop"))


def test_a_relu_on_parameters_is_left_alone():
    """Only what lies between image and scores counts, be it ReLU or not."""

    class Reparametrised(Net):
        def forward(self, image):
            scale = nn.functional.silu(self.fc.bias).relu()
            return super().forward(image) * (1 + scale)

    model = Reparametrised().double()
    assert [g.name for g in find_gates(*graph(model, image()))] == ["ReLU"] * 3


# MONAI ---------------------------------------------------------------------------------------------------------------


def module_reference(model, x, label):
    """Clamps on the outputs of all ReLU calls, as hooks on tensors."""
    handles = [
        m.register_forward_hook(lambda _, __, out: out.register_hook(lambda g: g.clamp(min=0)) and None)
        for m in model.modules()
        if isinstance(m, nn.ReLU)
    ]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, label].sum(), leaf)
    for handle in handles:
        handle.remove()
    return gradient.sum(dim=1)


@pytest.mark.parametrize("name", ["resnet", "se-resnet"])
def test_residual_nets_with_re_used_and_gated_parts(name):
    torch.manual_seed(0)
    arguments = {"spatial_dims": 3, "num_classes": L}
    if name == "resnet":
        model = ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 10], n_input_channels=C, **arguments)
    else:
        model = SEResNet50(in_channels=C, layers=(1, 1, 1, 1), **arguments)
    model = model.double().eval()
    x = torch.randn(2, C, 34, 40, 33, dtype=torch.float64)
    maps = ct.explain(model, x, "guided_backprop", labels=[3])
    torch.testing.assert_close(maps[:, 0], module_reference(model, x, 3), rtol=1e-8, atol=1e-12)
    both = ct.explain(model, x, "guided_gradcam", "layer4", labels=[3])
    up = nn.functional.interpolate(
        ct.explain(model, x, "gradcam", "layer4", labels=[3]).clamp(min=0), x.shape[2:], mode="trilinear"
    )
    torch.testing.assert_close(both, maps * up)


def test_efficientnet_is_refused_or_approximated():
    torch.manual_seed(0)
    model = EfficientNetBN("efficientnet-b0", spatial_dims=3, in_channels=C, num_classes=L).eval()
    x = torch.randn(1, C, 32, 36, 33)
    for method in ("guided_backprop", "guided_gradcam"):
        with pytest.raises(ct.InputError, match=r"ReLU networks only.*SiLU.*hirescam.*approximate=True"):
            ct.explain(model, x, method, labels=[1])
        maps = ct.explain(model, x, method, "_blocks.4", labels=[1], approximate=True)
        assert maps.shape == (1, 1, 32, 36, 33)
        assert torch.isfinite(maps).all()
        assert maps.any()


# smooth activations --------------------------------------------------------------------------------------------------


class Sigmoided(nn.Module):
    def forward(self, t):
        return t * torch.sigmoid(1.702 * t)


class HardSwish(nn.Module):
    def forward(self, t):
        return t * nn.functional.relu6(t + 3) / 6


class WrittenGELU(nn.Module):
    def forward(self, t):
        return 0.5 * t * (1 + torch.erf(t / 2**0.5))


def monai(name):
    from monai.networks.layers.factories import Act

    return Act[name]


SMOOTH = {
    "SiLU": (nn.SiLU, {}, "SiLU"),
    "SiLU, in place": (nn.SiLU, {"inplace": True}, "SiLU"),
    "MONAI swish": (monai("swish"), {}, "Swish"),
    "MONAI memswish": (monai("memswish"), {"inplace": True}, "SiLU"),
    "MONAI mish": (monai("mish"), {}, "Mish"),
    "GELU": (nn.GELU, {}, "GELU"),
    "GELU, tanh": (nn.GELU, {"approximate": "tanh"}, "GELU"),
    "Mish, in place": (nn.Mish, {"inplace": True}, "Mish"),
    "Hardswish, in place": (nn.Hardswish, {"inplace": True}, "Hardswish"),
    "ELU": (nn.ELU, {}, "ELU"),
    "ELU, in place": (nn.ELU, {"inplace": True}, "ELU"),
    "SELU": (nn.SELU, {}, "SELU"),
    "CELU": (nn.CELU, {}, "CELU"),
    "CELU, in place": (nn.CELU, {"inplace": True}, "CELU"),
    "Softplus": (nn.Softplus, {}, "Softplus"),
    "LeakyReLU": (nn.LeakyReLU, {}, "LeakyReLU"),
    "LeakyReLU, in place": (nn.LeakyReLU, {"inplace": True}, "LeakyReLU"),
    "PReLU": (nn.PReLU, {}, "PReLU"),
    "RReLU": (nn.RReLU, {}, "RReLU"),
    "x sigmoid(a x)": (Sigmoided, {}, "Swish"),
    "x relu6(x + 3)": (HardSwish, {}, "Swish"),
    "x erf(x)": (WrittenGELU, {}, "Swish"),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations(name):
    act, arguments, word = SMOOTH[name]
    model, x = Net(2, act, **arguments).double().eval(), image(2)
    for method in ("guided_backprop", "guided_gradcam"):
        with pytest.raises(ct.InputError, match=rf"ReLU networks only, and this one has .*{word}.*approximate=True"):
            ct.explain(model, x, method)
    maps = ct.explain(model, x, "guided_backprop", approximate=True)
    for label in range(L):
        torch.testing.assert_close(maps[:, label], smooth_by_hand(model, act, arguments, x, label))


def smooth_by_hand(model, act, arguments, x, label):
    stages = [model.one, model.two, lambda f: model.hidden(f.flatten(2).mean(dim=2))]
    values, outputs = x, []
    function = act(**arguments).double().eval()
    for stage in stages:
        start = values.detach().requires_grad_()
        before = stage(start)
        middle = before.detach().requires_grad_()
        after = function(middle.clone())
        outputs.append((start, before, middle, after))
        values = after
    gradient = model.fc.weight[label].expand(len(x), -1).detach()
    for start, before, middle, after in reversed(outputs):
        gradient = gradient * (gradient > 0) * (middle > 0)
        (gradient,) = torch.autograd.grad(after, middle, gradient)
        (gradient,) = torch.autograd.grad(before, start, gradient)
    return gradient.sum(dim=1)


def test_memory_efficient_swish_of_older_monai():
    from monai.networks.blocks.activation import SwishImplementation

    class Old(nn.Module):
        def forward(self, t):
            return SwishImplementation.apply(t)

    x = image(2)
    with pytest.raises(ct.InputError, match="this one has Swish"):
        ct.explain(Net(2, Old).double(), x, "guided_backprop")
    maps = ct.explain(Net(2, Old).double(), x, "guided_backprop", approximate=True)
    torch.testing.assert_close(maps, ct.explain(Net(2, nn.SiLU).double(), x, "guided_backprop", approximate=True))


def test_gates_are_no_activations():
    """A squeeze-and-excite gate times another tensor, a tanh: their own gradient, and no refusal."""

    class Gated(Net):
        def forward(self, image):
            features = self.act1(self.one(image))
            gate = torch.sigmoid(features.mean(dim=(2, 3), keepdim=True))
            features = self.act2(self.two(features * gate * (1 + features)))
            return self.fc(torch.tanh(self.hidden(features.flatten(2).mean(dim=2))))

    model, x = Gated(2).double(), image(2)
    assert [gate.name for gate in find_gates(*graph(model, x))] == ["ReLU"] * 2
    maps = ct.explain(model, x, "guided_backprop", labels=[0])
    torch.testing.assert_close(maps[:, 0], module_reference(model, x, 0))
    torch.testing.assert_close(ct.explain(model, x, "guided_backprop", labels=[0], approximate=True), maps)


def test_a_net_without_any_is_refused():
    for act in (nn.Identity, nn.Tanh, nn.Sigmoid):
        for approximate in (False, True):
            with pytest.raises(ct.InputError, match="no ReLU between the image and the scores"):
                ct.explain(Net(2, act), image(2).float(), "guided_backprop", approximate=approximate)


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
