"""Every method of the table, wherever it is called from: nothing is left behind, and the maps are right."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.method_table import find_method

B, L = 2, 5
METHODS = [row.name for row in ct.methods()]
OPTIONS = {"scorecam": {"chunk": 3, "progress": False}}


class Net(nn.Module):
    """What others disturb: dropout, two BatchNorms (one frozen by the user), in-place ReLUs behind the layers."""

    def __init__(self, fails=None, inplace=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3)
        self.act = nn.ReLU(inplace=inplace)
        self.frozen = nn.BatchNorm3d(3)
        self.second, self.last = nn.Conv3d(3, 4, 3), nn.ReLU(inplace=inplace)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, L)
        for norm in (self.norm, self.frozen):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.bias, -0.2, 0.5)
        self.fails, self.forwards = fails, 0

    def train(self, mode=True):
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, image):
        self.forwards += 1
        image = image + 0 * torch.rand((), dtype=image.dtype)  # draws from the global generator
        features = self.frozen(self.act(self.norm(self.conv(image))))
        if self.forwards == self.fails:
            raise ValueError("the user's own error")
        return self.fc(self.drop(self.last(self.second(features)).mean(dim=(2, 3, 4))))


def image():
    return torch.rand(B, 1, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def maps_of(model, method, x=None, layer=None):
    # CAM exists only right before pool + FC; the other methods look at a signed layer with an in-place ReLU behind.
    layer = layer or ("last" if method == "cam" else "norm")
    return ct.explain(model, image() if x is None else x, method, layer, **OPTIONS.get(method, {}))


def hooks_of(model):
    names = [n for n in vars(model) if "hook" in n and hasattr(getattr(model, n), "__len__")]
    return {(name, n): len(getattr(m, n)) for name, m in model.named_modules() for n in names}


def state(model):
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": hooks_of(model),
        "inplace": [m.inplace for m in model.modules() if hasattr(m, "inplace")],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "identities": [id(p) for p in model.parameters()] + [id(p.grad) for p in model.parameters()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "rng": torch.get_rng_state().tolist(),
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
    }


def assert_same(before, after):
    for key in before:
        if key not in ("values", "grads"):
            assert before[key] == after[key], key
    for key in ("values", "grads"):
        for name, value in before[key].items():
            now = after[key][name]
            assert (value is None and now is None) or torch.equal(value, now), (key, name)


def in_training(**arguments):
    """Train mode, one frozen BatchNorm, gradients accumulated so far, one frozen parameter."""
    model = Net(**arguments).train()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.conv.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_training_with_a_frozen_batchnorm_and_accumulated_gradients(method, mode):
    expected = maps_of(Net().eval(), method)
    model, probe = in_training(), in_training()
    with mode():
        before = state(model)
        maps = maps_of(model, method)
        assert_same(before, state(model))
    torch.testing.assert_close(maps, expected)
    assert not maps.requires_grad
    assert not maps.is_inference()
    torch.manual_seed(3)
    outputs = model(image())
    torch.manual_seed(3)
    assert torch.equal(outputs, probe(image())), "the next training forward is no longer what it would have been"


@pytest.mark.parametrize("method", METHODS)
def test_in_place_relus_behind_the_layer(method):
    for layer in ("norm", "second") if method != "cam" else ("last",):
        torch.testing.assert_close(
            maps_of(Net().eval(), method, layer=layer), maps_of(Net(inplace=False).eval(), method, layer=layer)
        )


@pytest.mark.parametrize("method", METHODS)
def test_all_parameters_frozen(method):
    model = Net().eval().requires_grad_(False)
    before = state(model)
    torch.testing.assert_close(maps_of(model, method), maps_of(Net().eval(), method))
    assert_same(before, state(model))


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_and_bf16_weights(method):
    # A signed channel's sum can be near 0, and no precision saves the weight of Respond-CAM then.
    layer = "act" if method in ("respondcam", "xgradcam") else None
    exact = maps_of(Net().double().eval(), method, image().double(), layer)
    # Rounded weights are another network: what it would say in float64 is the truth for it.
    rounded = maps_of(Net().bfloat16().double().eval(), method, image().bfloat16().double(), layer)
    assert exact.dtype == torch.float64
    model, half = Net().eval(), Net().bfloat16().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = state(model)
        mixed = maps_of(model, method, layer=layer)
        assert_same(before, state(model))
    before = state(half)
    low = maps_of(half, method, image().bfloat16(), layer)
    assert_same(before, state(half))
    for maps, truth in ((mixed, exact), (low, rounded)):
        assert maps.dtype == torch.float32
        limit = 1e-4 if find_method(method).family in ("relevance", "guided") else 0.03
        assert (maps.double() - truth).norm() < limit * truth.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [1, 2])
def test_an_exception_in_the_middle(method, fails):
    model = in_training(fails=fails)
    before = state(model)
    several = {"scorecam"}  # The only method with a second forward.
    if fails == 2 and method not in several:
        maps_of(model, method)
    else:
        with pytest.raises(ValueError, match="the user's own error"):
            maps_of(model, method)
    assert_same(before, state(model))


@pytest.mark.parametrize("method", METHODS)
def test_the_users_own_graph_survives(method):
    model, other = Net().eval(), Net().eval()
    loss = model(image()).square().sum()
    maps_of(model, method)
    loss.backward()
    other(image()).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def live_tensors():
    while gc.collect():  # what earlier tests have left may take several passes
        pass
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return len(found), sum(t.numel() * t.element_size() for t in found)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_repetitions_hold_no_memory(method):
    model = in_training()
    maps_of(model, method)
    before = live_tensors()
    for _ in range(10):
        maps_of(model, method)
    assert live_tensors() == before


def test_threads_wait_for_each_other():
    from concurrent.futures import ThreadPoolExecutor

    model = in_training()
    expected, before = maps_of(Net().eval(), "lrp"), state(model)
    before.pop("rng")  # Every thread draws; how they take turns is nobody's business.
    with ThreadPoolExecutor(3) as pool:
        for maps in pool.map(lambda _: maps_of(model, "lrp"), range(12)):
            torch.testing.assert_close(maps, expected)
    assert_same(before, state(model))
