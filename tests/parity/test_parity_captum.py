"""The same numbers as captum, where captum is right; the right numbers where it is not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from captum.attr import GuidedBackprop, GuidedGradCam, LayerGradCam, LayerGradientXActivation
from parity_tools import (
    GRID,
    LAYER,
    assert_untouched,
    guided_by_hand,
    image,
    in_training,
    inplace_net,
    mlp_net,
    monai_case,
    plain_copy,
    same,
    state_of,
    truth,
)

import camtrain as ct

LABELS = [2, 0]
LAYER_METHODS = {"gradcam": LayerGradCam, "hirescam": LayerGradientXActivation}
ONE_LABEL = "one label per call"


def layer_map(method, model, layer, x, label):
    """captum's map of one label, signed, on the layer's grid: (B, *S')."""
    found = LAYER_METHODS[method](model, model.get_submodule(layer)).attribute(x, target=label)
    return found.detach().sum(dim=1)


def guided(model, x, label):
    """captum's guided backpropagation, image channels summed: (B, *S)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GuidedBackprop(model).attribute(x.clone(), target=label).detach().sum(dim=1)


def guided_cam(model, layer, x, label, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tool = GuidedGradCam(model, model.get_submodule(layer))
        return tool.attribute(x.clone(), target=label, interpolate_mode=mode).detach().sum(dim=1)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("method", LAYER_METHODS)
def test_layer_maps(agree, method, rank):
    """captum explains one label per call and gives signed maps: nothing to step around but the loop over labels."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, method, LAYER, labels=LABELS)
    theirs = torch.stack([layer_map(method, plain_copy(model), LAYER, x, i) for i in LABELS], dim=1)
    agree(ours, theirs, library="captum", method=method, net=f"small {rank}D", around=ONE_LABEL, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["DenseNet121", "ResNet18"])
@pytest.mark.parametrize("method", LAYER_METHODS)
def test_layer_maps_in_the_middle_of_monai_nets(agree, method, net):
    """Asked on a copy in eval mode: captum runs the model in the mode that it finds."""
    model, layer, x = monai_case(net)
    ours = ct.explain(model, x, method, layer, labels=LABELS)
    theirs = torch.stack([layer_map(method, plain_copy(model), layer, x, i) for i in LABELS], dim=1)
    agree(ours, theirs, library="captum", method=method, net=f"{net} 3D", around=ONE_LABEL, tolerance=2e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_guided_backprop(agree, rank):
    """captum hooks modules of the class ReLU, and gives one label per call: asked on a net that has only such."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, "guided_backprop", labels=LABELS)
    theirs = torch.stack([guided(plain_copy(model), x, i) for i in LABELS], dim=1)
    around = f"{ONE_LABEL}, ReLU as modules"
    agree(
        ours, theirs, library="captum", method="guided_backprop", net=f"small {rank}D", around=around, tolerance=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("net", ["DenseNet121", "ResNet18"])
def test_guided_backprop_on_monai_nets(agree, net):
    """In-place ReLUs (both nets) and modules called twice in one forward (ResNet18): right in captum as well."""
    model, _, x = monai_case(net)
    ours = ct.explain(model, x, "guided_backprop", labels=LABELS)
    theirs = torch.stack([guided(copy.deepcopy(model), x, i) for i in LABELS], dim=1)
    around = f"{ONE_LABEL}, ReLU as modules"
    agree(ours, theirs, library="captum", method="guided_backprop", net=f"{net} 3D", around=around, tolerance=2e-5)


@pytest.mark.parametrize(("rank", "mode"), [(2, "bilinear"), (3, "trilinear")])
def test_guided_gradcam(agree, rank, mode):
    """captum enlarges by nearest neighbour unless told: asked for the linear enlargement of the paper."""
    model, x = mlp_net(rank), image(rank)
    ours = ct.explain(model, x, "guided_gradcam", LAYER, labels=LABELS)
    assert ours.shape[2:] == GRID[:rank]
    theirs = torch.stack([guided_cam(plain_copy(model), LAYER, x, i, mode) for i in LABELS], dim=1)
    around = "interpolate_mode set to linear"
    agree(ours, theirs, library="captum", method="guided_gradcam", net=f"small {rank}D", around=around, tolerance=1e-12)


@pytest.mark.slow
def test_guided_gradcam_on_densenet121(agree):
    """As above, in the middle of the net."""
    model, layer, x = monai_case("DenseNet121")
    ours = ct.explain(model, x, "guided_gradcam", layer, labels=LABELS)
    theirs = torch.stack([guided_cam(plain_copy(model), layer, x, i, "trilinear") for i in LABELS], dim=1)
    around = "interpolate_mode set to linear"
    agree(ours, theirs, library="captum", method="guided_gradcam", net="DenseNet121 3D", around=around, tolerance=2e-5)


def test_guided_backprop_by_hand_where_one_relu_module_is_called_twice():
    """The truth for a net whose blocks share one ReLU: every ReLU replaced by a function with the guided gradient."""
    model, _, x = monai_case("ResNet18", rank=2)
    ours = ct.explain(model, x, "guided_backprop", labels=LABELS)
    expected = torch.stack([guided_by_hand(model, x, i).sum(dim=1) for i in LABELS], dim=1)
    same(ours, expected, 2e-5)


def test_guided_gradcam_is_enlarged_linearly():
    """captum repeats cells (nearest neighbour) unless told otherwise, so that its product shows the layer's grid."""
    model, x = mlp_net(), image()
    cells = truth(model, LAYER, x, "gradcam", LABELS).relu()
    large = torch.nn.functional.interpolate(cells, GRID, mode="trilinear", align_corners=False)
    expected = torch.stack([guided_by_hand(model, x, i).sum(dim=1) for i in LABELS], dim=1) * large
    same(ct.explain(model, x, "guided_gradcam", LAYER, labels=LABELS), expected)


def test_a_model_in_training_is_left_alone_and_explained_in_eval_mode():
    """captum and torchcam run the model in the mode they find: dropout stays on and BatchNorm statistics move.

    grad-cam and MONAI overwrite every gradient; grad-cam leaves the model in eval mode, MONAI puts a frozen BatchNorm
    back to train, flips in-place flags and leaves its hooks behind.
    """
    model, x = inplace_net(), image()
    expected = truth(model, "relu2", x, "hirescam")
    in_training(model, x)
    # The forward of the training step has moved the statistics of the live BatchNorms; put the trained ones back.
    model.load_state_dict(inplace_net().state_dict())
    before = state_of(model)
    same(ct.explain(model, x, "hirescam", "relu2"), expected)
    assert_untouched(model, before)
