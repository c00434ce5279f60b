"""LRP through whole networks: against an explicit backward pass, conservation, and what the hooks leave behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lrp_tools import built, randn, relevances, seeded, shares
from monai.networks.nets import DenseNet121, EfficientNetBN, SEResNet50, resnet18
from torch import nn
from torch.utils.checkpoint import checkpoint

from camtrain.cam.capture import LayerCapture, own_forward
from camtrain.cam.lrp import PRESETS, find_rules, lrp_hooks
from camtrain.cam.lrp_rules import safe

F64 = torch.float64


class Residual(nn.Module):
    """Concatenation, residual addition, pooling, in-place ReLU; any rank, any norm."""

    def __init__(self, rank=2, norm="batch", pool="max"):
        super().__init__()
        conv = getattr(nn, f"Conv{rank}d")
        # Wide enough that no unit sees zeros only: such a unit has nothing to share its relevance out among.
        self.conv1, self.norm1 = conv(1, 16, 3, padding=1), self.norm(norm, rank, 16)
        self.left, self.right = conv(16, 4, 3, padding=1), conv(16, 2, 1)
        self.norm2, self.skip = self.norm(norm, rank, 6), conv(16, 6, 1)
        self.act = nn.ReLU(inplace=True)
        kind = {"max": f"MaxPool{rank}d", "avg": f"AvgPool{rank}d", "adaptive": f"AdaptiveAvgPool{rank}d"}[pool]
        self.pool, self.fc = getattr(nn, kind)(2), nn.LazyLinear(3)

    @staticmethod
    def norm(kind, rank, channels):
        if kind == "layer":
            return ChannelLayerNorm(channels)
        if kind == "group":
            return nn.GroupNorm(2, channels)
        return getattr(nn, f"{kind.capitalize()}Norm{rank}d")(channels, affine=True)

    def forward(self, image):
        first = self.act(self.norm1(self.conv1(image)))
        both = self.norm2(torch.cat([self.left(first), self.right(first)], dim=1))
        both += self.skip(first)
        return self.fc(self.pool(self.act(both)).flatten(1))


class ChannelLayerNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, image):
        return self.norm(image.movedim(1, -1)).movedim(-1, 1)


def residual(*args, dtype=torch.float32):
    sizes = (5, 6, 4)[: args[0] if args else 2]
    torch.manual_seed(0)
    model = Residual(*args)
    with torch.no_grad():
        model(torch.zeros(2, 1, *sizes))
    return seeded(model).to(dtype), randn(2, 1, *sizes, dtype=dtype)


def backward_zplus(module, x, relevance):
    """z+ of an affine layer from its full matrix, one sample."""
    inputs = torch.eye(x.numel(), dtype=F64).view(-1, *x.shape)
    with torch.no_grad():
        matrix = (module(inputs) - module(torch.zeros(1, *x.shape, dtype=F64))).flatten(1)
    positive = (x.flatten()[:, None] * matrix).clamp(min=0)
    without = positive.sum(0) == 0
    positive[:, without] = (x.flatten()[:, None] * matrix)[:, without]
    return (positive / positive.sum(0) * relevance.flatten()).sum(1).view(x.shape)


def explicit_lrp(m, image, start):
    """Relevance of one sample (1, C, *S) layer by layer, each operation by hand."""
    with torch.no_grad():
        first = m.conv1(image)
        active = F.relu(m.norm1(first))
        joined = torch.cat([m.left(active), m.right(active)], dim=1)
        normed, skipped = m.norm2(joined), m.skip(active)
        added = normed + skipped
        pooled, where = F.max_pool2d(F.relu(added), 2, return_indices=True)
    at_pool = backward_zplus(m.fc, pooled[0].flatten(), start).view(pooled.shape)
    at_sum = F.max_unpool2d(at_pool, where, 2, output_size=added.shape[2:])
    at_norm2, at_skip = at_sum * normed / added, at_sum * skipped / added
    at_left, at_right = at_norm2.split([4, 2], dim=1)
    at_active = sum(
        backward_zplus(layer, active[0], r[0])
        for layer, r in ((m.left, at_left), (m.right, at_right), (m.skip, at_skip))
    )
    at_input = backward_zplus(m.conv1, image[0], at_active)
    return {"pool": at_pool[0], "norm2": at_norm2[0], "left": at_left[0], "conv1": at_active, "input": at_input}


def test_equals_an_explicit_backward_pass_layer_by_layer():
    model, image = residual(dtype=F64)
    start = randn(2, 3, dtype=F64, seed=4)
    found, _ = relevances(model, image, ["pool", "norm2", "left", "conv1"], start)
    for b in range(2):
        wanted = explicit_lrp(model, image[b : b + 1], start[b])
        for name, value in wanted.items():
            torch.testing.assert_close(found[name][b], value, rtol=1e-6, atol=1e-7 * float(value.abs().max()))


@pytest.mark.parametrize("pool", ["max", "avg", "adaptive"])
@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conservation(rank, norm, pool):
    model, image = residual(rank, norm, pool)
    start = randn(2, 3).abs()
    found, hooks = relevances(model, image, ["norm1", "left", "skip", "norm2", "pool"], start)
    for name in ("input", "norm1", "pool"):
        torch.testing.assert_close(shares(found[name], start), torch.ones(2), rtol=0, atol=1e-4)
    parallel = found["norm2"].flatten(1).sum(1) + found["skip"].flatten(1).sum(1)
    torch.testing.assert_close(parallel, start.sum(1), rtol=0, atol=1e-4)
    assert hooks.unruled == []


@pytest.mark.parametrize("rules", ["lrp0", "epsilon"])
def test_lrp0_is_activation_times_gradient(rules):
    """At every layer, biases and norms included; a small relative epsilon changes next to nothing."""
    model, image = residual(dtype=F64)
    rules = PRESETS[rules]
    start = randn(2, 3, dtype=F64)
    names = ["conv1", "norm1", "left", "norm2", "pool"]
    found, _ = relevances(model, image, names, start, rules)
    leaf = image.clone().requires_grad_()
    captures = [LayerCapture(name) for name in names]
    for capture in captures:
        capture.attach(model.get_submodule(capture.name))
    y = model(leaf)
    tensors = [leaf, *(capture.outputs[0] for capture in captures)]
    gradients = torch.autograd.grad(y, tensors, start / y.detach())
    for name, a, g in zip(["input", *names], tensors, gradients, strict=True):
        tight = rules is PRESETS["lrp0"]
        wanted = a.detach() * g
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=(1e-12 if tight else 1e-3) * scale)


def test_zplus_keeps_the_sign_on_a_plain_relu_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 5, 2), nn.BatchNorm3d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 3)),
    )
    found, _ = relevances(seeded(model), randn(2, 1, 8, 9, 7), ["0", "2", "4", "7"])
    for relevance in found.values():
        assert float(relevance.min()) >= 0
        assert float(relevance.max()) > 0


@pytest.mark.parametrize("rules", ["zplus", "epsilon-plus", "alpha2beta1", "gamma"])
def test_samples_do_not_see_each_other(rules):
    model, image = residual(dtype=F64)
    image[1] *= 1e4
    both, _ = relevances(model, image, ["left"], rules=rules)
    alone, _ = relevances(model, image[:1], ["left"], rules=rules)
    for name, value in alone.items():
        torch.testing.assert_close(both[name][:1], value, rtol=1e-9, atol=1e-12)


def test_linear_in_the_start():
    model, image = residual(dtype=F64)
    a, b = randn(2, 3, dtype=F64), randn(2, 3, dtype=F64, seed=7)
    first, second, both = (relevances(model, image, ["left"], s)[0]["left"] for s in (a, b, 2 * a - b))
    torch.testing.assert_close(both, 2 * first - second)


@pytest.mark.parametrize("rules", PRESETS)
def test_zeros_are_finite(rules):
    model, image = residual()
    image[0] = 0  # a volume without any content
    image[1, :, :2] = 0
    with torch.no_grad():
        model.norm1.bias.fill_(-100)  # dead ReLUs
    found, _ = relevances(model, image, ["norm1", "pool"], rules=rules)
    assert all(torch.isfinite(r).all() for r in found.values())


def test_autocast_keeps_relevance():
    model, image = residual()
    image = image.abs() + 0.5
    exact, _ = relevances(model, image, ["norm1"])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = relevances(model, image, ["norm1"])
    for name, value in exact.items():
        torch.testing.assert_close(shares(found[name].float(), torch.ones(2, 3)), torch.ones(2), rtol=0, atol=0.02)
        assert float((found[name].float() - value).abs().sum() / value.abs().sum()) < 0.1


@pytest.mark.parametrize("tap_first", [True, False])
def test_a_tap_on_a_layer_with_a_rule_sees_the_rule(tap_first):
    """Whichever was attached first, the tapped tensor lies behind the rule's derivative."""
    model, image = residual(dtype=F64)
    capture = LayerCapture("norm1")
    if tap_first:
        capture.attach(model.norm1)
    with lrp_hooks(model, PRESETS["zplus"]):
        if not tap_first:
            capture.attach(model.norm1)
        y = model(image.clone().requires_grad_())
    (tapped,) = capture.outputs
    (g,) = torch.autograd.grad(y, tapped, torch.ones_like(y) / safe(y))
    torch.testing.assert_close(safe(tapped) * g, relevances(model, image, ["norm1"])[0]["norm1"])
    capture.detach()


def test_checkpointed_parts_follow_the_rules():
    class Checkpointed(Residual):
        def forward(self, image):
            # Not the image itself: its first reader is known by order alone, which a recomputation must not change.
            return checkpoint(super().forward, 1 * image, use_reentrant=False)

    plain, image = residual()
    model = Checkpointed()
    model(torch.zeros_like(image))
    model.load_state_dict(plain.state_dict())
    leaf = image.clone().requires_grad_()
    with lrp_hooks(model.eval(), find_rules("zplus", box=(-9, 9))):
        y = model(leaf)
        (g,) = torch.autograd.grad(y, leaf, torch.ones_like(y) / safe(y))
    wanted, _ = relevances(plain, image, [], rules=find_rules("zplus", box=(-9, 9)))
    torch.testing.assert_close(safe(leaf) * g, wanted["input"])


def test_other_forwards_of_camtrain_are_not_touched():
    model, image = residual()
    leaf = image.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(leaf).sum(), leaf)
    with lrp_hooks(model, PRESETS["zplus"]), own_forward():
        (got,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert torch.equal(got, wanted)


NETS = {
    "resnet18": (lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=4), (16, 24, 20)),
    "densenet121": (lambda: DenseNet121(3, 1, 4), (32, 40, 34)),
    "seresnet50": (lambda: SEResNet50(spatial_dims=3, in_channels=1, num_classes=4), (16, 24, 20)),
    "efficientnet": (lambda: EfficientNetBN("efficientnet-b0", False, spatial_dims=3, num_classes=4), (32, 40, 34)),
}
DEPTHS = {
    "resnet18": ["bn1", "layer1", "layer2", "layer3", "layer4"],
    "densenet121": ["features.pool0", "features.denseblock1", "features.denseblock3", "class_layers.relu"],
    "seresnet50": ["layer0", "layer1", "layer3", "layer4"],
    "efficientnet": ["_bn0", "_blocks.0.0", "_blocks.2.4", "_blocks.4.10", "_conv_head"],
}
TOLERANCE = {"resnet18": 1e-3, "densenet121": 5e-3, "seresnet50": 1e-3, "efficientnet": 3e-2}


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_conservation_in_monai_networks(net):
    factory, size = NETS[net]
    model = built(factory)
    channels = 3 if net == "efficientnet" else 1
    start = torch.zeros(2, 4).index_fill(1, torch.tensor([2]), 1.0)
    found, hooks = relevances(model, randn(2, channels, *size), DEPTHS[net], start)
    assert hooks.unruled == []
    for name, relevance in found.items():
        torch.testing.assert_close(
            shares(relevance, start), torch.ones(2), rtol=0, atol=TOLERANCE[net], msg=f"{net} {name}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["epsilon", "epsilon-plus", "alpha2beta1", "gamma"])
def test_other_presets_stay_finite_in_efficientnet(rules):
    factory, size = NETS["efficientnet"]
    found, _ = relevances(built(factory), randn(1, 3, *size), DEPTHS["efficientnet"], rules=rules)
    assert all(torch.isfinite(r).all() for r in found.values())
    if rules != "epsilon":
        torch.testing.assert_close(shares(found["input"], torch.ones(1, 4)), torch.ones(1), rtol=0, atol=3e-2)
