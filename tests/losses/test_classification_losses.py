"""Focal, asymmetric and weighted cross-entropy against loops written from the papers; gradients; extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from camtrain._errors import InputError
from camtrain.losses import AsymmetricLoss, CrossEntropyLoss, FocalLoss

NAN = float("nan")
LABEL = torch.tensor([[1.0, 0, NAN, 1, 0], [0, 1, 1, NAN, 0], [NAN] * 5])


def logits():
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def in_loops(of_present, of_absent, weights=None):
    """Mean over the known pairs, one number after the other."""
    total, known = 0.0, 0
    for row, truths in zip(logits().tolist(), LABEL.tolist(), strict=True):
        for column, (z, truth) in enumerate(zip(row, truths, strict=True)):
            if math.isnan(truth):
                continue
            p = 1 / (1 + math.exp(-z))
            total += (weights[column] if weights else 1) * of_present(p) if truth == 1 else of_absent(p)
            known += 1
    return total / known


@pytest.mark.parametrize("weights", [None, [1.0, 2.5, 0.5, 3.0, 7.0]])
def test_cross_entropy(weights):
    expected = in_loops(lambda p: -math.log(p), lambda p: -math.log(1 - p), weights)
    assert CrossEntropyLoss(weights)(logits(), LABEL).item() == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("weights", [None, [1.0, 2.5, 0.5, 3.0, 7.0]])
def test_focal(gamma, alpha, weights):
    a, b = (1, 1) if alpha is None else (alpha, 1 - alpha)
    expected = in_loops(
        lambda p: -a * (1 - p) ** gamma * math.log(p), lambda p: -b * p**gamma * math.log(1 - p), weights
    )
    assert FocalLoss(gamma, alpha, weights)(logits(), LABEL).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("neg", "pos", "margin"), [(4, 1, 0.05), (4, 0, 0.2), (2, 2, 0.0), (0, 0, 0.0), (0.5, 0.5, 0.1)]
)
def test_asymmetric(neg, pos, margin):
    def absent(p):
        shifted = max(p - margin, 0)
        return -(shifted**neg) * math.log(1 - shifted)

    expected = in_loops(lambda p: -((1 - p) ** pos) * math.log(p), absent)
    assert AsymmetricLoss(neg, pos, margin)(logits(), LABEL).item() == pytest.approx(expected)
    assert AsymmetricLoss(neg, pos, margin, detach_focus=True)(logits(), LABEL).item() == pytest.approx(expected)


def test_detached_focus_changes_the_gradient_only():
    values = []
    for detach in (False, True):
        z = logits().requires_grad_()
        AsymmetricLoss(detach_focus=detach)(z, LABEL).backward()
        values.append(z.grad)
    assert not torch.allclose(*values)
    # By hand, with the power as a constant: d/dz of -(1 - p) log p is then -(1 - p)^2.
    p = logits()[0, 0].sigmoid()
    assert values[1][0, 0].item() == pytest.approx(float(-((1 - p) ** 2) / 8))


ALL = [CrossEntropyLoss(), CrossEntropyLoss([1.0, 2, 3, 4, 5]), FocalLoss(), FocalLoss(0.5, 0.25), AsymmetricLoss()]


@pytest.mark.parametrize("loss", [*ALL, AsymmetricLoss(margin=0.0)], ids=repr)
def test_gradients(loss):
    z = logits().requires_grad_()
    assert gradcheck(lambda x: loss(x, LABEL), z)
    assert gradgradcheck(lambda x: loss(x, LABEL), z)


@pytest.mark.parametrize("loss", [*ALL, AsymmetricLoss(0.5, 0.5, 0.05), AsymmetricLoss(0, 0, 0.05)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(loss, dtype):
    z = torch.tensor([[-500.0, -90, 0, 90, 500]] * 3, dtype=dtype, requires_grad=True)
    value = loss(z, LABEL)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    value.backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad[LABEL.isnan()] == 0).all()


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_pairs_and_nothing_known(loss):
    z = logits().requires_grad_()
    pairs = type(loss)(
        **({"class_weights": loss.class_weights} if loss.class_weights is not None else {}), reduction="none"
    )
    each = pairs(z, LABEL)
    assert each.shape == (3, 5)
    assert (each[LABEL.isnan()] == 0).all()
    nothing = loss(z, torch.full((3, 5), NAN))
    assert nothing.item() == 0
    nothing.backward()
    assert (z.grad == 0).all()
    assert not loss.state_dict()


def test_mean_of_the_pairs_is_the_loss():
    each = FocalLoss(reduction="none")(logits(), LABEL)
    assert FocalLoss()(logits(), LABEL).item() == pytest.approx(float(each.sum() / 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FocalLoss(-1),
        lambda: FocalLoss(alpha=1.5),
        lambda: AsymmetricLoss(gamma_neg=-1),
        lambda: AsymmetricLoss(margin=1),
        lambda: CrossEntropyLoss([1, 0]),
        lambda: CrossEntropyLoss(reduction="sum"),
        lambda: CrossEntropyLoss([1, 2])(logits(), LABEL),
        lambda: CrossEntropyLoss()(logits(), LABEL[:2]),
    ],
)
def test_wrong_arguments(make):
    with pytest.raises(InputError):
        make()
