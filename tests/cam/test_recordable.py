"""Tensors made under inference mode become such that autograd may save, without a copy and with all that they carry."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

import camtrain as ct
from camtrain.cam.engine import attention_maps
from camtrain.cam.recordable import recordable
from camtrain.cam.watch import ModuleWatch


def made(layout):
    with torch.inference_mode():
        image = torch.arange(240.0).reshape(2, 2, 3, 4, 5)
        if layout == "channels last":
            return image.contiguous(memory_format=torch.channels_last_3d)
        if layout == "view":
            return image[:, 1:, :, 1:3].transpose(2, 4)
        if layout == "meta":
            return MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])), meta={"name": "a"})
        return image.to(torch.bfloat16) if layout == "bf16" else image


@pytest.mark.parametrize("layout", ["plain", "channels last", "view", "meta", "bf16"])
def test_the_memory_is_shared_and_the_rest_is_the_same(layout):
    image = made(layout)
    ((usual,), other) = recordable(((image,), {"x": "word"}))
    assert other == {"x": "word"}
    assert image.is_inference()
    assert not usual.is_inference()
    assert type(usual) is type(image)
    assert usual.data_ptr() == image.data_ptr()
    assert (usual.shape, usual.stride(), usual.dtype) == (image.shape, image.stride(), image.dtype)
    assert torch.equal(usual, image)
    if layout == "meta":
        assert usual.meta["name"] == "a"
        assert torch.equal(usual.affine, image.affine)
    weight = torch.ones(image.shape[-1], dtype=image.dtype, requires_grad=True)
    (usual * weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.as_tensor(image.sum((0, 1, 2, 3))), check_dtype=False)


def test_what_a_network_does_to_its_input_reaches_the_caller_as_without_a_watch():
    image = made("plain")
    with torch.no_grad():
        recordable(image).mul_(0)
    assert not image.any()


def test_other_kinds_are_copied_and_usual_tensors_stay_themselves():
    class Own(torch.Tensor):
        pass

    with torch.inference_mode():
        kinds = [torch.ones(3).as_subclass(Own), torch.ones(3, dtype=torch.complex64), torch.eye(3).to_sparse()]
    for value in kinds:
        assert not recordable(value).is_inference()
        assert type(recordable(value)) is type(value)
    usual = torch.ones(3)
    assert recordable(usual) is usual


def test_a_network_that_uses_its_image_behind_the_layer_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.scale = nn.Conv3d(1, 4, 3), nn.Linear(4, 2), nn.Parameter(torch.ones(2))

        def forward(self, image):
            return self.head(self.conv(image).relu().mean((2, 3, 4))) + self.scale * image.mean()

    torch.manual_seed(0)
    net, image = Net().eval(), torch.rand(2, 1, 6, 7, 8)
    expected = ct.explain(net, image, layer="conv")
    with torch.inference_mode():
        watch = ModuleWatch(net, "conv", cut=True)
        watch.start()
        net(image * 1)
        maps = attention_maps(*watch.take(2), "hirescam", create_graph=False)
        watch.stop()
    torch.testing.assert_close(maps, expected)
