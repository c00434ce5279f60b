"""Masked images and curves leave the model as it was, in any mode and precision, and refuse what does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from perturbing_tools import Counting, make_case
from torch import nn

from camtrain import InputError
from camtrain.evaluation.perturbing import masked_probabilities, perturbation_curves


def _user_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(112, 3)
    )
    net.train()
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    return net


def _state(net):
    return copy.deepcopy([net.state_dict(), [m.training for m in net.modules()], [p.grad for p in net.parameters()]])


def test_the_model_is_left_as_it_was_also_after_an_error():
    image, maps, pairs = (t.float() if t.is_floating_point() else t for t in make_case((6, 9)))
    net = _user_net()
    before, rng, given = _state(net), torch.get_rng_state(), image.clone()
    for fails in (False, True):
        calls = []

        def pick(output, fails=fails, calls=calls):
            calls.append(1)
            if fails and len(calls) > 1:
                raise RuntimeError("user")
            return output

        for ask in (masked_probabilities, perturbation_curves):
            calls.clear()
            if fails:
                with pytest.raises(RuntimeError, match="user"):
                    ask(net, image, maps, pairs, "mean", logits=pick, chunk=1)
            else:
                ask(net, image, maps, pairs, "mean", logits=pick)
        now = _state(net)
        torch.testing.assert_close(now[0], before[0])
        assert now[1] == before[1]
        assert torch.equal(now[2][0], before[2][0])
        assert all(g is None for g in now[2][1:])
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.equal(image, given)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode_and_plain_results(mode):
    image, maps, pairs = make_case((6, 9))
    net = Counting((6, 9))
    expected = perturbation_curves(net, image, maps.requires_grad_(), pairs, "blur", 4)
    assert not expected.insertion.requires_grad
    with mode():
        found = perturbation_curves(net, image.clone(), maps.clone(), pairs, "blur", 4)
        masked_probabilities(net, image.clone(), maps.clone(), pairs, "blur")
    torch.testing.assert_close(found.insertion, expected.insertion, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_and_maps(dtype):
    image, maps, pairs = make_case((6, 9))
    net = Counting((6, 9)).float()
    image, maps = image.to(dtype), maps.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        after = masked_probabilities(net.to(dtype), image, maps, pairs, "mean")
        curves = perturbation_curves(net, image, maps, pairs, "mean", 4)
    assert {after.dtype, *(c.dtype for c in vars(curves).values())} == {torch.float32}
    assert curves.insertion[pairs].isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"maps": torch.rand(2, 3, 6)}, r"maps \(B, L, \*S'\)"),
        ({"maps": torch.rand(1, 3, 6, 9)}, r"got \(1, 3, 6, 9\)"),
        ({"maps": torch.rand(2, 4, 6, 9), "pairs": torch.ones(2, 4) > 0}, "all 3 outputs of the model, got 4"),
        ({"pairs": torch.ones(2, 3)}, "pairs as bool"),
        ({"pairs": torch.ones(2, 2) > 0}, r"= \(2, 3\), got \(2, 2\)"),
        ({"columns": [0, 1]}, "each of the 3 maps, got 2"),
        ({"columns": [0, 1, 3]}, r"outputs in 0..2, got \[0, 1, 3\]"),
        ({"chunk": 0}, "chunk= expects"),
        ({"baseline": "zero"}, "air, mean, blur or a number"),
        ({"baseline": torch.rand(3, 3)}, "shape of the image"),
        ({"image": torch.full((2, 2, 6, 9), torch.nan).double()}, "NaN or Inf"),
        ({"model": "net"}, "expected a model"),
    ],
)
def test_wrong_input_is_refused(change, says):
    image, maps, _ = make_case((6, 9))
    good = {"model": Counting((6, 9)), "image": image, "maps": maps, "pairs": torch.ones(2, 3) > 0, "baseline": "air"}
    for ask in (masked_probabilities, perturbation_curves):
        with pytest.raises(InputError, match=says):
            ask(**good | change)


def test_wrong_steps_are_refused():
    image, maps, pairs = make_case((6, 9))
    for steps in (1, True, 2.5):
        with pytest.raises(InputError, match="steps= expects"):
            perturbation_curves(Counting((6, 9)), image, maps, pairs, "air", steps)
