"""What must hold between methods, logits and batches (rules 1, 2, 3, 5, 6; identities I1 to I8)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import camtrain as ct

B, L = 3, 5
GRIDS = {1: (9,), 2: (8, 6), 3: (6, 8, 4)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
ALL = ["gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "respondcam"]


class GlobalMean(nn.Module):
    def forward(self, activations):
        return activations.mean(dim=tuple(range(2, activations.ndim)))


class PerSlice(nn.Module):
    def __init__(self, channels, grid, labels):
        super().__init__()
        self.fc = CONV[len(grid)](channels, labels, (1, *grid[1:]))

    def forward(self, activations):
        return self.fc(activations).flatten(2).mean(dim=2)


def trunk(rank):
    return nn.Sequential(CONV[rank](2, 4, 3, stride=2, padding=1), nn.ReLU())


def image(rank, batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, 2, *GRIDS[rank], dtype=torch.float64)


def net(kind, rank):
    torch.manual_seed(0)
    grid = tuple((size + 1) // 2 for size in GRIDS[rank])
    cells = torch.Size(grid).numel()
    head = {
        "pool": [GlobalMean(), nn.Linear(4, L)],
        "pool without bias": [GlobalMean(), nn.Linear(4, L, bias=False)],
        "flatten": [nn.Flatten(), nn.Linear(4 * cells, L)],
        "per slice": [PerSlice(4, grid, L)],
        "mlp without bias": [nn.Flatten(), nn.Linear(4 * cells, 7, bias=False), nn.ReLU(), nn.Linear(7, L, bias=False)],
    }[kind]
    return nn.Sequential(trunk(rank), *head).double().eval()


def total(maps):
    return maps.flatten(2).sum(dim=2)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["flatten", "per slice", "pool"])
def test_hirescam_and_bias_add_up_to_the_logit(kind, rank):
    model = net(kind, rank)
    maps = ct.explain(model, image(rank), layer="0")
    bias = model[-1].fc.bias if kind == "per slice" else model[-1].bias
    assert maps.dtype == torch.float64
    torch.testing.assert_close(total(maps) + bias, model(image(rank)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_per_slice_head_carries_one_over_the_number_of_slices(rank):
    """Slice n's part of the map adds up to that slice's own score over N."""
    model = net("per slice", rank)
    activations = model[0](image(rank))
    slices = activations.shape[2]
    scores = model[1].fc(activations).flatten(2) - model[1].fc.bias[:, None]  # (B, L, N)
    maps = ct.explain(model, image(rank), layer="0")
    torch.testing.assert_close(maps.flatten(3).sum(dim=3), scores / slices, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_behind_pool_and_fc_the_methods_agree_up_to_the_number_of_cells(rank):
    model = net("pool", rank)
    maps = {m: ct.explain(model, image(rank), m, "0") for m in ("cam", "gradcam", "hirescam", "respondcam", "xgradcam")}
    cells = maps["cam"][0, 0].numel()
    for method in ("gradcam", "hirescam", "respondcam", "xgradcam"):
        torch.testing.assert_close(maps[method] * cells, maps["cam"], rtol=1e-10, atol=1e-12)
    mean = maps["cam"].flatten(2).mean(dim=2)
    torch.testing.assert_close(mean + model[-1].bias, model(image(rank)), rtol=1e-12, atol=1e-12)


def test_behind_a_flatten_head_hirescam_is_not_gradcam():
    model = net("flatten", 3)
    hires, grad = (ct.explain(model, image(3), m, "0") for m in ("hirescam", "gradcam"))
    cosine = nn.functional.cosine_similarity(hires.flatten(2), grad.flatten(2), dim=2)
    assert cosine.abs().max() < 0.9


def test_zero_head_weights_in_a_region_give_zero_hirescam_there_but_not_gradcam():
    model = net("flatten", 3)
    with torch.no_grad():
        model[-1].weight.view(L, 4, 3, 4, 2)[:, :, :2] = 0
    hires, grad = (ct.explain(model, image(3), m, "0") for m in ("hirescam", "gradcam"))
    assert torch.equal(hires[:, :, :2], torch.zeros_like(hires[:, :, :2]))
    assert hires[:, :, 2:].abs().max() > 0
    assert grad[:, :, :2].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["pool", "flatten", "per slice", "mlp without bias"])
def test_respondcam_and_hirescam_have_one_sum(kind):
    model = net(kind, 3)
    sums = [total(ct.explain(model, image(3), m, "0")) for m in ("respondcam", "hirescam")]
    torch.testing.assert_close(*sums, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["pool without bias", "mlp without bias"])
def test_without_biases_the_sum_is_the_logit(kind):
    model = net(kind, 3)
    for method in ("respondcam", "hirescam"):
        maps = ct.explain(model, image(3), method, "0")
        torch.testing.assert_close(total(maps), model(image(3)), rtol=1e-10, atol=1e-12)


def test_eval_batch_norm_behind_the_layer_enters_the_bias_term():
    rank = 3
    model = net("flatten", rank)
    norm = NORM[rank](4).double().eval()
    with torch.no_grad():
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.normal_(), norm.bias.normal_()
    model.insert(1, norm)
    maps = ct.explain(model, image(rank), layer="0")
    shift = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    constant = (model[-1].weight.view(L, 4, -1).sum(dim=2) * shift).sum(dim=1) + model[-1].bias
    torch.testing.assert_close(total(maps) + constant, model(image(rank)), rtol=1e-10, atol=1e-12)


def test_instance_norm_behind_the_layer_makes_the_sum_zero_whatever_the_logit():
    model = net("flatten", 3)
    model.insert(1, INSTANCE[3](4, eps=1e-12).double())
    maps = ct.explain(model, image(3), layer="0")
    assert model(image(3)).abs().max() > 0.1
    assert maps.abs().max() > 1e-2
    assert total(maps).abs().max() < 1e-6


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("kind", ["flatten", "mlp without bias"])
def test_maps_of_a_sample_do_not_depend_on_the_others(kind, method):
    model = net(kind, 2)
    together = ct.explain(model, image(2), method, "0")
    alone = torch.cat([ct.explain(model, image(2)[b : b + 1], method, "0") for b in range(B)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_maps_of_a_flipped_image_are_flipped_maps(axis, method):
    """A net that commutes with flips: kernels that are their own mirror image, stride 1, global pooling."""
    torch.manual_seed(0)
    conv = nn.Conv3d(2, 4, 3, padding=1)
    with torch.no_grad():
        for dim in (2, 3, 4):
            conv.weight.copy_((conv.weight + conv.weight.flip(dim)) / 2)
    after = nn.Conv3d(4, 4, 1)
    model = nn.Sequential(conv, nn.ReLU(), after, nn.ReLU(), GlobalMean(), nn.Linear(4, L)).double()
    maps = ct.explain(model, image(3), method, "1")
    flipped = ct.explain(model, image(3).flip(axis), method, "1")
    torch.testing.assert_close(flipped, maps.flip(axis), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["flatten", "mlp without bias"])
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "xgradcam", "respondcam"])
def test_maps_are_additive_in_the_score(kind, method):
    model = net(kind, 2)
    maps = ct.explain(model, image(2), method, "0")
    difference = ct.explain(model, image(2), method, "0", target=lambda y: y[:, 1] - 2 * y[:, 3])
    assert difference.shape == (B, 1, *maps.shape[2:])
    torch.testing.assert_close(difference[:, 0], maps[:, 1] - 2 * maps[:, 3], rtol=1e-10, atol=1e-12)


def test_a_positive_and_a_negative_logit_keep_their_signs():
    """No ReLU, no normalisation: evidence against a label stays negative."""
    model = net("flatten", 2)
    mirrored = copy.deepcopy(model)
    with torch.no_grad():
        mirrored[-1].weight.neg_(), mirrored[-1].bias.neg_()
    maps = ct.explain(model, image(2), layer="0")
    torch.testing.assert_close(ct.explain(mirrored, image(2), layer="0"), -maps)
    assert (maps < 0).any()
    assert (maps > 0).any()


def test_cam_is_refused_where_it_is_not_defined():
    for kind in ("flatten", "mlp without bias"):
        with pytest.raises(ct.InputError, match="global average pooling"):
            ct.explain(net(kind, 2), image(2), "cam", "0")
