"""Which maps `explain` gives: labels, targets, sizes, several layers, output layouts, wrong input."""

from __future__ import annotations

import copy
from collections import namedtuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import camtrain as ct
from camtrain.cam.logits import find_logits

B, L = 3, 5
GRID = (6, 4, 7)


class Net(nn.Module):
    """Flatten head behind a hidden layer: not affine, so that autograd passes are needed."""

    def __init__(self, affine=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 3, 3, padding=1)
        self.act = nn.ReLU()
        hidden = 3 * 6 * 4 * 7
        self.head = nn.Linear(hidden, L) if affine else nn.Sequential(nn.Linear(hidden, 8), nn.Tanh(), nn.Linear(8, L))
        self.forwards = 0

    def forward(self, image):
        self.forwards += 1
        return self.head(self.act(self.conv(image)).flatten(1))


def image(batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, 1, *GRID)


def passes(call):
    with mock.patch("torch.autograd.grad", wraps=torch.autograd.grad) as grad:
        result = call()
    return grad.call_count, result


@pytest.fixture(params=[False, True], ids=["autograd", "closed form"])
def net(request):
    return Net(affine=request.param)


def test_all_labels_are_one_forward_and_one_pass_each():
    model = Net()
    count, maps = passes(lambda: ct.explain(model, image(), layer="act"))
    assert maps.shape == (B, L, *GRID)
    assert (model.forwards, count) == (1, L)
    affine = Net(affine=True)
    count, _ = passes(lambda: ct.explain(affine, image(), layer="act"))
    assert (affine.forwards, count) == (1, 0)


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "layercam"])
def test_columns_in_the_order_asked_for(net, method):
    full = ct.explain(net, image(), method, "act")
    for labels in ([3, 0], (4,), torch.tensor([1, 1, 2]), 2, range(1, 4)):
        wanted = [labels] if isinstance(labels, int) else list(labels)
        torch.testing.assert_close(ct.explain(net, image(), method, "act", labels=labels), full[:, wanted])


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "layercam"])
def test_columns_per_sample(net, method):
    full = ct.explain(net, image(), method, "act")
    labels = torch.tensor([[4, 0], [1, 1], [2, 3]])
    maps = ct.explain(net, image(), method, "act", labels=labels)
    expected = torch.stack([full[b, labels[b]] for b in range(B)])
    torch.testing.assert_close(maps, expected)


def test_bool_per_label_takes_columns(net):
    full = ct.explain(net, image(), layer="act")
    maps = ct.explain(net, image(), layer="act", labels=[False, True, False, False, True])
    torch.testing.assert_close(maps, full[:, [1, 4]])


@pytest.mark.parametrize("method", ["hirescam", "gradcam", "layercam"])
def test_bool_per_sample_leaves_nan_and_never_zero(net, method):
    full = ct.explain(net, image(), method, "act")
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    maps = ct.explain(net, image(), method, "act", labels=mask)
    assert maps.shape == full.shape
    assert maps[~mask].isnan().all()
    torch.testing.assert_close(maps[mask], full[mask])


def test_passes_are_the_largest_number_of_selected_labels():
    model = Net()
    mask = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    assert passes(lambda: ct.explain(model, image(), layer="act", labels=mask))[0] == 3
    assert passes(lambda: ct.explain(model, image(), layer="act", labels=[1, 3]))[0] == 2
    assert passes(lambda: ct.explain(model, image(), layer="act", labels=torch.tensor([[1], [2], [0]])))[0] == 1
    assert passes(lambda: ct.explain(model, image(), layer="act", labels=torch.zeros(B, L).bool()))[0] == 0


@given(mask=st.lists(st.lists(st.booleans(), min_size=L, max_size=L), min_size=B, max_size=B))
@settings(max_examples=25, deadline=None)
def test_any_mask(mask):
    chosen = torch.tensor(mask)
    full = ct.explain(MODEL, image(), layer="act")
    count, maps = passes(lambda: ct.explain(MODEL, image(), layer="act", labels=chosen))
    assert count == int(chosen.sum(dim=1).max())
    assert torch.equal(maps.isnan().all(dim=(2, 3, 4)), ~chosen)
    torch.testing.assert_close(maps[chosen], full[chosen])


MODEL = Net()


def test_no_label_at_all(net):
    assert ct.explain(net, image(), layer="act", labels=[]).shape == (B, 0, *GRID)
    assert ct.explain(net, image(), layer="act", labels=[], size=(8, 8, 8)).shape == (B, 0, 8, 8, 8)
    assert ct.explain(net, image(), layer="act", labels=torch.zeros(B, L).bool()).isnan().all()
    assert ct.explain(net, image(), "layercam", "act", labels=torch.zeros(L).bool()).shape == (B, 0, *GRID)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 5], r"0\.\.4, got 0\.\.5"),
        ([-1], r"0\.\.4"),
        ([0.5], "float"),
        (torch.ones(B, L), "label == 1"),
        (torch.ones(B, L, dtype=torch.uint8), "label == 1"),
        (torch.ones(B, L - 1, dtype=torch.bool), r"\(3, 5\), got \(3, 4\)"),
        (torch.ones(B + 1, 2, dtype=torch.long), r"\(3, n\), got \(4, 2\)"),
    ],
)
def test_wrong_labels(net, labels, words):
    with pytest.raises(ct.InputError, match=words):
        ct.explain(net, image(), layer="act", labels=labels)


# target, size, layers ------------------------------------------------------------------------------------------------


def test_target_sees_the_whole_output_and_gives_one_map(net):
    full = ct.explain(net, image(), layer="act")
    maps = ct.explain(net, image(), layer="act", target=lambda y: y[:, 1:3].sum(dim=1))
    torch.testing.assert_close(maps[:, 0], full[:, 1] + full[:, 2])


def test_wrong_targets(net):
    with pytest.raises(ct.InputError, match=r"one score per sample, shape \(3,\), got \(3, 5\)"):
        ct.explain(net, image(), layer="act", target=lambda y: y)
    with pytest.raises(ct.InputError, match="got float"):
        ct.explain(net, image(), layer="act", target=lambda y: 1.0)
    with pytest.raises(ct.InputError, match="either labels= or target="):
        ct.explain(net, image(), layer="act", labels=[0], target=lambda y: y[:, 0])


def test_sizes(net):
    maps = ct.explain(net, image(), layer="act")
    assert torch.equal(ct.explain(net, image(), layer="act", size="image"), maps)
    larger = ct.explain(net, image(), layer="act", size=[12, 8, 9])
    expected = nn.functional.interpolate(maps, (12, 8, 9), mode="trilinear", align_corners=False)
    torch.testing.assert_close(larger, expected)
    for size in ("layer", 7, (4, 4), (4, 0, 4)):
        with pytest.raises(ct.InputError, match="size="):
            ct.explain(net, image(), layer="act", size=size)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_image_size_in_every_rank(rank):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](1, 2, 3, stride=2)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(L))
    x = torch.rand(2, 1, *(9, 12, 7)[:rank])
    assert ct.explain(model, x, size="image").shape == (2, L, *x.shape[2:])


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"one": nn.Conv2d(1, 3, 3, padding=1), "two": nn.Conv2d(3, 4, 3, stride=2)})
        self.fc = nn.Linear(4, L)

    def forward(self, image):
        return self.fc(self.net["two"](self.net["one"](image).relu()).relu().mean(dim=(2, 3)))


def test_several_layers_in_one_forward():
    model, x = Deep(), torch.rand(2, 1, 9, 7)
    each = {name: ct.explain(model, x, layer=name) for name in ("one", "net.two")}
    together = ct.explain(model, x, layer=["one", "net.two"])
    assert list(together) == ["one", "net.two"]
    for name in each:
        torch.testing.assert_close(together[name], each[name])
    by_module = ct.explain(model, x, layer=[model.net["two"]])
    assert list(by_module) == ["net.two"]
    fused = ct.explain(model, x, layer=["one", "two"], fuse="mean")
    up = nn.functional.interpolate(each["net.two"], (9, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(fused, (each["one"] + up) / 2)
    with pytest.raises(ct.InputError, match="fuse= knows 'mean', got 'max'"):
        ct.explain(model, x, layer=["one", "two"], fuse="max")
    with pytest.raises(ct.InputError, match="empty list"):
        ct.explain(model, x, layer=[])


def test_a_shared_activation_counts_by_its_last_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
            self.act, self.fc = nn.ReLU(), nn.Linear(4, L)

        def forward(self, image):
            return self.fc(self.act(self.b(self.act(self.a(image)))).mean(dim=(2, 3)))

    model, x = Shared(), torch.rand(2, 1, 9, 8)
    maps = ct.explain(model, x)
    assert maps.shape == (2, L, 5, 4)
    torch.testing.assert_close(maps.sum(dim=(2, 3)) + model.fc.bias, model(x))
    assert ct.explain(model, x, layer="act", call=0).shape == (2, L, 7, 6)
    with pytest.raises(ct.InputError, match=r"'act' ran 2 times.*call=0"):
        ct.explain(model, x, layer="act")
    with pytest.raises(ct.InputError, match="call=7 but layer 'act' ran 2"):
        ct.explain(model, x, layer="act", call=7)


class Often(nn.Module):
    """The activation runs as often as the image says; after each run it is noted whether a graph is recorded."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.SiLU(), nn.Linear(3, L)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.needed = []

    def forward(self, image):
        runs = 3 if image.mean() > 0 else 1
        for _ in range(runs):
            image = self.act(self.second(image) if image.shape[1] == 3 else self.first(image))
            self.needed.append(image.requires_grad)
        return self.fc(image.mean((2, 3)))


@pytest.mark.parametrize("layer", [None, "act"])
def test_before_the_last_run_of_a_shared_activation_nothing_is_recorded(layer):
    """A module named with call=-1 was seen once before; `layer=None` is looked for by a forward of its own."""
    model = Often().eval()
    x = torch.rand(2, 1, 6, 5)
    fresh = ct.explain(copy.deepcopy(model), x, layer=layer, call=-1)
    ct.explain(model, x, layer=layer, call=-1)
    model.needed.clear()
    maps = ct.explain(model, x, layer=layer, call=-1)
    assert model.needed[-3:] == [False, False, True]
    assert maps.equal(fresh)
    torch.testing.assert_close(maps.sum((2, 3)) + model.fc.bias, model(x))


def test_a_network_that_runs_it_less_often_for_another_image_is_asked_again():
    model = Often().eval()
    for x in (torch.rand(2, 1, 6, 5), -torch.rand(2, 1, 6, 5), torch.rand(2, 1, 6, 5)):
        maps = ct.explain(model, x, layer="act", call=-1)
        assert maps.equal(ct.explain(copy.deepcopy(model), x, layer="act", call=-1))
        torch.testing.assert_close(maps.sum((2, 3)) + model.fc.bias, model(x))


# output layouts ------------------------------------------------------------------------------------------------------


Output = namedtuple("Output", "logits features")


class Layout(nn.Module):
    def __init__(self, arrange):
        super().__init__()
        self.net, self.arrange = Net(affine=True), arrange

    def forward(self, image):
        return self.arrange(self.net(image))


LAYOUTS = {
    "tuple": lambda y: (y, torch.zeros(B, 3, 4, 4)),
    "list": lambda y: [torch.zeros(B, 2, 2), y],
    "dict": lambda y: {"logits": y, "embedding": torch.zeros(B, 9)},
    "dict without the usual key": lambda y: {"findings": y, "ids": torch.zeros(B, L, dtype=torch.long)},
    "named tuple": lambda y: Output(y, torch.zeros(B, 3, 2, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_layouts(layout):
    model = Layout(LAYOUTS[layout])
    torch.testing.assert_close(ct.explain(model, image(), layer="act"), ct.explain(model.net, image(), layer="act"))


def test_one_probability_per_sample():
    model = Layout(lambda y: y[:, 2])
    torch.testing.assert_close(
        ct.explain(model, image(), layer="act"), ct.explain(model.net, image(), layer="act", labels=[2])
    )


def test_a_callable_picks():
    model = Layout(lambda y: (y, -y))
    with pytest.raises(ct.InputError, match=r"a tuple of a tensor of shape \(3, 5\), a tensor.*pass logits="):
        ct.explain(model, image(), layer="act")
    full = ct.explain(model.net, image(), layer="act")
    torch.testing.assert_close(ct.explain(model, image(), layer="act", logits=lambda y: y[1]), -full)
    two = ct.explain(model, image(), layer="act", logits=lambda y: y[0][:, 3:])
    torch.testing.assert_close(two, full[:, 3:])
    calls = []
    with pytest.raises(ct.InputError, match=r"logits= returned a tensor of shape \(5,\)"):
        ct.explain(model, image(), layer="act", logits=lambda y: calls.append(1) or y[0][0])
    assert len(calls) == 1


def test_nothing_like_logits():
    for output in (torch.zeros(B, 2, 2), torch.zeros(B + 1, L), torch.zeros(B, L).long(), {"a": 1}, "text", None):
        assert find_logits(output, B) is None


# wrong input ---------------------------------------------------------------------------------------------------------


def test_wrong_images(net):
    bad = image()
    bad[0, 0, 0, 0, 0] = torch.inf
    for given_, words in (
        (bad, "NaN or Inf"),
        (image().long(), "floating image"),
        (image()[0, 0, 0], "shape"),
        (None, "NoneType"),
    ):
        with pytest.raises(ct.InputError, match=words):
            ct.explain(net, given_, layer="act")


def test_wrong_method_and_layer_names(net):
    with pytest.raises(ct.InputError, match="unknown method 'hirescan'; nearest: hirescam"):
        ct.explain(net, image(), "hirescan", "act")
    with pytest.raises(ct.InputError, match=r"no layer 'acts'; nearest: act"):
        ct.explain(net, image(), layer="acts")
    with pytest.raises(ct.InputError, match="no part of this Net"):
        ct.explain(net, image(), layer=nn.ReLU())
    with pytest.raises(ct.InputError, match=r"expected \(B, K, \*S\) with the image's spatial axes"):
        ct.explain(net, image(), layer="head")


def test_a_layer_beside_the_way_to_the_logits():
    class Beside(Net):
        def __init__(self):
            super().__init__()
            self.side = nn.Conv3d(1, 2, 1)

        def forward(self, image):
            self.side(image)
            return super().forward(image)

    with pytest.raises(ct.InputError, match="do not depend on the tapped layer"):
        ct.explain(Beside(), image(), layer="side")


def test_a_layer_that_gives_no_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.net = Pair(), Net()

        def forward(self, image):
            return self.net(self.pair(image)[0])

    with pytest.raises(ct.InputError, match="returns a tuple"):
        ct.explain(Holder(), image(), layer="pair")


def test_slices_folded_into_the_batch_need_reshape():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, L)

        def forward(self, image):
            batch, _, depth, *plane = image.shape
            features = self.conv(image.transpose(1, 2).reshape(batch * depth, 1, *plane))
            return self.fc(features.reshape(batch, depth, 3, *plane).mean(dim=(1, 3, 4)))

    def back(features):
        return features.reshape(B, GRID[0], *features.shape[1:]).transpose(1, 2)

    model = Slices()
    with pytest.raises(ct.InputError, match="reshape="):
        ct.explain(model, image(), layer="conv")
    maps = ct.explain(model, image(), layer="conv", reshape=back)
    torch.testing.assert_close(maps.sum(dim=(2, 3, 4)) + model.fc.bias, model(image()))
    score = ct.explain(model, image(), layer="conv", reshape=back, target=lambda y: y[:, 2])
    torch.testing.assert_close(score[:, 0], maps[:, 2])
    with ct.LayerTap(model, "conv", reshape=back) as tap:
        torch.testing.assert_close(tap.maps(model(image())).detach(), maps)
