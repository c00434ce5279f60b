"""Which argument of a call is the image, and calling so again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.call import Call
from camtrain.cam.watch import ModuleWatch

B, L = 3, 4
IDS = torch.arange(B * 5).reshape(B, 1, 5)


def image(seed=1, **given):
    return torch.randn(B, 2, 7, 9, generator=torch.Generator().manual_seed(seed), **given)


def call_of(*args, integer=False, **kwargs):
    return Call.of(nn.Identity(), args, kwargs, integer)


def test_the_image_is_floating_and_an_argument_itself_where_one_is():
    x, other = image(), image(2)
    assert call_of(torch.ones(B, 2), IDS, x, other).given is x
    assert call_of({"masks": other}, "text", scan=x).given is x
    nested = call_of(IDS, [None, {"age": torch.ones(B), "scan": x}], integer=True)
    assert nested.given is x
    assert not nested.direct
    assert call_of(scan=x).direct


def test_calls_without_an_image_are_none():
    assert call_of(torch.zeros(3, 2), "text", ids=IDS) is None
    assert call_of(torch.zeros(3, 2), "text", ids=IDS, integer=True).given is IDS


def test_an_image_that_is_given_twice_is_replaced_twice():
    x, age = image(), torch.rand(B)
    call = call_of(x, [x, age], scan=x)
    args, kwargs = call.rows([2, 0]).arguments(torch.zeros(2, 2, 7, 9))
    assert not any(each.any() for each in (args[0], args[1][0], kwargs["scan"]))
    assert torch.equal(args[1][1], age[[2, 0]])


def test_what_does_not_hold_the_image_is_handed_on_itself():
    notes, x = {"age": torch.rand(B)}, image()
    args, kwargs = call_of(x, notes, more=notes).arguments(image(2))
    assert args[1] is notes
    assert kwargs["more"] is notes


def test_samples_can_be_left_out_only_beside_numbers():
    x = image()
    assert call_of(x, None, True, factor=2.0).divisible
    assert call_of(x, x).divisible
    assert not any(call.divisible for call in (call_of(x, "text"), call_of(x, torch.ones(B)), call_of(x, [image(2)])))
    assert [call_of(*args).image_alone for args in ((x,), ([x],), (x, None))] == [True, False, False]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.fc = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(4, L)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean(dim=(2, 3)))


class Wrapped(nn.Module):
    """Makes the image of what it is called with."""

    def __init__(self, image_of):
        super().__init__()
        self.net, self.image_of = Net(), image_of

    def forward(self, given):
        return self.net(self.image_of(given))


def weighted(ages, images):
    """Refuses other ages than those of the samples."""
    return torch.stack([age * x for age, x in zip(ages, images, strict=True)])


@pytest.mark.parametrize(
    ("image_of", "given"),
    [
        (lambda x: x.float() / 255, (image() * 40).to(torch.uint8)),
        (lambda batch: weighted(*batch.values()), {"age": torch.rand(B), "image": image()}),
        (torch.cat, list(image().split(1))),
    ],
    ids=["integers", "dict", "list"],
)
def test_the_last_feature_map_of_models_with_other_inputs(image_of, given):
    model = Wrapped(image_of)
    with ct.LayerTap(model, None) as tap:
        maps = tap.maps(model(given))
    assert tap.name == "net.act"
    torch.testing.assert_close(maps.detach(), ct.explain(model.net, image_of(given), layer="act"))
    # Not the image of a list, but the batch that the layer saw.
    watch = ModuleWatch(model, "net.act")
    watch.start()
    logits = model(given)
    assert watch.take()[1].equal(logits)
    watch.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_rows_of_slices_are_counted_by_their_image(dtype):
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv1d(2, 4, 3), nn.Linear(4, L)

        def forward(self, x):
            rows = self.conv(x.float().transpose(1, 2).flatten(0, 1))
            return self.fc(rows.mean(dim=2).unflatten(0, (len(x), -1)).amax(dim=1))

    watch = ModuleWatch(Slices(), "conv")
    watch.start()
    logits = watch.model((9 * image()).to(dtype))
    source, found = watch.take()
    watch.stop()
    assert len(source) == 7 * B
    assert found.equal(logits)


def test_the_image_of_a_subclass_keeps_it():
    class Scan(torch.Tensor):
        spacing = 2.0

    model = Wrapped(lambda x: x.as_subclass(torch.Tensor) * x.spacing)
    with ct.LayerTap(model, [None, "input"]) as tap:
        tap.maps(model(image().as_subclass(Scan)))
    assert type(call_of(image().as_subclass(Scan)).image) is torch.Tensor


def test_the_input_cannot_be_explained_where_a_list_holds_it():
    model = Wrapped(torch.cat)
    with ct.LayerTap(model, "input"), pytest.raises(ct.InputError, match="needs a model that takes the image"):
        model([image(), image(2)])
