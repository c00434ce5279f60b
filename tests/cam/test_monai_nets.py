"""Identities between methods, and every method, on MONAI's own nets in 2D and 3D, non-cubic, in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from monai.networks.nets import DenseNet121, EfficientNetBN, SEResNet50, resnet18
from torch import nn

import camtrain as ct

pytestmark = pytest.mark.slow
B, L = 2, 3
GRIDS = {2: (64, 40), 3: (34, 40, 36)}
SMALL = {2: (40, 26), 3: (20, 26, 18)}  # enough for strides of 16
LONG = {2: (64, 40), 3: (66, 34, 36)}  # two cells at least behind EfficientNet's static padding
# Net -> (how it is made, last map, an earlier map whose values are not negative).
NETS = {
    "ResNet18": (lambda d: resnet18(spatial_dims=d, n_input_channels=1, num_classes=L), "layer4", "layer3"),
    "DenseNet121": (
        lambda d: DenseNet121(spatial_dims=d, in_channels=1, out_channels=L),
        "class_layers.relu",
        "features.transition2.relu",
    ),
    "SEResNet50": (lambda d: SEResNet50(spatial_dims=d, in_channels=1, num_classes=L), "layer4", "layer3"),
    "EfficientNet-B0": (
        lambda d: EfficientNetBN("efficientnet-b0", spatial_dims=d, in_channels=1, num_classes=L, pretrained=False),
        None,  # `_swish`, which runs twice in a forward: the default takes its last run
        "_blocks.3",
    ),
}
CASES = [(name, rank) for name in NETS for rank in GRIDS]
ids = [f"{name} {rank}D" for name, rank in CASES]


@pytest.fixture(scope="module", params=CASES, ids=ids)
def case(request):
    name, rank = request.param
    make, last, early = NETS[name]
    torch.manual_seed(0)
    model = make(rank)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.2)
    grid = {"ResNet18": SMALL, "EfficientNet-B0": LONG}.get(name, GRIDS)[rank]
    image = torch.rand(B, 1, *grid, generator=torch.Generator().manual_seed(1))
    return name, model.double().eval(), image.double(), last, early


@pytest.fixture(scope="module")
def part(case):
    """Enough of the image for the earlier layer: EfficientNet's last map needs far more than that one."""
    name, _, image, _, _ = case
    return image[..., :36, :, :] if name == "EfficientNet-B0" and image.ndim == 5 else image


def sums(maps):
    return maps.flatten(2).sum(2)


def test_pool_and_fc_make_the_gradient_family_agree(case):
    """I4: the last map lies right before pool + FC."""
    _, model, image, last, _ = case
    maps = {m: ct.explain(model, image, m, last) for m in ("cam", "gradcam", "hirescam", "respondcam")}
    cells = maps["cam"][0, 0].numel()
    for method in ("gradcam", "hirescam", "respondcam"):
        torch.testing.assert_close(maps[method] * cells, maps["cam"], rtol=1e-9, atol=1e-12)
    bias = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].bias.detach()
    torch.testing.assert_close(sums(maps["hirescam"]) + bias, model(image).detach(), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def account(case, part):
    """Of the earlier layer."""
    _, model, _, _, early = case
    return ct.account(model, part, early)


def test_respond_and_hires_have_one_sum(case, part, account):
    """I1, also for a signed layer, which is warned of, wherever no channel needs the safe denominator."""
    name, model, _, _, early = case
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hires, respond = (sums(ct.explain(model, part, m, early)) for m in ("hirescam", "respondcam"))
    signed = name == "EfficientNet-B0"
    assert [f"layer {early!r} gives negative values" in str(w.message) for w in said] == [True] * signed
    whole = account.respond_clipped == 0
    assert whole.any() if signed else whole.all()
    assert (hires - respond)[whole].abs().max() < 1e-8 * hires.abs().max()


def test_the_account_is_exact_or_says_why_not(case, part, account):
    """I3: cells and every bias behind the layer add up to the logit, unless something is not piecewise linear."""
    name, model, image, last, _ = case
    exact = ct.account(model, image, last)
    assert exact.valid
    assert exact.residual.abs().max() < 1e-10
    assert account.valid is (name in ("ResNet18", "DenseNet121"))
    if account.valid:
        assert account.residual.abs().max() < 1e-10
    else:
        assert account.why
    total = account.cells.flatten(2).sum(2) + account.bias + account.residual
    torch.testing.assert_close(total, model(part).detach(), rtol=1e-9, atol=1e-12)


def test_linear_in_the_score(case, part):
    """I7."""
    _, model, _, _, early = case
    for method in ("hirescam", "lrp"):
        each = ct.explain(model, part, method, early, labels=[2, 0])
        both = ct.explain(model, part, method, early, target=lambda y: y[:, 2] - 2 * y[:, 0])
        assert (both[:, 0] - each[:, 0] + 2 * each[:, 1]).abs().max() < 1e-8 * each.abs().max()


@pytest.mark.parametrize("method", [row.name for row in ct.methods() if row.name != "cam"])
def test_one_sample_alone_is_the_same_as_in_a_batch(case, part, method):
    """I8, for every method at an early layer."""
    name, model, _, _, early = case
    image = part
    options = {"scorecam": {"channels": 3, "progress": False}}.get(method, {})
    if method.startswith("guided") and name == "EfficientNet-B0":
        with pytest.raises(ct.InputError, match="approximate=True"):
            ct.explain(model, image, method, early, labels=[1])
        options = {"approximate": True}
    labels = torch.tensor([[2], [0]])
    together = ct.explain(model, image, method, early, labels=labels, **options)
    assert torch.isfinite(together).all()
    if method != "guided_gradcam":  # zero where Grad-CAM has no positive cell, which happens with random weights
        assert together.abs().flatten(1).max(1).values.min() > 0
    alone = ct.explain(model, image[1:], method, early, labels=labels[1:], **options)
    assert (alone[0] - together[1]).abs().max() <= 1e-7 * together[1].abs().max()
