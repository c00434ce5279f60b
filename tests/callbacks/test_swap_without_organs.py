"""OutsideSwap where only some cases are segmented: organs lent to the others, and usual regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._atlas import SHARE, RegionAtlas
from camtrain.callbacks._lenders import SEGMENTED, Lenders
from camtrain.callbacks._regions import Cases, Rules
from camtrain.callbacks._swapping import compose, make_plan

TABLE = {
    "organs": {"left": 1, "right": 2, "heart": 3},
    "labels": {"nodule": ["left", "right"], "mass": ["left", "right"], "stent": ["heart"], "any": "anywhere"},
}


def make_cases(seed, count=6, size=(6, 5, 4), segmented=2):
    rng = torch.Generator().manual_seed(seed)
    organs = torch.randint(0, 4, (count, 1, *size), generator=rng)
    organs[torch.randperm(count, generator=rng)[segmented:]] = 0
    label = torch.randint(0, 2, (count, 4), generator=rng).float()
    label[torch.rand(label.shape, generator=rng) < 0.2] = torch.nan
    return Cases(torch.randn(count, 2, *size, generator=rng), organs, label, organs.flatten(1).any(dim=1))


def some_without(kit, count=8, keep=(0, 5)):
    cases = kit.make_cases(count)
    for row, case in enumerate(cases):
        if row not in keep:
            case["organs"] = torch.zeros_like(case["organs"])
    return cases


def recording(kit, net=None, loss=None):
    seen = []

    def training_step(self, batch, batch_idx):
        seen.append(batch)
        return (loss or kit.bce)(self(batch["image"]), batch["label"])

    return kit.make_lit(net or kit.make_net(), training_step=training_step), seen


def fit(kit, folder, cases, swap, batch_size=4, net=None, **options):
    module, seen = recording(kit, net)
    trainer = kit.make_trainer(folder, swap, **options)
    trainer.fit(module, DataLoader(cases, batch_size=batch_size))
    return trainer, seen


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([(17,), (5, 4), (4, 5, 3)]), st.sampled_from(["label", "organs", "union"])
)
def test_a_lent_region_comes_whole_with_its_truth(seed, size, keep):
    cases, rules = make_cases(seed, size=size), Rules(ct.OrganTable.load(TABLE))
    regions = rules.regions(cases, None)
    draw = lambda: torch.Generator().manual_seed(seed)  # noqa: E731
    plan = make_plan(rules, regions, cases.label[:4], 6, 0.8, keep, draw(), lend=cases)
    without = make_plan(rules, regions, cases.label[:4], 6, 0.8, keep, draw())
    made = compose(rules, regions, cases, plan, "kept", 0)
    for b in range(4):
        if bool(cases.has_organs[b]):  # as without lending
            for name in ("source", "ground", "last"):
                assert torch.equal(getattr(plan, name)[b], getattr(without, name)[b])
            continue
        assert int(without.last[b]) == -1
        unit = int(plan.last[b])
        if unit < 0:
            assert torch.equal(made.cases.image[b], cases.image[b])
            assert not made.left_out[b].any()
            continue
        row = int(plan.source[b, unit])
        assert row != b
        assert bool(cases.has_organs[row])
        assert int(plan.ground[b]) == b
        assert int((plan.source[b] >= 0).sum()) == 1
        ids = [i for rule in plan.units[unit].nonzero().flatten().tolist() for i in rules.ids(rule)]
        region = torch.isin(cases.organs[row, 0], torch.tensor(ids))
        assert torch.equal(made.cases.image[b], torch.where(region, cases.image[row], cases.image[b]))
        assert torch.equal(made.cases.organs[b, 0], torch.where(region, cases.organs[row, 0], 0))
        assert bool(made.cases.has_organs[b])
        taught = ~made.left_out[b] & ~made.cases.label[b].isnan()
        assert bool(taught.any())  # of the drawn label at least
        assert torch.equal(made.cases.label[b][taught], cases.label[row][taught])
        assert not taught[3]  # the label from anywhere is the case's own, and its image is not any more


def test_the_lender_does_not_depend_on_its_truth_and_every_label_has_its_turn():
    cases, rules = make_cases(3, count=60, segmented=20), Rules(ct.OrganTable.load(TABLE))
    cases.label.nan_to_num_(0)
    regions = rules.regions(cases, None)
    plans = [
        make_plan(rules, regions, label, 60, 1.0, "label", torch.Generator().manual_seed(1),
                  lend=Cases(cases.image, cases.organs, label, cases.has_organs))
        for label in (cases.label, 1 - cases.label)
    ]  # fmt: skip
    for one, other in zip(vars(plans[0]).values(), vars(plans[1]).values(), strict=True):
        assert torch.equal(one, other)
    lent = plans[0].last[~cases.has_organs]
    assert (lent >= 0).all()
    assert 0.4 < (lent == 0).float().mean() < 0.9  # two labels of three
    rows = plans[0].source[~cases.has_organs].amax(dim=1)
    assert len(rows.unique()) > 12


def test_cases_without_organs_stay_by_default(kit, tmp_path):
    cases = some_without(kit, 4, (0,))
    _, seen = fit(kit, tmp_path, cases, ct.OutsideSwap(kit.TABLE, p=1.0))
    changed = (seen[0]["image"] != torch.stack([c["image"] for c in cases])).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, False, False]


def test_organs_are_lent_over_steps(kit, tmp_path):
    cases = some_without(kit)  # one segmented case per batch of four
    for case in cases:
        case["has_organs"] = bool(case["organs"].any())
    swap = ct.OutsideSwap(kit.TABLE, p=1.0, without_organs="lend", seam=0)
    trainer, seen = fit(kit, tmp_path, cases, swap, batch_size=2)
    assert trainer.callback_metrics["train/swapped_cases"] == 1
    lent = seen[1]  # a batch in which no case has organs
    assert lent["has_organs"].tolist() == [True, True]
    region = lent["organs"] > 0
    theirs, own = cases[0]["image"], torch.stack([cases[2]["image"], cases[3]["image"]])
    assert bool(region.flatten(1).any(dim=1).all())
    assert torch.equal(lent["image"], torch.where(region, theirs, own))
    # Nothing of the user's is changed in place.
    assert not cases[2]["organs"].any()
    assert cases[2]["has_organs"] is False


def test_of_a_lent_organ_alone_the_truth_is_taught(kit, tmp_path):
    cases = some_without(kit, 4, (0,))
    for case in cases[1:]:
        case["label"] = 1 - cases[0]["label"]
    _, seen = fit(kit, tmp_path, cases, ct.OutsideSwap(kit.TABLE, p=1.0, without_organs="lend", leave_out="nan"))
    label = seen[0]["label"]
    known = ~label.isnan()
    assert bool(known.any(dim=1).all())
    assert not bool(known.all())
    # Everything that is still known of the others is the lender's.
    assert torch.equal(label[known], cases[0]["label"].expand(4, -1)[known])


def test_usual_regions_close_the_gap_between_segmented_cases(kit, tmp_path):
    cases = some_without(kit)
    swap = ct.OutsideSwap(kit.TABLE, p=1.0, without_organs="atlas", seam=0)
    trainer, seen = fit(kit, tmp_path, cases, swap)
    table = ct.OrganTable.load(kit.TABLE)
    region = table.allowed(cases[0]["organs"][None])  # the only segmented case of the first batch
    for row in range(1, 4):
        same = seen[0]["image"][row] == cases[row]["image"]
        assert bool((same | ~region[0]).flatten(1).all(dim=1).any())
        assert not bool(same.all())
    assert trainer.callback_metrics["train/swapped_cases"] == 1


def test_usual_regions_are_those_that_a_share_of_cases_has():
    rules = Rules(ct.OrganTable.load(TABLE))
    cases = make_cases(1, count=40, segmented=30)
    plain = rules.regions(cases, None)
    atlas = RegionAtlas(len(rules.rules))
    assert not atlas.known
    for rows in (slice(0, 15), slice(15, 40)):
        part = cases.rows(torch.arange(40)[rows])
        atlas.add(rules.regions(part, None), part.has_organs, (6, 5, 4))
    for rule in range(len(rules.rules)):
        own = plain.of(rule, torch.arange(40))
        share = own[cases.has_organs].float().mean(dim=0)
        wanted = share >= SHARE - 1e-6
        assert torch.equal(atlas.region(rule), wanted)
        completed = rules.regions(cases, None)
        completed.complete_with(atlas.region)
        every = completed.of(rule, torch.arange(40))
        for b in range(40):
            assert torch.equal(every[b], own[b] if cases.has_organs[b] else wanted)
    atlas.fix(lambda value: value, torch.device("cpu"))
    again = RegionAtlas(len(rules.rules))
    again.load(atlas.state(), torch.device("cpu"))
    for rule in range(len(rules.rules)):
        assert torch.equal(again.region(rule), atlas.region(rule))
    other = RegionAtlas(len(rules.rules) + 1)
    other.load(atlas.state(), torch.device("cpu"))
    assert not other.known


def test_processes_fix_what_all_have_counted_or_wait():
    rules = Rules(ct.OrganTable.load(TABLE))
    cases = make_cases(1, count=4, segmented=2)
    atlas, empty = RegionAtlas(len(rules.rules)), RegionAtlas(len(rules.rules))
    atlas.add(rules.regions(cases, None), cases.has_organs, (6, 5, 4))
    calls = []
    atlas.fix(lambda value: calls.append(value) or value + (1 if len(calls) == 1 else 0), torch.device("cpu"))
    assert atlas.state() == {}  # another process has seen no organ yet
    assert len(calls) == 2
    empty.fix(lambda value: value, torch.device("cpu"))
    assert not empty.known


@pytest.mark.parametrize("way", ["lend", "atlas"])
def test_a_run_that_goes_on_is_one_that_never_stopped(kit, tmp_path, way):
    def images(epochs, ckpt=None):
        swap = ct.OutsideSwap(kit.TABLE, seed=5, without_organs=way, p=0.9)
        module, seen = recording(kit)
        trainer = kit.make_trainer(tmp_path, swap, max_epochs=epochs)
        # The second segmented case is larger than the first: an atlas that begins anew shows it.
        trainer.fit(module, DataLoader(some_without(kit, keep=(1, 6)), batch_size=4), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return torch.cat([batch["image"] for batch in seen])

    whole = images(3)
    images(2)
    assert torch.equal(images(3, ckpt=tmp_path / "2.ckpt"), whole[16:])
    torch.load(tmp_path / "3.ckpt", weights_only=True)


@pytest.mark.parametrize("way", ["lend", "atlas"])
def test_with_the_mask_loss_and_no_organs_at_all(kit, tmp_path, way):
    cases = some_without(kit, 6, ())
    module, seen = recording(kit)
    callbacks = [ct.OutsideSwap(kit.TABLE, p=1.0, without_organs=way), ct.MaskLossCallback(kit.LAYER, kit.TABLE)]
    trainer = kit.make_trainer(tmp_path, *callbacks)
    trainer.fit(module, DataLoader(cases, batch_size=3))
    assert torch.equal(torch.cat([b["image"] for b in seen]), torch.stack([c["image"] for c in cases]))
    assert trainer.callback_metrics["train/swapped_cases"] == 0


def test_the_mask_loss_sees_the_lent_organ(kit, tmp_path):
    cases = some_without(kit, 4, (0,))
    mask = ct.MaskLossCallback(kit.LAYER, kit.TABLE)
    module, seen = recording(kit)
    trainer = kit.make_trainer(tmp_path, mask, ct.OutsideSwap(kit.TABLE, p=1.0, without_organs="lend"))
    trainer.fit(module, DataLoader(cases, batch_size=4))
    assert bool(seen[0]["organs"].flatten(1).any(dim=1).all())
    assert float(trainer.callback_metrics["train/mask_loss"]) > 0


def test_few_lenders_are_kept_the_newest_first():
    cases = make_cases(0, count=30, segmented=30)
    lenders = Lenders(organs=True)
    joined, _ = lenders.join(cases.rows(torch.arange(20)), None)
    assert len(joined.image) == 20
    joined, _ = lenders.join(cases.rows(torch.arange(20, 23)), None)
    assert len(joined.image) == SEGMENTED
    wanted = cases.image[[20, 21, 22, *range(19, 19 - SEGMENTED + 3, -1)]]
    assert torch.equal(joined.image, wanted)
    other = Cases(torch.zeros(2, 2, 3, 3, 3), torch.zeros(2, 1, 3, 3, 3, dtype=torch.int64), cases.label[:2],
                  torch.zeros(2, dtype=torch.bool))  # fmt: skip
    joined, _ = lenders.join(other, None)
    assert len(joined.image) == 2  # images of another shape do not fit
    lenders.clear()
    assert len(lenders.join(cases.rows(torch.arange(1)), None)[0].image) == 1


def test_what_cannot_work_is_refused(kit, tmp_path):
    with pytest.raises(InputError, match="without_organs= expects stay, lend, atlas, got 'borrow'"):
        ct.OutsideSwap(kit.TABLE, without_organs="borrow")
    classes = kit.make_cases(4)
    for row, case in enumerate(classes):
        case["label"] = row % 3
    module, _ = recording(kit, loss=lambda y, t: F.cross_entropy(y, t))
    swap = ct.OutsideSwap(kit.TABLE, keep="union", without_organs="lend")
    with pytest.raises(InputError, match="a case that is lent an organ would show the class of another"):
        kit.make_trainer(tmp_path, swap).fit(module, DataLoader(classes, batch_size=2))
    small = kit.make_cases(2, size=(8, 16, 20))
    module, _ = recording(kit, kit.make_net("pool"))
    swap = ct.OutsideSwap(kit.TABLE, without_organs="atlas")
    with pytest.raises(InputError, match=r"images of one shape, \(12, 16, 20\) so far, got \(8, 16, 20\)"):
        kit.make_trainer(tmp_path, swap).fit(module, DataLoader([*kit.make_cases(2), *small], batch_size=2))
