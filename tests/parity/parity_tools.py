"""What the parity tests share: the peers, the networks, and the truth written out by hand, one case at a time."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from monai.networks.nets import DenseNet121, resnet18
from torch import nn

# `make parity` sets this: there a peer that is missing is an error, never a skip.
FORCED = os.environ.get("CAMTRAIN_PARITY") == "1"
# Batch, channels of the image, labels, channels of the layer, and every axis of every grid: all different.
B, C, L, K = 3, 2, 4, 8
GRID = (10, 12, 14)
LAYER = "relu2"


def peer(name):
    """The other library; where it is not installed, the whole file is skipped, except under `make parity`."""
    if not FORCED and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed beside this torch: run make parity", allow_module_level=True)
    if name in {"zennit", "pytorch_grad_cam"}:
        sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
        importlib.import_module("_torchvision").load_torchvision()
    return importlib.import_module(name)


def image(rank=3, batch=B, channels=C, grid=GRID, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, channels, *grid[:rank], dtype=dtype)


def mlp_net(rank=3, head_scale=1.0, stride=2):
    """Convolution, fully connected layers and biases behind `relu2`: no two methods give the same map here."""
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{rank}d")
    cells = 5
    for size in GRID[:rank]:
        cells *= (size + stride - 1) // stride - 2
    model = nn.Sequential(
        OrderedDict(
            conv1=conv(C, 6, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=conv(6, K, 3, stride=stride, padding=1),
            relu2=nn.ReLU(),
            conv3=conv(K, 5, 3),
            relu3=nn.ReLU(),
            flat=nn.Flatten(),
            hidden=nn.Linear(cells, 9),
            relu4=nn.ReLU(),
            out=nn.Linear(9, L),
        )
    ).double()
    model.out.weight.data *= head_scale
    return model.eval()


def pool_net(rank=3, head_scale=1.0):
    """Global average pooling and one linear layer behind `relu2`: the nets for which CAM is defined."""
    torch.manual_seed(0)
    conv, pool = getattr(nn, f"Conv{rank}d"), getattr(nn, f"AdaptiveAvgPool{rank}d")
    model = nn.Sequential(
        OrderedDict(
            conv1=conv(C, 6, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=conv(6, K, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            pool=pool(1),
            flat=nn.Flatten(),
            out=nn.Linear(K, L),
        )
    ).double()
    model.out.weight.data *= head_scale
    return model.eval()


def inplace_net():
    """`bn` is the layer to explain, and an in-place ReLU rewrites its output right behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv3d(C, K, 3, padding=1),
            bn=nn.BatchNorm3d(K),
            relu=nn.ReLU(inplace=True),
            conv2=nn.Conv3d(K, 5, 3, stride=2),
            relu2=nn.ReLU(inplace=True),
            flat=nn.Flatten(),
            out=nn.Linear(5 * 4 * 5 * 6, L),
        )
    ).double()
    return _with_used_statistics(model).eval()


def _with_used_statistics(model):
    """BatchNorm as after training: no statistic at its initial value."""
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def densenet121(rank=3):
    """MONAI DenseNet121; `features.transition2.relu` gives (B, 512, 4, 5, 8) of an image of (32, 40, 64)."""
    torch.manual_seed(0)
    return _with_used_statistics(DenseNet121(spatial_dims=rank, in_channels=1, out_channels=L)).eval()


def monai_resnet18(rank=3):
    """MONAI ResNet18; `layer3` gives (B, 256, 3, 4, 5) of an image of (24, 32, 40)."""
    torch.manual_seed(0)
    return _with_used_statistics(resnet18(spatial_dims=rank, n_input_channels=1, num_classes=L)).eval()


MONAI_NETS = {
    "DenseNet121": (densenet121, "features.transition2.relu", (32, 40, 64)),
    "ResNet18": (monai_resnet18, "layer3", (24, 32, 40)),
}


def monai_case(name, rank=3, batch=2):
    make, layer, grid = MONAI_NETS[name]
    return make(rank), layer, image(rank, batch, 1, grid, torch.float32)


def plain_copy(model):
    """A copy that a peer may change as it likes; no activation of it works in place."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return model


def parts(model, layer, x, label):
    """Activations (K, *S') and gradients (K, *S') of one case, by plain autograd on a copy: no other case is near."""
    model, kept = plain_copy(model), []
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    score = model(x[None])[0, label]
    (gradients,) = torch.autograd.grad(score, kept[-1])
    return kept[-1].detach()[0], gradients[0]


def by_hand(method, activations, gradients):
    """The formula of each paper without its final ReLU, channel by channel, for one case: (K, *S') -> (*S')."""
    total = torch.zeros_like(activations[0])
    for a, g in zip(activations, gradients, strict=True):
        if method == "gradcam":
            total += g.sum() / g.numel() * a
        elif method == "hirescam":
            total += g * a
        elif method == "layercam":
            total += torch.where(g > 0, g, 0.0) * a
        elif method == "xgradcam":
            total += ((g * a).sum() / a.sum() if bool(a.any()) else 0.0) * a
        elif method == "gradcam++":
            alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum() * g**3), 0.0)
            total += (alpha * torch.where(g > 0, g, 0.0)).sum() * a
        else:
            raise KeyError(method)
    return total


def truth(model, layer, x, method, labels=range(L)):
    """(B, n, *S'): every case alone, every label alone, by hand."""
    rows = [[by_hand(method, *parts(model, layer, case, label)) for label in labels] for case in x]
    return torch.stack([torch.stack(row) for row in rows])


def difference(ours, theirs):
    """Largest difference of two maps, as a share of the largest value; refuses to compare nothing with nothing."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    peak = float(theirs.abs().max())
    assert peak > 0, "an empty map proves nothing"
    return float((ours - theirs).abs().max()) / peak


def same(ours, expected, tolerance=1e-9):
    found = difference(ours, expected)
    assert found < tolerance, f"relative difference {found:.1e}"


def scaled_to_one(maps):
    """Each map divided by its largest value: takes away a factor per map, and nothing else."""
    return maps / maps.flatten(2).amax(2)[(...,) + (None,) * (maps.ndim - 2)]


class Guided(torch.autograd.Function):
    """ReLU whose backward lets a gradient through where both it and the input are positive."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient * (value > 0) * (gradient > 0)


class GuidedReLU(nn.Module):
    def forward(self, value):
        return Guided.apply(value)


def guided_by_hand(model, x, label):
    """Guided backpropagation of one label for every case alone: (B, C, *S). Right for re-used ReLU modules too."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, GuidedReLU())
    rows = []
    for case in x:
        leaf = case[None].clone().requires_grad_()
        rows.append(torch.autograd.grad(model(leaf)[0, label], leaf)[0][0])
    return torch.stack(rows)


def state_of(model):
    """Everything that an explanation must leave alone, as plain comparable values."""
    modules = [
        (name, m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    slopes = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return modules, tensors, slopes


def assert_untouched(model, before):
    modules, tensors, slopes = state_of(model)
    assert modules == before[0]
    for now, then in ((tensors, before[1]), (slopes, before[2])):
        assert now.keys() == then.keys()
        for name, value in then.items():
            assert (value is None) == (now[name] is None), name
            assert value is None or torch.equal(value, now[name]), name


def in_training(model, x):
    """The state of a training step: train mode, the last BatchNorm frozen, gradients accumulated."""
    model.train()
    frozen = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][-1:]
    for module in frozen:
        module.eval()
    model(x).square().mean().backward()
    return model
