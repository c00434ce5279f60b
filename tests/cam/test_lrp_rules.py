"""Every LRP rule against loops over single units, on every kind of affine layer; properties; messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from camtrain import InputError
from camtrain.cam.lrp import PRESETS, Rules, find_rules, lrp_hooks
from camtrain.cam.lrp_modules import take_apart
from camtrain.cam.lrp_rules import GUARD, AlphaBeta, Box, Epsilon, Gamma, ZPlus, identity, safe, share, surrogate

F64 = torch.float64
# (module, input size without batch): B = 2, all other sizes different.
LAYERS = {
    "conv1d stride dilation": (nn.Conv1d(3, 5, 3, stride=2, dilation=2, padding=1), (3, 13)),
    "conv1d circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7)),
    "conv1d same": (nn.Conv1d(2, 3, 5, padding="same"), (2, 9)),
    "conv2d groups": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), (4, 5, 7)),
    "conv2d depthwise no bias": (nn.Conv2d(3, 3, 3, groups=3, padding=1, bias=False), (3, 4, 5)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0)), (2, 3, 5, 4)),
    "transposed1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5)),
    "transposed2d groups": (nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), dilation=(1, 2), groups=2), (4, 3, 5)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 1)),
    "linear": (nn.Linear(7, 4), (7,)),
    "linear on tokens": (nn.Linear(5, 3, bias=False), (4, 5)),
}
RULES = [
    Epsilon(0.0),
    Epsilon(0.1),
    ZPlus(),
    AlphaBeta(2.0, 1.0),
    AlphaBeta(1.0, 0.0),
    Gamma(0.25),
    Gamma(3.0),
    Box(-2.0, 3.0),
]


def layer_of(key, seed=0):
    module, size = LAYERS[key]
    g = torch.Generator().manual_seed(seed)
    module = module.to(F64)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
    x = torch.randn(2, *size, generator=g, dtype=F64).clamp(-2, 3)
    x[torch.rand(x.shape, generator=g) < 0.2] = 0
    return module, x


def connections(module, shape):
    """w_kj of every output to every input, by unit vectors: (outputs, inputs), and the bias per output."""
    inputs = torch.eye(shape.numel(), dtype=F64).view(-1, *shape)
    with torch.no_grad():
        bias = module(torch.zeros(1, *shape, dtype=F64))
        columns = module(inputs) - bias
    return columns.flatten(1).T, bias.flatten()


def denominators(rule, x, w, b, y):
    """(contributions of every unit, what they add up to), from the formulas; AlphaBeta apart."""
    pairs = []
    for row, bias, out in zip(w.tolist(), b.tolist(), y.tolist(), strict=True):
        z = [v * weight for v, weight in zip(x.tolist(), row, strict=True)]
        if isinstance(rule, Epsilon):
            q, extra = z, bias
        elif isinstance(rule, ZPlus):
            q, extra = [max(v, 0) for v in z], 0.0
            q = q if sum(q) > 0 else z
        elif isinstance(rule, Gamma):
            favoured = max if out >= 0 else min
            q = [v + rule.gamma * favoured(v, 0) for v in z]
            extra = bias + rule.gamma * favoured(bias, 0)
        else:
            bounds = [rule.low * max(weight, 0) + rule.high * min(weight, 0) for weight in row]
            q = [v - bound for v, bound in zip(z, bounds, strict=True)]
            extra = 0.0
        pairs.append((q, sum(q) + extra))
    return pairs


def reference(rule, x, w, b, y, relevance):
    """One sample, unit by unit."""
    arrived = torch.zeros(len(x), dtype=F64)
    if isinstance(rule, AlphaBeta):
        for k in range(len(w)):
            z = x * w[k]
            positive, negative = z.clamp(min=0), z.clamp(max=0)
            alpha = 1.0 if negative.sum() == 0 else (0.0 if positive.sum() == 0 else rule.alpha)
            if positive.sum() > 0:
                arrived += alpha * positive / positive.sum() * relevance[k]
            if negative.sum() < 0:
                arrived += (1 - alpha) * negative / negative.sum() * relevance[k]
        return arrived
    pairs = denominators(rule, x, w, b, y)
    relative = rule.epsilon if isinstance(rule, Epsilon) else GUARD
    mean = sum(abs(d) for _, d in pairs) / len(pairs)
    for k, (q, d) in enumerate(pairs):
        if d != 0:
            stable = d + (1 if d >= 0 else -1) * relative * mean
            arrived += torch.tensor(q, dtype=F64) / stable * relevance[k]
    return arrived


def by_gradient(rule, module, x, relevance, dtype=F64):
    """What the hooks make of it."""
    leaf = x.detach().to(dtype).requires_grad_()
    with lrp_hooks(module, Rules(conv=rule, dense=rule)):
        y = module(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, relevance.to(dtype) / safe(y))
    return safe(leaf) * gradient, y.detach()


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("key", LAYERS)
def test_rule_equals_loops_over_units(key, rule):
    module, x = layer_of(key)
    y = module(x).detach()
    relevance = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    got, value = by_gradient(rule, module, x, relevance)
    assert torch.equal(value, y)
    w, b = connections(module, x.shape[1:])
    for one, r, out, ours in zip(x, relevance, y, got, strict=True):
        wanted = reference(rule, one.flatten(), w, b, out.flatten(), r.flatten())
        torch.testing.assert_close(ours.flatten(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_reflected_padding_is_respected():
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect").to(F64)
    x = torch.randn(2, 2, 4, 5, dtype=F64)
    relevance = torch.randn(2, 3, 4, 5, dtype=F64)
    got, y = by_gradient(Epsilon(0.01), module, x, relevance)
    w, b = connections(module, x.shape[1:])
    wanted = [
        reference(Epsilon(0.01), one, w, b, out, r)
        for one, out, r in zip(x.flatten(1), y.flatten(1), relevance.flatten(1), strict=True)
    ]
    torch.testing.assert_close(got.flatten(1), torch.stack(wanted))


def test_transposed_convolution_with_an_output_size_of_the_call():
    module = nn.ConvTranspose2d(2, 3, 3, stride=2).to(F64)
    x = torch.randn(2, 2, 3, 4, dtype=F64, requires_grad=True)
    with lrp_hooks(module, PRESETS["zplus"]):
        y = module(x, output_size=(8, 9))
    assert y.shape == (2, 3, 8, 9)
    start = torch.ones_like(y)
    (g,) = torch.autograd.grad(y, x, start / safe(y))
    layer = take_apart(module, x, y)
    reached = layer.signed(x, layer.weight.abs(), layer.weight.abs()).abs() > 0
    torch.testing.assert_close((x * g).sum(), (start * reached).sum())


def test_units_without_positive_evidence_fall_back_to_signed_contributions():
    layer = nn.Linear(3, 3).to(F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, -3, 0], [2, 1, 1], [0, 0, 0]]))
        layer.bias.copy_(torch.tensor([0.5, 0, 4]))
    got, _ = by_gradient(ZPlus(), layer, torch.tensor([[1.0, 1, 2]]), torch.tensor([[8.0, 0, 0]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 6, 0]], dtype=F64))
    # A unit without any evidence, or the bias alone, has nothing to share out.
    got, _ = by_gradient(ZPlus(), layer, torch.tensor([[1.0, 1, 2]]), torch.tensor([[0.0, 0, 5]]))
    assert got.abs().max() == 0


def test_rounding_noise_is_no_evidence():
    """Fast convolutions leave 1e-9 where the sum is 0: that must not decide where relevance goes."""
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, -3, 1e-9], [2, 1, 1]]))
    for rule in (ZPlus(), AlphaBeta(2.0, 1.0)):
        got, _ = by_gradient(rule, layer, torch.ones(1, 3), torch.tensor([[8.0, 0]]), torch.float32)
        torch.testing.assert_close(got, torch.tensor([[2.0, 6, 0]]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [ZPlus(), AlphaBeta(2.0, 1.0), AlphaBeta(3.0, 2.0), Box(-2.0, 2.0)], ids=repr)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_relevance_is_conserved_wherever_there_is_evidence(rule, data):
    numbers = st.integers(-2, 2).map(float)
    rows = st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=2, max_size=2)
    layer = nn.Linear(3, 2).to(F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(data.draw(rows)))
        layer.bias.copy_(torch.tensor(data.draw(st.lists(numbers, min_size=2, max_size=2))))
    x = torch.tensor(data.draw(rows), dtype=F64)
    start = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=2, max_size=2)))
    got, _ = by_gradient(rule, layer, x, start)
    assert torch.isfinite(got).all()
    contributions = x[:, None, :] * layer.weight.detach()
    if isinstance(rule, Box):
        contributions = contributions - rule.low * layer.weight.clamp(min=0) - rule.high * layer.weight.clamp(max=0)
    evidence = (contributions != 0).any(dim=2)
    torch.testing.assert_close(got.sum(1), (start * evidence).sum(1).to(F64), rtol=1e-6, atol=1e-6)
    if isinstance(rule, ZPlus | Box):
        one_sign, _ = by_gradient(rule, layer, x, start.abs())
        assert float(one_sign.min()) >= -1e-9


def test_box_gives_zero_voxels_their_share():
    layer = nn.Conv1d(1, 2, 3, bias=False).to(F64)
    image = torch.zeros(1, 1, 6, dtype=F64)
    start = torch.rand(1, 2, 4, dtype=F64)
    got, _ = by_gradient(Box(-1.0, 1.0), layer, image, start)
    torch.testing.assert_close(got.sum(), start.sum())
    w, b = connections(layer, image.shape[1:])
    wanted = reference(Box(-1.0, 1.0), image.flatten(), w, b, torch.zeros(8), start.flatten())
    torch.testing.assert_close(got.flatten(), wanted)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_samples_are_independent(rule):
    """A neighbour a billion times larger changes nothing: stabilisers are per sample."""
    module, x = layer_of("conv2d groups")
    relevance = torch.randn(module(x).shape, dtype=F64)
    if isinstance(rule, Box):
        rule = Box(-2e9, 3e9)
    alone, _ = by_gradient(rule, module, x[:1], relevance[:1])
    both, _ = by_gradient(rule, module, torch.cat([x[:1], x[1:] * 1e9]), relevance)
    torch.testing.assert_close(both[:1], alone, rtol=1e-12, atol=0)


def test_safe_cancels_zeros():
    t = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3.0, -4.0], dtype=F64)
    assert safe(t).tolist() == [1e-18, 1e-18, 1e-18, -1e-18, 3.0, -4.0]
    assert safe(torch.zeros(2, dtype=torch.float16)).min() > 0
    assert not safe(torch.ones(2, requires_grad=True)).requires_grad
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    y = torch.tensor([0.0, 0.0])
    (g,) = torch.autograd.grad(surrogate(y, identity(x, y)), x, torch.tensor([5.0, 7.0]) / safe(y))
    assert (safe(x) * g).tolist() == [5.0, 7.0]


def test_surrogate_keeps_value_and_dtype():
    y = torch.randn(3, 4).bfloat16()
    x = torch.randn(3, 4, requires_grad=True)
    replaced = surrogate(y, 1e20 * x)
    assert torch.equal(replaced, y)
    assert replaced.dtype == y.dtype


def test_share_of_no_evidence_is_zero():
    assert share(torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    assert torch.isfinite(share(torch.ones(1, 2), torch.tensor([[1e-30, 1.0]]))).all()


class Standardised(nn.Conv1d):
    """A convolution whose forward is not that of its weight."""

    def forward(self, input):
        return self._conv_forward(input, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Chatty(nn.Conv1d):
    """A forward of its own that does the usual thing."""

    def forward(self, input):
        return super().forward(input) * 1.0


def test_subclasses_with_a_forward_of_their_own_are_taken_apart_only_if_it_fits():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, requires_grad=True)
    for module, fits in ((Standardised(2, 3, 3), False), (Chatty(2, 3, 3), True)):
        assert (take_apart(module, x, module(x)) is not None) == fits
        with lrp_hooks(nn.Sequential(module), PRESETS["zplus"]) as hooks:
            module(x)
        assert hooks.unruled == ([] if fits else ["0"])


def test_weight_parametrizations_are_followed():
    torch.manual_seed(0)
    module = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3, bias=False)).to(F64)
    x = torch.randn(2, 2, 6, dtype=F64, requires_grad=True)
    with lrp_hooks(module, PRESETS["zplus"]) as hooks:
        y = module(x)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y) / safe(y))
    torch.testing.assert_close((x * g).sum(), torch.tensor(float(y.numel()), dtype=F64))
    assert hooks.unruled == []


def test_messages():
    with pytest.raises(InputError, match=r"rules= expects a preset or Rules, got 'zpluss'; nearest: zplus"):
        find_rules("zpluss")
    with pytest.raises(InputError, match=r"rules= expects one of zplus, .* got a int"):
        find_rules(3)
    with pytest.raises(InputError, match=r"alpha - beta = 1.* take alpha=3"):
        AlphaBeta(2.0, 2.0)
    with pytest.raises(InputError, match="epsilon expects a number >= 0, got -1"):
        Epsilon(-1.0)
    with pytest.raises(InputError, match="gamma expects"):
        Gamma(float("nan"))
    with pytest.raises(InputError, match=r"low < high, got \(1.0, 1.0\)"):
        find_rules("zplus", box=(1, 1))
    with pytest.raises(InputError, match="box= expects the two bounds"):
        find_rules("zplus", box=(1, 2, 3))
    assert find_rules("gamma", box=(0, 1)).first == Box(0.0, 1.0)
    assert find_rules(PRESETS["gamma"]) is PRESETS["gamma"]


def test_box_refuses_values_outside():
    with pytest.raises(InputError, match=r"box=\(0, 1\) does not hold .* from -0.5 to 1: give the range"):
        by_gradient(Box(0.0, 1.0), nn.Linear(2, 1).to(F64), torch.tensor([[-0.5, 1.0]]), torch.ones(1, 1))
    # Rounding at the border is not an error.
    by_gradient(Box(0.0, 1.0), nn.Linear(2, 1).to(F64), torch.tensor([[-1e-6, 1.0]]), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"norm": "ident"}, "identity or gradient"),
        ({"product": "gates"}, "gate or gradient"),
        ({"conv": 1}, r"expects a rule such as ZPlus\(\)"),
    ],
)
def test_rules_of_ones_own_are_checked(fields, says):
    from camtrain.cam.lrp import Rules

    with pytest.raises(InputError, match=says):
        Rules(**({"conv": ZPlus(), "dense": ZPlus()} | fields))
