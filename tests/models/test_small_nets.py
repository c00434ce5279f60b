from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camtrain import InputError
from camtrain.models import FlattenNet, PoolNet


def activations_of(net: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the output of the last module that gives a feature map, which must be the ReLU before the head."""
    seen: list[tuple[nn.Module, Tensor]] = []
    handles = [m.register_forward_hook(lambda m, _i, out: seen.append((m, out))) for m in net.modules() if m is not net]
    logits = net(image)
    for handle in handles:
        handle.remove()
    last, activations = [(m, out) for m, out in seen if out.ndim == image.ndim][-1]
    assert last is net.relu
    assert isinstance(last, nn.ReLU)
    return logits, activations


def hirescam(logits: Tensor, activations: Tensor) -> Tensor:
    maps = []
    for m in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, m].sum(), activations, retain_graph=True)
        maps.append((gradient * activations).sum(dim=1))
    return torch.stack(maps, dim=1)


def seen_of_cell(net: nn.Module, image: Tensor, cell: tuple[int, ...]) -> Tensor:
    """Voxels on which one cell of the tapped layer depends."""
    image = image.requires_grad_()
    _, activations = activations_of(net.eval(), image)
    # Before the ReLU, or a dead cell would seem blind.
    before = net.features(image)
    assert before.shape == activations.shape
    return torch.autograd.grad(before[(0, slice(None), *cell)].pow(2).sum(), image)[0][0, 0] != 0


def bounds(seen: Tensor) -> list[tuple[int, int]]:
    where = seen.nonzero()
    return [(int(low), int(high)) for low, high in zip(where.min(0).values, where.max(0).values, strict=True)]


@pytest.mark.parametrize("training", [False, True])
def test_flatten_head_maps_add_up(training):
    torch.manual_seed(0)
    net = FlattenNet(labels=5, size=(24, 18, 12), channels=2, widths=(4, 5, 6, 7)).double().train(training)
    logits, activations = activations_of(net, torch.randn(3, 2, 24, 18, 12, dtype=torch.float64))
    assert activations.shape == (3, 7, 4, 3, 2)
    assert net.cells == (4, 3, 2)
    maps = hirescam(logits, activations)
    torch.testing.assert_close(maps.flatten(2).sum(2) + net.head.bias, logits)
    alpha = net.head.weight.view(5, 7, -1).mean(2)
    grad_cam = torch.einsum("lk,bkxyz->blxyz", alpha, activations)
    assert not torch.allclose(maps, grad_cam), "a flatten head must tell the two apart"


def test_pool_head_makes_cam_and_hirescam_one():
    torch.manual_seed(0)
    net = PoolNet(labels=5, size=24, channels=2, widths=(4, 5, 6)).double().eval()
    logits, activations = activations_of(net, torch.randn(3, 2, 24, 36, 12, dtype=torch.float64))
    assert activations.shape == (3, 6, 2, 3, 1)
    cam = torch.einsum("lk,bkxyz->blxyz", net.head.weight, activations)
    torch.testing.assert_close(hirescam(logits, activations), cam / 6)
    torch.testing.assert_close(cam.flatten(2).mean(2) + net.head.bias, logits)


def test_flatten_cells_see_their_own_tile_and_four_more_voxels_around():
    torch.manual_seed(0)
    net = FlattenNet(labels=1)
    assert net.cells == (8, 8, 8)
    seen = bounds(seen_of_cell(net, torch.randn(1, 1, 48, 48, 48), (4, 0, 7)))
    # Cell 4 stands for voxels 24 to 29.
    assert seen == [(20, 33), (0, 9), (38, 47)]


def test_pool_cells_see_everything():
    torch.manual_seed(0)
    for size in ((36, 48, 24), (72, 12, 12)):
        net = PoolNet(labels=1, size=size, widths=(8, 8, 8)).double()
        for cell in ((0, 0, 0), tuple(-1 for _ in size)):
            seen = seen_of_cell(net, torch.randn(1, 1, *size, dtype=torch.float64), cell)
            assert bounds(seen) == [(0, n - 1) for n in size]
            assert seen.double().mean() > 0.95


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_any_size_rank_and_number_of_labels(size, channels, labels, batch):
    image = torch.randn(batch, channels, *size)
    flatten = FlattenNet(labels, tuple(size), channels, widths=(2, 2, 2, 3)).eval()
    logits, activations = activations_of(flatten, image)
    assert logits.shape == (batch, labels)
    assert activations.shape == (batch, 3, *(-(-n // 6) for n in size)) == (batch, 3, *flatten.cells)
    assert PoolNet(labels, tuple(size), channels, widths=(2, 2, 2)).eval()(image).shape == (batch, labels)


def test_no_voxel_goes_unseen_when_the_size_does_not_divide():
    torch.manual_seed(0)
    net = FlattenNet(labels=3, size=(13, 12, 7), widths=(4, 4, 4, 4)).eval()
    image = torch.randn(1, 1, 13, 12, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(image).pow(2).sum(), image)
    for axis in range(2, 5):
        others = tuple(a for a in range(5) if a != axis)
        assert (gradient != 0).sum(dim=others).min() > 0


@pytest.mark.parametrize("build", [FlattenNet, PoolNet])
def test_samples_do_not_meet_in_eval_mode(build):
    torch.manual_seed(0)
    net = build(labels=3, size=12).eval()
    image = torch.randn(4, 1, 12, 12, 12)
    torch.testing.assert_close(net(image)[2:3], net(image[2:3]), rtol=1e-4, atol=1e-5)


def test_flipped_weights_on_a_flipped_image_flip_the_map():
    """Cells tile the voxels exactly, so mirroring every kernel and the head mirrors the map, cell by cell."""
    torch.manual_seed(0)
    net = FlattenNet(labels=2, size=(12, 18, 24), widths=(3, 3, 3, 4)).eval()
    mirrored = FlattenNet(**net.config).eval()
    mirrored.load_state_dict(net.state_dict())
    with torch.no_grad():
        for module in mirrored.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.copy_(module.weight.flip(3))
        mirrored.head.weight.copy_(net.head.weight.view(2, 4, 2, 3, 4).flip(3).reshape(2, -1))
    image = torch.randn(1, 1, 12, 18, 24)
    logits, activations = activations_of(net, image)
    logits2, activations2 = activations_of(mirrored, image.flip(3))
    torch.testing.assert_close(logits2, logits, rtol=1e-4, atol=1e-5)
    maps, maps2 = hirescam(logits, activations), hirescam(logits2, activations2)
    torch.testing.assert_close(maps2.flip(3), maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [FlattenNet, PoolNet])
def test_head_is_resized_only_when_needed(build):
    net = build(labels=5, size=12)
    head = net.head
    net.resize_head(5)
    assert net.head is head
    net.double().resize_head(3)
    assert net(torch.zeros(2, 1, 12, 12, 12, dtype=torch.float64)).shape == (2, 3)


@pytest.mark.parametrize("build", [FlattenNet, PoolNet])
def test_config_rebuilds_the_net(build):
    net = build(labels=5, size=(12, 24), channels=2)
    net.resize_head(3)
    assert set(net.config) == set(inspect.signature(build).parameters)
    build(**net.config).load_state_dict(net.state_dict())


@pytest.mark.parametrize("build", [FlattenNet, PoolNet])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": 0}, "labels="),
        ({"labels": True}, "labels="),
        ({"size": 0}, "size="),
        ({"size": (4, 4, 4, 4)}, "size="),
        ({"size": (4.0, 4, 4)}, "size="),
        ({"widths": (3, 3)}, "widths="),
        ({"channels": 0}, "channels="),
    ],
)
def test_wrong_arguments_are_refused(build, arguments, words):
    with pytest.raises(InputError, match=words):
        build(**arguments)


def test_pool_of_flatten_net_is_checked():
    with pytest.raises(InputError, match="pool="):
        FlattenNet(pool=0)
    assert FlattenNet(size=48, pool=4).cells == (6, 6, 6)


@pytest.mark.parametrize("build", [FlattenNet, PoolNet])
def test_wrong_images_are_refused(build):
    net = build(size=12)
    with pytest.raises(InputError, match=rf"{build.__name__} was built for images of shape \(B, 1"):
        net(torch.zeros(1, 2, 12, 12, 12))
    with pytest.raises(InputError, match=r"got \(1, 1, 12, 12\)"):
        net(torch.zeros(1, 1, 12, 12))


def test_flatten_net_refuses_another_size():
    with pytest.raises(InputError, match="size="):
        FlattenNet(size=12)(torch.zeros(1, 1, 12, 12, 13))


@pytest.mark.slow
@pytest.mark.parametrize(("build", "rate"), [(FlattenNet, 2e-3), (PoolNet, 5e-3)])
def test_small_nets_learn_a_blob(build, rate):
    torch.manual_seed(0)
    net = build(labels=2, size=24)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for _ in range(40):
        label = torch.randint(0, 2, (16, 2)).float()
        image = 0.3 * torch.randn(16, 1, 24, 24, 24)
        image[:, 0, 3:9, 3:9, 3:9] += label[:, 0, None, None, None]
        image[:, 0, 15:21, 10:16, 3:9] -= label[:, 1, None, None, None]
        loss = nn.functional.binary_cross_entropy_with_logits(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
