"""layer="input" of LayerTap: the image that the model is called with is the start of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.fusing import fused, resized

B, L = 3, 4
GRID = (7, 9, 5)


class Net(nn.Module):
    def __init__(self, head="mlp"):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(3, 6, 3, 2, 1), nn.ReLU())
        size = 6 * 4 * 5 * 3
        last = [nn.Linear(size, 8), nn.Softplus(), nn.Linear(8, L)] if head == "mlp" else [nn.Linear(size, L)]
        self.head = nn.Sequential(nn.Flatten(), *last)

    def forward(self, image):
        return self.head(self.body(self.stem(image)))


def image(batch=B, dtype=torch.float32):
    return torch.randn(batch, 2, *GRID, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_input_map_is_image_times_gradient(head):
    model, x = Net(head), image()
    with ct.LayerTap(model, "input") as tap:
        y = model(x)
        maps = tap.maps(y)
    leaf = x.clone().requires_grad_()
    scores = model(leaf)
    for label in range(L):
        (gradient,) = torch.autograd.grad(scores[:, label].sum(), leaf, retain_graph=True)
        torch.testing.assert_close(maps[:, label], (gradient * x).sum(1))
    assert torch.equal(y, scores)
    assert not x.requires_grad
    torch.testing.assert_close(maps.detach(), ct.explain(model, x, layer="input"))


def test_a_loss_on_input_maps_trains_the_network():
    model, x = Net().double(), image(dtype=torch.float64)

    def value():
        with ct.LayerTap(model, ["input", "body"]) as tap:
            return tap.maps(model(x), fuse="mean").square().sum()

    value().backward()
    for parameter in (model.stem[0].weight, model.head[1].weight):
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        index, step = slope.abs().argmax().item(), 1e-6
        kept = flat[index].item()
        flat[index] = kept + step
        above = value().item()
        flat[index] = kept - step
        below = value().item()
        flat[index] = kept
        assert slope[index].item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


class Odd(nn.Module):
    """Takes the image by name, with ids and an age beside it, and writes into it."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, ids, age, image):
        image += age[:, None, None, None, None]
        return self.net(image)


def test_how_the_image_is_found_and_what_happens_to_it():
    model, x, age = Odd(), image(), torch.rand(B)
    ids = torch.zeros(B, 1, 5, dtype=torch.long)
    with ct.LayerTap(model, ["input", "net.stem"]) as tap:
        y = model(ids, age, image=x)
        found = tap.maps(y)
        assert torch.equal(tap.activations["input"], x)
    assert torch.equal(x, image())  # the network wrote into a clone
    leaf = image().requires_grad_()
    (gradient,) = torch.autograd.grad(model(ids, age, image=leaf + 0)[:, 1].sum(), leaf)
    torch.testing.assert_close(found["input"][:, 1], (gradient * leaf).sum(1))
    with ct.LayerTap(nn.Linear(3, 2), "input") as tap, pytest.raises(ct.InputError, match=r"needs a model that takes"):
        tap.model(torch.zeros(4, 3))


def test_an_image_with_a_graph_of_the_users_own_keeps_it():
    model, leaf = Net(), image().requires_grad_()
    with ct.LayerTap(model, "input") as tap:
        y = model(leaf * 2)
        assert torch.equal(tap.activations, leaf * 2)
        (gradient,) = torch.autograd.grad(y.sum() + tap.maps(y).sum(), leaf)
    assert gradient.abs().max() > 0


def test_the_input_of_a_part_or_without_gradients():
    outer = nn.ModuleDict({"net": Net()})
    with ct.LayerTap(outer, "input") as tap:
        y = outer["net"](image())
        with pytest.raises(ct.InputError, match="layer 'input' has not run: call the model"):
            tap.maps(y)
    model = Net()
    with ct.LayerTap(model, "input") as tap:
        with torch.no_grad():
            y = model(image())
        with pytest.raises(ct.InputError, match="do not depend on the tapped layer"):
            tap.maps(y)


def test_reshape_is_for_layers_not_for_the_input():
    model = Net()
    with ct.LayerTap(model, ["input", "body"], reshape=lambda f: f.flip(2)) as tap:
        found = tap.maps(model(image()))
    plain = ct.explain(model, image(), layer=["input", "body"])
    torch.testing.assert_close(found["input"].detach(), plain["input"])
    torch.testing.assert_close(found["body"].detach(), plain["body"].flip(2))


def test_our_own_forwards_do_not_count():
    model = Net()
    with ct.LayerTap(model, ["input", "body"]) as tap:
        y = model(image())
        ct.explain(model, image(2), layer="input")
        ct.layers(model, image(1))
        assert {len(maps) for maps in tap.maps(y).values()} == {B}


def test_resized_and_fused_refuse_what_they_cannot_do():
    with pytest.raises(ct.InputError, match="needs 2 positive sizes"):
        resized(torch.zeros(1, 1, 3, 4), (3,))
    assert fused([torch.zeros(2, 0, 3, 4), torch.zeros(2, 0, 5, 6)]).shape == (2, 0, 5, 6)
