"""Awkward batches for every score: unknown labels, empty regions, maps that are absent, negative, flat or broken."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

# The search for doctests would import the conftest.py of two folders under one name.
collect_ignore = ["conftest.py"]


class Case(NamedTuple):
    maps: Tensor
    allowed: Tensor
    label: Tensor


def _make(batch=5, labels=7, size=(4, 3, 6), seed=0, dtype=torch.float32, awkward=True):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, labels, *size, generator=generator)
    allowed = torch.rand(batch, labels, *size, generator=generator) < 0.3
    allowed[..., 0] = True
    label = (torch.rand(batch, labels, generator=generator) < 0.6).float()
    if awkward:
        label[0, 0] = torch.nan
        label[1, :5] = 1
        maps[1, 0] = -maps[1, 0].abs()
        maps[1, 1] = 0
        maps[1, 2] = 3.25
        maps[1, 3] = torch.nan
        allowed[1, 4] = False
        label[2, :3] = 1
        maps[2, 0].view(-1)[1] = torch.nan
        maps[2, 1].view(-1)[2] = torch.inf
        allowed[2, 2] = True
        label[:, labels - 1] = 0
    return Case(maps.to(dtype), allowed, label)


@pytest.fixture
def make_case():
    return _make


@pytest.fixture
def reference():
    """Loop over the pairs that count, as the design says, and call `score(map, allowed)` on numpy arrays."""

    def run(score, maps, allowed, label, has_organs=None):
        maps, allowed, label = (
            np.asarray(t.float() if t.dtype == torch.bfloat16 else t) for t in (maps, allowed, label)
        )
        result = np.full(label.shape, np.nan)
        counted = np.zeros(label.shape, dtype=bool)
        for b in range(label.shape[0]):
            for k in range(label.shape[1]):
                segmented = allowed[b].any() if has_organs is None else bool(has_organs[b])
                computed = not np.isnan(maps[b, k]).all()
                if label[b, k] == 1 and segmented and allowed[b, k].any() and computed:
                    counted[b, k] = True
                    if np.isfinite(maps[b, k]).all():
                        result[b, k] = score(maps[b, k], allowed[b, k])
        return result, counted

    return run
