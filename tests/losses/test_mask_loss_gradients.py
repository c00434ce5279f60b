"""First and second derivatives of every form, straight and through an attention map."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from camtrain.losses import OrganMaskLoss

SETTINGS = list(itertools.product(["softplus", "l2", "energy"], ["all", "present"], ["global", "per_label"]))


def a_case():
    rng = torch.Generator().manual_seed(0)
    allowed = torch.rand(2, 3, 2, 2, generator=rng) < 0.5
    allowed[..., 0, 0], allowed[..., 1, 1] = True, False
    label = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, float("nan")]])
    maps = torch.randn(2, 3, 2, 2, generator=rng, dtype=torch.float64)
    maps += 0.05 * maps.sign()  # away from the kink of relu
    return maps.requires_grad_(), allowed, label


@pytest.mark.parametrize(("form", "labels", "reduction"), SETTINGS)
def test_gradients(form, labels, reduction):
    maps, allowed, label = a_case()
    module = OrganMaskLoss(form, labels=labels, reduction=reduction, label_weights=[1.0, 2.0, 0.5])
    assert gradcheck(lambda m: module(m, allowed, label), maps)
    assert gradgradcheck(lambda m: module(m, allowed, label), maps)


@pytest.mark.parametrize("labels", ["all", "present"])
def test_gradients_of_l2_normalised_with_its_constant_held(labels):
    """Finite differences would move the constant, so the maps enter twice: here only the numerator's copy moves."""
    maps, allowed, label = a_case()
    form = OrganMaskLoss("l2_normalised", labels=labels, weight=1.0)
    takes_part = (label == 1) | ((label == 0) & (labels == "all"))
    pairs = takes_part[:, :, None, None].double()
    constant = (maps.detach().square() * pairs).sum((0, 2, 3))

    def held(m):
        return ((m.square() * pairs * ~allowed).sum((0, 2, 3)) / constant).mean()

    assert gradcheck(held, maps)
    assert gradgradcheck(held, maps)
    torch.testing.assert_close(form(maps, allowed, label), held(maps))
    ours = torch.autograd.grad(form(maps, allowed, label), maps)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(held(maps), maps)[0])


@pytest.mark.parametrize("form", ["softplus", "l2", "energy"])
def test_gradients_through_a_hirescam_map(form):
    """The parameters before the tapped layer and the head's weights both feel the loss."""
    _, allowed, label = a_case()
    rng = torch.Generator().manual_seed(1)
    image = torch.randn(2, 2, 2, 2, generator=rng, dtype=torch.float64)
    stem = torch.randn(4, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    head = torch.randn(3, 4, 2, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    module = OrganMaskLoss(form)

    def loss(stem, head):
        activations = torch.tanh(torch.einsum("kc,bcxy->bkxy", stem, image))
        logits = torch.einsum("bkxy,lkxy->bl", activations, head)
        columns = [torch.autograd.grad(y, activations, create_graph=True)[0] for y in logits.sum(0).unbind()]
        return module((torch.stack(columns, 1) * activations[:, None]).sum(2), allowed, label)

    assert gradcheck(loss, (stem, head))
