"""A logit is the sum of its cells, its biases, and nothing else: in every net, mode and form of labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from account_tools import GRIDS, B, L, bias_by_parameters, cnn, image, shaken, total
from monai.networks.nets import DenseNet121, resnet18
from torch import nn

import camtrain as ct
from camtrain.cam.account import account
from camtrain.models import AxialNet, FlattenNet


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_cells_and_biases_add_up_to_the_logit(rank):
    model, picture = cnn(rank), image(rank)
    found = account(model, picture, "1")
    assert found.valid, found.why
    assert found.balanced.all()
    assert found.layer == "1"
    torch.testing.assert_close(found.logits, model(picture).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total(found), found.logits, rtol=0, atol=1e-10)
    assert found.residual.abs().max() < 1e-10
    torch.testing.assert_close(found.cells, ct.explain(model, picture, layer="1"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.channels.sum(dim=2), found.cells.flatten(2).sum(dim=2), rtol=0, atol=1e-10)
    assert found.cells.shape == (B, L, *(size - 2 for size in GRIDS[rank]))
    assert found.channels.shape == found.importance.shape == (B, L, 4)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_bias_is_that_of_the_parameters_behind_the_layer(rank):
    model, picture = cnn(rank), image(rank)
    behind = [m for m in model[2:] if getattr(m, "bias", None) is not None]
    assert len(behind) == 4
    expected = bias_by_parameters(model, behind, picture)
    torch.testing.assert_close(account(model, picture, "1").bias, expected, rtol=1e-10, atol=1e-10)


def test_importance_is_the_mean_gradient_of_each_channel():
    model, picture = cnn(2), image(2)
    found = account(model, picture, "1")
    activations = model[:2](picture).detach().requires_grad_()
    for label in range(L):
        (gradient,) = torch.autograd.grad(model[2:](activations.clone())[:, label].sum(), activations)
        torch.testing.assert_close(found.importance[:, label], gradient.mean(dim=(2, 3)))
        torch.testing.assert_close(found.channels[:, label], (gradient * activations).sum(dim=(2, 3)).detach())
    torch.testing.assert_close(found.activations, activations.detach())


@pytest.mark.parametrize(("net", "picture", "layers"), [
    (lambda: AxialNet(labels=L, variant="small", image_size=(40, 32), slice_axis=2), (B, 1, 40, 32, 12), ["stack"]),
    (
        lambda: AxialNet(labels=L, variant="small", image_size=(40, 32), slice_axis=2, pool="max"),
        (B, 1, 40, 32, 12),
        ["stack"],
    ),
    (lambda: FlattenNet(labels=L, size=(24, 18, 12)), (B, 1, 24, 18, 12), ["relu", "features.3", None, "input"]),
])  # fmt: skip
def test_nets_of_this_package_in_float32(net, picture, layers):
    torch.manual_seed(0)
    model, picture = shaken(net()), torch.rand(picture)
    for layer in layers:
        found = account(model, picture, layer)
        assert found.valid, found.why
        torch.testing.assert_close(total(found), model.eval()(picture).detach(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("net", "layers"), [
    (lambda: DenseNet121(3, 1, L), ["class_layers.relu", "features.denseblock3.denselayer5", "features.norm5"]),
    (lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=L), ["layer4", "layer2"]),
], ids=["densenet121", "resnet18"])  # fmt: skip
def test_monai_nets_in_float32(net, layers):
    torch.manual_seed(0)
    model, picture = shaken(net()), torch.rand(B, 1, 32, 40, 36)
    for layer in layers:
        found = account(model, picture, layer)
        assert found.valid, found.why
        assert found.bias.abs().max() > 0.01
        torch.testing.assert_close(total(found), model.eval()(picture).detach(), rtol=0, atol=1e-5)


class Slices(nn.Module):
    """2D convolution over N slices of a volume, then a maximum over slices."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv3d(1, 3, 1), nn.Conv2d(3, 4, 3), nn.Linear(4, L)

    def forward(self, volume):
        maps = self.first(volume)
        rows = F.relu(self.second(maps.transpose(1, 2).flatten(0, 1)), inplace=True).mean(dim=(2, 3))
        return self.fc(rows).unflatten(0, (len(volume), -1)).amax(dim=1)


def test_rows_of_slices_are_folded_to_their_sample():
    torch.manual_seed(0)
    model, picture = shaken(Slices()).double(), torch.randn(B, 1, 5, 7, 6, dtype=torch.float64)
    found = account(model, picture, "first")
    assert found.valid, found.why
    torch.testing.assert_close(found.bias, bias_by_parameters(model, [model.second, model.fc], picture))
    torch.testing.assert_close(total(found), found.logits, rtol=0, atol=1e-10)


class Twice(nn.Module):
    """One convolution that runs twice, a bias without a module, and a parameter that is added."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(L, 3)), nn.Parameter(torch.randn(L))
        self.offset = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, picture):
        maps = self.first(picture)
        maps = F.relu(self.shared(F.relu(self.shared(maps), inplace=True)) + self.offset)
        return F.linear(maps.mean(dim=(2, 3)), self.weight, bias=self.bias)


def test_shared_modules_count_per_call_and_functions_count_like_modules():
    torch.manual_seed(0)
    model = shaken(Twice()).double()
    found = account(model, image(2), "first")
    assert found.valid, found.why
    torch.testing.assert_close(total(found), found.logits, rtol=0, atol=1e-10)


def test_an_in_place_relu_on_the_output_of_a_linear_layer_over_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mix, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.Linear(4, L)

        def forward(self, picture):
            tokens = self.mix(self.first(picture).flatten(2).transpose(1, 2))
            return self.head(F.relu_(tokens)).mean(dim=1)

    torch.manual_seed(0)
    model, picture = shaken(Tokens()).double(), image(2)
    found = account(model, picture, "first")
    assert found.valid, found.why
    torch.testing.assert_close(found.bias, bias_by_parameters(model, [model.mix, model.head], picture))


def test_labels_are_those_of_explain():
    model, picture = cnn(2), image(2)
    everything = account(model, picture, "1")
    for labels in ([2, 0], torch.tensor([[2, 1], [0, 2]]), torch.tensor([True, False, True])):
        some = account(model, picture, "1", labels=labels)
        torch.testing.assert_close(some.cells, ct.explain(model, picture, layer="1", labels=labels))
        assert some.bias.shape == some.logits.shape == some.cells.shape[:2]
        torch.testing.assert_close(total(some), some.logits, rtol=0, atol=1e-10)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    masked = account(model, picture, "1", labels=lambda logits: mask)
    for word in ("logits", "cells", "bias", "residual", "channels", "importance"):
        got, full = getattr(masked, word), getattr(everything, word)
        torch.testing.assert_close(got[mask], full[mask], atol=1e-10, rtol=1e-10)
        assert got[~mask].isnan().all()
    assert masked.valid
    assert masked.balanced.equal(mask)
    none = account(model, picture, "1", labels=torch.zeros(B, L, dtype=torch.bool))
    assert none.valid
    assert none.cells.shape == everything.cells.shape
    assert none.cells.isnan().all()
    assert account(model, picture, "1", labels=[]).channels.shape == (B, 0, 4)


def test_samples_do_not_know_of_each_other():
    model, picture = cnn(3), image(3, 3)
    together = account(model, picture, "1")
    for b in range(3):
        alone = account(model, picture[b : b + 1], "1")
        for word in ("cells", "bias", "channels", "signed_share", "respond_clipped"):
            torch.testing.assert_close(getattr(alone, word)[0], getattr(together, word)[b], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "no_grad", "inference_mode", "frozen", "autocast", "bf16"])
def test_it_leaves_no_trace_and_is_exact_in_every_mode(mode):
    model, picture = cnn(2).float(), image(2).float()
    expected = account(model, picture, "1")
    model.train(mode == "train")
    if mode == "frozen":
        model.requires_grad_(False)
    if mode == "bf16":
        model.bfloat16()
    if mode != "frozen":
        model(picture.to(model[0].weight.dtype)).sum().backward()
    if mode == "train":
        expected = None
    before = [(p.grad.clone() if p.grad is not None else None, p.requires_grad) for p in model.parameters()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rng = torch.get_rng_state()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode)
    if mode == "autocast":
        context = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    with context() if context else torch.enable_grad():
        found = account(model, picture, "1")
    assert found.valid, found.why
    torch.testing.assert_close(total(found), found.logits, rtol=0, atol=1e-5)
    if mode not in ("bf16", "train"):
        torch.testing.assert_close(found.cells, expected.cells, rtol=1e-4, atol=1e-6)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training == (mode == "train") for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for (grad, requires), parameter in zip(before, model.parameters(), strict=True):
        assert parameter.requires_grad == requires
        assert grad is None if parameter.grad is None else torch.equal(grad, parameter.grad)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


def test_an_error_in_the_middle_leaves_no_trace():
    class Breaks(nn.Module):
        def forward(self, maps):
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Conv2d(2, 4, 3), Breaks()).train()
    with pytest.raises(RuntimeError, match="broken"):
        account(model, image(2).float(), "0")
    assert model.training
    assert not model[0]._forward_hooks
    assert torch.overrides._get_current_function_mode_stack() == []


def test_bad_input_is_told():
    model, picture = cnn(2), image(2)
    with pytest.raises(ct.InputError, match="has no layer 'laier'"):
        account(model, picture, "laier")
    with pytest.raises(ct.InputError, match="NaN or Inf"):
        account(model, picture * torch.nan, "1")
    with pytest.raises(ct.InputError, match="floating image"):
        account(model, picture.long(), "1")
    with pytest.raises(ct.InputError, match="spatial axes"):
        account(model, picture, "7")
    with pytest.raises(ct.InputError, match=r"labels= must lie in 0\.\.2"):
        account(model, picture, "1", labels=[3])
    with pytest.raises(ct.InputError, match="logits"):
        account(nn.Sequential(nn.Conv2d(2, 4, 3)).double(), picture, "0")


def test_a_checkpointed_batchnorm_behind_the_layer():
    """What a part saves must not depend on whether somebody listens to its biases."""
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, saving):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.saving = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), saving
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=1e-2), nn.ReLU())
            self.shift = nn.Parameter(torch.rand(4, 1, 1))
            nn.init.normal_(self.block[1].running_mean)
            nn.init.normal_(self.block[1].bias)

        def forward(self, image):
            features = self.conv(image)
            run = (lambda x: checkpoint(self.block, x, use_reentrant=False)) if self.saving else self.block
            features = run(features).clone()
            features += self.shift
            return self.fc(features.clamp(min=0).mean((2, 3)))

    image = torch.rand(2, 1, 8, 9).double()
    plain, saving = (ct.account(Net(saved).double().eval(), image, "conv") for saved in (False, True))
    for found in (plain, saving):
        assert found.valid, found.why
        assert found.residual.abs().max() < 1e-10
    torch.testing.assert_close(plain.bias, saving.bias)
