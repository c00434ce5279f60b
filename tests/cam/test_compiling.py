"""compile_backbone: what runs before the layer is compiled, what maps need stays eager, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from monai.networks.nets import DenseNet, ResNet
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.models import AxialNet, FlattenNet, LitClassifier

IMAGE = torch.rand(2, 1, 16, 12, 20, generator=torch.Generator().manual_seed(0))


def resnet():
    torch.manual_seed(0)
    return ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 10], spatial_dims=3, n_input_channels=1, num_classes=3,
                  no_max_pool=True)  # fmt: skip


def compiled(model):
    return [n for n, m in model.named_modules() if m._compiled_call_impl is not None]


def step(net, layer):
    """Gradients of a step with a loss on maps."""
    net.train().zero_grad()
    with ct.LayerTap(net, layer) as tap:
        logits = net(IMAGE)
        maps = tap.maps(logits)
        (logits.square().mean() + nn.functional.softplus(20 * maps).mean()).backward()
    return maps.detach(), [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("make", "layer", "wanted"),
    [
        (resnet, "layer4", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4.0"]),
        (resnet, "layer3", ["conv1", "bn1", "layer1", "layer2", "layer3.0"]),
        (resnet, None, ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4.0"]),
        (lambda: FlattenNet(3, IMAGE.shape[2:]), None, ["features"]),
    ],
)
def test_what_is_compiled(make, layer, wanted):
    net = make()
    keys = list(net.state_dict())
    assert ct.compile_backbone(net, IMAGE, layer, backend="eager") is net
    assert compiled(net) == wanted
    assert list(net.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["layer4", "layer2"])
def test_a_step_with_a_loss_on_maps_is_the_same(layer):
    torch._dynamo.reset()
    plain, net = resnet(), resnet()
    ct.compile_backbone(net, IMAGE, layer, backend="aot_eager")
    wanted_maps, wanted = step(plain, layer)
    maps, found = step(net, layer)
    torch.testing.assert_close(maps, wanted_maps, atol=1e-6, rtol=1e-4)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ct.explain(net, IMAGE, layer=layer), ct.explain(plain, IMAGE, layer=layer))


@pytest.mark.slow
def test_a_densenet_is_compiled_up_to_its_layer():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = DenseNet(3, 1, 3, init_features=4, growth_rate=2, block_config=(2, 2))
    plain = copy.deepcopy(net)
    ct.compile_backbone(net, IMAGE, "class_layers.relu", backend="aot_eager")
    assert compiled(net) == ["features"]
    maps, found = step(net, "class_layers.relu")
    wanted_maps, wanted = step(plain, "class_layers.relu")
    torch.testing.assert_close(maps, wanted_maps, atol=1e-6, rtol=1e-4)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_module_that_runs_before_and_after_stays_eager():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.layer = (nn.Conv3d(c, 2, 3, padding=1) for c in (1, 2, 2))
            self.head = nn.Linear(2, 3)

        def forward(self, image):
            features = self.shared(self.layer(self.shared(self.first(image))))
            return self.head(features.mean(dim=(2, 3, 4)))

    net = Twice()
    ct.compile_backbone(net, IMAGE, "layer", backend="eager")
    assert compiled(net) == ["first"]


def test_the_model_is_left_as_it_was():
    net = resnet().train()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    ct.compile_backbone(net, IMAGE, "layer4", backend="eager")
    assert all(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.slow
def test_an_axial_net_and_a_lightning_module(tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LitClassifier(AxialNet(3, "small", (32, 32), 2), labels=["a", "b", "c"])
    image = torch.rand(2, 1, 32, 32, 12)
    ct.compile_backbone(model, image, "net.stack", backend="aot_eager")
    assert compiled(model) == ["net.trunk"]
    table = {"organs": {"lung": 1}, "labels": {name: ["lung"] for name in "abc"}}
    organs = torch.zeros(2, 1, 32, 32, 12, dtype=torch.uint8)
    organs[:, :, 4:16] = 1
    cases = [{"image": image[i], "label": torch.tensor([1.0, 0.0, 1.0]), "organs": organs[i]} for i in range(2)]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[ct.MaskLossCallback("net.stack", table), ct.OutsideSwap(table, p=1.0)],
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(cases, batch_size=2))
    assert float(trainer.callback_metrics["train/mask_loss"]) > 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_what_cannot_work_is_refused():
    with pytest.raises(InputError, match="has no layer 'layer9'"):
        ct.compile_backbone(resnet(), IMAGE, "layer9")
    with pytest.raises(InputError, match="nothing with parameters runs before layer 'conv1'"):
        ct.compile_backbone(resnet(), IMAGE, "conv1")
    idle = nn.ModuleDict({"net": resnet(), "spare": nn.Conv3d(1, 1, 1)})
    idle.forward = lambda image: idle["net"](image)
    with pytest.raises(InputError, match="layer 'spare' does not run"):
        ct.compile_backbone(idle, IMAGE, "spare")
