"""Composites against a slow reference, voxel by voxel and label by label; the draws; the gate on logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._gate import LogitGate, refuse_mixing
from camtrain.callbacks._regions import Cases, Rules
from camtrain.callbacks._swapping import compose, make_plan

TABLE = {
    "organs": {"left": 1, "right": 2, "heart": 3, "vessels": 4},
    "groups": {"lungs": ["left", "right"]},
    "labels": {"nodule": ["lungs"], "mass": ["lungs"], "left only": ["left"], "stent": ["heart"], "any": "anywhere",
               "leak": ["vessels"]},
}  # fmt: skip
SIZES = [(17,), (9, 7), (5, 6, 4)]


def make_cases(size, seed, count=4, channels=2):
    rng = torch.Generator().manual_seed(seed)
    organs = torch.randint(0, 5, (count, 1, *size), generator=rng)
    # Whole bands of one organ, and one case without any.
    organs[:, :, : size[0] // 3] = torch.randint(1, 5, (count, 1, *[1] * len(size)), generator=rng)
    organs[seed % count] = 0
    label = torch.randint(0, 2, (count, 6), generator=rng).float()
    label[torch.rand(label.shape, generator=rng) < 0.15] = torch.nan
    image = torch.randn(count, channels, *size, generator=rng)
    return Cases(image, organs, label, organs.flatten(1).any(dim=1))


def slow(rules, cases, plan, targets, cover, b):
    """(row that each voxel comes from, truths, left out) of one case, from the definitions."""
    organs, last = cases.organs[:, 0], int(plan.last[b])
    unit_ids = [sorted({i for r in m.nonzero().flatten().tolist() for i in rules.ids(r)}) for m in plan.units]
    laid = [u for u in plan.order.tolist() if u != last and plan.source[b, u] >= 0] + [last]
    row = torch.full(organs.shape[1:], int(plan.ground[b]))
    covered = torch.zeros(row.shape, dtype=torch.bool)
    unit = torch.full(organs.shape[1:], -1)
    for u in laid:
        d, g = int(plan.source[b, u]), int(plan.ground[b])
        here = torch.isin(organs[d], torch.tensor(unit_ids[u])) & cases.has_organs[d]
        covered &= ~here
        if cover and cases.has_organs[g]:
            more = torch.isin(organs[g], torch.tensor(unit_ids[u])) & (unit < 0) & ~here
            covered, here = covered | more, here | more
        row[here], unit[here] = d, u
    label, left_out = cases.label[b].clone(), []
    for column in range(cases.label.shape[1]):
        mine = [u for u in range(len(plan.units)) if (plan.units[u] & rules.of_label[column]).any()]
        u = mine[0] if mine else None
        d = -1 if u is None else int(plan.source[b, u])
        behind = d < 0 and u is not None and targets == "follow"
        d = int(plan.ground[b]) if behind else d
        whole = False
        if d >= 0 and cases.has_organs[d]:
            rule = rules.of_label[column].nonzero().item()
            region = torch.isin(organs[d], torch.tensor(rules.ids(rule)))
            whole = bool(region.any()) and bool((unit[region] == (-1 if behind else u)).all())
        if whole:
            label[column] = cases.label[d, column]
        left_out.append(not whole)
    return row, unit, label, torch.tensor(left_out), covered, [i for u in laid for i in unit_ids[u]]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SIZES), st.sampled_from(["label", "organs", "union"]),
       st.sampled_from(["kept", "follow"]), st.booleans(), st.integers(0, 2))  # fmt: skip
def test_composites_are_what_the_definition_says(seed, size, keep, targets, cover, seam):
    cases, rules = make_cases(size, seed), Rules(ct.OrganTable.load(TABLE))
    regions = rules.regions(cases, None)
    plan = make_plan(rules, regions, cases.label, 4, 0.8, keep, torch.Generator().manual_seed(seed))
    made = compose(rules, regions, cases, plan, targets, seam, cover)
    for b in range(4):
        assert bool(made.swapped[b]) == bool(plan.swapped[b])
        if not plan.swapped[b]:
            assert plan.ground[b] == b
            for got, had in zip(vars(made.cases).values(), vars(cases).values(), strict=True):
                torch.testing.assert_close(got[b], had[b], rtol=0, atol=0, equal_nan=True)
            assert not made.left_out[b].any()
            continue
        row, unit, label, left_out, covered, taken = slow(rules, cases, plan, targets, cover, b)
        image, places = made.cases.image[b], torch.arange(row.numel()).reshape(row.shape)
        wanted = cases.image.flatten(2)[row, :, places].movedim(-1, 0)
        own = (unit == plan.last[b]) & ~covered
        assert torch.equal(image[:, own], cases.image[b][:, own])
        if seam == 0:
            assert torch.equal(image, wanted)
        low, high = cases.image.amin(dim=0) - 1e-6, cases.image.amax(dim=0) + 1e-6
        assert bool(((image >= low) & (image <= high)).all())
        assert torch.equal(made.left_out[b], left_out)
        torch.testing.assert_close(made.cases.label[b][~left_out], label[~left_out], equal_nan=True)
        # Of the case behind, no organ shows that a laid unit has: the map of its label is compared with the laid one.
        organs = cases.organs[:, 0].flatten(1)[row, places]
        laid = unit >= 0
        organs = torch.where(~laid & torch.isin(organs, torch.tensor(taken)), 0, organs)
        organs = torch.where(laid & covered, 0, organs)
        assert torch.equal(made.cases.organs[b, 0], organs)


@pytest.mark.parametrize("keep", ["label", "organs", "union"])
def test_what_can_be_kept(keep):
    cases, rules = make_cases((5, 6, 4), 3, count=200), Rules(ct.OrganTable.load(TABLE))
    cases.organs[7] = 3  # the whole image is heart: nothing lies outside it
    cases.label[8] = torch.nan
    regions = rules.regions(cases, None)
    plan = make_plan(rules, regions, cases.label, 200, 0.6, keep, torch.Generator().manual_seed(0))
    assert 0.45 < plan.swapped.float().mean() < 0.75
    assert not plan.swapped[[3, 7, 8]].any()  # no organs, no outside, no known label
    assert bool((plan.ground[plan.swapped] != torch.arange(200)[plan.swapped]).all())
    for b in plan.swapped.nonzero().flatten().tolist():
        unit = plan.last[b]
        assert plan.source[b, unit] == b
        lend = [int(plan.ground[b]), *plan.source[b][plan.source[b] >= 0].tolist()]
        assert len(set(lend)) == len(lend)
        kept = plan.units[unit].nonzero().flatten().tolist()
        assert any(torch.isin(cases.organs[b], torch.tensor(rules.ids(rule))).any() for rule in kept)
        assert not cases.label[b, rules.of_label[:, kept].any(dim=1)].isnan().all()
    laid = (plan.source[plan.swapped] >= 0).sum(dim=1)
    assert bool((laid == {"label": 1, "organs": 3, "union": 1}[keep]).all())


def test_the_donor_does_not_depend_on_any_truth():
    cases, rules = make_cases((9, 7), 1, count=50), Rules(ct.OrganTable.load(TABLE))
    regions = rules.regions(cases, None)
    plans = [
        make_plan(rules, regions, label, 50, 1.0, "label", torch.Generator().manual_seed(5))
        for label in (cases.label, 1 - cases.label)
    ]
    for one, other in zip(vars(plans[0]).values(), vars(plans[1]).values(), strict=True):
        assert torch.equal(one, other)


def test_the_donor_is_any_other_case():
    cases, rules = make_cases((5, 6, 4), 2, count=40), Rules(ct.OrganTable.load(TABLE))
    plan = make_plan(rules, rules.regions(cases, None), cases.label, 40, 1.0, "label", torch.Generator().manual_seed(0))
    steps = ((plan.ground - torch.arange(40)) % 40)[plan.swapped]
    assert len(set(steps.tolist())) > 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_draws_do_not_follow_the_default_precision(dtype):
    cases, rules = make_cases((5, 6, 4), 2, count=40), Rules(ct.OrganTable.load(TABLE))

    def plan():
        regions = rules.regions(cases, None)
        return make_plan(rules, regions, cases.label, 40, 0.5, "organs", torch.Generator().manual_seed(0))

    usual = plan()
    torch.set_default_dtype(dtype)
    try:
        other = plan()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(vars(usual).values(), vars(other).values(), strict=True):
        assert torch.equal(one, two)


def test_every_label_has_its_turn():
    cases, rules = make_cases((5, 6, 4), 2, count=600), Rules(ct.OrganTable.load(TABLE))
    cases.label[:] = 1.0
    plan = make_plan(
        rules, rules.regions(cases, None), cases.label, 600, 1.0, "label", torch.Generator().manual_seed(0)
    )
    share = torch.bincount(plan.last[plan.swapped], minlength=4) / plan.swapped.sum()
    wanted = rules.of_label.float().sum(dim=0) / 5  # of the five labels with a region
    torch.testing.assert_close(share, wanted, atol=0.07, rtol=0)


def test_organs_that_a_label_needs_together_come_together():
    rules = Rules(ct.OrganTable.load(TABLE))
    lungs, left, heart, vessels = (rules.groups[r] for r in range(4))
    assert lungs == left
    assert len({lungs, heart, vessels}) == 3
    chain = {
        "organs": {"a": 1, "b": 2, "c": 3, "d": 4},
        "labels": {"x": ["a", "b"], "y": ["c"], "z": ["b", "c"], "w": ["d"]},
    }
    x, y, z, w = Rules(ct.OrganTable.load(chain)).groups
    assert x == y == z != w


def test_one_case_alone_has_no_donor():
    cases, rules = make_cases((9, 7), 1, count=2), Rules(ct.OrganTable.load(TABLE))
    one = cases.rows(torch.tensor([0]))
    plan = make_plan(rules, rules.regions(one, None), one.label, 1, 1.0, "label", torch.Generator())
    assert not plan.swapped.any()


def test_regions_are_made_when_asked_for_and_kept_while_they_are_small(monkeypatch):
    cases, rules = make_cases((5, 6, 4), 0), Rules(ct.OrganTable.load(TABLE))
    made = []
    original = Rules.allowed
    monkeypatch.setattr(Rules, "allowed", lambda *args: made.append((args[1], len(args[2]))) or original(*args))
    regions = rules.regions(cases)
    one = regions.of(2, torch.tensor([1, 3, 1]))
    assert made == [(2, 2)]
    assert torch.equal(one[0], one[2])
    again = regions.of(2, torch.tensor([3, 0]))
    assert made == [(2, 2), (2, 1)]
    assert torch.equal(again[0], one[1])
    monkeypatch.setattr("camtrain.callbacks._regions.AT_ONCE", 0)
    anew = rules.regions(cases)
    for _ in range(2):
        assert torch.equal(anew.of(2, torch.tensor([1, 3, 1])), one)
    assert made[2:] == [(2, 2), (2, 2)]
    table = ct.OrganTable.load(TABLE)
    for rule in range(4):
        label = next(k for k in range(6) if rules.of_label[k, rule])
        wanted = table.allowed(cases.organs)[:, label : label + 1] & cases.has_organs.view(-1, 1, 1, 1, 1)
        assert torch.equal(regions.of(rule, torch.arange(4)), wanted)
        assert torch.equal(regions.may()[:, rule], wanted.flatten(1).any(dim=1))


def test_a_step_makes_the_regions_that_it_lays_and_no_others(monkeypatch):
    """Thirty rules with hulls and closings would take longer than the network."""
    organs = {f"organ {i}": i + 1 for i in range(12)}
    labels = {f"label {i}": {"organs": [f"organ {i}"], "close_mm": 2.0 + i} for i in range(12)}
    rules = Rules(ct.OrganTable.load({"organs": organs, "labels": labels}))
    cases = Cases(
        torch.randn(2, 1, 8, 8, 8), torch.randint(0, 13, (2, 1, 8, 8, 8)), torch.ones(2, 12), torch.ones(2).bool()
    )
    made = []
    original = Rules.allowed
    monkeypatch.setattr(Rules, "allowed", lambda *args: made.append((args[1], len(args[2]))) or original(*args))
    regions = rules.regions(cases, torch.ones(2, 3))
    plan = make_plan(rules, regions, cases.label, 2, 1.0, "label", torch.Generator().manual_seed(0))
    composite = compose(rules, regions, cases, plan, "kept", 1)
    assert composite.swapped.all()
    assert {rule for rule, _ in made} == set(plan.last.tolist())
    assert sum(count for _, count in made) <= 4  # of each case its own region, and that of the case behind it


def test_an_empty_shaped_region_is_found_out_and_another_label_takes_its_place():
    table = ct.OrganTable.load({
        "organs": {"lung": 1, "heart": 2},
        "labels": {"gone": {"organs": ["lung"], "minus": ["lung"]}, "stent": ["heart"]},
    })  # fmt: skip
    rules = Rules(table)
    organs = torch.zeros(6, 1, 8, dtype=torch.int64)
    organs[:, :, :3], organs[:, :, 5:7] = 1, 2
    cases = Cases(torch.randn(6, 1, 8), organs, torch.ones(6, 2), torch.ones(6).bool())
    regions = rules.regions(cases)
    assert not regions.of(0, torch.arange(6)).any()
    assert regions.may()[:, 0].all()
    for seed in range(5):
        plan = make_plan(rules, regions, cases.label, 6, 1.0, "label", torch.Generator().manual_seed(seed))
        assert plan.last.tolist() == [1] * 6
    # Nor is it lent to cases without organs.
    cases.organs[3:], cases.has_organs[3:] = 0, False
    regions = rules.regions(cases)
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        plan = make_plan(rules, regions, cases.label, 6, 1.0, "label", rng, lend=cases)
        assert plan.last.tolist() == [1] * 6
        assert bool((plan.source[3:, 1] < 3).all())


# The gate ------------------------------------------------------------------------------------------------------------


def gated_step(output_of, factor, logits=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    outer = nn.Module()
    outer.net = model
    image = torch.randn(4, 1, 12)
    gate = LogitGate(outer, logits)
    gate.start(factor)
    given = model(image) if output_of is None else output_of(model, image)
    return model, image, gate, given


def test_a_closed_pair_has_no_gradient_and_the_others_those_of_a_masked_mean():
    label = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1.0]])
    left_out = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    factor = (~left_out).float() * 12 / (~left_out).sum()
    model, image, gate, logits = gated_step(None, factor)
    assert torch.equal(logits, gate.raw[0])
    F.binary_cross_entropy_with_logits(logits, label).backward()
    got = model[1].weight.grad.clone()
    gate.stop()
    model.zero_grad()
    plain = model(image)
    F.binary_cross_entropy_with_logits(plain[~left_out], label[~left_out]).backward()
    torch.testing.assert_close(got, model[1].weight.grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Wrapper(nn.Module):
    def __init__(self, net, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, image):
        logits = self.net(image)
        return {"dict": {"logits": logits, "x": 1}, "tuple": (logits, None), "flat": logits[:, 0]}[self.form]


@pytest.mark.parametrize("form", ["dict", "tuple", "flat"])
def test_logits_in_other_outputs(form):
    torch.manual_seed(0)
    model = Wrapper(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), form)
    gate = LogitGate(model)
    gate.start(torch.zeros(4, 1 if form == "flat" else 3))
    given = model(torch.randn(4, 1, 12))
    logits = {"dict": lambda g: g["logits"], "tuple": lambda g: g[0], "flat": lambda g: g}[form](given)
    assert logits.shape == ((4,) if form == "flat" else (4, 3))
    logits.sum().backward()
    assert model.net[1].weight.grad.abs().sum() == 0


def test_infinite_logits_do_not_poison_the_others():
    factor = torch.ones(1, 2)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([float("inf"), 0.0]))
    gate = LogitGate(model, lambda output: output)
    gate.start(factor)
    logits = model(torch.ones(1, 2))
    assert logits[0, 0] == float("inf")
    logits[0, 1].backward()
    assert model.weight.grad[1].isfinite().all()


def focal(logits, label):
    return ((1 - logits.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(logits, label, reduction="none")).sum()


LOSSES = [
    (F.binary_cross_entropy_with_logits, False),
    (lambda y, t: F.binary_cross_entropy_with_logits(y, t, pos_weight=torch.tensor([1.0, 2, 3])), False),
    (focal, False),
    (lambda y, t: (y * t).sum(), False),
    (lambda y, t: F.cross_entropy(y, t.argmax(dim=1)), True),
    (lambda y, t: -(y.sigmoid() * t).sum() / (y.sigmoid() + t).sum(), True),
]


@pytest.mark.parametrize(("loss", "mixes"), LOSSES)
def test_losses_that_mix_pairs_are_refused(loss, mixes):
    label = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1.0]])
    factor = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0.0]])
    _, _, gate, logits = gated_step(None, factor)
    # As a user's loss sees them: the check must look through the gate.
    if mixes:
        with pytest.raises(InputError, match="mixes labels or cases"):
            refuse_mixing(loss(logits, label), gate.gated, factor)
    else:
        refuse_mixing(loss(logits, label), gate.gated, factor)


def test_a_loss_of_other_logits_is_refused():
    _, image, gate, _ = gated_step(None, torch.ones(4, 3))
    elsewhere = nn.Linear(12, 3)(image.flatten(1)).sum()
    with pytest.raises(InputError, match="does not depend on the logits"):
        refuse_mixing(elsewhere, gate.gated, torch.ones(4, 3))


def test_logits_that_a_callable_makes_anew_are_refused():
    factor = torch.ones(4, 3)
    with pytest.raises(InputError, match="makes new ones"):
        gated_step(None, factor, logits=lambda output: output * 2)
