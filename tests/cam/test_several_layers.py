"""Several layers and the input in one forward: LayerTap, ModuleWatch, and running the user's network again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain.cam.several import maps_of_layers
from camtrain.cam.watch import ModuleWatch

B, L = 3, 4
GRID = (7, 9, 5)


class Net(nn.Module):
    """Two feature maps on different grids, and a side branch that nobody needs."""

    def __init__(self, head="mlp", inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(inplace))
        self.body = nn.Sequential(nn.Conv3d(3, 6, 3, 2, 1), nn.ReLU(inplace))
        self.side = nn.Conv3d(3, 2, 1)
        size = 6 * 4 * 5 * 3
        last = [nn.Linear(size, 8), nn.Softplus(), nn.Linear(8, L)] if head == "mlp" else [nn.Linear(size, L)]
        self.head = nn.Sequential(nn.Flatten(), *last)
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        features = self.stem(image)
        self.side(features)
        return self.head(self.body(features))


def image(batch=B, dtype=torch.float32):
    return torch.randn(batch, 2, *GRID, generator=torch.Generator().manual_seed(1), dtype=dtype)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def enlarged(maps):
    """(B, L, 4, 5, 3) on the grid of the stem."""
    return F.interpolate(maps, size=GRID, mode="trilinear", align_corners=False)


# LayerTap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "layercam"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_list_gives_what_each_layer_gives_alone(head, method):
    model = Net(head)
    alone = {}
    for layer in ("stem", "body"):
        with ct.LayerTap(model, layer) as tap:
            alone[layer] = tap.maps(model(image()), method, labels=[2, 0])
    model.calls = 0
    with ct.LayerTap(model, ["stem", "body"]) as tap:
        y = model(image())
        together = tap.maps(y, method, labels=[2, 0])
        activations = tap.activations
    assert model.calls == 1
    assert list(together) == ["stem", "body"]
    assert tap.name == "stem, body"
    assert {k: a.shape for k, a in activations.items()} == {"stem": (B, 3, *GRID), "body": (B, 6, 4, 5, 3)}
    for layer, maps in together.items():
        torch.testing.assert_close(maps, alone[layer])
    assert torch.equal(y, Net(head)(image()))


def test_fused_is_the_mean_of_enlarged_maps_and_trains_the_network():
    nets = [Net().double(), Net().double()]
    x = image(dtype=torch.float64)
    with ct.LayerTap(nets[0], ["body", "stem"]) as tap:
        together = tap.maps(nets[0](x), fuse="mean")
        together.square().sum().backward()
    each = []
    for layer in ("body", "stem"):
        with ct.LayerTap(nets[1], layer) as tap:
            each.append(tap.maps(nets[1](x)))
    by_hand = (enlarged(each[0]) + each[1]) / 2
    by_hand.square().sum().backward()
    torch.testing.assert_close(together, by_hand)
    for (name, p), (_, q) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert nets[0].stem[0].weight.grad.abs().max() > 0
    torch.testing.assert_close(
        together.detach(), ct.explain(nets[0], x, layer=["body", "stem"], fuse="mean"), atol=1e-12, rtol=1e-9
    )


def test_fused_without_a_graph_and_with_labels_left_out():
    model = Net()
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    with ct.LayerTap(model, ["stem", "body"]) as tap:
        y = model(image())
        with torch.no_grad():
            maps = tap.maps(y, labels=mask, fuse="mean")
        assert maps.requires_grad
        assert not tap.maps(y, labels=mask, create_graph=False, fuse="mean").requires_grad
        full = tap.maps(y, fuse="mean")
        with pytest.raises(ct.InputError, match="fuse= knows 'mean', got 'max'"):
            tap.maps(y, fuse="max")
        one = tap.maps(y)["stem"]
    assert torch.equal(~maps.isnan(), mask[:, :, None, None, None].expand_as(maps))
    torch.testing.assert_close(maps[mask], full[mask])
    with ct.LayerTap(model, "stem") as tap:
        torch.testing.assert_close(tap.maps(model(image()), fuse="mean"), one)


@pytest.mark.parametrize("inplace", [False, True])
def test_nested_layers_and_inplace_activations(inplace):
    layers = ["stem.0", "stem", "stem.1", "body.0"]
    model = Net(inplace=inplace)
    if not inplace:
        with pytest.raises(ct.InputError, match=r"'stem\.0' twice"):
            ct.LayerTap(model, ["stem.0", model.stem[0]])
    with ct.LayerTap(model, layers) as tap:
        found = tap.maps(model(image()))
    torch.testing.assert_close(found["stem"], found["stem.1"])
    for layer, maps in found.items():
        torch.testing.assert_close(maps, ct.explain(Net(), image(), layer=layer).to(maps), atol=1e-6, rtol=1e-4)


def test_modules_and_none_in_a_list():
    model = Net()
    tap = ct.LayerTap(model, [model.stem, None])
    for _ in range(2):
        with tap:
            found = tap.maps(model(image()))
            assert list(found) == ["stem", "body"]
    assert hooks(model) == 0
    with ct.LayerTap(model, [None, "body.1", "stem"]) as tap:
        # `body` ends in `body.1`: two modules with one output.
        found = tap.maps(model(image()))
        assert set(found) == {"body", "body.1", "stem"}
        torch.testing.assert_close(found["body"], found["body.1"])
    with ct.LayerTap(model, [None, "body"]), pytest.raises(ct.InputError, match="lists 'body' twice"):
        model(image())
    assert hooks(model) == 0


def test_none_in_a_list_when_an_inner_module_is_called():
    outer = nn.ModuleDict({"net": Net()})
    with ct.LayerTap(outer, ["stem", None]) as tap:
        y = outer["net"](image())
        with pytest.raises(ct.InputError, match="tapped layer has not run: call the model inside the with block"):
            tap.maps(y)


def test_each_forward_begins_anew_and_steps_leak_nothing():
    model = Net()
    with ct.LayerTap(model, ["input", "stem", "body"]) as tap:
        model(image() * 2)
        y = model(image(2))
        assert {len(maps) for maps in tap.maps(y).values()} == {2}
        assert all(len(capture.outputs) == 1 for capture in tap._captures)
    assert all(capture.outputs == [] for capture in tap._captures)


def test_wrong_lists():
    model = Net()
    with pytest.raises(ct.InputError, match="layer= is an empty list"):
        ct.LayerTap(model, [])
    with pytest.raises(ct.InputError, match="lists 'stem' twice"):
        ct.LayerTap(model, ["stem", "stem"])
    with pytest.raises(ct.InputError, match="lists 'input' twice"):
        ct.LayerTap(model, ["input", "stem", "input"])
    with pytest.raises(ct.InputError, match="lists None twice"):
        ct.LayerTap(model, [None, None])
    with pytest.raises(ct.InputError, match=r"no layer 'stam'; nearest: .*stem"):
        ct.LayerTap(model, ["body", "stam"])
    with ct.LayerTap(model, ["body", "side"]) as tap, pytest.raises(ct.InputError, match="layer 'side': the logits do"):
        tap.maps(model(image()))
    with ct.LayerTap(model, ["body", "head.1"]) as tap, pytest.raises(ct.InputError, match=r"layer 'head\.1': the tap"):
        tap.maps(model(image()))


@pytest.mark.parametrize("layer", [["stem", "input"], ["stem", None], "input"])
def test_hooks_are_gone_after_an_exception(layer):
    model = Net()

    def fail():
        with ct.LayerTap(model, layer):
            model(image())
            assert hooks(model) > 0
            model(image()[:, :1])

    with pytest.raises(RuntimeError, match="channels"):
        fail()
    assert hooks(model) == 0
    with ct.LayerTap(model, layer) as tap:
        assert len(tap.maps(model(image()), fuse="mean")) == B


# ModuleWatch ---------------------------------------------------------------------------------------------------------


class Module(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return self.net(image)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_watch_of_several_layers(mode):
    module = Module(Net())
    cut = mode is not torch.enable_grad
    watch = ModuleWatch(module, ["stem", "net.body"], cut=cut)
    with mode():
        before = modes()
        watch.start()
        y = module(image() + 0)
        assert modes() == before
        assert y.requires_grad != cut
        sources, logits = watch.take_all(L)
        maps = maps_of_layers(sources, logits, create_graph=False)
        source, again = watch.take()
        watch.stop()
        assert modes() == before
    assert list(maps) == ["stem", "net.body"]
    assert source is sources["stem"]
    torch.testing.assert_close(again, logits)
    assert sources["stem"].is_leaf == cut  # the graph starts at the first of them
    assert not sources["net.body"].is_leaf
    for layer, found in maps.items():
        torch.testing.assert_close(found, ct.explain(module, image(), layer=layer))
    assert module.net.calls == 3
    assert hooks(module) == 0


def test_the_order_of_a_list_is_the_users():
    module = Module(Net())
    watch = ModuleWatch(module, ["body", "stem"], cut=True)
    with torch.no_grad():
        watch.start()
        module(image())
        sources, logits = watch.take_all()
        maps = maps_of_layers(sources, logits, create_graph=False)
        watch.stop()
    assert list(maps) == ["body", "stem"]
    torch.testing.assert_close(maps["body"], ct.explain(module, image(), layer="body"))


@pytest.mark.parametrize("cut", [False, True])
def test_a_layer_in_another_branch_is_named(cut):
    module = Module(Net())
    watch = ModuleWatch(module, ["body", "net.side"], cut=cut)
    with torch.set_grad_enabled(not cut):
        watch.start()
        module(image())
        with pytest.raises(ct.InputError, match=r"do not depend on layer 'net\.side': it lies in another branch"):
            watch.take_all()
        watch.stop()
    with pytest.raises(ct.InputError, match=r"lists 'net\.body' twice"):
        ModuleWatch(module, ["body", "net.body"])


class Apart(nn.Module):
    """Backbone and head are called one after the other."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.head = Net().stem, Net().body, Net().head

    def step(self, image):
        return self.head(self.neck(self.backbone(image)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_layers_in_parts_that_the_step_calls_by_itself(mode):
    module = Apart()
    watch = ModuleWatch(module, ["backbone", "neck.1"], logits="head", cut=mode is not torch.enable_grad)
    with mode():
        before = modes()
        watch.start()
        module.step(image() + 0)
        sources, logits = watch.take_all(L)
        maps = maps_of_layers(sources, logits, create_graph=False)
        with pytest.raises(ct.InputError, match="calls the parts of the network one after another"):
            watch.rerun()
        watch.stop()
        assert modes() == before
    for layer, name in {"backbone": "stem", "neck.1": "body.1"}.items():
        torch.testing.assert_close(maps[layer], ct.explain(Net(), image(), layer=name))
    watch = ModuleWatch(module, ["backbone", "neck.1"])
    watch.start()
    module.step(image())
    with pytest.raises(ct.InputError, match=r"no module around the layers 'backbone', 'neck\.1' gives logits"):
        watch.take_all()
    watch.stop()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["body", "head"])
def test_an_exception_restores_every_mode(mode, where):
    module = Module(Net())

    def fail(*_):
        raise ValueError("the user's own error")

    handle = module.net.get_submodule(where).register_forward_pre_hook(fail)
    watch = ModuleWatch(module, ["stem", "body"], cut=True)
    with mode():
        before = modes()
        watch.start()
        with pytest.raises(ValueError, match="the user's own error"):
            module(image())
        watch.stop()
        assert modes() == before
    handle.remove()
    assert hooks(module) == 0
