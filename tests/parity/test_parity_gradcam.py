"""The same numbers as grad-cam, where it is right; the right numbers where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity_tools import (
    GRID,
    LAYER,
    B,
    image,
    mlp_net,
    monai_case,
    peer,
    plain_copy,
    same,
    truth,
)

import camtrain as ct

peer("pytorch_grad_cam")
from pytorch_grad_cam import (  # noqa: E402
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackpropReLUModel,
    HiResCAM,
    LayerCAM,
    ScoreCAM,
    XGradCAM,
)
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

LABELS = [2, 0]
FAMILY = {
    "gradcam": GradCAM,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "xgradcam": XGradCAM,
    "gradcam++": GradCAMPlusPlus,
}
RAW = "one target per case, on a copy; raw map before its ReLU, min-max and zoom"


def raw_map(tool, model, layer, x, label):
    """grad-cam's map before its ReLU, normalisation and zoom, with one target for every case: (B, *S')."""
    targets = [ClassifierOutputTarget(label)] * len(x)
    tool(x, targets)
    kept = tool.activations_and_grads
    gradients = kept.gradients[0].numpy() if kept.gradients else None
    found = tool.get_cam_image(x, model.get_submodule(layer), targets, kept.activations[0].numpy(), gradients, False)
    return torch.as_tensor(found)


def raw_maps(make, model, layer, x, labels=LABELS):
    copied = plain_copy(model)
    with make(copied, [copied.get_submodule(layer)]) as tool:
        return torch.stack([raw_map(tool, copied, layer, x, label) for label in labels], dim=1)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("method", FAMILY)
def test_gradient_family(agree, method, rank):
    """One target for every case: grad-cam pairs targets with cases and leaves the cases without a partner at zero.

    Grad-CAM++ adds 1e-6 to a denominator of the size of G^2, XGrad-CAM 1e-7 to sum(A): large gradients keep the first
    out of sight.
    """
    model, x = mlp_net(rank, head_scale=1000.0), image(rank)
    ours = ct.explain(model, x, method, LAYER, labels=LABELS)
    theirs = raw_maps(FAMILY[method], model, LAYER, x)
    around = RAW + ("; large gradients" if method == "gradcam++" else "")
    tolerance = {"gradcam++": 1e-4, "xgradcam": 1e-6}.get(method, 1e-12)
    agree(ours, theirs, library="grad-cam", method=method, net=f"small {rank}D", around=around, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["DenseNet121", "ResNet18"])
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "xgradcam"])
def test_gradient_family_in_the_middle_of_monai_nets(agree, method, net):
    """As above; on a copy, since grad-cam overwrites every gradient and leaves the model in eval mode."""
    model, layer, x = monai_case(net)
    ours = ct.explain(model, x, method, layer, labels=[2])
    theirs = raw_maps(FAMILY[method], model, layer, x, [2])
    agree(ours, theirs, library="grad-cam", method=method, net=f"{net} 3D", around=RAW, tolerance=2e-5)


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_2d_as_called_by_users(agree, method):
    """The public call: ReLU, min-max, linear enlargement, min-max again. In 3D it enlarges by splines."""
    model, x = mlp_net(2), image(2)
    maps = ct.explain(model, x, method, LAYER, labels=[2]).relu()
    ours = _stretched(F.interpolate(_stretched(maps), GRID[:2], mode="bilinear"))[:, 0]
    copied = plain_copy(model)
    with FAMILY[method](copied, [copied.get_submodule(LAYER)]) as tool:
        theirs = torch.as_tensor(tool(x, [ClassifierOutputTarget(2)] * B))
    around = "one target per case; our ReLU, min-max, enlargement"
    agree(ours, theirs, library="grad-cam", method=method, net="small 2D, full call", around=around, tolerance=1e-5)


def _stretched(maps):
    """Each map from 0 to 1."""
    flat = maps.flatten(2)
    low = flat.amin(dim=2, keepdim=True)
    return ((flat - low) / (flat.amax(dim=2, keepdim=True) - low).clamp(min=1e-7)).reshape(maps.shape)


def test_scorecam(agree):
    """2D only, and on a layer with the image's own grid: grad-cam enlarges masks corner-aligned, which moves them.

    Its weights are the softmax of the logits themselves, the same as the softmax of their increase over any baseline;
    it makes float32 of the scores.
    """
    model, x = mlp_net(2, head_scale=20.0, stride=1), image(2)
    ours = ct.explain(model, x, "scorecam", LAYER, labels=LABELS)
    theirs = raw_maps(ScoreCAM, model, LAYER, x)
    around = "2D, layer on the image's grid, one target per case"
    agree(ours, theirs, library="grad-cam", method="scorecam", net="small 2D", around=around, tolerance=1e-5)


def test_guided_backprop(agree):
    """2D, one case per call; on a copy, since grad-cam swaps the ReLU modules of the model that it is given."""
    model, x = mlp_net(2), image(2)
    ours = ct.explain(model, x, "guided_backprop", labels=LABELS)
    rows = []
    for case in x:
        maps = [GuidedBackpropReLUModel(plain_copy(model))(case[None].clone(), target_category=i) for i in LABELS]
        rows.append(torch.stack([torch.as_tensor(m).sum(dim=-1) for m in maps]))
    around = "2D, batch of one, copy of the model"
    theirs = torch.stack(rows)
    agree(ours, theirs, library="grad-cam", method="guided_backprop", net="small 2D", around=around, tolerance=1e-12)


def test_one_label_for_a_whole_batch():
    """grad-cam with one target for three cases explains the first and returns zeros for the others, without a word."""
    model, x = mlp_net(), image()
    maps = ct.explain(model, x, "gradcam", LAYER, labels=[1])
    assert maps.shape[:2] == (B, 1)
    assert bool(maps.flatten(1).any(dim=1).all())
    same(maps, truth(model, LAYER, x, "gradcam", [1]))


def test_a_label_list_of_the_wrong_length_is_refused():
    """The same trap, asked per case: silent zeros there, an error here."""
    model, x = mlp_net(), image()
    for cases in (B - 1, B + 1):
        with pytest.raises(ct.InputError):
            ct.explain(model, x, "gradcam", LAYER, labels=torch.zeros(cases, 1, dtype=torch.long))


def test_small_gradients():
    """grad-cam's 1e-6 in Grad-CAM++ swallows every gradient below 1e-3; the formula has no such scale."""
    model, x = mlp_net(head_scale=1e-3), image()
    same(ct.explain(model, x, "gradcam++", LAYER), truth(model, LAYER, x, "gradcam++"))


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])
def test_bfloat16(method):
    """grad-cam goes through numpy, which has no bfloat16; here the map of a bfloat16 model is float32."""
    model, x = mlp_net(), image()
    expected = truth(model, LAYER, x, method, [2])
    maps = ct.explain(plain_copy(model).to(torch.bfloat16), x.to(torch.bfloat16), method, LAYER, labels=[2])
    assert maps.dtype == torch.float32
    # bfloat16 keeps three digits of every activation: the direction of the map must survive, not its last digits.
    assert float(F.cosine_similarity(maps.flatten().double(), expected.flatten(), dim=0)) > 0.99


def test_frozen_and_inside_no_grad():
    """grad-cam calls backward: with all parameters frozen, or under no_grad, it raises."""
    model, x = mlp_net(), image()
    expected = truth(model, LAYER, x, "gradcam", LABELS)
    model.requires_grad_(False)
    with torch.no_grad():
        same(ct.explain(model, x, "gradcam", LAYER, labels=LABELS), expected)
