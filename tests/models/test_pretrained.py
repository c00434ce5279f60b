"""Files of weights as others write them, into networks as users build them."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DenseNet121, ResNet
from torch import nn

from camtrain._errors import InputError
from camtrain.models import AxialNet, LitClassifier
from camtrain.models.pretrained import load_pretrained, other_channels, read_weights

WIDTHS = [4, 6, 8, 10]


def resnet(labels=3, channels=1, seed=0, **changes):
    torch.manual_seed(seed)
    return ResNet("basic", [1, 1, 1, 1], WIDTHS, n_input_channels=channels, num_classes=labels, **changes)


def saved(tmp_path, content, name="w.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def medicalnet(seed=1):
    """The published form: `state_dict` of a DataParallel, one image channel, a segmentation head in place of `fc`."""
    body = {f"module.{k}": v for k, v in resnet(seed=seed).state_dict().items() if not k.startswith("fc.")}
    return {"state_dict": {**body, "module.conv_seg.0.weight": torch.ones(2, 10, 1, 1, 1)}, "epoch": 7}


def test_medicalnet_into_monais_resnet(tmp_path):
    net = resnet()
    before = net.fc.weight.clone()
    account = load_pretrained(net, saved(tmp_path, medicalnet()))
    for name, value in resnet(seed=1).state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(net.state_dict()[name], value), name
    assert torch.equal(net.fc.weight, before)
    assert account.left_out == {"module.conv_seg.0.weight": "the network has no such tensor"}
    assert account.fresh == ("fc.weight", "fc.bias")
    assert 0.98 < account.share < 1
    assert "not in the file, so as they were: fc.weight, fc.bias" in str(account)


@pytest.mark.parametrize("channels", [2, 3])
def test_one_channel_becomes_several(tmp_path, channels):
    net = resnet(channels=channels)
    account = load_pretrained(net, saved(tmp_path, medicalnet()))
    assert account.adapted == {"conv1.weight": f"1 image channels became {channels}"}
    image = torch.randn(1, 1, 16, 16, 16)
    one = resnet(seed=1).conv1(image)
    torch.testing.assert_close(net.conv1(image.expand(1, channels, 16, 16, 16)), one, rtol=1e-4, atol=1e-5)
    back = other_channels(torch.randn(4, 3, 7, 7), (4, 1, 7, 7))
    assert back.shape == (4, 1, 7, 7)
    assert other_channels(torch.randn(4, 3, 7, 7), (4, 2, 7, 7)) is None
    assert other_channels(torch.randn(4, 3, 7, 7), (5, 1, 7, 7)) is None


def test_model_zoo_and_lightning_files(tmp_path):
    torch.manual_seed(0)
    source = DenseNet121(3, 1, 7, init_features=4, growth_rate=2, block_config=(1, 1, 1, 1))
    target = DenseNet121(3, 1, 3, init_features=4, growth_rate=2, block_config=(1, 1, 1, 1))
    account = load_pretrained(target, saved(tmp_path, {"model": source.state_dict(), "optimizer": {}}))
    assert "the last layer: its outputs are other labels" in account.left_out.values()
    assert torch.equal(target.features.conv0.weight, source.features.conv0.weight)
    lit = {f"net._orig_mod.{k}": v for k, v in resnet(seed=1).state_dict().items()}
    net = resnet()
    load_pretrained(net, saved(tmp_path, {"state_dict": lit, "pytorch-lightning_version": "2.5"}))
    assert torch.equal(net.conv1.weight, resnet(seed=1).conv1.weight)


def test_the_head_is_taken_where_it_is_asked_for(tmp_path):
    path = saved(tmp_path, resnet(seed=1).state_dict())
    net = resnet()
    assert load_pretrained(net, path).left_out.keys() == {"fc.weight", "fc.bias"}
    account = load_pretrained(net, path, head=True)
    assert not account.left_out
    assert account.share == 1
    assert torch.equal(net.fc.weight, resnet(seed=1).fc.weight)


def test_into_a_part_of_a_network(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = resnet(), nn.Linear(3, 2)

    net = Wrapped()
    load_pretrained(net, saved(tmp_path, medicalnet()))
    assert torch.equal(net.backbone.conv1.weight, resnet(seed=1).conv1.weight)


@pytest.mark.slow
def test_torchvisions_resnet18_into_axialnet(tmp_path):
    """torchvision's names and shapes, which are those of MONAI's 2D ResNet-18, with a head of a thousand classes."""
    torch.manual_seed(3)
    twin = ResNet(
        "basic", [2, 2, 2, 2], [64, 128, 256, 512], 2, 3, conv1_t_stride=2, num_classes=1000, bias_downsample=False
    )
    net = AxialNet(labels=5)
    account = load_pretrained(net, saved(tmp_path, twin.state_dict()))
    trunk = net.trunk.state_dict()
    for name, value in twin.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(trunk[name], value), name
    assert set(account.left_out) == {"fc.weight", "fc.bias"}
    assert all(name.startswith(("fc.", "trunk.convs.")) for name in account.fresh)
    assert account.share > 0.95


def test_what_hardly_fits_is_refused(tmp_path):
    path = saved(tmp_path, {"module.a.weight": torch.ones(3, 3), "b": torch.ones(2)})
    net = resnet()
    before = net.conv1.weight.clone()
    with pytest.raises(InputError, match=r"fits 0\.0% of the network's numbers .*module\.a\.weight .*conv1\.weight"):
        load_pretrained(net, path)
    assert torch.equal(net.conv1.weight, before)
    wider = ResNet("basic", [1, 1, 1, 1], [8, 12, 16, 20], n_input_channels=1, num_classes=3)
    with pytest.raises(InputError, match=r"shape \(4, 1, 7, 7, 7\), in the network \(8, 1, 7, 7, 7\)"):
        load_pretrained(wider, saved(tmp_path, medicalnet()))


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="plain tensors"):
        read_weights(tmp_path / "text.pth")
    with pytest.raises(InputError, match="without running code"):
        read_weights(saved(tmp_path, resnet(), "whole.pth"))
    with pytest.raises(InputError, match="without tensors"):
        read_weights(saved(tmp_path, {"epoch": 3}))


def test_in_lit_classifier(tmp_path):
    path = str(saved(tmp_path, medicalnet()))
    model = LitClassifier(resnet(), ["a", "b", "c"], pretrained=path)
    assert torch.equal(model.net.conv1.weight, resnet(seed=1).conv1.weight)
    assert model.pretrained.share > 0.98
    # A checkpoint opens where the file is not.
    assert model.hparams["pretrained"] is None
    with pytest.raises(InputError, match="No such file"):
        LitClassifier(resnet(), ["a"], pretrained="nowhere.pth")
