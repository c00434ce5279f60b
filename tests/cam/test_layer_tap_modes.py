"""LayerTap in other surroundings: wrappers, frozen parts, mixed precision, grad modes, tokens, misuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct

B, L = 3, 4
GRID = (6, 4, 7)


class Net(nn.Module):
    def __init__(self, head="flatten"):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv3d(1, 3, 3, padding=1), nn.ReLU()
        size = 3 * 6 * 4 * 7
        self.head = {
            "flatten": nn.Linear(size, L),
            "mlp": nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, L)),
        }[head]

    def forward(self, image):
        return self.head(self.act(self.conv(image)).flatten(1))


def image(batch=B):
    return torch.randn(batch, 1, *GRID, generator=torch.Generator().manual_seed(1))


def loss_outside(maps):
    """All evidence in the first half is forbidden."""
    return nn.functional.softplus(maps[:, :, :3] * 500).mean()


class Wrapper(nn.Module):
    """As DistributedDataParallel names its inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


@pytest.mark.parametrize("layer", ["act", "module.act"])
def test_names_inside_a_wrapper(layer):
    model = Wrapper(Net())
    with ct.LayerTap(model, layer) as tap:
        y = model(image())
        torch.testing.assert_close(tap.maps(y).sum(dim=(2, 3, 4)) + model.module.head.bias, y)


def test_frozen_backbone_still_trains_the_head():
    for head in ("flatten", "mlp"):
        model = Net(head)
        model.conv.requires_grad_(False)
        with ct.LayerTap(model, "act") as tap:
            loss_outside(tap.maps(model(image()))).backward()
        assert next(model.head.parameters()).grad.abs().max() > 0
        assert model.conv.weight.grad is None


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_autocast_bf16(head):
    model = Net(head)
    with ct.LayerTap(model, "act") as tap:
        exact = tap.maps(model(image())).detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = tap.maps(model(image()))
        loss_outside(maps).backward()
    assert maps.dtype == torch.float32
    assert (maps - exact).norm() < 0.03 * exact.norm()
    assert model.conv.weight.grad.isfinite().all()


def test_maps_may_be_asked_for_under_no_grad():
    for head in ("flatten", "mlp"):
        model = Net(head)
        with ct.LayerTap(model, "act") as tap:
            y = model(image())
            expected = tap.maps(y).detach()
            with torch.no_grad():
                torch.testing.assert_close(tap.maps(y, create_graph=False), expected)


def test_a_forward_without_gradients_is_told():
    model = Net()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), ct.LayerTap(model, "act") as tap, pytest.raises(ct.InputError, match=r"outside torch\.no_grad"):
            tap.maps(model(image()))


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_maps_after_backward_are_told(head):
    model = Net(head)
    with ct.LayerTap(model, "act") as tap:
        y = model(image())
        y.sum().backward()
        with pytest.raises(ct.InputError, match=r"ask for maps before backward"):
            tap.maps(y)


def test_other_errors_of_torch_are_not_dressed_up():
    """Out of memory in the inner backward pass must not read as a wrong layer."""

    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("no memory")

    class Exploding(Net):
        def forward(self, image):
            return Bomb.apply(super().forward(image))

    model = Exploding()
    with ct.LayerTap(model, "act") as tap, pytest.raises(torch.OutOfMemoryError):
        tap.maps(model(image()))


def test_wrong_layer_is_told_before_the_first_step():
    with pytest.raises(ct.InputError, match="no layer 'akt'; nearest: act"):
        ct.LayerTap(Net(), "akt")


def test_tokens_through_reshape():
    """A transformer-like net: class token and patches; reshape drops the first and puts the others on their grid."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.patch = nn.Conv2d(1, 8, 4, stride=4)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.mix, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, L)

        def forward(self, image):
            patches = self.patch(image).flatten(2).transpose(1, 2)
            tokens = self.block(torch.cat([self.token.expand(len(image), -1, -1), patches], dim=1))
            return self.fc(self.mix(tokens, tokens, tokens)[0][:, 0])

    model, x = Tokens(), torch.randn(B, 1, 12, 20)

    def grid(tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 5))

    with ct.LayerTap(model, "block", reshape=grid) as tap:
        maps = tap.maps(model(x))
        maps.square().sum().backward()
    assert maps.shape == (B, L, 3, 5)
    assert model.fc.weight.grad.abs().max() > 0
    assert model.patch.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        ct.explain(model.train(), x, layer="block", reshape=grid), maps.detach(), rtol=1e-4, atol=1e-6
    )
    tokens = torch.cat([model.token.expand(B, -1, -1), model.patch(x).flatten(2).transpose(1, 2)], dim=1)
    tokens = model.block(tokens).detach().requires_grad_()
    score = model.fc(model.mix(tokens, tokens, tokens)[0][:, 0])[:, 2].sum()
    (gradient,) = torch.autograd.grad(score, tokens)
    expected = (tokens * gradient).sum(dim=2)[:, 1:].reshape(B, 3, 5)
    torch.testing.assert_close(maps[:, 2].detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ct.InputError, match="spatial axes"):
        ct.explain(model, x, layer="block", reshape=lambda t: t[:, 0])
