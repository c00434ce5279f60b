"""What a forward and a pass are counted as, against counts written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from camtrain.cam.capture import own_forward
from camtrain.cam.price import Work, WorkCount


def counted(net, layers, image):
    count = WorkCount(net, layers)
    with count.counting(), torch.no_grad():
        net(image)
    return count


def hooks_of(net):
    return [name for name, module in net.named_modules() if module._forward_hooks]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_multiplies_its_kernel_at_every_place_it_gives(groups):
    net = nn.Sequential(nn.Conv3d(4, 6, (1, 2, 3), stride=2, groups=groups))
    count = counted(net, [net[0]], torch.rand(5, 4, 7, 8, 9))
    places, kernel = 5 * 4 * 4 * 4, (4 // groups) * 1 * 2 * 3
    narrow = places * 6 * kernel if groups == 2 else 0
    assert count.whole == Work(places * 6 * kernel, places * 6, 6 * kernel, 1, narrow)
    assert count.behind(0) == Work()


def test_a_transposed_one_at_every_place_it_takes():
    net = nn.Sequential(nn.ConvTranspose2d(4, 3, (2, 3), stride=2))
    count = counted(net, [], torch.rand(5, 4, 7, 8))
    assert count.whole.products == 5 * 7 * 8 * (4 * 3 * 2 * 3)
    assert count.whole.numbers == 5 * 3 * 14 * 17


def test_linear_layers_count_each_row_also_of_tokens():
    net = nn.Sequential(nn.Linear(4, 6))
    assert counted(net, [], torch.rand(5, 7, 4)).whole == Work(5 * 7 * 4 * 6, 5 * 7 * 6, 24, 1)


def test_a_table_of_words_is_no_product():
    net = nn.Sequential(nn.Embedding(1000, 8))
    assert counted(net, [], torch.zeros(3, 5, dtype=torch.long)).whole == Work(0, 120, 0, 1)


def test_what_lies_behind_a_layer_comes_after_it_be_it_a_block_or_a_leaf():
    block = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU())
    net = nn.Sequential(block, nn.Conv1d(4, 8, 1), nn.Flatten(), nn.Linear(8 * 6, 3))
    count = counted(net, [block, block[0], net[3]], torch.rand(5, 2, 6))
    late = Work(5 * 6 * 32, 5 * 6 * 8, 32, 1).plus(Work(numbers=5 * 48, calls=1)).plus(Work(5 * 144, 15, 144, 1))
    assert count.behind(0) == late
    assert count.behind(1) == late.plus(Work(numbers=5 * 4 * 6, calls=1))
    assert count.behind(2) == Work()
    assert count.whole == count.behind(1).plus(Work(5 * 6 * 8, 5 * 4 * 6, 8, 1))


def test_of_a_layer_that_runs_several_times_each_run_has_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.mix = nn.ReLU(), nn.Conv1d(2, 2, 1)

        def forward(self, image):
            return self.act(self.mix(self.act(image)))

    net = Twice()
    count = counted(net, [net.act], torch.rand(1, 2, 3))
    assert [count.behind(0, call).calls for call in (0, 1, -1, -2)] == [2, 0, 0, 2]
    assert count.behind(0, 2) == count.behind(0, -3) == Work()


def test_prices_are_sums_that_grow_with_the_work():
    small, large = Work(1e6, 1e4, 1e3, 2), Work(1e8, 1e6, 1e5, 30)
    assert 0 == Work().forward == Work().backward < small.forward < large.forward
    assert small.plus(large).backward == pytest.approx(small.backward + large.backward)
    assert large.minus(small).plus(small) == large


def test_it_leaves_nothing_and_sees_neither_repeats_nor_forwards_of_our_own():
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU())
    count, image = WorkCount(net, [net[1]]), torch.rand(1, 1, 4, requires_grad=True)
    with count.counting():
        given = checkpoint(net, image, use_reentrant=False)
        once = count.whole
        given.sum().backward()  # runs the network again
        with own_forward():
            net(image)
    assert count.whole == once
    assert once.calls == 2
    assert hooks_of(net) == []
    with pytest.raises(RuntimeError, match=r"shape|channels|expected"), count.counting():
        net(torch.rand(1, 5, 4))
    assert hooks_of(net) == []


def test_outputs_that_are_no_tensor_are_calls():
    net = nn.Sequential(nn.MaxPool1d(2, return_indices=True))
    assert counted(net, [], torch.rand(2, 5, 4)).whole == Work(calls=1)


@pytest.mark.parametrize(("first", "shape"), [(True, (2, 5, 3)), (False, (5, 2, 3))])
def test_recurrent_layers_multiply_at_every_step(first, shape):
    net = nn.Sequential(nn.LSTM(3, 4, num_layers=2, batch_first=first))
    weights = sum(p.numel() for p in net.parameters())
    whole = counted(net, [], torch.rand(shape)).whole
    assert whole.products == 2 * 5 * weights
    assert whole.calls == 5 * 2 * 4


def test_a_layer_whose_weight_is_made_of_others_is_counted_all_the_same():
    plain, normed = nn.Conv1d(2, 6, 3), nn.utils.parametrizations.spectral_norm(nn.Conv1d(2, 6, 3))
    image = torch.rand(5, 2, 9)
    whole = [counted(nn.Sequential(layer), [], image).whole for layer in (plain, normed)]
    assert whole[0].products == whole[1].products == 5 * 7 * 36


def test_scripted_modules_are_passed_over():
    net = nn.Sequential(nn.Conv1d(1, 2, 1), torch.jit.script(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU())))
    assert counted(net, [net[0]], torch.rand(1, 1, 4)).whole.calls == 1
    assert hooks_of(net) == []


def test_compiled_modules_keep_their_graphs():
    graphs = []

    def backend(graph, _):
        graphs.append(len([node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]))
        return graph.forward

    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Conv1d(2, 2, 1)).eval()
    whole = nn.Sequential(torch.compile(net, backend=backend), nn.Flatten())
    count = counted(whole, [whole[1]], torch.rand(1, 1, 4))
    assert graphs == []  # the step that is counted runs eagerly, and is seen
    assert count.whole.calls == 4
    with torch.no_grad():
        whole(torch.rand(1, 1, 4))
    assert len(graphs) == 1 and graphs[0] >= 3  # noqa: PT018


@pytest.mark.parametrize(("net", "size", "layer", "share"), [
    ("resnet18", 32, "layer3", 0.175), ("resnet18", 64, "layer2", 0.11), ("densenet", 32, "features.transition3", 0.13),
])  # fmt: skip
def test_counted_prices_are_of_the_order_of_measured_ones(net, size, layer, share):
    """`share`: what benchmarks/pass_price.py measured on one core of an AMD EPYC."""
    from monai.networks.nets import DenseNet121, resnet18

    if net == "densenet":
        model = DenseNet121(spatial_dims=3, in_channels=1, out_channels=16).eval()
    else:
        model = resnet18(spatial_dims=3, n_input_channels=1, num_classes=16).eval()
    count = counted(model, [model.get_submodule(layer)], torch.rand(2, 1, size, size, size))
    assert count.behind(0).backward / count.whole.forward == pytest.approx(share, rel=0.5)
