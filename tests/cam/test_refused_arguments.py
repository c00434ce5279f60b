"""What is refused in words of the user's own arguments: labels, images, models, layers, sizes, reshape, dead ends."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.explaining import checked_image
from camtrain.cam.selection import select
from camtrain.cam.several import one_layer, unreached

B, L = 2, 3
GRID = (6, 5)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 3, L)).eval()


def image(batch=B, dtype=torch.float32):
    return torch.rand(batch, 1, *GRID, generator=torch.Generator().manual_seed(1), dtype=dtype)


# labels ---------------------------------------------------------------------------------------------------------------


def test_a_truth_of_whole_numbers_is_no_list_of_columns():
    truth = torch.tensor([[0, 1, 1], [1, 0, 0]])
    for labels in (truth, truth.int(), truth.numpy(), truth.tolist(), torch.zeros(B, L, dtype=torch.long)):
        with pytest.raises(ct.InputError, match=r"reads as columns 0 and 1; for a truth of 0 and 1 pass label == 1"):
            ct.explain(model(), image(), layer="1", labels=labels)
    full = ct.explain(model(), image(), layer="1")
    maps = ct.explain(model(), image(), layer="1", labels=truth == 1)
    torch.testing.assert_close(maps[truth == 1], full[truth == 1])


def test_columns_per_sample_that_cannot_be_a_truth_are_taken():
    device = torch.device("cpu")
    for labels, outputs in (
        (torch.tensor([[0, 1, 2], [1, 0, 0]]), 3),
        (torch.tensor([[0, 1], [1, 0]]), 2),  # all of both columns, in another order
        (torch.tensor([[0, 1], [1, 0]]), 3),
        (torch.tensor([[0], [1]]), 1 + 1),
    ):
        assert select(labels, B, outputs, device).picks.equal(labels)
    assert select([1, 0, 0], B, 3, device).picks.tolist() == [[1, 0, 0]] * B
    assert select([False, True, True], B, 3, device).picks.tolist() == [[1, 2]] * B
    assert select(torch.zeros(0, 3, dtype=torch.long), 0, 3, device).picks.shape == (0, 3)


@pytest.mark.parametrize("labels", [["a"], "ab", {0, 1}, {"a": 1}, [0, None], [[0], [1, 2]], object(), lambda y: [0]])
def test_labels_of_another_type(labels):
    with pytest.raises(ct.InputError, match=r"labels= expects columns such as \[0, 2\], or a bool mask, got "):
        ct.explain(model(), image(), layer="1", labels=labels)


# images and models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [ct.explain, ct.account])
def test_an_empty_batch(call):
    with pytest.raises(ct.InputError, match=r"the batch is empty, shape \(0, 1, 6, 5\)"):
        call(model(), image()[:0])
    with pytest.raises(ct.InputError, match=r"the image has no voxels, shape \(2, 1, 6, 0\)"):
        call(model(), image()[..., :0])


@pytest.mark.parametrize("call", [ct.explain, ct.account])
def test_double_and_single_precision_do_not_mix(call):
    with pytest.raises(ct.InputError, match=r"the image is float64, the weights float32: pass image\.float\(\)"):
        call(model(), image(dtype=torch.float64))
    with pytest.raises(ct.InputError, match=r"the image is float32, the weights float64: pass image\.double\(\)"):
        call(model().double(), image())
    with pytest.raises(ct.InputError, match=r"pass image\.bfloat16\(\)"):
        call(model().bfloat16(), image(dtype=torch.float64))


def test_half_precision_goes_on():
    expected = ct.explain(model(), image(), layer="1")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ct.explain(model(), image(), layer="1"), expected, rtol=0.1, atol=0.02)
        assert ct.explain(model(), image().bfloat16(), layer="1").isfinite().all()
    assert ct.explain(model().bfloat16(), image().bfloat16(), layer="1").dtype == torch.float32
    assert ct.account(model().bfloat16(), image(), "1").logits.dtype == torch.float32
    assert ct.explain(nn.Sequential(nn.Identity(), nn.Flatten()), image(dtype=torch.float64), layer="0").ndim == 4


@pytest.mark.parametrize("wrong", [None, "resnet18", lambda x: x, nn.Conv2d])
@pytest.mark.parametrize("call", [ct.explain, ct.account])
def test_a_model_that_is_none(call, wrong):
    with pytest.raises(ct.InputError, match=r"expected a model \(torch\.nn\.Module\), got "):
        call(wrong, image())


class WithAge(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, image, age, sex=None):
        return self.net(image) + age[:, None]


@pytest.mark.parametrize("call", [ct.explain, ct.account])
def test_a_model_that_needs_more_than_the_image(call):
    words = r"needs more than the image \(missing a required argument: 'age'\): wrap it in a module"
    with pytest.raises(ct.InputError, match=words):
        call(WithAge(), image())

    class ByName(WithAge):
        def forward(self, *, image):
            return self.net(image)

    with pytest.raises(ct.InputError, match="does not take the image by position"):
        call(ByName(), image())


def test_models_that_get_the_rest_elsewhere_are_left_alone():
    expected = ct.explain(model(), image(), layer="1")
    age = torch.zeros(B)

    def same(net, layer="net.1"):
        torch.testing.assert_close(ct.explain(net, image(), layer=layer), expected)

    hooked = WithAge()
    hooked.register_forward_pre_hook(lambda m, args, kwargs: (args, {"age": age}), with_kwargs=True)
    same(hooked)

    class OwnCall(WithAge):
        def __call__(self, image):
            return super().__call__(image, age)

    same(OwnCall())

    def filled(forward):
        @functools.wraps(forward)
        def run(self, image):
            return forward(self, image, age)

        return run

    class Decorated(WithAge):
        forward = filled(WithAge.forward)

    same(Decorated())

    class Passing(WithAge):
        def forward(self, *args, **kwargs):
            return self.net(*args, **kwargs)

    same(Passing())
    same(nn.DataParallel(model()), "1")
    torch._dynamo.reset()
    same(torch.compile(model(), backend="eager"), "1")


def test_the_image_alone_can_be_checked():
    assert checked_image(image()).equal(image())


# layers and sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [3, 1.5, b"1", {"1": 2}, [3]])
def test_a_layer_of_another_type(layer):
    with pytest.raises(ct.InputError, match="layer= expects a dotted name or a module of the model, got "):
        ct.explain(model(), image(), layer=layer)


@pytest.mark.parametrize("layer", [["0", "1"], ["1"], ("0",)])
def test_an_account_is_of_one_layer(layer):
    with pytest.raises(ct.InputError, match=f"layer= expects one layer, got a list of {len(layer)}"):
        ct.account(model(), image(), layer)
    assert one_layer("1") == "1"
    assert one_layer(None) is None


@pytest.mark.parametrize("size", [("a", "b"), (5.7, 3.2), (5.0, 3.0), (None, 4)])
def test_sizes_that_are_no_whole_numbers(size):
    with pytest.raises(ct.InputError, match="size= expects 2 whole numbers of voxels, got "):
        ct.explain(model(), image(), layer="1", size=size)


def test_sizes_of_any_whole_kind():
    for size in ((8, 7), [np.int64(8), np.int32(7)], torch.Size([8, 7]), torch.tensor([8, 7])):
        assert ct.explain(model(), image(), layer="1", size=size).shape == (B, L, 8, 7)


# reshape and taps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hirescam", "lrp", "scorecam"])
def test_a_reshape_that_fails(method):
    with pytest.raises(ct.InputError, match=r"reshape= failed on \(2, 4, 4, 3\): .*permute") as caught:
        ct.explain(model(), image(), method, "1", reshape=lambda t: t.permute(0, 2, 1))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ct.InputError, match=r"reshape= failed on \(2, 4, 4, 3\): AssertionError"):
        ct.explain(model(), image(), method, "1", reshape=_asserting)
    with pytest.raises(ct.InputError, match="reshape= returned a list"):
        ct.explain(model(), image(), method, "1", reshape=lambda t: [t])


def _asserting(tokens):
    raise AssertionError


def test_memory_that_ends_in_reshape_is_no_wrong_input():
    def greedy(tokens):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        ct.explain(model(), image(), layer="1", reshape=greedy)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.never = model(), nn.ReLU()

    def forward(self, image):
        return self.net(image)


def test_a_layer_that_has_not_run_is_told_for_taps_and_for_explain():
    words = r"'never' has not run: call the model inside the with block .*LayerTap.*or name a layer .*\(explain\)"
    with pytest.raises(ct.InputError, match=words):
        ct.explain(Unused(), image(), layer="never")
    with ct.LayerTap(Unused(), "never") as tap, pytest.raises(ct.InputError, match=words):
        tap.maps(torch.zeros(B, L))


# dead ends ------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """`aside` is computed and thrown away."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.aside, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 1), nn.Linear(4, L)

    def forward(self, image):
        self.aside(image)
        return self.fc(self.one(image).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["aside", ["one", "aside"]])
@pytest.mark.parametrize("more", [{}, {"labels": [0]}, {"target": lambda y: y[:, 0]}])
def test_score_cam_refuses_a_dead_end(frozen, layer, more):
    net = Branches().requires_grad_(not frozen)
    with pytest.raises(ct.InputError, match="layer 'aside': the logits do not depend on the tapped layer"):
        ct.explain(net, image(), "scorecam", layer, progress=False, **more)
    assert ct.explain(net, image(), "scorecam", "one", progress=False).isfinite().all()


def test_score_cam_takes_a_target_without_a_gradient():
    net = Branches()
    maps = ct.explain(net, image(), "scorecam", "one", target=lambda y: y[:, 1].detach(), progress=False)
    torch.testing.assert_close(maps, ct.explain(net, image(), "scorecam", "one", labels=[1], progress=False))
    with pytest.raises(ct.InputError, match="layer 'aside'"):
        ct.explain(net, image(), "scorecam", "aside", target=lambda y: y[:, 1].detach(), progress=False)


def test_whole_numbers_of_numpy_are_options_of_score_cam():
    net = Branches()
    expected = ct.explain(net, image(), "scorecam", "one", channels=2, chunk=3)
    found = ct.explain(net, image(), "scorecam", "one", channels=np.int64(2), chunk=np.int32(3))
    torch.testing.assert_close(found, expected)
    for wrong in (np.int64(0), np.float64(2), True, "2"):
        with pytest.raises(ct.InputError, match="channels= expects how many channels to ask, 1 or more, or None"):
            ct.explain(net, image(), "scorecam", "one", channels=wrong)


def test_what_is_unreached():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    middle = a * 2
    total = (middle + b).sum()
    assert unreached({"a": a, "middle": middle, "b": b, "c": c}, [total]) == ["c"]
    assert unreached({"a": a, "c": c}, [total, c.exp()]) == []
    assert unreached({"a": a}, [torch.ones(1)]) == ["a"]
