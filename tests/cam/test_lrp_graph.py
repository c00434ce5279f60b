"""LRP on networks whose gates and activations are functions: conserved, or named."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain.cam.graph import nodes_between, operator_of

B, L = 2, 3


class Net(nn.Module):
    """Two convolutions with something written by hand between them; pool + FC."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, L)
        self.squeeze, self.excite = nn.Linear(4, 2), nn.Linear(2, 4)
        self.sigmoid = nn.Sigmoid()
        self.between = between

    def forward(self, image):
        features = self.between(self, self.first(image))
        return self.fc(F.relu(self.second(features)).mean(dim=(2, 3)))


def gate_logits(net, x):
    return net.excite(F.relu(net.squeeze(x.mean(dim=(2, 3)))))


CONSERVED = {
    "squeeze and excitation, module": lambda n, x: x.relu() * n.sigmoid(gate_logits(n, x))[:, :, None, None],
    "squeeze and excitation, function": lambda n, x: x.relu() * gate_logits(n, x).sigmoid()[..., None, None],
    "gate first": lambda n, x: torch.sigmoid(gate_logits(n, x)).view(B, 4, 1, 1).expand_as(x) * x.relu(),
    "gate with a residual": lambda n, x: x + x * F.hardsigmoid(gate_logits(n, x))[..., None, None],
    "swish written out": lambda n, x: x * torch.sigmoid(1.7 * x),
    "sigmoid": lambda n, x: torch.sigmoid(x),
    "tanh": lambda n, x: torch.tanh(x),
    "silu": lambda n, x: F.silu(x),
    "gelu": lambda n, x: F.gelu(x),
    "gelu, tanh": lambda n, x: F.gelu(x, approximate="tanh"),
    "mish": lambda n, x: F.mish(x),
    "hardswish": lambda n, x: F.hardswish(x),
    "softplus": lambda n, x: F.softplus(x, beta=2),
    "elu": lambda n, x: F.elu(x, alpha=0.7),
    "selu": lambda n, x: F.selu(x),
    "celu": lambda n, x: F.celu(x, alpha=1.3),
    "leaky relu": lambda n, x: F.leaky_relu(x, 0.2),
}
NAMED = {
    "InstanceNorm": lambda n, x: F.instance_norm(x),
    "BatchNorm": lambda n, x: F.batch_norm(x, torch.full((4,), 0.3), torch.ones(4)),
    "Mul of two": lambda n, x: x * x.flip(1),
    "Exp": lambda n, x: x.exp(),
}


def image():
    return torch.rand(B, 1, 7, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CONSERVED)
def test_conserved_without_a_word(kind):
    model = Net(CONSERVED[kind]).double().eval()
    logits = model(image().double()).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = ct.explain(model, image().double(), "lrp", ["first", "second"])
    for name, found in maps.items():
        torch.testing.assert_close(found.flatten(2).sum(2), logits, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", NAMED)
def test_what_has_no_rule_is_named(name):
    with pytest.warns(UserWarning, match=f"no LRP rule for .*{name}"):
        ct.explain(Net(NAMED[name]).eval(), image(), "relevancecam", "first")


@pytest.mark.parametrize("name", [*NAMED, "silu", "squeeze and excitation, function"])
def test_lrp0_is_the_plain_gradient_and_says_nothing(name):
    model = Net((NAMED | CONSERVED)[name]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = ct.explain(model, image(), "lrp", "first", rules="lrp0")
    torch.testing.assert_close(maps, ct.explain(model, image(), "hirescam", "first"))


def test_attention_as_a_function_is_refused():
    def attend(net, x):
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).view_as(x)

    with pytest.raises(ct.InputError, match="no rule for attention"):
        ct.explain(Net(attend).eval(), image(), "lrp", "first")


def test_a_gate_in_a_checkpointed_part():
    from torch.utils.checkpoint import checkpoint

    gated = CONSERVED["squeeze and excitation, module"]
    plain, saving = Net(gated).eval(), Net(lambda n, x: checkpoint(gated, n, x, use_reentrant=False)).eval()
    torch.testing.assert_close(ct.explain(saving, image(), "lrp", "first"), ct.explain(plain, image(), "lrp", "first"))


def test_reentrant_checkpointing_is_told():
    from torch.utils.checkpoint import checkpoint

    model = Net(lambda n, x: checkpoint(F.relu, x, use_reentrant=True)).eval()
    for method in ("lrp", "relevancecam"):
        with pytest.raises(ct.InputError, match="reentrant"):
            ct.explain(model, image(), method, "first")


def test_no_hook_stays_on_the_users_own_graph():
    model = Net(CONSERVED["squeeze and excitation, function"]).eval()
    x = image().requires_grad_()
    logits = model(x)
    ct.explain(model, image(), "lrp", "first")
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    fresh = image().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(model(fresh).sum(), fresh)[0])


def test_nodes_between():
    a, b = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    scores = (a.relu() * b.sigmoid()).sum()
    assert [operator_of(n) for n in nodes_between([scores], [a])] == ["Sum", "Mul", "Relu"]
    both = nodes_between([scores], [a, b], with_sources=True)
    assert sorted(map(operator_of, both)) == ["AccumulateGrad", "AccumulateGrad", "Mul", "Relu", "Sigmoid", "Sum"]
    assert nodes_between([scores], [torch.rand(3, requires_grad=True)]) == {}


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_difference_of_two_labels_is_their_contrast():
    """With two labels, label 0 against the others is y0 - y1, also where both logits are negative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 35, 2)).double().eval()
    with torch.no_grad():
        model[3].bias.sub_(9)
    x = image().double()
    assert (model(x) < 0).all()
    torch.testing.assert_close(
        ct.explain(model, x, "relevancecam", "1", target=lambda y: y[:, 0] - y[:, 1]),
        ct.explain(model, x, "relevancecam", "1", labels=[0]),
    )
    summed = ct.explain(model, x, "lrp", "1", target=lambda y: 2 * y[:, 0] - y[:, 1]).flatten(1).sum(1)
    torch.testing.assert_close(summed, (2 * model(x)[:, 0] - model(x)[:, 1]).detach())


def test_a_target_on_one_of_several_outputs_is_not_counted_twice():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, L)

        def forward(self, image):
            features = self.conv(image).relu()
            return {"features": features, "logits": self.fc(features.mean(dim=(2, 3)))}

    model = Two().double().eval()
    x = image().double()
    for method in ("lrp", "relevancecam"):
        by_target = ct.explain(model, x, method, "conv", target=lambda y: y["logits"][:, 1])
        contrast = {"contrast": "none"} if method == "lrp" else {"contrast": torch.zeros(L, dtype=torch.bool)}
        torch.testing.assert_close(by_target, ct.explain(model, x, method, "conv", labels=[1], **contrast))
