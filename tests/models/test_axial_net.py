from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor, nn

from camtrain import InputError
from camtrain.models import AxialNet, BodyCAM


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(**changes) -> AxialNet:
    torch.manual_seed(0)
    arguments = {"labels": 5, "variant": "small", "image_size": (40, 32), "slice_axis": 0}
    return AxialNet(**{**arguments, **changes}).eval()


def activations_of(net: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the output of `stack`, which must be called once and be the last rank-5 output of any module."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, out)))
        for name, m in net.named_modules()
        if name
    ]
    logits = net(image)
    for handle in handles:
        handle.remove()
    volumes = [(name, out) for name, out in seen if out.ndim == image.ndim and out.shape[2:].numel() > 1]
    assert [name for name, _ in volumes] == ["stack"]
    return logits, volumes[0][1]


def hirescam(logits: Tensor, activations: Tensor) -> Tensor:
    """Element-wise product first, then the sum over features; one backward per label (Draelos and Carin, section 3)."""
    maps = []
    for m in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, m].sum(), activations, retain_graph=True)
        maps.append((gradient * activations).sum(dim=1))
    return torch.stack(maps, dim=1)


def as_published(net: AxialNet, image: Tensor) -> Tensor:
    """One case (1, 1, D, h, w), slice by slice: FC on every group of three slices, then the mean of their scores."""
    scores = []
    for start in range(0, image.shape[2], 3):
        features = net.trunk(image[:, 0, start : start + 3])
        scores.append(net.fc.weight @ features.flatten() + net.fc.bias)
    return torch.stack(scores).mean(dim=0)


@pytest.mark.slow
def test_parameter_counts_are_the_papers():
    assert parameters(AxialNet(labels=80)) == 11_543_056
    assert parameters(AxialNet(labels=83)) == 11_544_787
    net = AxialNet(labels=80, custom_convs=False)
    assert parameters(net.trunk) == 11_176_512
    assert net.fc.weight.shape == (80, 512 * 14 * 14)
    assert parameters(BodyCAM(labels=80)) == 11_176_512 + 320_384 + 16 * 80 + 80


@pytest.mark.slow
def test_full_variant_has_the_published_grid():
    net = AxialNet(labels=80).eval()
    with torch.no_grad():
        logits, activations = activations_of(net, torch.randn(1, 1, 6, 420, 420))
        authors = net(torch.zeros(1, 2, 3, 420, 420))
    assert logits.shape == authors.shape == (1, 80)
    assert activations.shape == (1, 16, 2, 6, 6)
    assert activations.min() >= 0


@pytest.mark.parametrize(
    ("axis", "shape", "grid"),
    [
        (0, (1, 1, 405, 420, 420), (135, 6, 6)),
        (0, (2, 135, 3, 420, 420), (135, 6, 6)),
        (2, (1, 1, 420, 420, 405), (6, 6, 135)),
    ],
)
def test_full_size_shapes(axis, shape, grid):
    """On the meta device: every operator runs at full size, without its arithmetic (half a minute and 3 GiB)."""
    with torch.device("meta"):
        logits, activations = activations_of(AxialNet(labels=80, slice_axis=axis), torch.empty(shape))
    assert logits.shape == (shape[0], 80)
    assert activations.shape == (shape[0], 16, *grid)


@pytest.mark.slow
def test_full_size_in_plane_backward_with_checkpointing():
    """One real training step on full slices, few of them."""
    torch.manual_seed(0)
    net = AxialNet(labels=80, activation_checkpointing=True, slice_axis=2)
    logits, activations = activations_of(net, torch.rand(1, 1, 420, 420, 9))
    assert activations.shape == (1, 16, 6, 6, 3)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_forward_is_fc_per_slice_and_mean():
    net = small()
    image = torch.randn(3, 1, 12, 40, 32)
    expected = torch.stack([as_published(net, case[None]) for case in image])
    torch.testing.assert_close(net(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("build", [AxialNet, BodyCAM])
def test_sum_of_hirescam_and_bias_is_the_logit(build, axis):
    torch.manual_seed(1)
    net = build(labels=5, variant="small", image_size=(40, 32), slice_axis=axis).double().eval()
    image = torch.randn(2, 1, 12, 40, 32, dtype=torch.float64).movedim(2, 2 + axis)
    logits, activations = activations_of(net, image)
    grid = [5, 4]
    grid.insert(axis, 4)
    assert activations.shape == (2, 16, *grid)
    maps = hirescam(logits, activations)
    torch.testing.assert_close(maps.sum(dim=(2, 3, 4)) + net.fc.bias, logits)
    assert maps.abs().max() > 0


def test_closed_form_map_has_one_nth_of_the_slice_weights():
    net = small().double()
    logits, activations = activations_of(net, torch.randn(1, 1, 15, 40, 32, dtype=torch.float64))
    weight = net.fc.weight.view(5, 16, 5, 4)
    closed = torch.einsum("mkhw,bkshw->bmshw", weight, activations) / 5
    torch.testing.assert_close(hirescam(logits, activations), closed)


def test_slice_axis_only_turns_the_volume():
    nets = [small(slice_axis=axis) for axis in range(3)]
    image = torch.randn(2, 1, 12, 40, 32)
    first, one = activations_of(nets[0], image)
    for axis in (1, 2):
        nets[axis].load_state_dict(nets[0].state_dict())
        logits, turned = activations_of(nets[axis], image.movedim(2, 2 + axis))
        torch.testing.assert_close(logits, first, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(turned.movedim(2 + axis, 2), one, rtol=1e-4, atol=1e-5)


def test_authors_layout_is_the_same_volume():
    net = small()
    image = torch.randn(2, 1, 12, 40, 32)
    torch.testing.assert_close(net(image), net(image.reshape(2, 4, 3, 40, 32)))


def test_order_of_groups_moves_the_map_and_keeps_the_logits():
    net = small()
    image = torch.randn(1, 1, 12, 40, 32)
    turned = image.reshape(1, 4, 3, 40, 32).flip(1).reshape_as(image)
    (logits, activations), (logits2, activations2) = activations_of(net, image), activations_of(net, turned)
    torch.testing.assert_close(logits, logits2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(activations.flip(2), activations2, rtol=1e-4, atol=1e-5)


def test_samples_do_not_meet_in_eval_mode():
    net = small()
    image = torch.randn(3, 1, 6, 40, 32)
    torch.testing.assert_close(net(image)[1:2], net(image[1:2]), rtol=1e-4, atol=1e-5)


def test_max_pool_takes_the_strongest_group():
    net = small(pool="max")
    image = torch.randn(1, 1, 12, 40, 32)
    groups = torch.cat([small().requires_grad_(False)(image[:, :, i : i + 3]) for i in range(0, 12, 3)])
    torch.testing.assert_close(net(image)[0], groups.max(dim=0).values, rtol=1e-4, atol=1e-5)
    for axis in (1, 2):
        other = small(pool="max", slice_axis=axis)
        torch.testing.assert_close(other(image.movedim(2, 2 + axis)), net(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [AxialNet, BodyCAM])
def test_activation_checkpointing_changes_memory_only(build):
    image = torch.randn(2, 1, 6, 40, 32)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = build(labels=5, variant="small", image_size=(40, 32), activation_checkpointing=recompute).train()
        logits, activations = activations_of(net, image)
        # A gradient of a gradient, as the mask loss takes it.
        maps = (torch.autograd.grad(logits.sum(), activations, create_graph=True)[0] * activations).sum(dim=1)
        (logits.square().mean() + maps.square().sum()).backward()
        results.append(({n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())))
    (gradients, buffers), (gradients2, buffers2) = results
    assert gradients.keys() == gradients2.keys()
    assert buffers.keys() == buffers2.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients2[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0 or name.endswith("bias")
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffers2[name], buffer, msg=f"{name}: statistics updated twice")


def test_checkpointing_stores_less(monkeypatch):
    stored = []
    for recompute in (False, True):
        net = small(activation_checkpointing=recompute).train()
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.randn(2, 1, 6, 40, 32)).sum()
        stored.append(size)
    assert stored[1] < 0.6 * stored[0]


def torchvision_resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's resnet18, written down from the architecture of He et al. (2016), table 1."""

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")
        }
        return {**shapes, f"{name}.num_batches_tracked": ()}

    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.conv1.weight": (width, before, 3, 3), f"{at}.conv2.weight": (width, width, 3, 3)}
            shapes |= norm(f"{at}.bn1", width) | norm(f"{at}.bn2", width)
            if before != width:
                shapes |= {f"{at}.downsample.0.weight": (width, before, 1, 1)} | norm(f"{at}.downsample.1", width)
            before = width
    return shapes


@pytest.fixture
def torchvision_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in torchvision_resnet18_shapes().items()}


@pytest.mark.slow
@pytest.mark.parametrize("build", [AxialNet, BodyCAM])
def test_every_torchvision_weight_arrives(build, torchvision_state):
    assert len(torchvision_state) == 122
    net = build(labels=2)
    convs = {k: v.clone() for k, v in net.trunk.convs.state_dict().items()}
    net.load_torchvision_trunk(torchvision_state)
    own = net.trunk.state_dict()
    for name, weight in torchvision_state.items():
        if not name.startswith("fc."):
            torch.testing.assert_close(own[name], weight.to(own[name].dtype), msg=name)
    assert {k for k in own if not k.startswith("convs.")} == {k for k in torchvision_state if not k.startswith("fc.")}
    for name, weight in convs.items():
        assert torch.equal(net.trunk.convs.state_dict()[name], weight)


def test_wrong_torchvision_weights_are_named(torchvision_state):
    full = AxialNet(labels=2)
    before = full.trunk.conv1.weight.clone()
    missing = {k: v for k, v in torchvision_state.items() if k != "layer3.1.conv2.weight"}
    with pytest.raises(InputError, match=r"layer3\.1\.conv2\.weight"):
        full.load_torchvision_trunk(missing)
    with pytest.raises(InputError, match=r"layer1\.2\.conv1"):
        full.load_torchvision_trunk({**torchvision_state, "layer1.2.conv1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"'conv1\.weight'"):
        full.load_torchvision_trunk({**torchvision_state, "conv1.weight": torch.zeros(64, 1, 7, 7)})
    assert torch.equal(full.trunk.conv1.weight, before)
    with pytest.raises(InputError, match="full variant"):
        small().load_torchvision_trunk(torchvision_state)


def test_weights_from_before_batches_were_counted_load(torchvision_state):
    old = {k: v for k, v in torchvision_state.items() if not k.endswith("num_batches_tracked")}
    net = AxialNet(labels=2)
    net.load_torchvision_trunk(old)
    assert torch.equal(net.trunk.layer4[1].bn2.running_var, old["layer4.1.bn2.running_var"])


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 2, 12, 40, 32), "one channel"),
        ((1, 1, 40, 32), "three spatial axes"),
        ((1, 1, 12, 32, 40), "image_size="),
        ((1, 1, 13, 40, 32), "divides by group=3, got 13"),
        ((1, 1, 0, 40, 32), "got 0"),
        ((1, 4, 2, 40, 32), "one channel"),
    ],
)
@pytest.mark.parametrize("build", [AxialNet, BodyCAM])
def test_wrong_images_are_refused(build, shape, words):
    net = build(labels=2, variant="small", image_size=(40, 32))
    with pytest.raises(InputError, match=words):
        net(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": 0}, "labels="),
        ({"variant": "tiny"}, "variant="),
        ({"image_size": 200}, "at least 257"),
        ({"image_size": (420, 0)}, "image_size="),
        ({"image_size": (420, 420, 420)}, "image_size="),
        ({"slice_axis": 3}, "slice_axis="),
        ({"group": 0}, "group="),
        ({"pool": "sum"}, "pool="),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        AxialNet(**arguments)


def test_least_image_size_leaves_one_cell():
    net = AxialNet(labels=2, image_size=257)
    assert net.trunk.cells == (1, 1)
    with torch.no_grad():
        assert net(torch.zeros(1, 1, 3, 257, 257)).shape == (1, 2)


@pytest.mark.parametrize(("rows", "columns"), [(48, 48), (33, 47), (8, 100), (1, 1)])
def test_cells_are_what_the_trunk_gives(rows, columns):
    for variant, custom in itertools.product(("full", "small"), (True, False)):
        if variant == "full" and custom:
            continue
        net = AxialNet(labels=1, variant=variant, image_size=(rows, columns), custom_convs=custom).eval()
        assert net.trunk(torch.zeros(1, 3, rows, columns)).shape[2:] == net.trunk.cells


@pytest.mark.parametrize("build", [AxialNet, BodyCAM])
def test_head_is_resized_only_when_needed(build):
    net = build(labels=5, variant="small", image_size=32, group=2)
    head = net.fc
    net.resize_head(5)
    assert net.fc is head
    net.double().resize_head(3)
    assert net(torch.zeros(1, 1, 4, 32, 32, dtype=torch.float64)).shape == (1, 3)
    with pytest.raises(InputError, match="at least 1"):
        net.resize_head(0)


@pytest.mark.parametrize("build", [AxialNet, BodyCAM])
def test_config_rebuilds_the_net(build):
    net = build(labels=5, variant="small", image_size=(32, 40), slice_axis=1, activation_checkpointing=True)
    net.resize_head(3)
    assert set(net.config) == set(inspect.signature(build).parameters)
    build(**net.config).load_state_dict(net.state_dict())


def test_small_variant_learns_where_a_blob_lies():
    """Bright or dark square on one slice group: learnt within a few steps, on a CPU."""
    torch.manual_seed(0)
    net = AxialNet(labels=2, variant="small", image_size=24, slice_axis=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(40):
        label = torch.randint(0, 2, (16, 2)).float()
        image = 0.2 * torch.randn(16, 1, 24, 24, 6)
        image[:, 0, 3:9, 3:9, 0] += label[:, 0, None, None]
        image[:, 0, 15:21, 3:9, 4] += label[:, 1, None, None]
        loss = nn.functional.binary_cross_entropy_with_logits(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
