"""`explain` leaves the model and the process as they were, wherever it is called from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct

B, L = 2, 5


class Net(nn.Module):
    """What others disturb: dropout, two BatchNorms (one frozen by the user), in-place ReLU behind the layer."""

    def __init__(self, fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3)
        self.act = nn.ReLU(inplace=True)
        self.frozen = nn.BatchNorm3d(3)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3, L)
        self.fails, self.trained = fails, 0

    def train(self, mode=True):
        self.trained += 1
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, image):
        image = image + 0 * torch.rand(())  # draws from the global generator
        features = self.frozen(self.act(self.norm(self.conv(image))))
        if self.fails:
            raise ValueError("the user's own error")
        return self.fc(self.drop(features.mean(dim=(2, 3, 4))))


def image():
    return torch.randn(B, 1, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def hooks_of(model):
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
    )
    return [len(getattr(m, name)) for m in model.modules() for name in names]


def state(model):
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": hooks_of(model),
        "inplace": [m.inplace for m in model.modules() if hasattr(m, "inplace")],
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: (None if p.grad is None else p.grad.clone(), id(p.grad)) for k, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "trained": getattr(model, "trained", 0),
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_same(before, after):
    for key in before:
        if key in ("values", "grads"):
            continue
        same = torch.equal(before[key], after[key]) if key == "rng" else before[key] == after[key]
        assert same, key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for name, (value, identity) in before["grads"].items():
        assert identity == after["grads"][name][1], name
        assert value is None or torch.equal(value, after["grads"][name][0]), name


def a_model_in_training(**arguments):
    model = Net(**arguments).train()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.conv.bias.requires_grad_(False)
    model.drop.eval()
    return model


CALLS = {
    "maps": lambda model: ct.explain(model, image(), layer="norm"),
    "default layer": lambda model: ct.explain(model, image()),
    "autograd": lambda model: ct.explain(model, image(), "layercam", "conv"),
    "target": lambda model: ct.explain(model, image(), layer="norm", target=lambda y: y[:, 0]),
    "several": lambda model: ct.explain(model, image(), layer=["conv", "act"]),
    "layers": lambda model: ct.layers(model, image()),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_trace(call):
    model = a_model_in_training()
    x = image().requires_grad_()
    before = state(model)
    result = CALLS[call](model)
    assert_same(before, state(model))
    assert x.grad is None
    for maps in result.values() if isinstance(result, dict) else [result]:
        assert isinstance(maps, tuple) or (not maps.requires_grad and not maps.is_inference())


@pytest.mark.parametrize("call", [c for c in CALLS if c != "default layer"])
def test_no_trace_after_an_exception_in_the_forward(call):
    model = a_model_in_training(fails=True)
    before = state(model)
    with pytest.raises(ValueError, match="the user's own error"):
        CALLS[call](model)
    assert_same(before, state(model))


def test_no_trace_after_wrong_input():
    model = a_model_in_training()
    before = state(model)
    for arguments in ({"layer": "fc"}, {"labels": [9]}, {"logits": lambda y: y[0]}, {"method": "cam", "layer": "conv"}):
        with pytest.raises(ct.InputError):
            ct.explain(model, image(), **{"layer": "norm", **arguments})
    assert_same(before, state(model))


@pytest.mark.parametrize("call", [c for c in CALLS if c != "layers"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_same_maps_in_every_grad_mode(call, mode):
    model = a_model_in_training()
    expected = CALLS[call](model)
    with mode():
        before = state(model)
        result = CALLS[call](model)
        after = state(model)
    assert_same(before, after)
    pairs = [(expected[k], result[k]) for k in expected] if isinstance(expected, dict) else [(expected, result)]
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_layers_under_inference_mode():
    model = Net().eval()
    expected = [row.seen for row in ct.layers(model, image())]
    with torch.inference_mode():
        assert [row.seen for row in ct.layers(model, image() + 0)] == expected


def test_inside_a_training_step_the_users_graph_survives():
    model = a_model_in_training()
    model.zero_grad()
    torch.manual_seed(5)
    model(image()).sum().backward()
    expected = model.conv.weight.grad.clone()
    fresh = a_model_in_training()
    fresh.zero_grad()
    torch.manual_seed(5)
    loss = fresh(image()).sum()
    ct.explain(fresh, image(), layer="norm")
    loss.backward()
    assert torch.equal(fresh.conv.weight.grad, expected)


def test_eval_behaviour_in_training_mode():
    """Dropout off, running statistics used: the map is that of the deployed model, sample by sample."""
    model = a_model_in_training()
    maps = ct.explain(model, image(), layer="act")
    torch.testing.assert_close(maps, ct.explain(model.eval(), image(), layer="act"))
    alone = ct.explain(model, image()[1:], layer="act")
    torch.testing.assert_close(maps[1:], alone)


def test_the_users_image_is_neither_changed_nor_tied_to_the_maps():
    class Greedy(Net):
        def forward(self, image):
            return super().forward(image.mul_(2))

    x = image()
    kept = x.clone()
    ct.explain(Greedy(), x, layer="norm")
    assert torch.equal(x, kept)


def test_in_place_relu_behind_the_layer_does_not_rewrite_the_activations():
    """HiResCAM of signed values by hand: the gradient through ReLU times what the BatchNorm really returned."""
    model = Net().eval()
    nn.init.normal_(model.norm.bias)
    signed = model.norm(model.conv(image())).detach().requires_grad_()
    logits = model.fc(model.frozen(signed.relu()).mean(dim=(2, 3, 4)))
    for label in range(L):
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), signed, retain_graph=True)
        for method, expected in {
            "hirescam": (signed * gradient).sum(dim=1),
            "gradcam": (signed * gradient.mean(dim=(2, 3, 4), keepdim=True)).sum(dim=1),
        }.items():
            maps = ct.explain(model, image(), method, "norm", labels=[label])
            torch.testing.assert_close(maps[:, 0], expected.detach(), rtol=1e-4, atol=1e-7)
    assert (signed < 0).any()


def test_all_parameters_frozen():
    model = Net().eval()
    expected = ct.explain(model, image(), layer="norm")
    frozen = Net().eval().requires_grad_(False)
    for method in ("hirescam", "layercam"):
        maps = ct.explain(frozen, image(), method, "norm")
        torch.testing.assert_close(maps, ct.explain(model, image(), method, "norm"))
    torch.testing.assert_close(ct.explain(frozen, image(), layer="norm"), expected)


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "gradcam++", "layercam", "respondcam"])
def test_precisions(method):
    model, x = Net().eval(), image()
    exact = ct.explain(Net().double().eval(), x.double(), method, "act")
    assert exact.dtype == torch.float64
    single = ct.explain(model, x, method, "act")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ct.explain(model, x, method, "act")
    half = ct.explain(Net().bfloat16().eval(), x.bfloat16(), method, "act")
    for low in (mixed, half):
        assert low.dtype == torch.float32
        assert (low.double() - exact).norm() < 0.03 * exact.norm()


def test_meta_tensors_end_at_the_tap():
    from monai.data import MetaTensor

    model = Net().eval()
    meta = MetaTensor(image(), affine=torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0])))
    for method in ("hirescam", "layercam"):
        for layer in ("act", "conv"):
            maps = ct.explain(model, meta, method, layer)
            assert type(maps) is torch.Tensor
            torch.testing.assert_close(maps, ct.explain(model, image(), method, layer))
    with ct.LayerTap(model, "act") as tap:
        maps = tap.maps(model(meta), "layercam")
        assert type(maps) is torch.Tensor
        assert type(tap.maps(model(meta))) is torch.Tensor
