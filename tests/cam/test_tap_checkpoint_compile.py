"""LayerTap beside gradient checkpointing and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import camtrain as ct

B, L = 2, 3
GRID = (6, 5, 4)


class Net(nn.Module):
    """`part` says what is checkpointed: nothing, the trunk (with or without the tapped layer), the head, or all."""

    def __init__(self, part=None, reentrant=False, head="flatten", frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU())
        self.trunk = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU())
        size = 4 * 6 * 5 * 4
        last = [nn.Linear(size, L)] if head == "flatten" else [nn.Linear(size, 6), nn.Tanh(), nn.Linear(6, L)]
        self.head = nn.Sequential(nn.Flatten(), *last)
        self.part, self.reentrant = part, reentrant
        if frozen:
            self.stem.requires_grad_(False)
            self.trunk.requires_grad_(False)

    def run(self, part, module, value):
        if self.part == part:
            return checkpoint(module, value, use_reentrant=self.reentrant)
        return module(value)

    def body(self, image):
        return self.run("head", self.head, self.run("trunk", self.trunk, self.run("stem", self.stem, image)))

    def forward(self, image):
        return self.run("all", self.body, image)


def image():
    return torch.randn(B, 1, *GRID, generator=torch.Generator().manual_seed(1)).requires_grad_()


def step(model, method="hirescam", steps=2):
    """Two steps of task and map loss; the maps, and every gradient after the second."""
    with ct.LayerTap(model, "trunk") as tap:
        for _ in range(steps):
            model.zero_grad()
            y = model(image())
            maps = tap.maps(y, method)
            again = tap.maps(y, "gradcam")  # asking twice must not run anything twice
            (nn.functional.softplus(50 * maps).mean() + again.square().sum() + y.square().mean()).backward()
    return maps.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_equal_steps(model, plain, method="hirescam"):
    maps, slopes = step(model, method)
    expected, right = step(plain, method)
    torch.testing.assert_close(maps, expected)
    for name, slope in right.items():
        assert (slope is None) == (slopes[name] is None), name
        if slope is not None:
            torch.testing.assert_close(slopes[name], slope, msg=name)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", ["flatten", "mlp"])
@pytest.mark.parametrize("part", ["stem", "trunk", "head", "all"])
def test_non_reentrant_checkpointing_of_any_part(part, head, frozen):
    assert_equal_steps(Net(part, head=head, frozen=frozen), Net(head=head, frozen=frozen))


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_reentrant_checkpointing_before_the_layer(head):
    assert_equal_steps(Net("stem", reentrant=True, head=head), Net(head=head), "layercam")


@pytest.mark.parametrize("part", ["all", "head"])
def test_reentrant_checkpointing_across_the_layer_or_behind_it_is_told(part):
    model = Net(part, reentrant=True, head="mlp")
    with ct.LayerTap(model, "trunk") as tap, pytest.raises(ct.InputError, match="reentrant"):
        tap.maps(model(image()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["stem", "trunk", "head", "all"])
def test_explain_a_checkpointed_model(part, reentrant):
    expected = ct.explain(Net(head="mlp"), image().detach(), layer="trunk")
    model = Net(part, reentrant=reentrant, head="mlp")
    if reentrant and part != "stem":
        # Reentrant checkpointing hides what runs inside it from every graph.
        with pytest.raises(ct.InputError, match="reentrant"):
            ct.explain(model, image().detach(), layer="trunk")
        return
    torch.testing.assert_close(ct.explain(model, image().detach(), layer="trunk"), expected)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flatten", "mlp"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiling_what_lies_before_the_head(backend, head, in_place):
    model = Net(head=head)
    for part in ("stem", "trunk"):
        if in_place:
            getattr(model, part).compile(backend=backend)
        else:
            setattr(model, part, torch.compile(getattr(model, part), backend=backend))
    model(image())  # compiled before there was any hook
    maps, slopes = step(model, "layercam")
    expected, right = step(Net(head=head), "layercam")
    torch.testing.assert_close(maps, expected)
    slopes = {name.replace("_orig_mod.", ""): slope for name, slope in slopes.items()}
    for name, slope in right.items():
        torch.testing.assert_close(slopes[name], slope, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["trunk", "stem.1"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_model_compiled_before_the_tap_is_told(layer):
    model = torch.compile(Net(head="mlp"), backend="aot_eager")
    model(image())
    with ct.LayerTap(model, layer) as tap:
        y = model(image())
        try:
            maps = tap.maps(y)
        except ct.InputError as error:
            assert "torch.compile" in str(error)  # noqa: PT017 - either answer is right, a wrong map is not
        else:
            with ct.LayerTap(model._orig_mod, layer) as plain:
                torch.testing.assert_close(maps, plain.maps(model._orig_mod(image())))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flatten", "mlp"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_model_compiled_with_the_tap_in_place_is_right_or_told(head):
    model = torch.compile(Net(head=head), backend="aot_eager")
    expected, right = step(Net(head=head), "layercam")
    try:
        maps, slopes = step(model, "layercam")
    except ct.InputError as error:
        assert "leave the head eager" in str(error)  # noqa: PT017 - either answer is right, a wrong map is not
    else:
        torch.testing.assert_close(maps, expected)
        for name, slope in right.items():
            torch.testing.assert_close(slopes[f"_orig_mod.{name}"], slope, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_head_is_told_before_the_backward_pass():
    model = Net(head="mlp")
    model.head = torch.compile(model.head, backend="aot_eager")
    with ct.LayerTap(model, "trunk") as tap:
        y = model(image())
        with pytest.raises(ct.InputError, match="leave the head eager"):
            tap.maps(y)
        torch.testing.assert_close(
            tap.maps(y, create_graph=False), ct.explain(Net(head="mlp"), image().detach(), layer="trunk")
        )
