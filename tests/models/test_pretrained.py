"""Files of weights as others write them, into networks as users build them."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DenseNet121, ResNet, SENet
from published_layouts import DEPTHS, medicalnet, numbers, resnet_shapes, torchvision_resnet18
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


def data_parallel(seed=1):
    """The published form: `state_dict` of a DataParallel, one image channel, a segmentation head in place of `fc`."""
    body = {f"module.{k}": v for k, v in resnet(seed=seed).state_dict().items() if not k.startswith("fc.")}
    return {"state_dict": {**body, "module.conv_seg.0.weight": torch.ones(2, 10, 1, 1, 1)}, "epoch": 7}


def test_medicalnet_into_monais_resnet(tmp_path):
    net = resnet()
    before = net.fc.weight.clone()
    account = load_pretrained(net, saved(tmp_path, data_parallel()))
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
    account = load_pretrained(net, saved(tmp_path, data_parallel()))
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
    load_pretrained(net, saved(tmp_path, data_parallel()))
    assert torch.equal(net.backbone.conv1.weight, resnet(seed=1).conv1.weight)


# ---- the layouts that are published -------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(10, 14.36), (18, 32.99), (34, 63.31), (50, 46.21), (101, 85.31)])
def test_the_layouts_have_the_published_sizes(depth, millions):
    """The numbers of parameters in MedicalNet's README; torchvision states 11,689,512 for its ResNet-18."""
    shapes = resnet_shapes(depth, 3, 1, "A" if depth in (18, 34) else "B")
    assert numbers(shapes) / 1e6 == pytest.approx(millions, abs=0.006)
    flat = resnet_shapes(18, 2, 3)
    assert numbers({n: s for n, s in flat.items() if "running" not in n}) + 512 * 1000 + 1000 == 11_689_512


def monai_resnet(depth, widths, shortcut, bias):
    block, layers = DEPTHS[depth]
    return ResNet(
        block,
        list(layers),
        list(widths),
        n_input_channels=1,
        conv1_t_stride=2,
        shortcut_type=shortcut,
        bias_downsample=bias,
        num_classes=3,
    )


@pytest.mark.parametrize(("depth", "shortcut"), [(10, "B"), (18, "A"), (50, "B")])
def test_every_tensor_of_medicalnet_lands(tmp_path, depth, shortcut):
    """The published names at an eighth of the widths."""
    widths = (8, 16, 32, 64)
    content = medicalnet(depth, widths)
    net = monai_resnet(depth, widths, shortcut, bias=False)
    account = load_pretrained(net, saved(tmp_path, content))
    body = {n.removeprefix("module."): v for n, v in content["state_dict"].items() if "conv_seg" not in n}
    state = net.state_dict()
    assert set(account.loaded) == set(body) == set(state) - {"fc.weight", "fc.bias"}
    assert all(torch.equal(state[name], value) for name, value in body.items())
    assert set(account.left_out) == {name for name in content["state_dict"] if "conv_seg" in name}
    assert set(account.left_out.values()) == {"the network has no such tensor"}
    assert account.fresh == ("fc.weight", "fc.bias")


def test_medicalnet_into_the_other_shortcut(tmp_path):
    """Nothing is left out in silence: what one has and the other lacks is in the account."""
    widths = (8, 16, 32, 64)
    into_b = monai_resnet(18, widths, "B", bias=False)
    account = load_pretrained(into_b, saved(tmp_path, medicalnet(18, widths)))
    lacking = {name for name in account.fresh if not name.startswith("fc.")}
    assert lacking == {n for n in into_b.state_dict() if "downsample" in n and not n.endswith("tracked")}
    assert "not in the file, so as they were: layer2.0.downsample.0.weight" in str(account)
    into_a = monai_resnet(10, widths, "A", bias=False)
    account = load_pretrained(into_a, saved(tmp_path, medicalnet(10, widths)))
    assert {name for name in account.left_out if "downsample" in name}
    assert {name for name in account.left_out if "conv_seg" not in name and "downsample" not in name} == set()
    # MONAI's default has a bias where the file's convolution has none, which is the same as a bias of 0.
    net = monai_resnet(10, widths, "B", bias=True)
    account = load_pretrained(net, saved(tmp_path, medicalnet(10, widths)))
    assert account.fresh == ("fc.weight", "fc.bias")
    biases = [n for n in net.state_dict() if n.endswith("downsample.0.bias")]
    assert {account.adapted[name] for name in biases} == {"a bias of 0: the file's convolution has none"}
    plain = monai_resnet(10, widths, "B", bias=False)
    load_pretrained(plain, saved(tmp_path, medicalnet(10, widths)))
    plain.fc.load_state_dict(net.fc.state_dict())
    image = torch.randn(1, 1, 24, 24, 24)
    torch.testing.assert_close(net.eval()(image), plain.eval()(image))


@pytest.mark.slow
def test_bundles_of_the_model_zoo(tmp_path):
    """`models/model.pt` is a flat state dict; a classifier's fits its network, a detector holds half a ResNet."""

    def classifier(outputs):  # the network of endoscopic_inbody_classification, with a block for each stage
        return SENet(2, 3, "se_resnet_bottleneck", (1, 1, 1, 1), 1, 16, num_classes=outputs, inplanes=64)

    torch.manual_seed(0)
    zoo, net = classifier(2).state_dict(), classifier(3)
    account = load_pretrained(net, saved(tmp_path, zoo, "model.pt"))
    assert set(account.loaded) == set(zoo) - {"last_linear.weight", "last_linear.bias"}
    assert all(torch.equal(net.state_dict()[name], zoo[name]) for name in account.loaded)
    assert set(account.left_out.values()) == {"the last layer: its outputs are other labels"}
    # lung_nodule_ct_detection: feature pyramids of layers 1 and 2, what follows them is not in the file.
    widths = (8, 16, 32, 64)
    body = {n: v for n, v in monai_resnet(50, widths, "B", True).state_dict().items() if n[:6] not in FOLLOWING}
    detector = {f"feature_extractor.body.{name}": value for name, value in body.items()}
    detector["classification_head.cls_logits.weight"] = torch.ones(3, 8, 3, 3, 3)
    account = load_pretrained(monai_resnet(50, widths, "B", True), saved(tmp_path, detector, "model.pt"))
    assert set(account.loaded) == set(body)
    assert list(account.left_out) == ["classification_head.cls_logits.weight"]
    assert {name[:6] for name in account.fresh} == set(FOLLOWING)
    assert "6.6% of the network's numbers" in str(account)


FOLLOWING = ("layer3", "layer4", "fc.wei", "fc.bia")


def test_torchscript_names_the_other_file(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "model.ts")
    with pytest.raises(InputError, match=r"TorchScript archive: .* models/model\.pt"):
        load_pretrained(resnet(), tmp_path / "model.ts")


@pytest.mark.slow
@pytest.mark.parametrize("tracked", [False, True])
def test_torchvisions_resnet18_into_axialnet(tmp_path, tracked):
    """Every tensor but the head of a thousand classes; files that were saved before and after norms counted batches."""
    content = torchvision_resnet18(tracked)
    net = AxialNet(labels=5)
    account = load_pretrained(net, saved(tmp_path, content))
    trunk = net.trunk.state_dict()
    body = {name: value for name, value in content.items() if not name.startswith("fc.")}
    assert all(torch.equal(trunk[name], value) for name, value in body.items())
    assert {name.removeprefix("trunk.") for name in account.loaded} == set(body)
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
        load_pretrained(wider, saved(tmp_path, data_parallel()))


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
    path = str(saved(tmp_path, data_parallel()))
    model = LitClassifier(resnet(), ["a", "b", "c"], pretrained=path)
    assert torch.equal(model.net.conv1.weight, resnet(seed=1).conv1.weight)
    assert model.pretrained.share > 0.98
    # A checkpoint opens where the file is not.
    assert model.hparams["pretrained"] is None
    with pytest.raises(InputError, match="No such file"):
        LitClassifier(resnet(), ["a"], pretrained="nowhere.pth")
