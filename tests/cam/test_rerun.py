"""Running the network of a user's step again, for methods that need forwards of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.method_table import find_method
from camtrain.cam.watch import ModuleWatch

B, L = 3, 4
GRID = (7, 9, 5)


class Module(nn.Module):
    """As a LightningModule around a net."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return self.net(image)


def image():
    return torch.randn(B, 2, *GRID, generator=torch.Generator().manual_seed(1))


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


PAID = ["scorecam", "lrp", "relevancecam", "guided_backprop", "guided_gradcam"]
PRESENT = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(3, 6, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 4 * 5 * 3, 8), nn.ReLU(), nn.Linear(8, L))

    def forward(self, image):
        return self.head(self.body(self.stem(image)))


def rerun_maps(module, method, step, layer="body", labels=PRESENT, mode=torch.inference_mode, options=None, **given):
    watch = ModuleWatch(module, layer, cut=True, **given)
    with mode():
        watch.start()
        step()
        watch.take_all(L)
        before = modes()
        try:
            with torch.inference_mode(False), torch.no_grad():
                found = watch.rerun().maps(find_method(method), options or {}, labels)
        finally:
            assert modes() == before
            watch.stop()
            assert hooks(module) == 0
    assert all(p.grad is None for p in module.parameters())
    return found


@pytest.mark.parametrize("method", PAID)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_rerun_gives_the_maps_of_explain(method, mode):
    module = Module(Relu())
    found = rerun_maps(module, method, lambda: module(image() + 0), ["stem", "body"], mode=mode)
    for maps, layer in zip(found, ("stem", "body"), strict=True):
        wanted = ct.explain(module, image(), method, layer, labels=PRESENT)
        torch.testing.assert_close(maps, wanted, equal_nan=True)
    assert rerun_maps(module, method, lambda: module(image()), labels=PRESENT & False) is None


class Wide(nn.Module):
    """More than the image goes in, and more than the logits comes out."""

    def __init__(self):
        super().__init__()
        self.net, self.age = Relu(), nn.Linear(1, L)

    def forward(self, batch, scale=1.0):
        logits = self.net(batch["image"] * scale + batch["age"].reshape(-1, 1, 1, 1, 1))
        return {"logits": logits, "other": logits.sigmoid(), "weird": logits.mean()}


@pytest.mark.parametrize("method", PAID)
@pytest.mark.parametrize(
    "given", [{}, {"logits": "net.head"}, {"logits": "net.head.3"}, {"logits": lambda output: output["logits"]}]
)
def test_a_rerun_with_other_inputs_and_outputs(method, given):
    module, age = Wide(), torch.rand(B)
    batch = {"age": age, "image": image()}
    found = rerun_maps(module, method, lambda: module(batch, scale=2.0), **given)[0]
    seen = image() * 2.0 + age.reshape(-1, 1, 1, 1, 1)
    options = {"layer": "body", "labels": PRESENT}
    if method == "scorecam":
        # It masks the image as it was given, not what the network makes of it.
        each = [
            ct.explain(_Alone(module, age[row]), image()[[row]], method, layer="body", labels=PRESENT[[row]])
            for row in (0, 2)
        ]
        wanted = torch.cat([each[0], torch.full_like(each[0], torch.nan), each[1]])
    elif method.startswith("guided"):
        wanted = ct.explain(module.net, seen, method, **options) * 2.0
    else:
        wanted = ct.explain(module.net, seen, method, **options)
    torch.testing.assert_close(found, wanted, equal_nan=True)


class _Alone(nn.Module):
    def __init__(self, wide, age):
        super().__init__()
        self.wide, self.age = wide, age

    def forward(self, image):
        return self.wide({"image": image, "age": self.age.expand(len(image))}, scale=2.0)["logits"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Relu()

    def forward(self, image):
        return torch.stack([self.net(image), self.net(image.flip(2))])


@pytest.mark.parametrize("call", [0, 1, -1, -2])
@pytest.mark.parametrize("inside", [True, False])
def test_a_rerun_of_the_view_that_counts(call, inside):
    module = Twice()
    views = [image(), image().flip(2)]

    def step():
        for view in [] if inside else views:
            module.net(view)
        return module(image()) if inside else None

    found = rerun_maps(module, "relevancecam", step, "body", call=call)[0]
    wanted = ct.explain(module.net, views[call], "relevancecam", "body", labels=PRESENT)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_a_rerun_needs_one_image_per_row():
    module = Module(Relu())
    with pytest.raises(ct.InputError, match=r"called with 3 images for 1 rows of labels: method 'lrp'"):
        rerun_maps(module, "lrp", lambda: module(image()), labels=PRESENT[:1])
    assert hooks(module) == 0


@pytest.mark.parametrize(("extra", "sizes"), [((), [3, 2]), ((2.0,), [3, 2]), ((torch.ones(3),), [3, 3])])
def test_samples_without_a_label_are_left_out_where_they_can_be(extra, sizes):
    class Net(Relu):
        def forward(self, image, factor=1.0):
            seen.append(len(image))
            factor = factor.reshape(-1, 1, 1, 1, 1) if isinstance(factor, torch.Tensor) else factor
            return super().forward(image * factor)

    module, seen = Net(), []
    found = rerun_maps(module, "lrp", lambda: module(image(), *extra))[0]
    assert seen == sizes
    wanted = ct.explain(module, image() * (2.0 if sizes == [3, 2] and extra else 1.0), "lrp", "body", labels=PRESENT)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_a_failing_method_leaves_no_hook(monkeypatch):
    from camtrain.cam import rerun

    def fail(*_):
        raise ValueError("broken")

    monkeypatch.setattr(rerun, "answer", fail)
    module = Wide()
    with pytest.raises(ValueError, match="broken"):
        rerun_maps(module, "lrp", lambda: module({"age": torch.rand(B), "image": image()}), logits="net.head")
    assert hooks(module) == 0
