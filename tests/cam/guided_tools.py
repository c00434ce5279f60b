"""What the tests of the guided methods share: a small net, its image, and references that need no gates."""

from __future__ import annotations

import torch
from torch import nn

B, C, L = 3, 2, 4
SIZES = {1: (11,), 2: (11, 8), 3: (7, 10, 8)}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Net(nn.Module):
    """Two convolutions and two ReLUs, each its own module, as captum needs it."""

    def __init__(self, rank=3, act=nn.ReLU, **arguments):
        super().__init__()
        torch.manual_seed(rank)
        conv = CONVS[rank - 1]
        self.one, self.two = conv(C, 5, 3, padding=1), conv(5, 6, 3, stride=2)
        self.act1, self.act2, self.act3 = act(**arguments), act(**arguments), act(**arguments)
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, L)

    def forward(self, image):
        features = self.act2(self.two(self.act1(self.one(image))))
        return self.fc(self.act3(self.hidden(features.flatten(2).mean(dim=2))))


def image(rank=3, batch=B, dtype=torch.float64):
    torch.manual_seed(9)
    return torch.randn(batch, C, *SIZES[rank], dtype=dtype)


def graph(model, x):
    leaf = x.clone().requires_grad_()
    return model(leaf.clone()), leaf


def module_reference(model, x, label):
    """Clamps on the outputs of all ReLU calls, as hooks on tensors."""
    handles = [
        m.register_forward_hook(lambda _, __, out: out.register_hook(lambda g: g.clamp(min=0)) and None)
        for m in model.modules()
        if isinstance(m, nn.ReLU)
    ]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, label].sum(), leaf)
    for handle in handles:
        handle.remove()
    return gradient.sum(dim=1)
