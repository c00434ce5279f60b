"""Effects of single cells: by hand, and against HiResCAM where that is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.evaluation import cell_effects


@pytest.mark.parametrize("size", [(7,), (4, 5), (2, 3, 4)])
def test_behind_one_linear_layer_it_is_hirescam(size):
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)](1, 3, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    image = torch.randn(4, 1, *size)
    net(image)
    found = cell_effects(net[2:], net[:2](image))
    assert found.shape == (4, 2, *size)
    assert not found.requires_grad
    torch.testing.assert_close(found, ct.explain(net, image, "hirescam", "1"), atol=1e-5, rtol=1e-4)


def test_behind_two_layers_it_is_what_happens_and_hirescam_is_not():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 1))
    image = torch.randn(1, 1, 5, 5)
    activations = net[:2](image)
    found = cell_effects(net[2:], activations)
    without = activations.clone()
    without[:, :, 1, 2] = 0
    torch.testing.assert_close(found[0, 0, 1, 2], (net[2:](activations) - net[2:](without))[0, 0])
    assert (found - ct.explain(net, image, "hirescam", "1")).abs().max() > 1e-3


def test_activations_are_left_alone():
    activations = torch.rand(2, 3, 4, 5, requires_grad=True)
    before = activations.detach().clone()
    cell_effects(lambda a: a.flatten(1)[:, :2], activations)
    torch.testing.assert_close(activations.detach(), before)


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match=r"activations \(B, K, \*S\), got \(2, 3\)"):
        cell_effects(lambda a: a, torch.rand(2, 3))
    with pytest.raises(InputError, match=r"logits \(B, L\) from head, got \(2, 3, 4\)"):
        cell_effects(lambda a: a, torch.rand(2, 3, 4))
