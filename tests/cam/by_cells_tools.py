"""Layers, tails and both ways to their maps, for the tests of maps cell by cell."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from camtrain.cam import engine
from camtrain.cam.by_cells import hires_cam_by_cells
from camtrain.cam.engine import attention_maps_by
from camtrain.cam.selection import select

B, L, K = 3, 9, 5
GRIDS = {"1d": (4,), "2d": (2, 3), "3d": (2, 1, 3)}


def activations(*grid, batch=B, dtype=torch.float64):
    drawn = torch.randn(batch, K, *(grid or GRIDS["3d"]), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return drawn.requires_grad_()


def ask(source, logits, labels=None, samples=None, cells=True):
    """Maps with the gate forced open or shut."""
    with mock.patch.object(engine, "cheaper_by_cells", return_value=cells):
        return attention_maps_by(source, logits, ["hirescam"], labels, False, samples=samples)["hirescam"]


def by_cells(source, logits):
    return hires_cam_by_cells(source, logits, select(None, *logits.shape, logits.device))


def assert_cells_equal_loop(source, logits, labels=None, samples=None):
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if source.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    with mock.patch.object(engine, "hires_cam_by_cells", wraps=hires_cam_by_cells) as asked:
        found = ask(source, logits, labels, samples)
    assert asked.call_count == 1
    assert by_cells(source, logits) is not None
    wanted = ask(source, logits, labels, samples, cells=False)
    assert (found.shape, found.dtype, found.requires_grad) == (wanted.shape, wanted.dtype, False)
    torch.testing.assert_close(found, wanted, equal_nan=True, **tolerance)
    return found


def assert_loop_is_taken(source, logits):
    assert by_cells(source, logits) is None
    torch.testing.assert_close(ask(source, logits), ask(source, logits, cells=False), rtol=0, atol=0, equal_nan=True)


class Tail(nn.Module):
    """What lies behind the layer; `kind` names its middle."""

    def __init__(self, kind, rank=3, labels=L):
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
        self.middle = {
            "mlp": nn.Identity(),
            "conv": nn.Sequential(conv(K, K, 3, padding=1), nn.ReLU(inplace=True)),
            "silu": nn.Sequential(conv(K, K, 1), nn.SiLU()),
            "batchnorm": nn.Sequential(norm(K), nn.GELU()).eval(),
            "batchnorm training": nn.Sequential(norm(K), nn.GELU()),
            "instancenorm": instance(K, affine=True),
            "groupnorm": nn.GroupNorm(1, K),
            "dropout": nn.Sequential(nn.Dropout(0.4), nn.Tanh()),
        }[kind]
        self.head = nn.Sequential(nn.Linear(K, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, labels))

    def forward(self, value):
        return self.head((value + self.middle(value)).flatten(2).mean(dim=2))


KINDS = ["mlp", "conv", "silu", "batchnorm", "instancenorm", "groupnorm", "dropout"]
