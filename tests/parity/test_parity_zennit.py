"""The same relevance as zennit, on nets that its rules are right for; the right one where they are not."""

from __future__ import annotations

import pytest
import torch
from parity_tools import LAYER, image, mlp_net, monai_case, monai_resnet18, peer, plain_copy, same

import camtrain as ct

peer("zennit")
from zennit.composites import GuidedBackprop, LayerMapComposite, SpecialFirstLayerMapComposite  # noqa: E402
from zennit.rules import AlphaBeta, Epsilon, Gamma, Norm, Pass, ZBox, ZPlus  # noqa: E402
from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear  # noqa: E402

LABELS = [2, 0]
LOW, HIGH = -6.0, 5.0
DENSE_LAYERS = [
    "features.pool0",
    "features.transition1.relu",
    "features.denseblock2.denselayer3.layers.relu1",
    "features.transition2.relu",
    "features.denseblock3.denselayer24.layers.conv2",
    "features.transition3.pool",
    "class_layers.relu",
]
STABILISER = "its stabilisers made relative"
NO_BIAS = f"biases kept out of its z+ rule; {STABILISER}"


def relative(size):
    """A stabiliser that grows with the layer: zennit's own is 1e-6, whatever the size of the activations."""

    def stabilised(z):
        room = size * z.abs().mean(dim=tuple(range(1, z.ndim)), keepdim=True)
        return torch.where(z < 0, z - room, z + room)

    return stabilised


GUARD = relative(1e-9)
Z_PLUS = ZPlus(stabilizer=GUARD, zero_params="bias")
EPSILON = Epsilon(epsilon=relative(1e-6))
# Our preset -> zennit's rules for convolutions and for linear layers.
RULES = {
    "zplus": (Z_PLUS, Z_PLUS),
    "epsilon-plus": (Z_PLUS, EPSILON),
    "epsilon": (EPSILON, EPSILON),
    "alpha2beta1": (AlphaBeta(2.0, 1.0, stabilizer=GUARD, zero_params="bias"), EPSILON),
    "gamma": (Gamma(0.25, stabilizer=GUARD), Gamma(0.25, stabilizer=GUARD)),
}


def composite(rules, first=None):
    """zennit's rules for every kind of layer; no canonizer, so BatchNorm passes relevance on."""
    convolution, linear = RULES[rules]
    layers = [
        (Activation, Pass()),
        (AvgPool, Norm(stabilizer=GUARD)),
        (BatchNorm, Pass()),
        (Convolution, convolution),
        (Linear, linear),
    ]
    return LayerMapComposite(layers) if first is None else SpecialFirstLayerMapComposite(layers, [(Convolution, first)])


def relevance(model, layers, x, label, rules, first=None):
    """zennit's relevance of one label, starting at the logit: [(B, K, *S') for every layer]."""
    model, kept, leaf = plain_copy(model), {}, x.clone().requires_grad_()
    kept["input"] = leaf
    with composite(rules, first).context(model) as watched:
        # Registered after zennit's own hooks, so that what is kept is what it hands on.
        for name in set(layers) - {"input"}:
            watched.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: kept.update({name: out}))
        output = watched(leaf)
        start = torch.zeros_like(output)
        start[:, label] = output.detach()[:, label]
        return torch.autograd.grad(output, [kept[name] for name in layers], start)


def relevances(model, layers, x, rules, first=None):
    """{layer: (B, n, K, *S')}."""
    each = [relevance(model, layers, x, label, rules, first) for label in LABELS]
    return {name: torch.stack([found[i] for found in each], dim=1) for i, name in enumerate(layers)}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("rules", RULES)
def test_rules(agree, rules, rank):
    """zennit counts a positive bias as evidence in z+ and alpha-beta (here: left out, as in the papers).

    Its stabiliser is 1e-6 whatever the scale of a layer; both tools get the same relative one.
    """
    model, x = mlp_net(rank), image(rank)
    layers = ["relu1", "relu2", "relu3"]
    theirs = relevances(model, layers, x, rules)
    around = NO_BIAS if rules in {"zplus", "epsilon-plus", "alpha2beta1"} else STABILISER
    for layer in layers:
        ours = ct.explain(model, x, "lrp", layer, labels=LABELS, rules=rules)
        agree(
            ours, theirs[layer].sum(2), library="zennit", method=f"lrp, {rules}", net=f"small {rank}D", around=around,
            tolerance=1e-8,
        )  # fmt: skip


@pytest.mark.parametrize("rank", [2, 3])
def test_box_rule_down_to_the_image(agree, rank):
    """zennit keeps biases out of the box rule on request; bounds are those of the preprocessing, not of one image."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, "lrp", "input", labels=LABELS, rules="epsilon-plus", box=(LOW, HIGH))
    first = ZBox(torch.full_like(x[:1], LOW), torch.full_like(x[:1], HIGH), stabilizer=GUARD, zero_params="bias")
    theirs = relevances(model, ["input"], x, "epsilon-plus", first)["input"].sum(2)
    net = f"small {rank}D, input"
    agree(ours, theirs, library="zennit", method="lrp, box", net=net, around=NO_BIAS, tolerance=1e-9)


@pytest.mark.parametrize("rank", [2, 3])
def test_relevancecam(agree, rank):
    """Relevance-CAM is no part of zennit; its channel weights are: sums of relevance, here times the activations."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, "relevancecam", LAYER, labels=LABELS, rules="zplus", contrast="none")
    weights = relevances(model, [LAYER], x, "zplus")[LAYER].flatten(3).sum(3)
    activations = model[: list(dict(model.named_children())).index(LAYER) + 1](x)
    theirs = torch.einsum("bnk,bk...->bn...", weights, activations)
    agree(ours, theirs, library="zennit", method="relevancecam", net=f"small {rank}D", around=NO_BIAS, tolerance=1e-9)


@pytest.fixture(scope="module")
def dense():
    model, _, x = monai_case("DenseNet121")
    return model, x, relevances(model, DENSE_LAYERS, x, "epsilon-plus")


@pytest.mark.slow
@pytest.mark.parametrize("layer", DENSE_LAYERS)
def test_epsilon_plus_on_densenet121(agree, layer, dense):
    """No canonizer: DenseNet's modules are not registered in the order of the data, so merging would corrupt weights.

    With zennit's own stabiliser of 1e-6 early layers differ by 0.1 %, since their activations are small.
    """
    model, x, theirs = dense
    ours = ct.explain(model, x, "lrp", layer, labels=LABELS, rules="epsilon-plus")
    around = f"no canonizer; {STABILISER}"
    agree(
        ours, theirs[layer].sum(2), library="zennit", method="lrp, epsilon-plus", net="DenseNet121 3D", around=around,
        tolerance=2e-5,
    )  # fmt: skip


def test_guided_backprop(agree):
    """zennit's composite hooks every call of an activation module; channels of the image are summed here."""
    for rank in (2, 3):
        model, x = mlp_net(rank), image(rank)
        ours = ct.explain(model, x, "guided_backprop", labels=LABELS)
        agree(
            ours, _guided(model, x), library="zennit", method="guided_backprop", net=f"small {rank}D",
            around="nothing to step around", tolerance=1e-12,
        )  # fmt: skip


@pytest.mark.slow
def test_guided_backprop_on_resnet18(agree):
    """A block of MONAI's ResNet calls one ReLU module twice; zennit keeps the two calls apart."""
    model, _, x = monai_case("ResNet18")
    ours = ct.explain(model, x, "guided_backprop", labels=LABELS)
    around = "copy without in-place ReLU"
    agree(
        ours, _guided(model, x), library="zennit", method="guided_backprop", net="ResNet18 3D", around=around,
        tolerance=2e-5,
    )  # fmt: skip


def _guided(model, x):
    maps = []
    for label in LABELS:
        with GuidedBackprop().context(plain_copy(model)) as watched:
            leaf = x.clone().requires_grad_()
            maps.append(torch.autograd.grad(watched(leaf)[:, label].sum(), leaf)[0].sum(dim=1))
    return torch.stack(maps, dim=1)


def test_residual_connections_conserve_relevance():
    """zennit splits sums for torchvision's blocks only: in MONAI's every block hands its relevance on twice."""
    model, x = monai_resnet18(2).double(), image(2, 2, 1, (48, 64))
    logits = model(x).detach()
    for layer in ("layer4", "layer3", "layer2", "layer1", "maxpool"):
        maps = ct.explain(model, x, "lrp", layer, rules="zplus")
        same(maps.flatten(2).sum(2), logits, 1e-6)
