"""`ct.layers`, layer lookup and the seen share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.layer_lookup import default_layer, find_layer
from camtrain.cam.layer_table import seen_share


def image(*grid, batch=2):
    return torch.rand(batch, 1, *grid, generator=torch.Generator().manual_seed(0))


class Smooth(nn.Module):
    """No ReLU is ever silent, so that gradient support is what a perturbation shows."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv3d(1, 3, 3, padding=1)
        self.two = nn.Conv3d(3, 2, 3, stride=2, padding=1, dilation=2)
        self.norm = nn.InstanceNorm3d(2) if norm else nn.Identity()
        self.fc = nn.LazyLinear(4)

    def forward(self, image):
        return self.fc(self.norm(self.two(nn.functional.softplus(self.one(image)))).flatten(1))


def brute_force(model, layer, x):
    """Move every voxel once: does any channel of the central cell change?"""
    kept = {}
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.update(out=out))

    def centre(volume):
        model(volume)
        out = kept["out"]
        return out[(0, slice(None), *(size // 2 for size in out.shape[2:]))]

    with torch.no_grad():
        before, changed = centre(x), 0
        for index in range(x[0].numel()):
            moved = x.clone()
            moved.view(-1)[index] += 0.5
            changed += bool((centre(moved) != before).any())
    handle.remove()
    return changed / x[0].numel()


@pytest.mark.parametrize(("layer", "norm"), [("one", False), ("two", False), ("norm", True)])
def test_seen_share_against_brute_force(layer, norm):
    model, x = Smooth(norm).double().eval(), image(7, 5, 9, batch=1).double()
    model(x)
    share = seen_share(model, x, layer)
    assert share == pytest.approx(brute_force(model, layer, x))
    assert share == 1 if norm else 0 < share < 1


def test_seen_share_of_a_silent_cell_is_that_of_the_liveliest():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.zeros(1, 1, 9, 11)
    x[0, 0, 1:3, 1:3] = 5
    model(x)
    with torch.no_grad():
        model[0].bias.fill_(-0.1)
        model[0].weight.abs_()
    assert seen_share(model, x, "1") == pytest.approx(9 / 99)


def test_seen_share_behind_a_norm_over_channels():
    class ChannelNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, features):
            return self.norm(features.movedim(1, -1)).movedim(-1, 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), ChannelNorm(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = image(8, 6, batch=1).double()
    model(x)
    assert seen_share(model, x, "1") == pytest.approx(9 / 48)


def test_seen_share_of_a_layer_off_the_way():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Conv2d(1, 2, 1)
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, image):
            return (self.conv(image) + self.table(torch.ones(1, 1, *image.shape[2:]))).mean(dim=(2, 3))

    with pytest.raises(ct.InputError, match="does not depend on the image"):
        seen_share(Constant(), image(5, 6), "table")
    rows = {row.name: row for row in ct.layers(Constant(), image(5, 6))}
    assert rows["table"].seen is None
    assert rows["conv"].seen == pytest.approx(9 / 30)
    with pytest.raises(ct.InputError, match="did not run"):
        seen_share(Unused(), image(5, 6), "spare")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.spare = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)

    def forward(self, image):
        return self.conv(image).mean(dim=(2, 3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 3, 3, stride=(2, 1, 2), padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(3, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.pool, self.fc = nn.AdaptiveAvgPool3d(1), nn.Linear(4, 5)

    def forward(self, image):
        return self.fc(self.pool(self.body(self.stem(image))).flatten(1))


def test_rows():
    table = ct.layers(Net(), image(8, 6, 12))
    assert [row.name for row in table] == ["stem.0", "stem.1", "stem", "body.0", "body.1", "body.2", "body"]
    stem, body = (next(row for row in table if row.name == name) for name in ("stem", "body"))
    assert (stem.shape, stem.cell) == ((3, 4, 6, 6), (2.0, 1.0, 2.0))
    assert (body.shape, body.cell, body.kind) == ((4, 2, 3, 3), (4.0, 2.0, 4.0), "Sequential")
    assert [row.name for row in table if row.default] == ["body"]
    assert body.cell_mm is None
    assert 0 < stem.seen < body.seen <= 1
    assert "* body" in str(table)
    assert "4 x 2 x 4" in str(table)


def test_a_container_can_be_left_out_and_seen_shares_too():
    assert [row.name for row in ct.layers(Net(), image(8, 6, 12), depth=1, seen=False)] == ["stem", "body"]
    assert {row.seen for row in ct.layers(Net(), image(8, 6, 12), seen=False)} == {None}
    assert len(ct.layers(nn.ModuleDict({"net": Net()})["net"], image(8, 6, 12), depth=None)) == 7


def test_cells_in_millimetres():
    affine = torch.tensor([[0.0, 0.8, 0, 5], [-0.7, 0, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    for given in (affine, affine.expand(2, 4, 4)):
        row = ct.layers(Net(), image(8, 6, 12), affine=given, seen=False)[-1]
        assert row.cell_mm == pytest.approx((4 * 0.7, 2 * 0.8, 4 * 2.5))
    from monai.data import MetaTensor

    row = ct.layers(Net(), MetaTensor(image(8, 6, 12), affine=affine), seen=False)[-1]
    assert row.cell_mm == pytest.approx((2.8, 1.6, 10.0))


def test_printing_goes_to_no_stream(capfd):
    ct.layers(Net(), image(8, 6, 12))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank(rank):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    model = nn.Sequential(conv(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = image(*(8, 6, 5)[:rank])
    model(x)
    nn.init.constant_(model[0].bias, 2.0)  # no cell is silent
    (row,) = [row for row in ct.layers(model, x) if row.default]
    assert row.name == "1"
    assert row.seen == pytest.approx(3**rank / x[0].numel())


# Which layer is the default ------------------------------------------------------------------------------------------


def test_the_default_is_the_last_feature_map_after_its_activation():
    assert default_layer(Net(), image(8, 6, 12))[0] == "body"
    functional = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))
    assert default_layer(functional, image(7, 6))[0] == "0"


def test_the_default_of_monai_nets():
    from monai.networks.nets import DenseNet, ResNet

    dense = DenseNet(3, 1, 4, init_features=4, growth_rate=2, block_config=(2, 2), bn_size=1)
    assert default_layer(dense, image(16, 24, 16))[0] == "class_layers.relu"
    res = ResNet("basic", [1, 1, 1, 1], [4, 4, 4, 4], n_input_channels=1, num_classes=3)
    assert default_layer(res, image(34, 40, 40))[0] == "layer4"


def test_no_feature_map_at_all():
    with pytest.raises(ct.InputError, match="name the layer with layer="):
        ct.layers(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), image(4, 5))


# Lookup --------------------------------------------------------------------------------------------------------------


def test_names_and_their_ends():
    model = nn.ModuleDict({"net": Net()})
    for name in ("net.body", "body"):
        assert find_layer(model, name) == ("net.body", model["net"].body)
    assert find_layer(model, model["net"].fc)[0] == "net.fc"


def test_a_typo_names_the_nearest():
    with pytest.raises(ct.InputError, match=r"Net has no layer 'boddy'; nearest: body"):
        find_layer(Net(), "boddy")
    with pytest.raises(ct.InputError, match=r"known: stem"):
        find_layer(Net(), "xyzw")


def test_an_ambiguous_end_lists_the_candidates():
    model = nn.ModuleDict({"student": Net(), "teacher": Net()})
    with pytest.raises(ct.InputError, match=r"'body' is ambiguous.*student\.body, teacher\.body"):
        find_layer(model, "body")
    assert find_layer(model, "teacher.body")[1] is model["teacher"].body


@pytest.mark.parametrize("name", ["body", "net.body", "net._orig_mod.body"])
def test_what_torch_compile_inserts_is_tolerated(name):
    model = nn.ModuleDict({"net": nn.ModuleDict({"_orig_mod": Net()})})
    found, module = find_layer(model, name)
    assert found == "net._orig_mod.body"
    assert module is model["net"]["_orig_mod"].body


def test_a_module_known_under_two_names_is_one():
    shared = nn.Conv2d(1, 2, 3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.ModuleDict({"c": shared})})
    assert find_layer(model, "c")[1] is shared
    assert find_layer(model, "a.0")[1] is shared


# The method table ----------------------------------------------------------------------------------------------------


def test_methods():
    table = ct.methods()
    assert [row.name for row in table] == [
        "hirescam",
        "gradcam",
        "cam",
        "gradcam++",
        "layercam",
        "xgradcam",
        "respondcam",
        "counterfactual",
        "scorecam",
        "relevancecam",
        "lrp",
        "guided_backprop",
        "guided_gradcam",
    ]
    for row in table:
        assert row.guarantee
        assert row.blind_spot
        assert row.reference
        assert row.family != "gradient" or callable(row.function())
        assert row.name in str(table)
    assert "cells, not evidence" in str(table)


def test_the_default_layer_is_no_padding():
    """What a padding gives lies on a grid wider than the image's."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.ConstantPad2d(1, 0.0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    assert [row.name for row in ct.layers(model, torch.rand(1, 1, 6, 7), seen=False) if row.default] == ["1"]
