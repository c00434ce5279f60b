"""What takes no part in the loss, one rule at a time; nothing left; values that are not computed; wrong shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from camtrain._errors import InputError
from camtrain._grid import to_grid
from camtrain.losses import OrganMaskLoss, organ_mask_loss

ALL_FORMS = ["softplus", "l2", "l2_normalised", "energy"]
NAN = float("nan")


def a_batch(seed: int = 0):
    """Three samples, four labels, 2 x 5 cells: nothing unusual in it."""
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, 2, 5, generator=rng, dtype=torch.float64)
    allowed = torch.rand(3, 4, 2, 5, generator=rng) < 0.4
    allowed[..., 0, 0], allowed[..., 1, 1] = True, False
    label = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.float64)
    return maps, allowed, label


def loss_and_grad(maps, allowed, label, **arguments):
    maps = maps.clone().requires_grad_()
    loss = organ_mask_loss(maps, allowed, label, **arguments)
    loss.backward()
    return loss.detach(), maps.grad


@pytest.mark.parametrize("form", ALL_FORMS)
def test_unknown_labels_take_no_part(form):
    maps, allowed, label = a_batch()
    label[:, 1] = NAN
    loss, grad = loss_and_grad(maps, allowed, label, form=form)
    keep = [0, 2, 3]
    torch.testing.assert_close(loss, organ_mask_loss(maps[:, keep], allowed[:, keep], label[:, keep], form=form))
    assert not grad[:, 1].any()
    parts = OrganMaskLoss(form).parts(maps, allowed, label)
    assert (parts.unknown_labels, parts.cases_without_organs, parts.labels_without_region) == (3, 0, 0)


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("told", [True, False])
def test_samples_without_organs_take_no_part_with_all_their_labels(form, told):
    maps, allowed, label = a_batch()
    has_organs = torch.tensor([True, False, True]) if told else None
    if not told:
        allowed[1] = False
    loss, grad = loss_and_grad(maps, allowed, label, form=form, has_organs=has_organs)
    keep = [0, 2]
    torch.testing.assert_close(loss, organ_mask_loss(maps[keep], allowed[keep], label[keep], form=form))
    assert not grad[1].any()
    parts = OrganMaskLoss(form).parts(maps, allowed, label, has_organs)
    assert (parts.unknown_labels, parts.cases_without_organs, parts.labels_without_region) == (0, 1, 0)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_present_labels_without_a_region_take_no_part(form):
    maps, allowed, label = a_batch()
    allowed[1, 2] = False
    loss, grad = loss_and_grad(maps, allowed, label, form=form)
    label_unknown = label.clone()
    label_unknown[1, 2] = NAN
    torch.testing.assert_close(loss, organ_mask_loss(maps, allowed, label_unknown, form=form))
    assert not grad[1, 2].any()
    parts = OrganMaskLoss(form).parts(maps, allowed, label)
    assert (parts.unknown_labels, parts.cases_without_organs, parts.labels_without_region) == (0, 0, 1)


@pytest.mark.parametrize(
    ("form", "acts"), [("softplus", True), ("l2", False), ("l2_normalised", False), ("energy", False)]
)
def test_absent_labels_without_a_region(form, acts):
    """Everything is forbidden for softplus; of where the organ is, the l2 forms know nothing."""
    maps, allowed, label = a_batch()
    allowed[0, 1] = False
    loss, grad = loss_and_grad(maps, allowed, label, form=form)
    assert bool(grad[0, 1].all()) is acts
    assert bool(grad[0, 1].any()) is acts
    assert OrganMaskLoss(form).parts(maps, allowed, label).labels_without_region == 0
    label[0, 1] = NAN
    assert torch.isclose(loss, organ_mask_loss(maps, allowed, label, form=form)).item() is not acts


def test_cropped_out_is_not_unsegmented():
    """Organs known but none in the crop: absent labels still forbid everything, unlike in an unsegmented sample."""
    maps, allowed, label = a_batch()
    allowed[1] = False
    label[1, 0] = 0
    yes, no = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    _, grad = loss_and_grad(maps, allowed, label, has_organs=yes)
    assert grad[1, 0].all()
    assert not grad[1, 1:].any()
    assert not loss_and_grad(maps, allowed, label, has_organs=no)[1][1].any()
    assert OrganMaskLoss().parts(maps, allowed, label, yes).labels_without_region == 3


@pytest.mark.parametrize(
    ("form", "absent_acts"), [("softplus", True), ("l2", False), ("l2_normalised", False), ("energy", False)]
)
def test_anywhere(form, absent_acts):
    maps, allowed, label = a_batch()
    allowed[:, 1] = True
    _, grad = loss_and_grad(maps, allowed, label, form=form)
    assert not grad[1:, 1].any()
    assert bool(grad[0, 1].all()) is absent_acts
    known = loss_and_grad(maps, allowed, label, form=form, labels="present")[0]
    keep = [0, 2, 3]
    kept = organ_mask_loss(maps[:, keep], allowed[:, keep], label[:, keep], form=form, labels="present")
    torch.testing.assert_close(known, kept)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_present_leaves_absent_labels_out(form):
    maps, allowed, label = a_batch()
    _, grad = loss_and_grad(maps.abs(), allowed, label, form=form, labels="present")
    assert not grad[label == 0].any()
    assert grad[label == 1].flatten(1).any(1).all()


def test_energy_leaves_out_pairs_without_positive_evidence():
    maps, allowed, label = a_batch()
    maps[0, 0] = -maps[0, 0].abs()
    loss, grad = loss_and_grad(maps, allowed, label, form="energy")
    assert not grad[0, 0].any()
    label[0, 0] = NAN
    torch.testing.assert_close(loss, organ_mask_loss(maps, allowed, label, form="energy"))


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("reduction", ["global", "per_label"])
@pytest.mark.parametrize("reason", ["unknown", "no organs", "no weight", "nan maps", "anywhere", "no samples"])
def test_nothing_left_is_exactly_zero_with_a_graph(form, reduction, reason):
    maps, allowed, label = a_batch()
    weights = [0.0] * 4 if reason == "no weight" else None
    if reason == "unknown":
        label[:] = NAN
    elif reason == "no organs":
        allowed[:] = False
    elif reason == "nan maps":
        maps[:] = NAN
    elif reason == "anywhere":
        allowed[:], label[:] = True, 1
    elif reason == "no samples":
        maps, allowed, label = maps[:0], allowed[:0], label[:0]
    loss, grad = loss_and_grad(maps, allowed, label, form=form, reduction=reduction, label_weights=weights)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("form", ["l2_normalised", "energy"])
@pytest.mark.parametrize("reduction", ["global", "per_label"])
@pytest.mark.parametrize("tiny", [0.0, 1e-250])
def test_scale_free_forms_of_maps_without_evidence_are_exactly_zero(form, reduction, tiny):
    maps, allowed, label = a_batch()
    maps = maps.sign() * tiny * (1e-60 if form == "energy" else 1)
    loss, grad = loss_and_grad(maps, allowed, label, form=form, reduction=reduction)
    assert loss.item() == 0
    assert grad.abs().max() < 1e-200


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("labels", ["all", "present"])
def test_maps_that_were_not_computed_reach_neither_value_nor_gradient(form, labels):
    maps, allowed, label = a_batch()
    selected = torch.ones(3, 4, dtype=torch.bool)
    selected[0, 1] = selected[2, 0] = False
    label_unknown = label.masked_fill(~selected, NAN)
    expected = organ_mask_loss(maps, allowed, label_unknown, form=form, labels=labels)
    holes = maps.masked_fill(~selected[:, :, None, None], NAN).requires_grad_()
    module = OrganMaskLoss(form, labels=labels, weight=1 / 3)
    for given in (None, selected):
        parts = module.parts(holes, allowed, label, selected=given)
        (grad,) = torch.autograd.grad(parts.loss, holes, create_graph=True)
        torch.testing.assert_close(parts.loss / 3, expected)
        assert grad.isfinite().all()
        assert not grad[~selected].any()
        second = torch.autograd.grad(grad.square().sum(), holes)[0]
        assert second.isfinite().all()
        assert parts.evidence.isfinite().all()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_broken_map_is_not_hidden(form):
    """NaN in a cell that the form reads, or in a pair that is said to be computed, must come out as NaN."""
    maps, allowed, label = a_batch()
    maps[0, 0, 1, 1] = NAN
    assert organ_mask_loss(maps, allowed, label, form=form).isnan()
    assert OrganMaskLoss(form, reduction="per_label").parts(maps, allowed, label).loss.isnan()
    inside_only = a_batch()[0]
    inside_only[0, 0, 0, 0] = NAN
    read = form in ("l2_normalised", "energy")
    assert organ_mask_loss(inside_only, allowed, label, form=form).isnan().item() is read
    maps[0, 0] = NAN
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert OrganMaskLoss(form).parts(maps, allowed, label, selected=everything).loss.isnan()


@pytest.mark.parametrize("labels", ["all", "present"])
def test_outside_evidence_is_the_share_of_present_labels(labels):
    maps, allowed, label = a_batch()
    allowed[:, 1] = True  # anywhere: no outside, so not counted
    allowed[1, 3] = False  # no region: left out
    outside = total = 0.0
    for b, m in [(0, 0), (2, 0), (0, 2), (1, 2)]:
        positive = maps[b, m].clamp(min=0)
        total += positive.sum().item()
        outside += positive[~allowed[b, m]].sum().item()
    maps.requires_grad_()
    parts = OrganMaskLoss(labels=labels).parts(maps, allowed, label)
    assert parts.loss.requires_grad
    assert not parts.outside_evidence.requires_grad
    assert parts.outside_evidence.item() == pytest.approx(outside / total)


def test_outside_evidence_is_none_where_there_is_nothing_to_share():
    maps, allowed, label = a_batch()
    assert OrganMaskLoss().parts(-maps.abs(), allowed, label).outside_evidence is None
    assert OrganMaskLoss().parts(maps, allowed, label * 0).outside_evidence is None


def test_allowed_of_another_resolution_comes_down_to_the_grid_of_the_maps():
    maps, _, label = a_batch()
    fine = torch.rand(3, 4, 6, 10, generator=torch.Generator().manual_seed(3)) < 0.3
    expected = organ_mask_loss(maps, to_grid(fine, (2, 5)), label)
    assert organ_mask_loss(maps, fine, label) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_half_precision_is_computed_in_float32(form, dtype):
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 60, 60, generator=rng).mul(10).to(dtype).requires_grad_()
    allowed = torch.rand(2, 3, 60, 60, generator=rng) < 0.5
    label = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = organ_mask_loss(maps, allowed, label, form=form)
    assert loss.dtype == torch.float32
    exact = organ_mask_loss(maps.detach().double(), allowed, label, form=form)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    loss.backward()
    assert maps.grad.dtype == dtype
    assert maps.grad.isfinite().all()


def test_any_label_dtype():
    maps, allowed, label = a_batch()
    loss = organ_mask_loss(maps, allowed, label)
    assert organ_mask_loss(maps, allowed, label.bool()) == loss
    assert organ_mask_loss(maps, allowed, label.long()) == loss


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("reduction", ["global", "per_label"])
def test_the_host_never_waits_for_the_device(form, reduction):
    """Fake tensors have no values: any look at one raises."""
    module = OrganMaskLoss(form, reduction=reduction, label_weights=[1.0, 2.0, 3.0, 4.0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps = torch.randn(3, 4, 2, 5, requires_grad=True)
        label, has_organs = torch.ones(3, 4), torch.ones(3, dtype=torch.bool)
        parts = module.parts(maps, torch.ones(3, 4, 2, 5, dtype=torch.bool), label, has_organs)
        parts.loss.backward()
        assert maps.grad.shape == maps.shape


def test_softplus_of_large_maps_is_exact():
    maps, allowed = torch.full((1, 1, 2), 80.0), torch.tensor([[[True, False]]])
    one = torch.ones(1, 1)
    assert organ_mask_loss(maps, allowed, one, scale="sum", weight=1.0).item() == 80.0
    tiny = organ_mask_loss(-maps, allowed, one, scale="sum", weight=1.0).item()
    assert tiny == pytest.approx(math.exp(-80), rel=1e-5)
    assert F.softplus(torch.tensor(-80.0)).item() == tiny


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(3, 4)}, r"maps of shape \(B, L, \*S\) in floating point, got \(3, 4\)"),
        ({"maps": torch.zeros(3, 4, 2, 5, dtype=torch.long)}, r"floating point, got \(3, 4, 2, 5\) torch.int64"),
        ({"allowed": torch.zeros(3, 5, 2, 5) > 0}, r"rank of the maps \(3, 4, 2, 5\), got \(3, 5, 2, 5\)"),
        ({"allowed": torch.zeros(3, 4, 2, 5, 6) > 0}, r"rank of the maps \(3, 4, 2, 5\), got \(3, 4, 2, 5, 6\)"),
        ({"allowed": torch.zeros(3, 4, 2, 5)}, r"allowed as bool .* got torch.float32"),
        ({"label": torch.zeros(3, 6)}, r"label of shape \(3, 4\) for maps \(3, 4, 2, 5\), got \(3, 6\)"),
        ({"has_organs": torch.zeros(4) > 0}, r"has_organs of shape \(3,\) for maps .* got \(4,\)"),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(change, message):
    maps, allowed, label = a_batch()
    arguments = {"maps": maps, "allowed": allowed, "label": label, **change}
    with pytest.raises(InputError, match=message):
        organ_mask_loss(**arguments)


def test_a_wrong_number_of_weights_and_a_wrong_selection_are_named():
    maps, allowed, label = a_batch()
    with pytest.raises(InputError, match=r"expected 4 label_weights .* got 2"):
        organ_mask_loss(maps, allowed, label, label_weights=[1.0, 2.0])
    with pytest.raises(InputError, match=r"selected of shape \(3, 4\)"):
        OrganMaskLoss().parts(maps, allowed, label, selected=torch.ones(3, dtype=torch.bool))
