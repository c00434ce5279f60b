"""What MaskLossCallback says, once, of layers whose cells have seen most of the scan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct


def fit(kit, folder, module, layer=None, cases=None, **options):
    callback = ct.MaskLossCallback(layer or kit.LAYER, kit.TABLE)
    kit.make_trainer(folder, callback, **options).fit(module, kit.loader(cases or kit.make_cases()))


def shares_said(caplog):
    return [r.getMessage() for r in caplog.records if "a central cell of" in r.getMessage()]


def test_the_seen_share_is_not_told_of_cells_that_see_little(kit, tmp_path, caplog):
    fit(kit, tmp_path, kit.make_lit(kit.make_net()))
    assert shares_said(caplog) == []


class Mixed(nn.Module):
    """Takes the whole batch; every cell has seen the whole image."""

    def __init__(self, net, style):
        super().__init__()
        self.features, self.head, self.style = net.features, net.head, style

    def forward(self, image, age=None):
        if self.style == "dict":
            image, age = image["image"], image["age"]
        if self.style == "kwargs" and age is None:
            raise ValueError("an age for each case, please")
        image = image + image.mean(dim=(2, 3, 4), keepdim=True) + age.reshape(-1, 1, 1, 1, 1)
        return self.head(self.features(image))


@pytest.mark.parametrize("style", ["dict", "kwargs"])
def test_the_seen_share_with_other_inputs_than_an_image(kit, tmp_path, caplog, style):
    cases = [{**case, "age": torch.tensor(0.1 * row)} for row, case in enumerate(kit.make_cases())]

    def training_step(self, batch, batch_idx):
        logits = self.net(batch) if style == "dict" else self.net(batch["image"], age=batch["age"])
        return kit.bce(logits, batch["label"])

    module = kit.make_lit(Mixed(kit.make_net(), style), training_step=training_step)
    fit(kit, tmp_path, module, cases=cases, max_epochs=2)
    assert len(shares_said(caplog)) == 1
    assert "'net.features.3' depends on 100% of the image" in shares_said(caplog)[0]
    assert "OutsideSwap" in shares_said(caplog)[0]


@pytest.mark.slow
def test_the_seen_share_of_a_monai_resnet(kit, tmp_path, caplog):
    from monai.networks.nets import ResNet

    torch.manual_seed(0)
    net = ResNet("basic", [1, 1, 1, 1], [2, 4, 4, 8], n_input_channels=1, num_classes=3)
    module = kit.make_lit(net)
    fit(kit, tmp_path, module, layer="layer4", cases=kit.make_cases(2, size=(32, 32, 32)))
    assert len(shares_said(caplog)) == 1
    assert "'net.layer4'" in shares_said(caplog)[0]
    assert kit.hooks_of(module) == {}
