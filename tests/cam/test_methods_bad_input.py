"""What every method does with what cannot work: it is right, or it says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct

B, L = 2, 4
METHODS = [row.name for row in ct.methods()]
# Guided backprop looks at the image and at no layer.
ON_LAYERS = [m for m in METHODS if m != "guided_backprop"]
QUIET = {"scorecam": {"progress": False}}


class Net(nn.Module):
    """A trunk, a layer that never runs, one that runs twice, and a second branch that no logit depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv3d(1, 5, 3), nn.ReLU()
        self.never, self.twice = nn.ReLU(), nn.ReLU()
        self.branch, self.last = nn.Conv3d(5, 5, 1), nn.ReLU()
        self.fc = nn.Linear(5, L)
        self.aside = None

    def forward(self, image):
        features = self.twice(self.twice(self.act(self.conv(image))) + 0.1)
        self.aside = self.branch(features)
        return self.fc(self.last(features).mean(dim=(2, 3, 4)))


def image(batch=B):
    return torch.rand(batch, 1, 5, 7, 6, generator=torch.Generator().manual_seed(1))


def explain(model, method, layer="last", x=None, **arguments):
    return ct.explain(model, image() if x is None else x, method, layer, **QUIET.get(method, {}), **arguments)


@pytest.mark.parametrize("method", ON_LAYERS)
def test_a_layer_that_never_runs(method):
    with pytest.raises(ct.InputError, match=r"'never' has not run"):
        explain(Net().eval(), method, "never")


@pytest.mark.parametrize("method", ON_LAYERS)
def test_a_layer_that_runs_twice(method):
    model = Net().eval()
    with pytest.raises(ct.InputError, match=r"'twice' ran 2 times.*call="):
        explain(model, method, "twice")
    if method != "cam":
        first, second = (explain(model, method, "twice", call=call) for call in (0, 1))
        assert first.shape == second.shape


@pytest.mark.parametrize("method", [m for m in ON_LAYERS if m != "scorecam"])
def test_a_layer_in_another_branch(method):
    with pytest.raises(ct.InputError, match=r"between the image and the logits|global average pooling"):
        explain(Net().eval(), method, "branch")


@pytest.mark.parametrize("method", METHODS)
def test_label_lists_that_do_not_fit_the_batch(method):
    model = Net().eval()
    for labels in (torch.zeros(1, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, L) > 0):
        with pytest.raises(ct.InputError, match=f"{B}"):
            explain(model, method, labels=labels)
    with pytest.raises(ct.InputError, match=r"0\.\.3"):
        explain(model, method, labels=[0, 4])


@pytest.mark.parametrize("method", METHODS)
def test_scripted_and_traced_models_are_refused(method):
    model = Net().eval()
    model.aside = torch.zeros(())
    traced = torch.jit.trace(model, image(), check_trace=False)
    with pytest.raises(ct.InputError, match="pass the eager model"):
        explain(traced, method)
    holder = nn.Sequential(traced)
    with pytest.raises(ct.InputError, match=r"'0' is scripted or traced"):
        explain(holder, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["whole", "inner", "in place"])
def test_compiled_models_run_eagerly(method, part):
    torch._dynamo.reset()
    model, expected = Net().eval(), explain(Net().eval(), method)
    if part == "whole":
        model = torch.compile(model, backend="aot_eager")
    elif part == "inner":
        model.last = torch.compile(model.last, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    with torch.no_grad():
        model(image())
    torch.testing.assert_close(explain(model, method), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_activations_give_zero_maps(method):
    model = Net().eval()
    with torch.no_grad():
        model.conv.bias.fill_(-100)
    layer = "act" if method not in ("cam",) else "last"
    # The 0.1 behind it keeps the network alive.
    maps = explain(model, method, layer)
    assert torch.isfinite(maps).all()
    if layer == "act":
        assert (maps == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_one_label_and_non_finite_images(method):
    model = nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 1)).eval()
    maps = explain(model, method, "1", image(1))
    assert maps.shape[:2] == (1, 1)
    assert torch.isfinite(maps).all()
    broken = image()
    broken[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ct.InputError, match="NaN or Inf"):
        explain(model, method, "1", broken)


@pytest.mark.parametrize("method", METHODS)
def test_negative_logits_are_finite_and_right_in_a_batch(method):
    model = Net().eval()
    with torch.no_grad():
        model.fc.bias.fill_(-5)
    assert (model(image()) < 0).all()
    maps = explain(model, method)
    assert torch.isfinite(maps).all()
    for i in range(B):
        torch.testing.assert_close(explain(model, method, x=image()[i : i + 1]), maps[i : i + 1])


@pytest.mark.parametrize("method", METHODS)
def test_several_layers_and_their_mean(method):
    model, names = Net().eval(), ["act", "last"]
    if method == "cam":
        with pytest.raises(ct.InputError, match="global average pooling"):
            explain(model, method, names)
        return
    each = explain(model, method, names)
    assert list(each) == names
    for name in names:
        torch.testing.assert_close(each[name], explain(model, method, name))
    torch.testing.assert_close(explain(model, method, names, fuse="mean"), (each["act"] + each["last"]) / 2)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("cam", "scorecam")])
def test_the_image_itself_as_layer(method):
    maps = explain(Net().eval(), method, "input")
    assert maps.shape == (B, L, 5, 7, 6)
    assert torch.isfinite(maps).all()


@pytest.mark.parametrize("method", ["cam", "scorecam"])
def test_methods_that_the_image_does_not_have(method):
    with pytest.raises(ct.InputError):
        explain(Net().eval(), method, "input")
