"""What the tests of masked images and of curves share."""

from __future__ import annotations

import torch
from torch import nn


class Counting(nn.Module):
    """A linear net that remembers how many images it was given at once."""

    def __init__(self, size, labels=3, channels=2):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(labels, channels, *size, generator=generator).double())
        self.batches = []

    def forward(self, image):
        self.batches.append(len(image))
        return image.flatten(1) @ self.weight.flatten(1).T


def make_case(size, batch=2, labels=3, grid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 2, *size, generator=generator).double()
    maps = torch.randn(batch, labels, *(grid or size), generator=generator).double()
    pairs = torch.rand(batch, labels, generator=generator) < 0.7
    pairs[0, 0] = True
    pairs[-1, -1] = batch * labels == 1
    return image, maps, pairs
