"""The closed form and autograd give the same maps and parameter gradients, on MONAI nets; identities of pool heads."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DenseNet, DenseNet121, ResNet
from torch import nn

import camtrain as ct

B, L = 2, 5


class Hidden(torch.autograd.Function):
    """The identity, as an operator that no proof can look into."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class Wrapped(nn.Module):
    """Forces the engine to take autograd."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return Hidden.apply(self.net(image))


def resnet(rank=3):
    torch.manual_seed(0)
    return ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 10], spatial_dims=rank, n_input_channels=1, num_classes=L).eval()


def densenet(rank=3):
    torch.manual_seed(0)
    model = DenseNet(rank, 1, L, init_features=4, growth_rate=3, block_config=(2, 2, 2), bn_size=1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    return model.eval()


def image(*grid):
    torch.manual_seed(1)
    return torch.randn(B, 1, *grid)


NETS = {"resnet": (resnet, "layer4"), "densenet": (densenet, "class_layers.relu")}


def compare_with_autograd(model, layer, x, methods):
    wrapped = Wrapped(model)
    for method in methods:
        results = []
        for net, name in ((model, layer), (wrapped, f"net.{layer}")):
            net.zero_grad()
            with ct.LayerTap(net, name) as tap:
                maps = tap.maps(net(x), method)
            nn.functional.softplus(maps * 100).mean().backward()
            results.append((maps.detach(), {n.removeprefix("net."): p.grad for n, p in net.named_parameters()}))
        (closed, slopes), (auto, expected) = (
            (m, {k: None if g is None else g.clone() for k, g in s.items()}) for m, s in results
        )
        torch.testing.assert_close(closed, auto, rtol=1e-4, atol=1e-7)
        moved = 0
        for name, slope in expected.items():
            # The bias of the head is no part of a map: no gradient here, a zero there.
            if slope is None or not slope.any():
                assert slopes[name] is None or not slopes[name].any(), name
                continue
            moved += 1
            torch.testing.assert_close(slopes[name], slope, rtol=2e-3, atol=1e-4 * float(slope.abs().max()) + 1e-9)
        assert moved > 10
        model.zero_grad(set_to_none=True)


def test_autograd_is_really_forced():
    model, x = resnet(), image(33, 40, 64)
    passes = count_passes(lambda: ct.explain(Wrapped(model), x, layer="net.layer4"))
    assert passes == L
    assert count_passes(lambda: ct.explain(model, x, layer="layer4")) == 0


def count_passes(call):
    from unittest import mock

    with mock.patch("torch.autograd.grad", wraps=torch.autograd.grad) as grad:
        call()
    return grad.call_count


METHODS = ["hirescam", "gradcam", "gradcam++", "layercam", "respondcam"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_closed_form_equals_autograd_in_maps_and_parameter_gradients(name):
    make, layer = NETS[name]
    compare_with_autograd(make(), layer, image(33, 48, 66), METHODS)


@pytest.mark.slow
def test_closed_form_equals_autograd_on_resnet18_of_quarter_width():
    torch.manual_seed(0)
    model = ResNet("basic", [2, 2, 2, 2], [16, 32, 64, 128], spatial_dims=3, n_input_channels=1, num_classes=L).eval()
    compare_with_autograd(model, "layer4", image(32, 40, 48), ["hirescam", "gradcam", "layercam"])


@pytest.mark.slow
def test_closed_form_equals_autograd_on_densenet121():
    torch.manual_seed(0)
    model = DenseNet121(spatial_dims=3, in_channels=1, out_channels=L).eval()
    compare_with_autograd(model, "class_layers.relu", image(64, 64, 72), ["hirescam", "layercam"])


def test_monai_densenet_pool_head_identities():
    """At class_layers.relu: CAM / cells = Grad-CAM = HiResCAM = Respond-CAM, and the sum is the logit without bias."""
    model, x = densenet().double(), image(48, 64, 33).double()
    maps = {m: ct.explain(model, x, m, "class_layers.relu") for m in ("cam", "gradcam", "hirescam", "respondcam")}
    cells = maps["cam"][0, 0].numel()
    assert cells > 1
    for method in ("gradcam", "hirescam", "respondcam"):
        torch.testing.assert_close(maps[method], maps["cam"] / cells, rtol=1e-10, atol=1e-13)
    bias = model.class_layers.out.bias
    torch.testing.assert_close(maps["hirescam"].flatten(2).sum(2) + bias, model(x), rtol=1e-10, atol=1e-10)
