"""ModuleWatch: the user's own step, watched from outside, in training, validation and test modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import camtrain as ct
from camtrain.cam.engine import attention_maps
from camtrain.cam.layer_lookup import default_layer
from camtrain.cam.watch import ModuleWatch

B, L = 3, 4
GRID = (6, 5)


class Net(nn.Module):
    def __init__(self, hidden=False):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True))
        size = 3 * 6 * 5
        self.head = nn.Sequential(nn.Linear(size, 6), nn.Tanh(), nn.Linear(6, L)) if hidden else nn.Linear(size, L)

    def forward(self, image):
        return self.head(self.features(image).flatten(1))


class Module(nn.Module):
    """As a LightningModule: steps are methods, the net is an attribute."""

    def __init__(self, hidden=False):
        super().__init__()
        self.net = Net(hidden)
        self.seen = None

    def forward(self, image):
        return self.net(image)

    def step(self, image):
        y = self(image)
        self.seen = (y, y.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        return y.sigmoid().mean()


def image():
    return torch.randn(B, 1, *GRID, generator=torch.Generator().manual_seed(1))


def expected_maps(module, method="hirescam"):
    return ct.explain(module, image(), method, "net.features.1")


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_under_both_modes_of_lightning(mode, hidden):
    module = Module(hidden).eval()
    watch = ModuleWatch(module, "features.1", cut=True)
    with mode():
        given, before = image() + 0, modes()
        watch.start()
        module.step(given)
        y, needs_grad, *inside = module.seen
        assert (tuple(inside), needs_grad) == (before, False)
        assert modes() == before
        source, logits = watch.take(L)
        maps = attention_maps(source, logits, "hirescam", create_graph=False)
        watch.stop()
        assert modes() == before
    torch.testing.assert_close(maps, expected_maps(module))
    torch.testing.assert_close(logits.detach(), y)
    assert hooks(module) == 0
    assert all(p.grad is None for p in module.parameters())


def test_below_the_layer_nothing_is_recorded():
    module = Module().eval()
    kept = []
    module.net.features[0].register_forward_hook(lambda m, a, out: kept.append(out.requires_grad))
    watch = ModuleWatch(module, "features.1", cut=True)
    watch.start()
    with torch.no_grad():
        module.step(image())
    source, logits = watch.take()
    assert kept == [False]
    assert source.is_leaf
    assert logits.requires_grad
    watch.stop()


@pytest.mark.parametrize("hidden", [False, True])
def test_training_leaves_the_users_graph_alone(hidden):
    module, plain = Module(hidden), Module(hidden)
    watch = ModuleWatch(module, "features.1")
    watch.start()
    loss = module.step(image())
    source, logits = watch.take()
    maps = attention_maps(source, logits)
    watch.stop()
    (loss + 0 * maps.sum()).backward()
    plain.step(image()).backward()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    module.zero_grad()


def test_many_steps_start_anew():
    module = Module()
    watch = ModuleWatch(module, "features.1")
    for scale in (1.0, -2.0):
        watch.start()
        watch.start()  # calling it twice is calling it once
        module.step(image() * scale)
        _, logits = watch.take()
        torch.testing.assert_close(logits, Net()(image() * scale))
        watch.stop()
    assert watch.inputs is None
    assert watch._outputs == []
    with pytest.raises(ct.InputError, match="has not run"):
        watch.take()


@pytest.mark.parametrize("where", ["head", "features.0"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_exception_in_the_users_forward_restores_every_mode(mode, where):
    module = Module().eval()

    def fail(*_):
        raise ValueError("the user's own error")

    handle = module.net.get_submodule(where).register_forward_pre_hook(fail)
    watch = ModuleWatch(module, "features.1", cut=True)
    with mode():
        before = modes()
        watch.start()
        with pytest.raises(ValueError, match="the user's own error"):
            module.step(image())
        assert modes() == before
        watch.stop()
        assert modes() == before
        handle.remove()
        watch.start()
        module.step(image())
        watch.take()
        watch.stop()
        assert modes() == before


def test_where_the_user_wants_gradients_in_validation_they_are_left():
    """Adversarial validation: gradients of the image are the user's business."""
    module = Module(hidden=True).eval()
    watch = ModuleWatch(module, "features.1", cut=True)
    with torch.no_grad():
        watch.start()
        with torch.enable_grad():
            x = image().requires_grad_()
            y = module(x)
            (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        source, logits = watch.take()
        maps = attention_maps(source, logits, create_graph=False)
        watch.stop()
    assert gradient.abs().max() > 0
    torch.testing.assert_close(maps, expected_maps(module))


@pytest.mark.parametrize("cut", [False, True])
def test_what_the_user_does_to_the_logits_in_place_is_not_seen(cut):
    module = Module(hidden=True).eval()
    right = module(image()).detach()
    watch = ModuleWatch(module, "features.1", cut=cut)
    with torch.set_grad_enabled(not cut):
        watch.start()
        y = module(image())
        y.sigmoid_()
        source, logits = watch.take()
        maps = attention_maps(source, logits, create_graph=False)
        watch.stop()
    torch.testing.assert_close(logits.detach(), right)
    torch.testing.assert_close(maps, expected_maps(module))


# Where the logits are ------------------------------------------------------------------------------------------------


class Apart(nn.Module):
    """Backbone and head are called one after the other by the step."""

    def __init__(self, features_first=False):
        super().__init__()
        self.net = Net()
        self.backbone, self.head = self.net.features, self.net.head
        del self.net

    def step(self, image):
        features = self.backbone(image)
        y = self.head(features.flatten(1))
        self.user = (y.requires_grad, *modes())
        return y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_head_beside_the_backbone_by_its_name(mode):
    module = Apart().eval()
    watch = ModuleWatch(module, "backbone.1", logits="head", cut=True)
    with mode():
        before = modes()
        watch.start()
        y = module.step(image() + 0)
        assert module.user == (False, *before)
        source, logits = watch.take(L)
        maps = attention_maps(source, logits, create_graph=False)
        watch.stop()
        assert modes() == before
    torch.testing.assert_close(maps, expected_maps(Module()))
    torch.testing.assert_close(logits.detach(), y)


def test_a_head_beside_the_backbone_that_nobody_named():
    module = Apart()
    watch = ModuleWatch(module, "backbone.1")
    watch.start()
    module.step(image())
    with pytest.raises(ct.InputError, match=r"no module around layer 'backbone.1'.*logits='name.of.the.head'"):
        watch.take()
    watch.stop()
    watch = ModuleWatch(module, "backbone.1", logits="head")
    watch.start()
    module.backbone(image())
    with pytest.raises(ct.InputError, match="logits= names did not run"):
        watch.take()
    watch.stop()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_head_inside_the_net_by_its_name(mode):
    """The modes are the user's again when the net returns, not at the end of the step."""
    module = Module().eval()
    watch = ModuleWatch(module, "features.1", logits="net.head", cut=True)
    with mode():
        before = modes()
        watch.start()
        module.step(image() + 0)
        _, needs_grad, *inside = module.seen
        assert (needs_grad, *inside) == (False, *before)
        source, logits = watch.take(L)
        maps = attention_maps(source, logits, create_graph=False)
        watch.stop()
    torch.testing.assert_close(maps, expected_maps(module))


class Nested(nn.Module):
    """Pooled features (B, 9) come back from a module that is smaller than the one with the logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(9, L)

    def forward(self, image):
        return {"logits": self.fc(self.encoder(image)), "loss": torch.zeros(())}


def test_the_smallest_module_with_logits_or_with_so_many():
    module = Nested()
    watch = ModuleWatch(module, "encoder.1")
    watch.start()
    y = module(image())
    assert watch.take()[1].shape == (B, 9)
    assert torch.equal(watch.take(prefer=L)[1], y["logits"])
    assert torch.equal(watch.take(L)[1], y["logits"])
    with pytest.raises(ct.InputError, match=r"there are 7 labels.*\(3, 9\).*logits="):
        watch.take(7)
    watch.stop()
    watch = ModuleWatch(module, "encoder.1", logits=lambda output: output["logits"][:, :2])
    watch.start()
    module(image())
    source, logits = watch.take(2)
    assert attention_maps(source, logits).shape == (B, 2, 4, 3)
    watch.stop()


def test_the_user_gets_detached_outputs_of_any_layout():
    module = Nested().eval()
    watch = ModuleWatch(module, "encoder.1", logits=lambda output: output["logits"], cut=True)
    with torch.no_grad():
        watch.start()
        output = module(image())
        watch.take()
        watch.stop()
    assert list(output) == ["logits", "loss"]
    assert not any(leaf.requires_grad for leaf in tree_leaves(output))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_two_views_in_one_step(mode):
    module = Module().eval()
    views = [image(), image() * -2]
    cut = mode is torch.no_grad
    for call, view in enumerate(views):
        watch = ModuleWatch(module, "features.1", call=call, cut=cut)
        with mode():
            watch.start()
            for each in views:
                module(each)
            source, logits = watch.take()
            maps = attention_maps(source, logits, create_graph=False)
            watch.stop()
        torch.testing.assert_close(maps, ct.explain(module, view, layer="net.features.1"))
    watch = ModuleWatch(module, "features.1")
    watch.start()
    for each in views:
        module(each)
    with pytest.raises(ct.InputError, match=r"'net.features.1' ran 2 times.*call=0"):
        watch.take()
    watch.stop()


class Often(nn.Module):
    """Its activation runs as often as it is told."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.SiLU(), nn.Linear(2, 3)
        self.runs, self.needed = 3, []

    def features(self, image):
        for _ in range(self.runs):
            image = self.act(self.conv(image))
            self.needed.append(image.requires_grad)
        return image

    def forward(self, image):
        return self.fc(self.features(image).mean((2, 3)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_that_was_found_is_recorded_from_its_last_run_on(mode):
    model, x = Often().eval(), torch.rand(2, 2, 5, 6)
    name, _ = default_layer(model, x)
    watch, other = (ModuleWatch(model, name, cut=True, found=[True]) for _ in range(2))
    for runs, asked_again in ((3, False), (5, False), (2, True), (4, False)):
        model.runs = runs
        model.needed.clear()
        with mode():
            other.start()
            watch.start()
            logits = model(x)
            state = torch.random.get_rng_state()
            maps = attention_maps(*watch.take(), create_graph=False)
            assert len(model.needed) == runs * (1 + asked_again)
            beside = attention_maps(*other.take(), create_graph=False)
            for each in (watch, other):
                each.stop()
        assert state.equal(torch.random.get_rng_state())
        assert not logits.requires_grad
        assert maps.equal(beside)
        if runs in (3, 5):
            assert model.needed == [number >= 2 for number in range(runs)]
        torch.testing.assert_close(maps.sum((2, 3)) + model.fc.bias, logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_named_layer_is_recorded_from_its_last_run_on_from_the_second_step(mode):
    model, x = Often().eval(), torch.rand(2, 2, 5, 6)
    watch, first = ModuleWatch(model, "act", call=-1, cut=True), ModuleWatch(model, "act", call=0, cut=True)
    # Runs, then from which run on there is a graph; 2 is less often than before, so that the network is asked again.
    for runs, recorded, asked_again in ((3, 0, 0), (3, 2, 0), (4, 2, 0), (2, 2, 1), (4, 0, 0), (3, 0, 0)):
        model.runs = runs
        model.needed.clear()
        with mode():
            watch.start()
            logits = model(x)
            maps = attention_maps(*watch.take(), create_graph=False)
            watch.stop()
        assert model.needed[:runs] == [number >= recorded for number in range(runs)]
        assert len(model.needed) == runs * (1 + asked_again)
        torch.testing.assert_close(maps.sum((2, 3)) + model.fc.bias, logits)
    for _ in range(2):  # a run counted from the front needs the graph from there on
        model.needed.clear()
        with mode():
            first.start()
            model(x)
            first.take()
            first.stop()
        assert model.needed == [True] * 3


def test_a_step_that_calls_the_parts_itself_is_recorded_from_the_first_run_on():
    model, x = Often().eval(), torch.rand(2, 2, 5, 6)
    watch = ModuleWatch(model, "act", call=-1, cut=True, logits="fc")
    for runs in (3, 2, 1):
        model.runs = runs
        with torch.no_grad():
            watch.start()
            logits = model.fc(model.features(x).mean((2, 3)))
            maps = attention_maps(*watch.take(), create_graph=False)
            watch.stop()
        torch.testing.assert_close(maps.sum((2, 3)) + model.fc.bias, logits)


def test_parts_that_run_it_less_often_than_the_forward_that_found_it():
    model, x = Often().eval(), torch.rand(2, 2, 5, 6)
    name, _ = default_layer(model, x)
    watch = ModuleWatch(model, name, cut=True, found=[True], logits="fc")
    model.runs = 1
    with torch.no_grad():
        watch.start()
        model.fc(model.features(x).mean((2, 3)))
        with pytest.raises(ct.InputError, match=r"'act' 1 x.*parts.*name a layer"):
            watch.take()
    watch.stop()


def test_inner_and_outer_inputs_are_remembered():
    module = Module()
    watch = ModuleWatch(module, "features.1")
    watch.start()
    x = image()
    module.net(x)
    assert watch.entry is module.net
    assert watch.inputs[0][0] is x
    module(image=x)
    assert watch.entry is module
    assert watch.inputs[1]["image"] is x
    watch.stop()


def test_a_layer_that_works_on_slices():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, L)

        def forward(self, image):
            batch, _, depth, *plane = image.shape
            features = self.conv(image.transpose(1, 2).reshape(batch * depth, 1, *plane))
            return self.fc(features.reshape(batch, depth, 3, *plane).mean(dim=(1, 3, 4)))

    model, x = Slices(), torch.rand(B, 1, 7, *GRID)
    watch = ModuleWatch(model, "conv")
    watch.start()
    y = model(x)
    source, logits = watch.take(L)
    maps = attention_maps(source, logits, reshape=lambda f: f.reshape(B, 7, *f.shape[1:]).transpose(1, 2))
    watch.stop()
    torch.testing.assert_close(maps.sum(dim=(2, 3, 4)) + model.fc.bias, y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_two_watches_of_one_forward_both_see_the_graph(mode):
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))})
    watches = [ModuleWatch(model, "net.1", cut=True), ModuleWatch(model, "net.0", cut=True)]
    for watch in watches:
        watch.start()
    with mode():
        output = model["net"](torch.rand(2, 1, 8))
        assert not output.requires_grad
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        for watch in watches:
            source, logits = watch.take()
            with torch.inference_mode(False), torch.enable_grad():
                (gradient,) = torch.autograd.grad(logits.sum(), source, retain_graph=True)
            assert gradient.abs().sum() > 0
    for watch in watches:
        watch.stop()
    assert torch.is_grad_enabled()


def test_forwards_of_our_own_are_not_seen():
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))})
    watch = ModuleWatch(model, "net.1")
    watch.start()
    image = torch.rand(2, 1, 8)
    output = model["net"](image)
    ct.explain(model["net"], image, layer="0")
    ct.layers(model["net"], image)
    source, logits = watch.take()
    assert torch.equal(logits, output)
    assert len(source) == 2
    watch.stop()
