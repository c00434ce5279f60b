"""What the tests of Score-CAM share: a net that counts what it is given, and its image."""

from __future__ import annotations

import torch
from torch import nn

B, K, L = 3, 7, 4
SIZES = {1: (11,), 2: (11, 8), 3: (7, 10, 8)}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Net(nn.Module):
    """Two convolutions with a stride, a hidden layer behind the pool; counts what it is given."""

    def __init__(self, rank=3, channels=K):
        super().__init__()
        torch.manual_seed(rank)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.one, self.two = conv(2, 5, 3, padding=1), conv(5, channels, 3, stride=2, padding=1)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels)
        nn.init.uniform_(self.norm.running_mean, -0.2, 0.2)
        self.act, self.hidden, self.fc = nn.ReLU(inplace=True), nn.Linear(channels, 6), nn.Linear(6, L)
        self.seen = []

    def forward(self, image):
        self.seen.append(len(image))
        features = self.act(self.norm(self.two(self.one(image).relu())))
        return 20 * self.fc(torch.tanh(self.hidden(features.flatten(2).mean(dim=2))))


def image(rank=3, batch=B):
    torch.manual_seed(9)
    return torch.rand(batch, 2, *SIZES[rank])
