"""LayerTap in training loops: gradients reach everything they must, nothing is kept, misuse is told."""

from __future__ import annotations

import gc
import weakref

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


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "layercam", "respondcam"])
@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_a_training_loop_brings_the_mask_loss_down(head, method):
    model = Net(head)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with ct.LayerTap(model, "act") as tap:
        for _ in range(12):
            optimizer.zero_grad()
            loss = loss_outside(tap.maps(model(image()), method))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_gradients_reach_convolution_and_head(head):
    model = Net(head)
    with ct.LayerTap(model, "act") as tap:
        loss_outside(tap.maps(model(image()))).backward()
    for name, parameter in model.named_parameters():
        if name in ("head.bias", "head.2.bias"):
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("head", ["flatten", "mlp"])
@pytest.mark.parametrize("method", ["hirescam", "gradcam", "respondcam"])
def test_parameter_gradients_are_the_finite_differences(head, method):
    model, x = Net(head).double(), image().double()

    def value():
        with ct.LayerTap(model, "conv") as tap:
            return tap.maps(model(x), method).square().sum()

    value().backward()
    for parameter in (model.conv.weight, next(model.head.parameters())):
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for index in (0, slope.abs().argmax().item()):
            kept, step = flat[index].item(), 1e-6
            flat[index] = kept + step
            above = value().item()
            flat[index] = kept - step
            below = value().item()
            flat[index] = kept
            assert slope[index].item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-9)


def test_one_forward_and_the_users_output_untouched():
    model, plain = Net(), Net()
    expected = plain(image())
    with ct.LayerTap(model, "act") as tap:
        y = model(image())
        maps = tap.maps(y)
    assert torch.equal(y, expected)
    torch.testing.assert_close(maps.sum(dim=(2, 3, 4)) + model.head.bias, y)
    (y.sum() + 0 * maps.sum()).backward()
    expected.sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_create_graph_maps_are_detached_and_the_graph_survives():
    model = Net("mlp")
    with ct.LayerTap(model, "act") as tap:
        y = model(image())
        maps = tap.maps(y, create_graph=False)
        again = tap.maps(y, "gradcam", labels=[1])
        y.sum().backward()
    assert not maps.requires_grad
    assert again.requires_grad
    assert model.conv.weight.grad is not None


def test_no_selected_label_gives_a_zero_loss_with_a_graph():
    for head in ("flatten", "mlp"):
        model = Net(head)
        with ct.LayerTap(model, "act") as tap:
            mask = torch.zeros(B, L, dtype=torch.bool)
            maps = tap.maps(model(image()), labels=mask)
            assert maps.isnan().all()
            loss = torch.where(mask[:, :, None, None, None], maps, 0).sum()
            loss.backward()
        assert loss == 0
        assert not model.conv.weight.grad.any()


def test_labels_present_in_the_batch():
    model = Net("mlp")
    present = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    with ct.LayerTap(model, "act") as tap:
        y = model(image())
        maps, full = tap.maps(y, labels=present), tap.maps(y)
    torch.testing.assert_close(maps[present], full[present])
    slope, expected = (
        torch.autograd.grad(m[present].square().sum(), model.conv.weight, retain_graph=True)[0] for m in (maps, full)
    )
    torch.testing.assert_close(slope, expected)


# Which forward counts ------------------------------------------------------------------------------------------------


def test_each_forward_begins_anew():
    model = Net()
    with ct.LayerTap(model, "act") as tap:
        first = model(image())
        second = model(image(2) * 2)
        assert tap.activations.shape[0] == 2
        torch.testing.assert_close(tap.maps(second).sum(dim=(2, 3, 4)) + model.head.bias, second)
        with pytest.raises(ct.InputError, match="expected logits"):
            tap.maps(first)
        same_size = model(image(2))
        model(image(2))
        with pytest.raises(ct.InputError, match="what the last one returned"):
            tap.maps(same_size)


def test_the_user_may_call_an_inner_module():
    """A tap on a LightningModule whose training step calls `self.net(image)`: nothing piles up."""
    outer = nn.ModuleDict({"net": Net()})
    with ct.LayerTap(outer, "act") as tap:
        for _ in range(3):
            y = outer["net"](image())
        torch.testing.assert_close(tap.maps(y).sum(dim=(2, 3, 4)) + outer["net"].head.bias, y)
        features = outer["net"].act(outer["net"].conv(image()))
        y = outer["net"].head(features.flatten(1))
        assert tap.maps(y).shape == (B, L, *GRID)


def test_an_exception_in_one_step_does_not_spoil_the_next():
    class Fragile(Net):
        broken = False

        def forward(self, image):
            features = self.act(self.conv(image))
            if self.broken:
                raise ValueError("broken")
            return self.head(features.flatten(1))

    model = Fragile()
    with ct.LayerTap(model, "act") as tap:
        model.broken = True
        with pytest.raises(ValueError, match="broken"):
            model(image())
        model.broken = False
        assert tap.maps(model(image())).shape == (B, L, *GRID)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, a, b):
        return self.net(a), self.net(b)


def test_several_calls_of_the_layer_in_one_forward():
    model = Twice()
    a, b = image(), image() * -1
    with ct.LayerTap(model, "act", call=1) as tap:
        first, second = model(a, b)
        torch.testing.assert_close(tap.maps(second).sum(dim=(2, 3, 4)) + model.net.head.bias, second)
    with ct.LayerTap(model, "act", call=0) as tap:
        first, second = model(a, b)
        torch.testing.assert_close(tap.maps(first).sum(dim=(2, 3, 4)) + model.net.head.bias, first)
    with (
        ct.LayerTap(model, "act") as tap,
        pytest.raises(ct.InputError, match=r"ran 2 times in one forward.*call=0 ... call=1"),
    ):
        tap.maps(model(a, b)[0])


def test_default_layer():
    model = Net()
    with ct.LayerTap(model, None) as tap:
        assert tap.name is None
        y = model(image())
        assert tap.name == "act"
        maps = tap.maps(y)
        model(image())
    with ct.LayerTap(model, "act") as named:
        torch.testing.assert_close(named.maps(model(image())), maps)
    with tap:
        assert tap.maps(model(image())).shape == maps.shape


def test_default_layer_of_a_model_with_other_inputs():
    class Clinical(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.age = Net("mlp"), nn.Linear(2, L)

        def forward(self, image, table, scale=1.0):
            return self.net(image) * scale + self.age(table)

    model = Clinical()
    with ct.LayerTap(model, None) as tap:
        maps = tap.maps(model(image(), torch.rand(B, 2), scale=2.0))
    assert maps.shape == (B, L, *GRID)
    with ct.LayerTap(nn.Linear(3, L), None) as tap, pytest.raises(ct.InputError, match="layer=None needs a model"):
        tap.model(torch.rand(B, 3))


def test_hooks_are_gone_afterwards():
    model = Net()

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail():
        with tap:
            model(image())
            assert count() > 0
            raise ValueError("stop")

    tap = ct.LayerTap(model, "act")
    with pytest.raises(ValueError, match="stop"):
        fail()
    assert count() == 0
    with pytest.raises(ct.InputError, match="has not run"):
        tap.maps(torch.zeros(B, L))
    for layer in (None, "act"):
        with ct.LayerTap(model, layer):
            model(image())
        assert count() == 0


@pytest.mark.slow
def test_nothing_leaks_over_50_steps():
    model = Net("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(tap):
        optimizer.zero_grad()
        y = model(image())
        loss_outside(tap.maps(y, labels=[0, 2])).backward()
        optimizer.step()
        return weakref.ref(tap.activations)

    def alive():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    with ct.LayerTap(model, "act") as tap:
        refs = [step(tap) for _ in range(3)]
        before = alive()
        refs += [step(tap) for _ in range(50)]
        assert alive() <= before + 2
    gc.collect()
    assert [ref for ref in refs if ref() is not None] == []
