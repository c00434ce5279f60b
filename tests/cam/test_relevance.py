"""Start vectors, contrast, LRP maps and Relevance-CAM on top of the rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import camtrain as ct
from camtrain.cam.relevance_start import CONTRASTS, start_vector

B, L = 2, 5


class Net(nn.Module):
    """Conv + ReLU three times, flatten, two FC layers: every rule has work to do."""

    def __init__(self, labels=L, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.r1 = nn.Conv3d(1, 4, 3, bias=bias), nn.ReLU()
        self.c2, self.r2 = nn.Conv3d(4, 6, 2, stride=2, bias=bias), nn.ReLU()
        self.f1, self.r3 = nn.Linear(6 * 2 * 3 * 1, 7, bias=bias), nn.ReLU()
        self.f2 = nn.Linear(7, labels, bias=bias)

    def forward(self, image):
        return self.f2(self.r3(self.f1(self.r2(self.c2(self.r1(self.c1(image)))).flatten(1))))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.act, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, L)

    def forward(self, image):
        return self.fc(self.act(self.conv(image)).mean(dim=(2, 3)))


def image(double=True):
    x = torch.rand(B, 1, 6, 8, 5, generator=torch.Generator().manual_seed(1))
    return x.double() if double else x


def net(**arguments):
    return Net(**arguments).double().eval()


def activations_and_gradients(model, name, x, label):
    kept = {}
    handle = dict(model.named_modules())[name].register_forward_hook(lambda m, i, o: kept.update(a=o))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, label].sum(), kept["a"])
    return kept["a"].detach(), gradient, logits.detach()


# start vectors --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**16))
def test_sums_of_the_start_vectors(labels, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, labels, generator=generator, dtype=torch.float64)
    picks = torch.randint(labels, (batch,), generator=generator)
    own = logits.gather(1, picks[:, None])[:, 0]
    torch.testing.assert_close(start_vector(logits, picks, "none").sum(1), own)
    paper, code = start_vector(logits, picks, "paper"), start_vector(logits, picks, "official-code")
    others = start_vector(logits, picks, "others")
    torch.testing.assert_close(paper, others * own[:, None])
    everybody = torch.ones(batch, labels, dtype=torch.bool)
    torch.testing.assert_close(others, start_vector(logits, picks, "custom", everybody))
    torch.testing.assert_close(paper.sum(1), torch.zeros(batch).double() if labels > 1 else own)
    torch.testing.assert_close(code.sum(1), torch.full((batch,), 1 / labels).double())
    torch.testing.assert_close(paper.gather(1, picks[:, None])[:, 0], own)
    assert (code.gather(1, picks[:, None]) == 1).all()


def test_a_negative_logit_turns_the_paper_start_and_not_that_of_the_code():
    logits, picks = torch.tensor([[-2.0, 1.0, 4.0]]), torch.tensor([0])
    assert start_vector(logits, picks, "paper").tolist() == [[-2.0, 1.0, 1.0]]
    torch.testing.assert_close(start_vector(logits, picks, "official-code"), torch.tensor([[1.0, -1 / 3, -1 / 3]]))


def test_only_labels_known_to_be_absent_are_set_against():
    logits, picks = torch.randn(2, 4), torch.tensor([1, 2])
    absent = torch.tensor([[True, True, False, True], [False, False, False, False]])
    start = start_vector(logits, picks, "custom", absent)
    assert start.tolist() == [[-0.5, 1.0, 0.0, -0.5], [0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("contrast", [*CONTRASTS, [0], torch.zeros(B, 1, dtype=torch.bool)])
def test_one_label_has_nothing_to_be_set_against(contrast):
    model, x = net(labels=1), image()
    maps = ct.explain(model, x, "relevancecam", "r2", contrast=contrast)
    plain = ct.explain(model, x, "relevancecam", "r2", contrast="none")
    logits = model(x).detach().reshape(B, 1, 1, 1, 1)
    unit = 1 if isinstance(contrast, str) and contrast in ("none", "paper") else logits
    torch.testing.assert_close(maps * unit, plain)


# identities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["input", "c1", "r1", "r2"])
def test_lrp0_is_activation_times_gradient(layer):
    """LRP-0 on a ReLU network, at every layer."""
    model, x = net(), image()
    maps = ct.explain(model, x, "lrp", layer, rules="lrp0")
    for label in range(L):
        if layer == "input":
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(leaf)[:, label].sum(), leaf)
            active = x
        else:
            active, gradient, _ = activations_and_gradients(model, layer, x, label)
        torch.testing.assert_close(maps[:, label], (active * gradient).sum(1))
    torch.testing.assert_close(maps, ct.explain(model, x, "hirescam", layer))


def test_relevance_cam_under_lrp0_is_respond_cam_times_the_activation_of_the_channel():
    """Its weight is <A G>_k, which is the weight of Respond-CAM times <A_k>."""
    model, x = net(), image()
    maps = ct.explain(model, x, "relevancecam", "r2", rules="lrp0", contrast="none")
    for label in range(L):
        active, gradient, _ = activations_and_gradients(model, "r2", x, label)
        weights = (active * gradient).sum(dim=(2, 3, 4), keepdim=True)
        torch.testing.assert_close(maps[:, label], (weights * active).sum(1))


def test_relevance_cam_is_not_cam_behind_pool_and_fc():
    """Its weight over the channel's activation is CAM's weight over Z."""
    model, x = Pooled().double().eval(), torch.rand(B, 1, 7, 9).double()
    maps = ct.explain(model, x, "relevancecam", "act", rules="lrp0", contrast="none")
    active = model.act(model.conv(x)).detach()
    cells = active[0, 0].numel()
    weights = model.fc.weight.detach() / cells
    expected = torch.einsum("lk,bk,bkhw->blhw", weights, active.sum(dim=(2, 3)), active)
    torch.testing.assert_close(maps, expected)
    cam = ct.explain(model, x, "cam", "act") / cells
    assert not torch.allclose(maps / maps.abs().amax(), cam / cam.abs().amax(), atol=0.02)


@pytest.mark.parametrize("layer", ["input", "r1", "r2"])
def test_maps_add_up_to_the_logit_without_biases(layer):
    model, x = net(bias=False), image()
    logits = model(x).detach()
    for rules in ("zplus", "lrp0", "epsilon-plus", "gamma", "alpha2beta1"):
        maps = ct.explain(model, x, "lrp", layer, rules=rules)
        torch.testing.assert_close(maps.flatten(2).sum(2), logits, rtol=1e-5, atol=1e-9)


def test_zplus_adds_up_to_the_logit_with_biases_too():
    model, x = net(), image()
    for layer in ("input", "r1", "r2"):
        sums = ct.explain(model, x, "lrp", layer, rules="zplus").flatten(2).sum(2)
        torch.testing.assert_close(sums, model(x).detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("rules", ["zplus", "epsilon-plus"])
def test_the_weights_add_up_to_what_started(contrast, rules):
    model, x = net(bias=False), image()
    maps = ct.explain(model, x, "lrp", "r2", rules=rules, contrast=contrast)
    logits = model(x).detach()
    for label in range(L):
        start = start_vector(logits, torch.full((B,), label), contrast)
        torch.testing.assert_close(maps[:, label].flatten(1).sum(1), start.sum(1), rtol=1e-5, atol=1e-6)


def test_maps_are_linear_in_the_start_and_turn_with_it():
    model, x = net(), image()
    absent = torch.tensor([True, False, False, False, True])
    contrasted = ct.explain(model, x, "lrp", "r2", labels=[1], contrast=absent)
    logits = model(x).detach().reshape(B, L, 1, 1, 1)
    unit = ct.explain(model, x, "lrp", "r2", contrast="none") / logits  # start = 1 at each label
    torch.testing.assert_close(contrasted[:, 0], unit[:, 1] - (unit[:, 0] + unit[:, 4]) / 2)
    by_columns = ct.explain(model, x, "lrp", "r2", labels=[1], contrast=[4, 0])
    torch.testing.assert_close(by_columns, contrasted)


def test_zplus_is_positive_for_a_positive_start():
    model, x = net(), image()
    logits = model(x).detach().reshape(B, L, 1, 1, 1)
    unit = ct.explain(model, x, "lrp", "input", rules="zplus", contrast="none") / logits
    assert unit.min() >= -1e-12
    assert unit.max() > 0


# cost -----------------------------------------------------------------------------------------------------------------


def test_one_forward_and_one_backward_per_label_for_all_layers(monkeypatch):
    model, x = net(), image()
    forwards, backwards = [], []
    model.register_forward_pre_hook(lambda m, a: forwards.append(1))
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or grad(*a, **k))
    every = ct.explain(model, x, "relevancecam", ["input", "r1", "r2"], labels=[3, 1])
    assert (len(forwards), len(backwards)) == (1, 2)
    monkeypatch.undo()
    for name, maps in every.items():
        torch.testing.assert_close(maps, ct.explain(model, x, "relevancecam", name, labels=[3, 1]))


def test_labels_per_sample_and_by_mask():
    model, x = net(), image()
    every = ct.explain(model, x, "relevancecam", "r2")
    picks = torch.tensor([[4, 0], [2, 2]])
    chosen = ct.explain(model, x, "relevancecam", "r2", labels=picks)
    for i in range(B):
        torch.testing.assert_close(chosen[i], every[i, picks[i]])
    mask = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    masked = ct.explain(model, x, "relevancecam", "r2", labels=mask)
    assert masked[~mask].isnan().all()
    torch.testing.assert_close(masked[mask], every[mask])


def test_samples_do_not_touch_each_other():
    model, x = net(), image()
    for rules in ("zplus", "epsilon", "gamma", "alpha2beta1"):
        both = ct.explain(model, x, "lrp", "r1", rules=rules)
        # A hundredfold neighbour would move any tolerance or mean that is taken over the batch.
        loud = torch.cat([x[:1], 100 * x[1:]])
        torch.testing.assert_close(ct.explain(model, loud, "lrp", "r1", rules=rules)[:1], both[:1])


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"contrast": "papr"}, r"none, paper, official-code, others.*paper"),
        ({"contrast": [7]}, r"outside 0\.\.4"),
        ({"contrast": torch.ones(3, dtype=torch.bool)}, r"shape \(5,\) or \(2, 5\)"),
        ({"contrast": torch.ones(B, L)}, "label == 0"),
        ({"rules": "zpluss"}, "zplus"),
        ({"rule": "zplus"}, r"rules, contrast, box, gates, got rule="),
        ({"box": (1.0, 0.0)}, "low"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ct.InputError, match=says):
        ct.explain(net(), image(), "relevancecam", "r2", **options)


def test_options_that_a_method_does_not_have():
    with pytest.raises(ct.InputError, match="'hirescam' has no options, got rules="):
        ct.explain(net(), image(), layer="r2", rules="zplus")


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_zero_logits_and_dead_layers_are_finite(contrast):
    model = net()
    with torch.no_grad():
        model.f2.weight[1], model.f2.bias[1] = 0, 0
        maps = ct.explain(model, image(), "relevancecam", "r2", contrast=contrast)
        assert torch.isfinite(maps).all()
        model.c2.weight.zero_()
        model.c2.bias.fill_(-1)
        dead = ct.explain(model, image(), "relevancecam", "r2", contrast=contrast)
        assert (dead == 0).all()


def test_a_zero_logit_starts_with_one_all_the_same():
    """official-code starts with 1 whatever the logit; a logit that happens to be 0 is no exception."""
    model, x = net(), image()[:1]
    with torch.no_grad():
        shift = model(x)[0, 2]
        model.f2.bias[2] -= shift
        assert model(x)[0, 2].abs() < 1e-15
    near = net()
    with torch.no_grad():
        near.f2.bias[2] -= shift - 1e-3
    zero = ct.explain(model, x, "relevancecam", "r2", labels=[2], contrast="official-code")
    torch.testing.assert_close(zero, ct.explain(near, x, "relevancecam", "r2", labels=[2], contrast="official-code"))


def test_nothing_selected_is_nan_everywhere_and_no_column_is_no_map():
    model, x = net(), image()
    assert ct.explain(model, x, "relevancecam", "r2", labels=torch.zeros(B, L, dtype=torch.bool)).isnan().all()
    assert ct.explain(model, x, "lrp", "r2", labels=[]).shape == (B, 0, 2, 3, 1)


def test_reshape_is_not_applied_to_the_image():
    model, x = net(), image()
    maps = ct.explain(model, x, "lrp", ["input", "r2"], reshape=lambda t: t.flip(-1))
    torch.testing.assert_close(maps["input"], ct.explain(model, x, "lrp", "input"))
    torch.testing.assert_close(maps["r2"].flip(-1), ct.explain(model, x, "lrp", "r2"))
