"""The layer in the middle: the deepest whose cells have seen little, found without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.cam.call import Call
from camtrain.cam.mid_layer import mid_layer
from camtrain.cam.question import WantedLayer
from camtrain.cam.rerun import Rerun


def net(convs=5, size=17):
    """Each convolution of width 3 sees one cell more on either side: 3, 5, 7, ... of 17 positions."""
    torch.manual_seed(0)
    layers = [m for i in range(convs) for m in (nn.Conv1d(1 if i == 0 else 3, 3, 3, padding=1), nn.Softplus())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * size, 2)).train()


def asked(model, name, image=None):
    image = torch.rand(2, 1, 17) if image is None else image
    call = Call.of(model, (image,), {})
    return Rerun(call, (WantedLayer.of(model, image, name),), model, -1, None)


def test_the_deepest_layer_that_has_seen_at_most_half():
    model = net()
    shares = {row.name: row.seen for row in ct.layers(model, torch.rand(1, 1, 17))}
    assert shares["5"] == pytest.approx(7 / 17)
    assert shares["7"] == pytest.approx(9 / 17)
    assert mid_layer(asked(model, "9")).name == "5"
    assert mid_layer(asked(model, "9"), limit=0.2).name == "1"
    assert mid_layer(asked(model, "9"), name="3").module is model[3]
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_where_there_is_none():
    with pytest.raises(InputError, match="sees at most 50% of the image"):
        mid_layer(asked(net(), "5"))
    with pytest.raises(InputError, match="no layer before '9'"):
        mid_layer(asked(net(), "9"), limit=0.1)
    with pytest.raises(InputError, match="no layer '99'"):
        mid_layer(asked(net(), "9"), name="99")


def test_reruns_on_other_images():
    model, image = net(), torch.rand(3, 1, 17)
    rerun = asked(model, "9").on(image)
    torch.testing.assert_close(rerun.logits(), model.eval()(image).detach())
    with_age = Rerun(Call.of(model, (image,), {"age": torch.ones(3)}), rerun.layers, model, -1, None)
    with pytest.raises(InputError, match="more than the image"):
        with_age.on(image)
