"""What reports say of single cases, in both callbacks, in OutsideSwap and in an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import camtrain as ct
from camtrain import InputError
from camtrain.metrics import energy_inside
from camtrain.reporting.panel_files import read_volume

ORGANS = ["lung_left", "lung_right", "heart"]
MEMBERS = {"nodule": ["lung_left", "lung_right"], "stent": ["heart"], "effusion": ["lung_right"]}


def told_cases(kit, count=6):
    """Every other nodule lies in one lung only, and one stent nowhere that is known."""
    cases = kit.make_cases(count)
    for row, case in enumerate(cases):
        case["allowed_organs"] = torch.ones(3, 3, dtype=torch.bool)
        if row % 2:
            case["label"][0] = 1
            case["allowed_organs"][0, row % 4 == 1] = False
        if row == 2:
            case["allowed_organs"][1] = False
    return cases


def allowed_by_hand(organs, told, size):
    """(B, L, *S') from each organ alone, without the table's own code for reports."""
    alone = ct.OrganTable({name: i for i, name in enumerate(ORGANS, 1)}, {name: [name] for name in ORGANS})
    cells = alone.allowed(organs, size)
    result = torch.zeros(len(organs), 3, *size, dtype=torch.bool)
    for case in range(len(organs)):
        for label, members in enumerate(MEMBERS.values()):
            for name in members:
                if told[case, label, ORGANS.index(name)]:
                    result[case, label] |= cells[case, ORGANS.index(name)]
    return result


class ByHand:
    """Stands for the table in the training loop of the test kit, batch after batch."""

    def __init__(self, batches):
        self.told = [batch["allowed_organs"] for batch in batches]

    def allowed(self, organs, size):
        return allowed_by_hand(organs, self.told.pop(0), size)


def test_the_mask_loss_forbids_the_other_lung(kit, tmp_path):
    nets, cases = [kit.make_net(), kit.make_net(), kit.make_net()], told_cases(kit)
    loss = {"labels": "present", "weight": 3.0}
    trainer = kit.make_trainer(tmp_path, ct.MaskLossCallback(layer=kit.LAYER, table=kit.TABLE, **loss))
    trainer.fit(kit.make_lit(nets[0]), kit.loader(cases))
    told = kit.by_hand(nets[1], kit.loader(cases), ct.OrganMaskLoss(**loss), ByHand(kit.loader(cases)))
    kit.same_weights(nets[0], nets[1])
    untold = kit.by_hand(nets[2], kit.loader(cases), ct.OrganMaskLoss(**loss))
    assert abs(told[0][1] - untold[0][1]) > 1e-4
    assert not torch.allclose(nets[0].features[2].weight, nets[2].features[2].weight, atol=1e-5)


@pytest.mark.slow
def test_scores_of_the_monitor_and_of_an_evaluation(kit, tmp_path):
    net, cases = kit.make_net(), told_cases(kit)
    (whole,) = kit.loader(cases, 6)
    maps = ct.explain(net, whole["image"], layer=kit.LAYER)
    allowed = allowed_by_hand(whole["organs"], whole["allowed_organs"], maps.shape[2:])
    wanted = energy_inside(maps, allowed, whole["label"]).nanmean(0)
    both = energy_inside(maps, ct.OrganTable.load(kit.TABLE).allowed(whole["organs"], maps.shape[2:]), whole["label"])
    assert abs(wanted - both.nanmean(0)).max() > 1e-3
    monitor = ct.AttentionMonitor(layer=kit.LAYER, table=kit.TABLE)
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.validate(kit.make_lit(net), kit.loader(cases), verbose=False)
    found = ct.evaluate(
        net, kit.loader(cases), kit.TABLE, layers=[kit.LAYER], measures=["energy_inside"], progress=False
    )
    rows = {row.label: row.mean for row in found.rows if row.measure == "energy_inside" and row.label}
    for index, name in enumerate(kit.LABELS):
        value = wanted[index].item()
        assert not math.isnan(value)
        assert trainer.callback_metrics[f"val/energy_inside/{name}"].item() == pytest.approx(value, rel=1e-5)
        assert rows[name] == pytest.approx(value, rel=1e-5)


def test_a_composite_follows_the_table(kit, tmp_path):
    """What is shown then comes from several cases: a report about one of them says nothing of the others."""
    cases, seen = told_cases(kit), []

    def training_step(self, batch, batch_idx):
        seen.append(batch)
        return kit.bce(self(batch["image"]), batch["label"])

    swap = ct.OutsideSwap(table=kit.TABLE, p=0.5)
    module = kit.make_lit(kit.make_net(), training_step=training_step)
    kit.make_trainer(tmp_path, swap).fit(module, kit.loader(cases, 6))
    (batch,) = seen
    swapped = (batch["image"] != torch.stack([c["image"] for c in cases])).flatten(1).any(1)
    assert 0 < swapped.sum() < 6
    before = torch.stack([c["allowed_organs"] for c in cases])
    assert torch.equal(batch["allowed_organs"], before | swapped[:, None, None])
    assert not before[swapped].all()


def test_another_number_of_organs_is_refused(kit, tmp_path):
    cases = told_cases(kit)
    for case in cases:
        case["allowed_organs"] = case["allowed_organs"][:, :2]
    trainer = kit.make_trainer(tmp_path, ct.MaskLossCallback(layer=kit.LAYER, table=kit.TABLE))
    with pytest.raises(InputError, match=r"expected allowed_organs of shape \(3, 3, 3\).*got \(3, 3, 2\)"):
        trainer.fit(kit.make_lit(kit.make_net()), kit.loader(cases))


def test_the_report_draws_the_lung_of_the_case(kit, tmp_path):
    cases = told_cases(kit)
    monitor = ct.AttentionMonitor(layer=kit.LAYER, table=kit.TABLE)
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.fit(kit.make_lit(kit.make_net()), kit.loader(cases), kit.loader(cases))
    narrowed = 0
    for case in cases:
        path = monitor.publisher.run_dir.volume_path(case["id"], "val")
        if not path.exists():
            continue
        volume = read_volume(path)
        wanted = allowed_by_hand(case["organs"][None], case["allowed_organs"][None], kit.SIZE)[0]
        for index, label in enumerate(kit.LABELS):
            drawn = volume.regions[volume.region_of[label]] if label in volume.region_of else np.zeros(kit.SIZE)
            np.testing.assert_array_equal(drawn, wanted[index].numpy())
        narrowed += not bool(case["allowed_organs"].all())
    assert narrowed
