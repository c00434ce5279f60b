"""Every form against a slow loop written from its definition, and what the formulas promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from camtrain._errors import InputError
from camtrain.losses import FORMS, Form, OrganMaskLoss, organ_mask_loss

B, L, SIZE = 3, 5, (2, 3, 4)
ALL_FORMS = ["softplus", "l2", "l2_normalised", "energy"]
SETTINGS = list(itertools.product(ALL_FORMS, ["all", "present"], ["global", "per_label"]))


def a_batch(seed: int = 0, size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.float64):
    """Maps, allowed, label with an unknown label, an organ that is missing and one that is everywhere."""
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randn(B, L, *size, generator=rng, dtype=dtype)
    allowed = torch.rand(B, L, *size, generator=rng) < 0.4
    allowed[0, 1] = False
    allowed[:, 2] = True
    label = (torch.rand(B, L, generator=rng) < 0.5).to(dtype)
    label[:2, 1] = 1
    label[0, 0], label[1, 0] = 1, 0
    label[2, 3] = float("nan")
    return maps, allowed, label


def pairs_that_count(maps, allowed, label, form, labels):
    """(label, forbidden values, all values) of each pair that takes part, as plain numbers."""
    for b, m in itertools.product(range(maps.shape[0]), range(maps.shape[1])):
        truth = label[b, m].item()
        inside = [bool(v) for v in allowed[b, m].flatten()]
        values = [v.item() for v in maps[b, m].flatten()]
        if not allowed[b].any() or math.isnan(truth):
            continue
        if truth == 0 and (labels == "present" or form == "energy"):
            continue
        if not any(inside) and (truth == 1 or form != "softplus"):
            continue
        if truth == 0 and form == "softplus":
            inside = [False] * len(inside)
        if not all(inside):
            yield m, [v for v, ok in zip(values, inside, strict=True) if not ok], values


def one_pair(form, forbidden, values):
    """What a pair adds above and below the line."""
    if form == "softplus":
        return sum(math.log1p(math.exp(-abs(v))) + max(v, 0.0) for v in forbidden), len(forbidden)
    if form == "l2":
        return sum(v * v for v in forbidden), len(forbidden)
    if form == "l2_normalised":
        return sum(v * v for v in forbidden), sum(v * v for v in values)
    total = sum(max(v, 0.0) for v in values)
    inside = total - sum(max(v, 0.0) for v in forbidden)
    return (1 - inside / total, 1) if total > 0 else (0, 0)


def reference(maps, allowed, label, form, labels, reduction, scale, weights=None) -> float:
    """One cell at a time, from the definitions in the issue; no tensor arithmetic."""
    maps = maps * {"mean": math.prod(maps.shape[2:]), "sum": 1}.get(scale, scale)
    weights = weights or [1.0] * maps.shape[1]
    top, bottom = [0.0] * maps.shape[1], [0.0] * maps.shape[1]
    for m, forbidden, values in pairs_that_count(maps, allowed, label, form, labels):
        above, below = one_pair(form, forbidden, values)
        top[m], bottom[m] = top[m] + above, bottom[m] + below
    if reduction == "global" and form != "l2_normalised":
        sums = [sum(w * v for w, v in zip(weights, side, strict=True)) for side in (top, bottom)]
        return sums[0] / sums[1]
    have = [m for m in range(maps.shape[1]) if bottom[m] > 0]
    return sum(weights[m] * top[m] / bottom[m] for m in have) / sum(weights[m] for m in have)


@pytest.mark.parametrize(("form", "labels", "reduction"), SETTINGS)
@pytest.mark.parametrize("scale", ["mean", "sum", 1.7])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 0.0, 3.0]])
def test_equals_the_loop(form, labels, reduction, scale, weights):
    maps, allowed, label = a_batch()
    loss = organ_mask_loss(
        maps,
        allowed,
        label,
        form=form,
        labels=labels,
        weight=0.7,
        scale=scale,
        reduction=reduction,
        label_weights=weights,
    )
    expected = 0.7 * reference(maps, allowed, label, form, labels, reduction, scale, weights)
    assert loss.dtype == torch.float64
    assert loss.ndim == 0
    torch.testing.assert_close(loss.item(), expected, rtol=1e-10, atol=0)


def test_softplus_is_the_authors_loss():
    """Their code: an absent label's ground truth is all zero; BCE with logits against 0 where the truth is 0."""
    maps, allowed, label = a_batch(1)
    label = torch.nan_to_num(label)
    allowed[0, 1, 0] = True
    truth = allowed & (label == 1)[:, :, None, None, None]
    raw = maps[~truth]
    authors = F.binary_cross_entropy_with_logits(raw, torch.zeros_like(raw))
    torch.testing.assert_close(organ_mask_loss(maps, allowed, label, scale="sum"), authors / 3)


@pytest.mark.parametrize(("labels", "reduction"), itertools.product(["all", "present"], ["global", "per_label"]))
def test_zero_maps_cost_ln_2(labels, reduction):
    maps, allowed, label = a_batch()
    loss = organ_mask_loss(maps * 0, allowed, label, labels=labels, reduction=reduction, weight=1.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("form", ["softplus", "l2"])
def test_allowed_cells_of_present_labels_change_nothing(form):
    maps, allowed, label = a_batch()
    free = allowed & (label == 1)[:, :, None, None, None]
    changed = torch.where(free, torch.full_like(maps, float("inf")), maps)
    assert organ_mask_loss(changed, allowed, label, form=form) == organ_mask_loss(maps, allowed, label, form=form)


def test_l2_leaves_the_organ_of_an_absent_label_free_and_is_two_sided():
    maps, allowed, label = a_batch()
    label = torch.zeros_like(label)
    inside = torch.where(allowed, maps + 5, maps)
    loss = organ_mask_loss(maps, allowed, label, form="l2")
    assert organ_mask_loss(inside, allowed, label, form="l2") == loss
    assert organ_mask_loss(-maps, allowed, label, form="l2") == loss
    assert organ_mask_loss(inside, allowed, label) > organ_mask_loss(maps, allowed, label)


@pytest.mark.parametrize("form", ["l2_normalised", "energy"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_free_forms(form, factor):
    maps, allowed, label = a_batch()
    small, large = (
        organ_mask_loss(maps, allowed, label, form=form),
        organ_mask_loss(maps * factor, allowed, label, form=form),
    )
    torch.testing.assert_close(small, large)
    assert FORMS[form].scale_free
    assert 0 < small < 1 / 3


def test_the_normalising_sum_is_a_constant():
    maps, allowed, label = a_batch()
    maps.requires_grad_()
    (grad,) = torch.autograd.grad(organ_mask_loss(maps, allowed, label, form="l2_normalised"), maps)
    assert torch.equal(grad[allowed], torch.zeros_like(grad[allowed]))
    assert (grad[~allowed] != 0).any()


def heads(activations: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor):
    """The same logits from a pool head, a flatten head with tied weights and a per-slice head."""
    labels, channels = kernel.shape
    size = activations.shape[2:]
    cells, slices = math.prod(size), size[0]
    yield nn.functional.linear(activations.mean((2, 3, 4)), kernel, bias)
    tied = (kernel / cells)[:, :, None].expand(labels, channels, cells)
    yield nn.functional.linear(activations.flatten(1), tied.flatten(1), bias)
    per_slice = (kernel * slices / cells)[:, :, None, None].expand(labels, channels, *size[1:])
    yield torch.stack([(activations[:, None, :, s] * per_slice).sum((2, 3, 4)) + bias for s in range(slices)]).mean(0)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_one_weight_one_pressure_for_three_heads(form):
    """Rule 8; and at the mean scale it is the mean of the map, plus bias, that makes the logit."""
    maps, allowed, label = a_batch()
    rng = torch.Generator().manual_seed(5)
    activations = torch.randn(B, 4, *SIZE, generator=rng, dtype=torch.float64).relu().requires_grad_()
    kernel = torch.randn(L, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(L, generator=rng, dtype=torch.float64)
    results, cam = [], torch.einsum("bkxyz,lk->blxyz", activations, kernel)
    for logits in heads(activations, kernel, bias):
        columns = [torch.autograd.grad(y, activations, create_graph=True)[0] for y in logits.sum(0).unbind()]
        maps = (torch.stack(columns, 1) * activations[:, None]).sum(2)
        torch.testing.assert_close(maps.sum((2, 3, 4)) + bias, logits)
        torch.testing.assert_close(maps * math.prod(SIZE), cam)
        loss = organ_mask_loss(maps, allowed, label, form=form)
        results.append((loss, *torch.autograd.grad(loss, (activations, kernel))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    torch.testing.assert_close(results[0][0], organ_mask_loss(cam, allowed, label, form=form, scale=1.0))


@pytest.mark.parametrize("size", [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_any_number_of_axes_gives_the_same_number(form, size):
    maps, allowed, label = a_batch(size=size)
    flat = organ_mask_loss(maps.flatten(2), allowed.flatten(2), label, form=form)
    torch.testing.assert_close(organ_mask_loss(maps, allowed, label, form=form), flat, rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    form=st.sampled_from(ALL_FORMS),
    reduction=st.sampled_from(["global", "per_label"]),
    samples=st.permutations(range(B)),
    columns=st.permutations(range(L)),
    flips=st.sets(st.sampled_from([2, 3, 4])),
    seed=st.integers(0, 100),
)
def test_order_of_samples_labels_and_axes_does_not_matter(form, reduction, samples, columns, flips, seed):
    maps, allowed, label = a_batch(seed)
    weights = [1.0, 2.0, 3.0, 0.5, 0.0]
    loss = organ_mask_loss(maps, allowed, label, form=form, reduction=reduction, label_weights=weights)
    turned = organ_mask_loss(
        maps[samples][:, columns].flip(list(flips)),
        allowed[samples][:, columns].flip(list(flips)),
        label[samples][:, columns],
        form=form,
        reduction=reduction,
        label_weights=[weights[c] for c in columns],
    )
    torch.testing.assert_close(turned, loss)


def test_module_and_function_agree_and_the_weight_is_the_papers():
    maps, allowed, label = a_batch()
    module = OrganMaskLoss()
    assert module(maps, allowed, label) == organ_mask_loss(maps, allowed, label)
    assert module(maps, allowed, label) == module.parts(maps, allowed, label).loss / 3
    assert not module.state_dict()
    assert not OrganMaskLoss(label_weights=[1.0, 2.0]).state_dict()
    assert "softplus" in repr(module)


def test_a_form_is_added_in_a_few_lines(monkeypatch):
    def hinge_outside(cells):
        return cells.outside.relu().sum((0, 2)), cells.count

    monkeypatch.setitem(FORMS, "hinge", Form(hinge_outside, absent="everything", summary="mean of relu(map)"))
    maps, allowed, label = a_batch()
    shelter = allowed & (label == 1)[:, :, None, None, None]
    takes_part = (label == 0) | ((label == 1) & allowed.flatten(2).any(-1))
    expected = maps[takes_part[:, :, None, None, None] & ~shelter].relu().mean()
    torch.testing.assert_close(organ_mask_loss(maps, allowed, label, form="hinge", weight=1.0, scale="sum"), expected)


def test_a_form_of_ones_own_runs_in_float32_with_a_constant_denominator(monkeypatch):
    def share(cells):
        ones = torch.ones(cells.maps.shape[-1], 1, dtype=cells.maps.dtype)
        return (cells.outside.square() @ ones).sum((0, 2)), (cells.maps.square() @ ones).sum((0, 2))

    monkeypatch.setitem(FORMS, "share", Form(share, absent="outside", scale_free=True, per_label=True))
    maps, allowed, label = a_batch(dtype=torch.float32)
    maps.requires_grad_()
    results = []
    for form in ("share", "l2_normalised"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = organ_mask_loss(maps, allowed, label, form=form)
        results.append((loss, *torch.autograd.grad(loss, maps)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["l2_normalised", "energy"])
def test_scale_free_forms_ignore_the_scale(form):
    maps, allowed, label = a_batch()
    assert organ_mask_loss(maps, allowed, label, form=form, scale=1e200) == organ_mask_loss(
        maps, allowed, label, form=form
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "softpuls"}, "no mask loss form 'softpuls'; nearest: softplus"),
        ({"labels": "presnt"}, "labels as one of all, present, got 'presnt'; nearest: present"),
        ({"reduction": "mean"}, "reduction as one of global, per_label"),
        ({"scale": "median"}, "scale as one of mean, sum, got 'median'"),
        ({"scale": 0.0}, "scale as 'mean', 'sum' or a positive number"),
        ({"weight": -1.0}, "weight as a finite number >= 0, got -1"),
        ({"weight": float("nan")}, "weight as a finite number >= 0"),
        ({"label_weights": [1.0, -2.0]}, "label_weights as one finite number >= 0 per label"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        OrganMaskLoss(**arguments)
