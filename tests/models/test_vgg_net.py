from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

import camtrain as ct
from camtrain import InputError
from camtrain.models import LitClassifier, VGGNet


def small(**changes):
    torch.manual_seed(0)
    arguments = {"labels": 5, "size": (12, 9, 7), "channels": 2, "widths": (3, 4), "depths": (1, 2), "hidden": 6}
    return VGGNet(**(arguments | changes)).eval()


def slow(net: VGGNet, image: Tensor) -> Tensor:
    """Module by module, written from the text of the class."""
    for axis in range(2, image.ndim):
        missing = -image.shape[axis] % 2 ** len(net.stages)
        border = image.narrow(axis, image.shape[axis] - 1, 1)
        image = torch.cat([image, *[border] * missing], dim=axis)
    for name in net.stages:
        for module in getattr(net, name):
            image = module(image)
    if net.config["head"] == "pool":
        return net.head(image.flatten(2).mean(dim=2))
    _, first, act = net.between
    return net.head(act(first(image.flatten(1))))


@pytest.mark.parametrize("head", ["flatten", "pool"])
@pytest.mark.parametrize("size", [(12, 9, 7), (11, 8), (13,)])
def test_forward_is_what_the_class_says(head, size):
    net = small(size=size, head=head).double()
    image = torch.randn(3, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(net(image), slow(net, image))
    assert net.cells == tuple(math.ceil(n / 4) for n in size)


def test_stages_and_their_convolutions():
    net = VGGNet(widths=(3, 5, 7), depths=(1, 2, 3), size=16)
    assert net.stages == ["stage1", "stage2", "stage3"]
    counts = [sum(isinstance(m, nn.Conv3d) for m in getattr(net, name).modules()) for name in net.stages]
    assert counts == [1, 2, 3]
    assert [getattr(net, name)[-1].kernel_size for name in net.stages] == [2, 2, 2]


def test_stages_can_be_tapped_by_name():
    net = small()
    maps = ct.explain(net, torch.rand(2, 2, 12, 9, 7), "gradcam", ["stage1", "stage2"])
    assert {name: tuple(m.shape) for name, m in maps.items()} == {"stage1": (2, 5, 6, 6, 4), "stage2": (2, 5, 3, 3, 2)}
    assert [row.name for row in ct.layers(net, torch.rand(1, 2, 12, 9, 7), depth=1) if row.default] == ["stage2"]


def test_pool_head_makes_grad_cam_and_hirescam_one():
    net, image = small(head="pool"), torch.rand(2, 2, 12, 9, 7)
    torch.testing.assert_close(*(ct.explain(net, image, method, "stage2") for method in ("gradcam", "hirescam")))
    other = small()
    maps = [ct.explain(other, image, method, "stage2") for method in ("gradcam", "hirescam")]
    assert not torch.allclose(*maps, rtol=0.1), "a flatten head must tell the two apart"


def test_cell_lies_on_its_own_voxels():
    """A bright voxel moves the strongest cell of a stage with kernels of one tap to the cell that holds it."""
    net = VGGNet(labels=1, size=(12, 8, 16), widths=(1, 1), depths=(1, 1)).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.zeros_(module.weight)
            module.weight.data[..., 1, 1, 1] = 1.0
    image = torch.zeros(1, 1, 12, 8, 16)
    image[0, 0, 7, 2, 13] = 1.0
    activations = net.stage2(net.stage1(image))
    assert activations[0, 0].nonzero().tolist() == [[1, 0, 3]]


def test_relevance_is_conserved_behind_every_stage():
    net = small().double()
    image = torch.rand(1, 2, 12, 9, 7, dtype=torch.float64)
    logits = net(image).detach()
    for maps in ct.explain(net, image, "lrp", ["stage1", "stage2"], rules="zplus").values():
        torch.testing.assert_close(maps.flatten(2).sum(dim=2), logits, rtol=1e-6, atol=1e-8)


def test_config_and_head():
    net = small(head="pool")
    assert set(net.config) == set(inspect.signature(VGGNet).parameters)
    head = net.head
    net.resize_head(5)
    assert net.head is head
    net.resize_head(3)
    assert net(torch.zeros(2, 2, 12, 9, 7)).shape == (2, 3)
    VGGNet(**net.config).load_state_dict(net.state_dict())
    assert LitClassifier(small(), labels=["a", "b"])(torch.zeros(2, 2, 12, 9, 7)).shape == (2, 2)


def test_samples_do_not_meet():
    net, image = small(), torch.randn(4, 2, 12, 9, 7)
    torch.testing.assert_close(net(image)[2:3], net(image[2:3]), rtol=1e-4, atol=1e-5)


def test_only_the_flatten_head_is_bound_to_a_size():
    assert small(head="pool")(torch.zeros(2, 2, 15, 20, 6)).shape == (2, 5)
    with pytest.raises(InputError, match=r"VGGNet was built for images of shape \(B, 2, 12, 9, 7\)"):
        small()(torch.zeros(2, 2, 15, 20, 6))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": 0}, "labels="),
        ({"size": 0}, "size="),
        ({"channels": 0}, "channels="),
        ({"widths": ()}, "widths="),
        ({"widths": (3, 0)}, "widths="),
        ({"depths": (1,)}, "2 stages"),
        ({"depths": (1, 0)}, "depths="),
        ({"depths": (1, True)}, "depths="),
        ({"head": "polo"}, "head= expects flatten or pool"),
        ({"hidden": 0}, "hidden="),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        small(**arguments)


def test_wrong_images_are_refused():
    with pytest.raises(InputError, match=r"got \(1, 1, 12, 9, 7\)"):
        small()(torch.zeros(1, 1, 12, 9, 7))
