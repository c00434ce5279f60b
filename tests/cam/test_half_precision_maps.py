"""Maps of a float16 network behind a mean over many cells: the slope of a cell lies under float16's least number."""

from __future__ import annotations

import torch
from torch import nn

import camtrain as ct
from camtrain.cam.engine import start_of


class Pooled(nn.Module):
    def __init__(self, labels=2):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU())
        # Tanh: not affine, so that the maps come from autograd.
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, labels)
        )

    def forward(self, image):
        return self.head(self.features(image))


def test_float16_maps_keep_slopes_below_its_least_number():
    net, image = Pooled().eval(), torch.rand(1, 1, 40, 40, 40)
    exact = ct.explain(net, image, layer="features")
    half = ct.explain(net.half(), image.half(), layer="features")
    assert exact.abs().max() < 4e-6  # where float16 has about 6e-8 between neighbours
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=float(exact.abs().max()) * 2e-3)


def test_the_mask_loss_of_a_float16_network_is_finite_and_has_the_gradient_of_float32():
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        net = Pooled().to(dtype)
        image = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        with ct.LayerTap(net, "features") as tap:
            maps = tap.maps(net(image), method="hirescam")
        # In units of the maps: what a loss with a scale of its own does.
        (maps.float() / maps.detach().float().abs().max()).pow(2).mean().backward()
        gradients[dtype] = net.features[0].weight.grad.float()
    assert gradients[torch.float16].isfinite().all()
    torch.testing.assert_close(
        gradients[torch.float16], gradients[torch.float32], rtol=0.05,
        atol=0.02 * float(gradients[torch.float32].abs().max()),
    )  # fmt: skip


def test_only_float16_starts_with_more_than_one():
    cells = torch.zeros(1, 1, 16, 16, 16)
    assert start_of(cells.sum(), cells) == 1
    assert start_of(cells.bfloat16().sum(), cells.bfloat16()) == 1
    assert start_of(cells.half().sum(), cells.half()) == 4096
    assert start_of(cells.half().sum(), cells[..., :1, :1, :2].half()) == 2


def test_slopes_that_overflow_with_the_start_are_taken_without_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(8192, 2), nn.Softplus(), nn.Linear(2, 1))
    with torch.no_grad():
        net[2].weight.mul_(20_000.0)  # slopes up to 150, times 4096 beyond float16
    image = torch.rand(1, 1, 4096)
    exact = ct.explain(net, image, layer="0")
    with ct.LayerTap(net, "0") as tap, torch.autocast("cpu", torch.float16):
        maps = tap.maps(net(image))
    assert maps.isfinite().all()
    assert (maps.detach() - exact).norm() < 5e-3 * exact.norm()
