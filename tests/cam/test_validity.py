"""What runs between a layer and the logits, and what that means for sums over cells."""

from __future__ import annotations

import torch

from camtrain.cam.validity import between, respond_clipped_share, respond_warnings, signed_share


def test_respond_cam_is_warned_of_signed_layers_and_of_norms():
    positive = torch.rand(2, 3, 4, 5)
    assert respond_warnings(positive, [], "layer4") == []
    assert respond_warnings(positive, ["GroupNorm"], "layer4")[0].startswith("GroupNorm runs between layer 'layer4'")
    signed = positive.clone()
    signed[1, 0] -= signed[1, 0].mean()
    (told,) = respond_warnings(signed, [], "layer4")
    assert "gives negative values" in told
    assert "safe denominator" in told
    torch.testing.assert_close(signed_share(signed)[0], torch.tensor(0.0))
    torch.testing.assert_close(respond_clipped_share(signed), torch.tensor([0.0, 1 / 3]))
    assert respond_clipped_share(torch.zeros(1, 3, 4)).tolist() == [0.0]


def test_what_runs_in_another_branch_is_not_between():
    activations = torch.rand(2, 3, 4, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    scores = activations.relu().mean(dim=2) * weight.sigmoid() / weight.exp()
    assert between(scores, activations) == between(activations * 2, activations)
    assert between(weight / scores, activations).others == ("Div",)
    assert between(scores @ scores.t(), activations).others == ("Mm of two of its features",)
