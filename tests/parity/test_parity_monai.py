"""The same numbers as monai.visualize, where it is right; the right numbers where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.visualize import CAM, GradCAM, GradCAMpp
from parity_tools import (
    GRID,
    LAYER,
    L,
    image,
    inplace_net,
    mlp_net,
    monai_case,
    plain_copy,
    pool_net,
    same,
    scaled_to_one,
    truth,
)

import camtrain as ct

LABELS = [2, 0]
ALONE = "batch of one, explicit label, copy of the model; our ReLU added"


def one_by_one(tool, x, labels=LABELS):
    """MONAI's raw maps of cases and labels, each asked alone: (B, n, *S')."""
    rows = [[tool.compute_map(case[None], class_idx=label).detach()[0, 0] for label in labels] for case in x]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("rank", [2, 3])
def test_gradcam(agree, rank):
    """Asked with one case and a given label: without a label, MONAI adds every case's class to every case's map."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, "gradcam", LAYER, labels=LABELS).relu()
    theirs = one_by_one(GradCAM(plain_copy(model), LAYER), x)
    agree(ours, theirs, library="monai", method="gradcam", net=f"small {rank}D", around=ALONE, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["DenseNet121", "ResNet18"])
def test_gradcam_in_the_middle_of_monai_nets(agree, net):
    """As above; on a copy, since MONAI overwrites every gradient, switches in-place off and leaves its hooks behind."""
    model, layer, x = monai_case(net)
    ours = ct.explain(model, x, "gradcam", layer, labels=LABELS).relu()
    theirs = one_by_one(GradCAM(plain_copy(model), layer), x)
    agree(ours, theirs, library="monai", method="gradcam", net=f"{net} 3D", around=ALONE, tolerance=2e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_cam(agree, rank):
    """MONAI sends every cell through the linear layer, bias included: the bias is added to our map."""
    model, x = pool_net(rank), image(rank)
    label = 3
    ours = ct.explain(model, x, "cam", LAYER, labels=[label]) + model.out.bias[label]
    tool = CAM(plain_copy(model), LAYER, fc_layers="out")
    theirs = tool.compute_map(x, class_idx=[label] * len(x)).detach()
    around = "the head's bias added to our map"
    agree(ours, theirs, library="monai", method="cam", net=f"small pool {rank}D", around=around, tolerance=1e-12)


def test_gradcam_pp(agree):
    """Agrees up to one factor per map, behind a pool head, for a batch of one, with large gradients.

    MONAI weighs sum(A G^3) instead of sum(A) G^3 (the same behind a pool head only), keeps the factor exp(score) of the
    paper, adds 1e-7 to a denominator of the size of G^2, and multiplies the scores of the batch into the last axis.
    """
    model, x = pool_net(head_scale=100.0), image()
    labels = [i for i in range(L) if bool((ct.explain(model, x, "gradcam++", LAYER, labels=[i]) > 0).any())]
    ours = scaled_to_one(ct.explain(model, x, "gradcam++", LAYER, labels=labels))
    theirs = scaled_to_one(one_by_one(GradCAMpp(plain_copy(model), LAYER), x, labels))
    around = "pool head, batch of one, large gradients; one factor per map"
    agree(ours, theirs, library="monai", method="gradcam++", net="small pool 3D", around=around, tolerance=1e-4)


def test_gradcam_as_called_by_users(agree):
    """The public call enlarges, then normalises upside down (its largest value becomes 0): undone by 1 - map."""
    model, x = mlp_net(), image(batch=1)
    label = 2
    maps = F.interpolate(ct.explain(model, x, "gradcam", LAYER, labels=[label]).relu(), GRID, mode="trilinear")
    low, high = maps.amin(), maps.amax()
    theirs = 1 - torch.as_tensor(GradCAM(plain_copy(model), LAYER)(x, class_idx=label)).detach()
    around = "batch of one; our ReLU, enlargement, min-max; 1 - its map"
    ours = (maps - low) / (high - low)
    agree(ours, theirs, library="monai", method="gradcam", net="small 3D, full call", around=around, tolerance=1e-6)


def test_gradcam_pp_of_a_batch_as_long_as_an_axis():
    """MONAI multiplies the scores (B,) into the last axis: mostly an error, wrong maps where the sizes fit."""
    model, x = mlp_net(), image(batch=7)
    maps = ct.explain(model, x, "gradcam++", LAYER)
    assert maps.shape[-1] == len(x)
    same(maps, truth(model, LAYER, x, "gradcam++"))


def test_every_case_by_its_own_best_label():
    """MONAI's default label picks a B x B table of scores, so that every case is explained for all cases' labels."""
    model, x = mlp_net(), image(batch=6)
    model.out.bias.data -= model(x).detach().mean(dim=0)
    best = model(x).argmax(dim=1)
    assert len(best.unique()) > 1
    everything = truth(model, LAYER, x, "gradcam")
    expected = everything[torch.arange(len(x)), best][:, None]
    same(ct.explain(model, x, "gradcam", LAYER, labels=best[:, None]), expected)


def test_evidence_against_a_label_stays_visible():
    """MONAI's normaliser leaves an empty map at 0, which is its colour for the hottest; ours is signed."""
    model, x = pool_net(), image()
    model.out.weight.data[1] = -model.out.weight.data[1].abs()
    maps = ct.explain(model, x, "gradcam", LAYER, labels=[1])
    assert bool((maps <= 0).all())
    assert bool((maps < 0).any())
    same(maps, truth(model, LAYER, x, "gradcam", [1]))


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "gradcam++"])
def test_an_inplace_relu_behind_the_layer(method):
    """MONAI raises here: its full backward hooks make a view of the output, which is then changed in place.

    grad-cam mixes the gradient before the ReLU with the activation after it, and torchcam explains the layer after the
    one asked: what they keep of the layer is overwritten.
    """
    model, x = inplace_net(), image()
    before, after = (truth(model, name, x, method) for name in ("bn", "relu"))
    # Where activations are multiplied by their own gradients, what the ReLU takes away counts for nothing.
    assert (float((before - after).abs().max()) > 0.1 * float(before.abs().max())) == method.startswith("gradcam")
    same(ct.explain(model, x, method, "bn"), before)
    same(ct.explain(model, x, method, "relu"), after)
