"""LRP module by module: activations, gates, refusals, the layer that sees the image, and what is left behind."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lrp_tools import built, randn, relevances, seeded, shares
from monai.networks.blocks.squeeze_and_excitation import ChannelSELayer
from torch import nn

from camtrain import InputError
from camtrain.cam.capture import LayerCapture
from camtrain.cam.lrp import PRESETS, Rules, lrp_hooks
from camtrain.cam.lrp_rules import Box, ZPlus


def test_a_logit_of_exactly_zero_loses_nothing():
    head = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -1.0]]))
    found, _ = relevances(nn.Sequential(head), torch.ones(1, 2), [], torch.tensor([[7.0]]))
    torch.testing.assert_close(found["input"], torch.tensor([[7.0, 0.0]]))


def test_a_norm_after_exact_zeros_loses_nothing():
    """As in DenseNet: ReLU, pool, BatchNorm."""
    model = built(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    image = randn(2, 3, 4).clamp(min=0)
    found, _ = relevances(model, image, [])
    torch.testing.assert_close(shares(found["input"], torch.ones(2, 2)), torch.ones(2))
    assert found["input"][image == 0].abs().max() > 0


class Reuses(nn.Module):
    """One convolution and one in-place activation, twice each; the activation's return value is not used."""

    def __init__(self, act, fails=False):
        super().__init__()
        self.conv, self.act, self.fc, self.fails = nn.Conv2d(2, 2, 3, padding=1), act, nn.Linear(2, 3), fails

    def forward(self, image):
        features = self.conv(image)
        self.act(features)
        features = self.conv(features) + features
        self.act(features)
        if self.fails:
            raise ValueError("the user's own error")
        return self.fc(features.mean(dim=(2, 3)))


ACTIVATIONS = [nn.ReLU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Hardswish, nn.ReLU6, nn.SELU]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.__name__)
def test_reused_modules_and_in_place_activations(act):
    model = built(lambda: Reuses(act(inplace=True)))
    image = 3 * randn(2, 2, 5, 4)
    found, hooks = relevances(model, image, [])
    torch.testing.assert_close(shares(found["input"], torch.ones(2, 3)), torch.ones(2), rtol=0, atol=2e-4)
    assert hooks.unruled == []
    assert model.act.inplace


@pytest.mark.parametrize("act", [nn.GELU(), nn.Tanh(), nn.PReLU(), nn.Softplus(), nn.CELU()], ids=repr)
def test_activations_pass_relevance(act):
    model = nn.Sequential(nn.Linear(5, 4), act, nn.Linear(4, 2))
    found, _ = relevances(built(lambda: model), randn(3, 5), ["0", "1"])
    torch.testing.assert_close(found["0"], found["1"])
    assert found["0"].abs().max() > 0


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    names += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [len(getattr(m, name)) for m in model.modules() for name in names]


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_nothing_behind(fails):
    model = built(lambda: Reuses(nn.SiLU(inplace=True), fails))
    before = hooks_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    raised = pytest.raises(ValueError, match="own error") if fails else contextlib.nullcontext()
    with raised, lrp_hooks(model, PRESETS["zplus"], gates=["conv"]):
        y = model(randn(1, 2, 4, 5).requires_grad_())
        torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True)
    assert hooks_of(model) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.act.inplace


def test_hooks_are_gone_when_a_gate_has_no_such_name():
    model = built(lambda: Reuses(nn.ReLU()))
    with pytest.raises(InputError, match=r"no layer 'fcc'; nearest: fc"), lrp_hooks(model, PRESETS["zplus"], ["fcc"]):
        pass
    assert sum(hooks_of(model)) == 0


def test_rules_work_in_float32_inside_autocast():
    """Only the network's own rounding remains: weights and inputs that bf16 holds exactly give the float32 result."""
    layer = nn.Conv1d(2, 3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape).float())
    image = torch.randint(-3, 4, (2, 2, 7)).float()
    exact, _ = relevances(layer, image, [])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = relevances(layer, image, [])
    torch.testing.assert_close(found["input"].float(), exact["input"], rtol=1e-2, atol=1e-3)


def test_gates_are_held_constant():
    torch.manual_seed(0)
    se = ChannelSELayer(2, 4, r=2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), se, nn.Flatten(), nn.Linear(4 * 12, 3))
    found, _ = relevances(seeded(model), randn(2, 1, 6, 5), ["1"])
    torch.testing.assert_close(shares(found["1"], torch.ones(2, 3)), torch.ones(2))


class Attends(nn.Module):
    """A gate of the user's own, 2-D sigmoid and all."""

    def __init__(self):
        super().__init__()
        self.conv, self.score, self.fc = nn.Conv1d(2, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)
        self.squash = nn.Sigmoid()

    def forward(self, image):
        features = self.conv(image)
        weights = self.squash(self.score(features.mean(2)))
        return self.fc((features * weights[:, :, None]).mean(2))


@pytest.mark.parametrize("gates", [["squash"], "squash", lambda name, _: name == "squash", ["score"]])
def test_gates_that_the_user_names(gates):
    model, image = built(Attends), randn(2, 2, 9)
    named, _ = relevances(model, image, ["conv"], gates=gates)
    torch.testing.assert_close(shares(named["conv"], torch.ones(2, 3)), torch.ones(2), rtol=0, atol=1e-4)
    unnamed, _ = relevances(model, image, ["conv"])
    assert (shares(unnamed["conv"], torch.ones(2, 3)) - 1).abs().min() > 0.01


class SABlock(nn.Module):
    def forward(self, tokens):
        return tokens


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.MultiheadAttention(4, 2, batch_first=True), "MultiheadAttention"),
        (nn.GRU(4, 4), "GRU"),
        (nn.Softmax(dim=1), "Softmax"),
        (SABlock(), "SABlock"),
    ],
)
def test_modules_without_a_rule_are_refused_where_relevance_passes(module, name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mixes = nn.Linear(3, 4), module

        def forward(self, tokens):
            tokens = self.embed(tokens)
            if name == "MultiheadAttention":
                return self.mixes(tokens, tokens, tokens)[0]
            out = self.mixes(tokens)
            return out[0] if isinstance(out, tuple) else out

    model, tokens = Net(), randn(2, 5, 3)
    with lrp_hooks(model, PRESETS["zplus"]):
        with torch.no_grad():
            model(tokens)  # nothing is recorded: nothing to refuse
        with pytest.raises(InputError, match=rf"no rule for 'mixes' \({name}\): use a method of the gradient family"):
            model(tokens.clone().requires_grad_())
    for rules, gates in ((PRESETS["lrp0"], None), (PRESETS["zplus"], ["mixes"])):
        with lrp_hooks(model, rules, gates):
            model(tokens.clone().requires_grad_())


def test_layers_without_a_rule_are_named_once():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, features):
            return features * self.factor

    model = nn.Sequential(nn.Linear(3, 4), Scale(), nn.Linear(4, 2), nn.Softmax(dim=1))
    _, hooks = relevances(model, randn(2, 3), [])
    assert hooks.unruled == ["1", "3"]
    assert relevances(model, randn(2, 3), [], rules="lrp0")[1].unruled == []


def test_first_rule_is_for_the_layer_that_sees_the_image():
    """Also where the graph begins further up, and for every layer that reads the image itself."""
    box = Rules(conv=ZPlus(), dense=ZPlus(), first=Box(-1.0, 1.0))

    class TwoStems(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv1d(1, 3, 3, bias=False), nn.Conv1d(1, 3, 3, bias=False)
            self.inner, self.fc = nn.Conv1d(6, 2, 1, bias=False), nn.Linear(12, 2, bias=False)

        def forward(self, image):
            return self.fc(self.inner(100 * torch.cat([self.one(image[:, :1]), self.two(image[:, 1:])], 1)).flatten(1))

    model = built(TwoStems)
    image = randn(2, 2, 8).clamp(-1, 1)
    image[:, :, 3:5] = 0
    found, _ = relevances(model, image, ["inner"], rules=box)
    # zB gives voxels of value 0 a share, z+ does not.
    assert float(found["input"][:, :, 3:5].min()) > 0
    assert relevances(model, image, ["inner"])[0]["input"][:, :, 3:5].abs().max() < 1e-9
    # The graph begins at `one`: `inner` sees far larger values than the box holds, and is not asked.
    with lrp_hooks(model, box, image=image):
        capture = LayerCapture("one", cut=True)
        capture.attach(model.one)
        with torch.no_grad():
            assert model(image).requires_grad
        capture.detach()
    with pytest.raises(InputError, match="does not hold the input"):
        relevances(model, 3 * image, [], rules=box)
