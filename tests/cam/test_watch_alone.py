"""ModuleWatch of steps that nothing is asked of but the logits: fewer hooks, the same logits, no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.watch import ModuleWatch

B, L = 3, 4


class Net(nn.Module):
    def __init__(self, gives=lambda logits, features: logits):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(90, L)
        self.gives = gives

    def forward(self, image):
        features = self.features(image)
        return self.gives(self.head(features.flatten(1)), features)


class Module(nn.Module):
    """As a LightningModule: steps are methods, the net is an attribute."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or Net()

    def forward(self, image):
        return self.net(image)


def images(seed=0, number=B):
    return torch.rand(number, 1, 6, 5, generator=torch.Generator().manual_seed(seed))


def hooked(module):
    return {name for name, m in module.named_modules() if m._forward_hooks or m._forward_pre_hooks}


def a_step(watch, step, **how):
    """Logits that the watch took, what the step returned, and the modules that had hooks in it."""
    watch.start(**how)
    try:
        had, given = hooked(watch.model), step()
        return watch.take_all(L)[1], given, had
    finally:
        watch.stop()


def both(watch, step):
    """The same step after one with a graph: with all hooks, and with those that suffice."""
    a_step(watch, step)
    every = a_step(watch, step, graph=False)
    return every, a_step(watch, step, graph=False, again=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("as_whole", [False, True])
def test_hooks_on_the_giver_and_around_it_see_the_same_logits(mode, as_whole):
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with mode():
        step = lambda: (module if as_whole else module.net)(images())  # noqa: E731
        plain = step()
        every, alone = both(watch, step)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (False, mode is torch.inference_mode)
        assert alone[1].is_inference() == plain.is_inference()
    assert torch.equal(alone[0], every[0])
    assert torch.equal(alone[0], plain)
    assert torch.equal(alone[1], plain)
    assert not alone[0].requires_grad
    assert not alone[0].is_inference()
    assert every[2] == {"", "net", "net.features", "net.features.1"}
    assert alone[2] == {"", "net"}
    assert hooked(module) == set()


def test_a_graph_is_there_again_when_it_is_wanted():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with torch.no_grad():
        both(watch, lambda: module.net(images()))
        watch.start()
        module.net(images())
        sources, logits = watch.take_all(L)
    assert logits.requires_grad
    assert sources["net.features.1"].shape == (B, 3, 6, 5)
    watch.stop()


@pytest.mark.parametrize("call", [0, 1, -1])
def test_of_two_views_the_call_that_was_asked_for(call):
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", call=call, cut=True)

    def step():
        return [module.net(images(0)), module.net(images(1))]

    with torch.no_grad():
        every, alone = both(watch, step)
    assert torch.equal(alone[0], every[0])
    assert torch.equal(alone[0], alone[1][call])
    assert alone[2] == {"", "net"}


def test_of_a_layer_that_runs_twice_in_a_forward_the_logits_are_one():
    class Twice(Net):
        def forward(self, image):
            return self.head(self.features(self.features[0](image)[:, :1]).flatten(1))

    module = Module(Twice()).eval()
    watch = ModuleWatch(module, "net.features.0", call=0, cut=True)
    with torch.no_grad():
        every, alone = both(watch, lambda: [module.net(images(0)), module.net(images(1))][-1])
    assert torch.equal(alone[0], every[0])
    assert torch.equal(alone[0], alone[1])


@pytest.mark.parametrize(
    ("gives", "suffices"),
    [
        (lambda logits, features: {"logits": logits, "features": features}, True),
        (lambda logits, features: (features, logits), True),
        # Which of these two has a row per case is known where the layer is watched.
        (lambda logits, features: (logits, logits[:1] + 1), False),
    ],
)
def test_logits_among_other_things(gives, suffices):
    module = Module(Net(gives)).eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with torch.no_grad():
        every, alone = both(watch, lambda: module.net(images()))
    assert torch.equal(alone[0], every[0])
    assert (alone[2] == {"", "net"}) == suffices


@pytest.mark.parametrize("logits", ["net.head", lambda output: output[1]])
def test_where_the_user_says_where_logits_are_all_hooks_stay(logits):
    module = Module(Net(lambda logits, features: (features.mean((2, 3)), logits))).eval()
    watch = ModuleWatch(module, "net.features.1", logits, cut=True)
    with torch.no_grad():
        every, alone = both(watch, lambda: module.net(images()))
    assert torch.equal(alone[0], every[0])
    assert alone[2] == every[2]


def test_what_a_callable_is_given_may_differ_from_step_to_step():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", lambda output: output, cut=True)
    with torch.no_grad():
        a_step(watch, lambda: module(images()))
        logits, given, _ = a_step(watch, lambda: module.net(images()), graph=False, again=False)
    assert torch.equal(logits, given)


def test_a_step_that_calls_the_parts_keeps_all_hooks():
    class Parts(Module):
        def forward(self, image):
            return self.net.head(self.net.features(image).flatten(1))

    module = Parts().eval()
    watch = ModuleWatch(module, "net.features.1", "net.head", cut=True)

    def step():
        return module.net.head(module.net.features(images()).flatten(1))

    with torch.no_grad():
        every, alone = both(watch, step)
    assert torch.equal(alone[0], every[0])
    assert alone[2] == every[2] == {"", "net", "net.features", "net.features.1", "net.head"}


def test_a_step_that_enters_beside_the_giver_too_keeps_all_hooks():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", call=-1, cut=True)
    with torch.no_grad():
        every, alone = both(watch, lambda: (module.net.features(images(1)), module.net(images()))[1])
    assert torch.equal(alone[0], every[0])
    assert alone[2] == every[2]


def test_what_the_user_does_in_place_does_not_reach_the_logits():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with torch.no_grad():
        plain = module.net(images())
        _, alone = both(watch, lambda: module.net(images()).sigmoid_())
    assert torch.equal(alone[0], plain)
    assert torch.equal(alone[1], plain.sigmoid())


def test_a_step_without_the_network_is_told_as_ever():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with torch.no_grad():
        both(watch, lambda: module.net(images()))
        with pytest.raises(ct.InputError, match=r"layer 'net.features.1' has not run"):
            a_step(watch, lambda: None, graph=False, again=False)
    assert hooked(module) == set()


def test_another_width_is_told_as_ever():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with torch.no_grad():
        both(watch, lambda: module.net(images()))
        module.net.gives = lambda logits, features: logits[:, :2]
        with pytest.raises(ct.InputError, match=rf"there are {L} labels, but the logits found .* \(3, 2\)"):
            a_step(watch, lambda: module.net(images()), graph=False, again=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_exception_in_the_network_leaves_no_trace(mode):
    def fails(logits, features):
        raise RuntimeError("in the middle")

    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with mode():
        both(watch, lambda: module.net(images()))
        module.net.gives = fails
        with pytest.raises(RuntimeError, match="in the middle"):
            a_step(watch, lambda: module.net(images()), graph=False, again=False)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (False, mode is torch.inference_mode)
    assert hooked(module) == set()


def test_before_any_step_with_a_graph_all_hooks_are_needed():
    module = Module().eval()
    watch = ModuleWatch(module, "net.features.1", cut=True)
    with torch.no_grad():
        logits, given, had = a_step(watch, lambda: module.net(images()), graph=False, again=False)
    assert torch.equal(logits, given)
    assert had == {"", "net", "net.features", "net.features.1"}


def test_a_watch_of_training_keeps_its_graph():
    module = Module()
    watch = ModuleWatch(module, "net.features.1")
    a_step(watch, lambda: module.net(images()))
    logits, _, had = a_step(watch, lambda: module.net(images()), graph=False, again=False)
    assert logits.requires_grad
    assert "net.features.1" in had
