"""Guided methods find every ReLU however it is written, refuse or approximate smooth activations, leave gates alone."""

from __future__ import annotations

import pytest
import torch
from guided_tools import C, L, Net, graph, image, module_reference
from monai.networks.nets import EfficientNetBN, ResNet, SEResNet50
from torch import nn
from torch.utils.checkpoint import checkpoint

import camtrain as ct
from camtrain.cam.guided_gates import find_gates, guiding

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


@pytest.mark.slow
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


@pytest.mark.slow
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
