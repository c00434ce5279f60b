"""The same numbers as torchcam, where it is right; the right numbers where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity_tools import (
    GRID,
    LAYER,
    image,
    mlp_net,
    monai_case,
    peer,
    plain_copy,
    pool_net,
    same,
    truth,
)

import camtrain as ct

peer("torchcam")
from torchcam.methods import CAM, GradCAM, LayerCAM, ScoreCAM, XGradCAM  # noqa: E402

LABELS = [2, 0]
GRADIENT_FAMILY = {"gradcam": GradCAM, "layercam": LayerCAM, "xgradcam": XGradCAM}
RAW = "normalized=False, our ReLU added"


def asked(tool, model, x, labels=LABELS):
    """torchcam's maps of a batch, not normalised: (B, n, *S')."""
    maps = []
    for label in labels:
        with torch.enable_grad():
            scores = model(x)
        maps.append(tool(label, scores, normalized=False)[0].detach())
    return torch.stack(maps, dim=1)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("method", GRADIENT_FAMILY)
def test_gradient_family(agree, method, rank):
    """torchcam applies the outer ReLU and min-max by default: the latter is switched off, the former added to ours."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, method, LAYER, labels=LABELS).relu()
    copied = plain_copy(model)
    with GRADIENT_FAMILY[method](copied, LAYER) as tool:
        theirs = asked(tool, copied, x)
    agree(ours, theirs, library="torchcam", method=method, net=f"small {rank}D", around=RAW, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["DenseNet121", "ResNet18"])
@pytest.mark.parametrize("method", GRADIENT_FAMILY)
def test_gradient_family_in_the_middle_of_monai_nets(agree, method, net):
    """As above, on a copy in eval mode: torchcam leaves the mode as it finds it, BatchNorm statistics would move."""
    model, layer, x = monai_case(net)
    ours = ct.explain(model, x, method, layer, labels=LABELS).relu()
    copied = plain_copy(model)
    with GRADIENT_FAMILY[method](copied, layer) as tool:
        theirs = asked(tool, copied, x)
    agree(ours, theirs, library="torchcam", method=method, net=f"{net} 3D", around=RAW, tolerance=2e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_cam(agree, rank):
    """torchcam reads the weights off the linear layer it is given; no ReLU, no bias."""
    model, x = pool_net(rank), image(rank)
    ours = ct.explain(model, x, "cam", LAYER, labels=LABELS)
    copied = plain_copy(model)
    with CAM(copied, LAYER, fc_layer="out") as tool:
        theirs = asked(tool, copied, x)
    around = "normalized=False"
    agree(ours, theirs, library="torchcam", method="cam", net=f"small pool {rank}D", around=around, tolerance=1e-12)


@pytest.mark.parametrize("rank", [2, 3])
def test_scorecam(agree, rank):
    """On a layer with the image's own grid, where it does not matter whether masks are normalised or enlarged first.

    torchcam divides a mask by its largest value + 1e-8, and applies the outer ReLU.
    """
    model, x = mlp_net(rank, head_scale=20.0, stride=1), image(rank)
    ours = ct.explain(model, x, "scorecam", LAYER, labels=LABELS).relu()
    copied = plain_copy(model)
    with ScoreCAM(copied, LAYER) as tool:
        theirs = asked(tool, copied, x)
    around = "layer on the image's grid; normalized=False, our ReLU added"
    agree(ours, theirs, library="torchcam", method="scorecam", net=f"small {rank}D", around=around, tolerance=1e-6)


def test_scorecam_on_a_coarse_layer():
    """torchcam normalises masks first and enlarges them then, so that they end below 1. Here as in the paper."""
    model, x = mlp_net(head_scale=20.0), image()
    ours = ct.explain(model, x, "scorecam", LAYER, labels=LABELS)
    rows = []
    for case in x:
        active = model[:4](case[None]).detach()[0]
        logits = []
        for channel in active:
            mask = F.interpolate(channel[None, None], GRID, mode="trilinear", align_corners=False)[0, 0]
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            logits.append(model((case * mask)[None]).detach()[0])
        weights = (torch.stack(logits) - model(torch.zeros_like(case[None])).detach()).softmax(dim=0)
        rows.append(torch.stack([sum(w * a for w, a in zip(weights[:, i], active, strict=True)) for i in LABELS]))
    same(ours, torch.stack(rows))


@pytest.mark.parametrize("rank", [2, 3])
def test_gradcam_pp(rank):
    """torchcam 0.5 divides a copy: its weights stay sum(G^2 ReLU(G)), undivided. No parity here, only the formula."""
    model, x = mlp_net(rank), image(rank)
    same(ct.explain(model, x, "gradcam++", LAYER), truth(model, LAYER, x, "gradcam++"))


def test_inside_no_grad():
    """torchcam raises where gradients are switched off, which is what a validation loop does."""
    model, x = mlp_net(), image()
    with torch.no_grad():
        maps = ct.explain(model, x, "gradcam", LAYER, labels=LABELS)
    same(maps, truth(model, LAYER, x, "gradcam", LABELS))
