"""CNN-1 and CNN-2 of the Respond-CAM paper: their layers, sizes, and what holds of their maps."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain.metrics import sum_to_score
from camtrain.models import SubtomogramCNN

LAYERS = [
    *("conv1", "relu1", "conv2", "relu2", "maxpool1", "conv3", "relu3", "conv4", "relu4", "maxpool2"),
    *("fc1", "relu5", "fc2", "relu6", "head"),
]


def small(variant="cnn1", size=(16, 12, 20), **options):
    torch.manual_seed(0)
    return SubtomogramCNN(**{"labels": 5, "size": size, "variant": variant, "widths": (3, 4), "hidden": 6, **options})


@pytest.mark.parametrize(("variant", "first"), [("cnn1", nn.Identity), ("cnn2", nn.AvgPool3d)])
def test_layers_run_in_the_order_of_the_paper(variant, first):
    net, ran = small(variant), []
    for name, module in net.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    net(torch.randn(2, 1, 16, 12, 20))
    assert ran == ["avgpool", *LAYERS]
    assert isinstance(net.avgpool, first)
    kinds = {type(module) for module in net.modules()} - {SubtomogramCNN, first}
    assert kinds == {nn.Conv3d, nn.ReLU, nn.MaxPool3d, nn.Linear}  # no norm, no dropout


@pytest.mark.parametrize(("variant", "cells"), [("cnn1", 10), ("cnn2", 5)])
def test_published_size(variant, cells):
    with torch.device("meta"):
        net = SubtomogramCNN(labels=23, size=40, variant=variant)
    assert net.cells == (cells,) * 3
    conv = 27 * 32 + 32 + 27 * 32 * 32 + 32 + 27 * 32 * 64 + 64 + 27 * 64 * 64 + 64
    dense = 64 * cells**3 * 512 + 512 + 512 * 512 + 512 + 512 * 23 + 23
    assert sum(p.numel() for p in net.parameters()) == conv + dense


def test_cnn2_is_cnn1_of_the_averaged_volume():
    two, one = small("cnn2", (16, 24, 32)), small("cnn1", (8, 12, 16))
    one.load_state_dict(two.state_dict())
    image = torch.randn(3, 1, 16, 24, 32)
    torch.testing.assert_close(two(image), one(F.avg_pool3d(image, 2)))


def test_forward_against_the_functional_form():
    net, x = small(size=(8, 12, 16)).double(), torch.randn(2, 1, 8, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases too
    image, p = x, dict(net.named_parameters())
    for first, second in (("conv1", "conv2"), ("conv3", "conv4")):
        for name in (first, second):
            x = F.conv3d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1).clamp(min=0)
        x = F.max_pool3d(x, 2)
    x = x.reshape(2, -1)
    for name in ("fc1", "fc2"):
        x = (x @ p[f"{name}.weight"].T + p[f"{name}.bias"]).clamp(min=0)
    torch.testing.assert_close(net(image), x @ p["head.weight"].T + p["head.bias"])


def test_weights_start_as_in_keras():
    net = SubtomogramCNN(labels=7, size=12, widths=(16, 24), hidden=128)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
            continue
        receptive = parameter[0, 0].numel() if parameter.ndim > 2 else 1
        limit = math.sqrt(6 / (receptive * (parameter.shape[0] + parameter.shape[1])))
        assert 0.95 * limit < parameter.abs().max() <= limit, name
        assert parameter.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.08)


@pytest.mark.parametrize("variant", ["cnn1", "cnn2"])
@pytest.mark.parametrize("size", [(16, 12, 20), (20, 28)])
def test_sum_of_respond_cam_is_the_logit_without_biases_and_grad_cams_is_not(variant, size):
    net, image = small(variant, size).eval(), torch.randn(4, 1, *size)
    logits = net(image).detach()  # biases start at 0
    found = sum_to_score(ct.explain(net, image, "respondcam", "maxpool2"), logits)
    assert found.l1.max() < 1e-5
    assert found.kendall_tau.min() == 1
    assert sum_to_score(ct.explain(net, image, "gradcam", "maxpool2"), logits).l1.mean() > 0.1 * logits.abs().mean()


def test_with_biases_the_account_is_exact():
    net, image = small("cnn2"), torch.randn(3, 1, 16, 12, 20)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    found = ct.account(net, image, "maxpool2")
    assert found.valid
    assert found.cells.shape == (3, 5, 2, 2, 3)
    respond = ct.explain(net, image, "respondcam", "maxpool2").flatten(2).sum(2)
    logits = net(image).detach()
    torch.testing.assert_close(respond + found.bias, logits, atol=1e-5, rtol=1e-4)
    assert (respond - logits).abs().mean() > 0.05


@pytest.mark.parametrize("variant", ["cnn1", "cnn2"])
@pytest.mark.parametrize("size", [(9,), (13, 10), (7, 12, 5)])
def test_any_rank_and_size_and_no_voxel_goes_unseen(variant, size):
    net = small(variant, size, channels=2, widths=(8, 8), hidden=32)
    image = torch.randn(3, 2, *size, requires_grad=True)
    logits = net(image)
    assert logits.shape == (3, 5)
    (gradient,) = torch.autograd.grad(logits.pow(2).sum(), image)
    for axis in range(2, image.ndim):
        others = tuple(a for a in range(image.ndim) if a != axis)
        assert (gradient != 0).sum(dim=others).min() > 0


def test_config_rebuilds_the_net_and_the_head_is_resized():
    net = small("cnn2", channels=2).double()
    net.resize_head(3)
    assert net(torch.zeros(2, 2, 16, 12, 20, dtype=torch.float64)).shape == (2, 3)
    assert set(net.config) == set(inspect.signature(SubtomogramCNN).parameters)
    SubtomogramCNN(**net.config).load_state_dict(net.state_dict())
    head = net.head
    net.resize_head(3)
    assert net.head is head


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": 0}, "labels="),
        ({"size": (4, 4, 4, 4)}, "size="),
        ({"variant": "cnn3"}, "cnn1, cnn2"),
        ({"widths": (3, 3, 3)}, "widths="),
        ({"channels": 0}, "channels="),
        ({"hidden": 0}, "hidden="),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ct.InputError, match=words):
        SubtomogramCNN(**({"size": 8} | arguments))


def test_images_of_another_shape_are_refused():
    with pytest.raises(ct.InputError, match=r"SubtomogramCNN was built for images of shape \(B, 1, 16, 12, 20\)"):
        small()(torch.zeros(1, 1, 16, 12, 16))
