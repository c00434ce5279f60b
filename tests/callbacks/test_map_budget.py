"""Which labels are scored where maps are dear: as many as the budget holds, evenly, and the same ones every time."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from budget_tools import MID, SECOND, Spy, price_of, validate
from hypothesis import given, settings
from hypothesis import strategies as st

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._map_budget import MapBudget
from camtrain.cam.watch import ModuleWatch
from camtrain.metrics import class_sensitivity, label_auroc, organ_iou

# How the passes are paced -------------------------------------------------------------------------------------------


def paced(rows, price, share=0.5, forward=1.0, batches=None):
    """Scored pairs per batch, of a budget that is told price and forward."""
    budget = MapBudget(share)
    budget._price, budget._count = (price, forward), object()
    trainer = SimpleNamespace(
        testing=False, sanity_checking=False, num_val_batches=[batches or len(rows)], callbacks=[], datamodule=None
    )
    step = SimpleNamespace(watch=SimpleNamespace(graph=True))
    budget._told = step.watch
    book = SimpleNamespace(share=SimpleNamespace(update=lambda *_: None))
    chosen = []
    for row in rows:
        label = torch.tensor(row, dtype=torch.float)
        planned = budget.plan(trainer, label, 0)
        within = budget.within(trainer, step, label, label == 1, 0, book)
        assert not (within & (label != 1)).any()
        assert int(within.sum(1).max()) == planned
        chosen.append(within)
    return chosen


def labels_of(seed, batches, cases, labels, rate=0.5):
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(batches, cases, labels, generator=rng) < rate).float().tolist()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 999), batches=st.integers(1, 60), cases=st.integers(1, 4), labels=st.integers(1, 9),
    price=st.floats(0.01, 3.0), share=st.floats(0.01, 1.0),
)  # fmt: skip
def test_no_more_is_spent_than_the_budget_and_a_loan_hold_by_any_batch(seed, batches, cases, labels, price, share):
    chosen = paced(labels_of(seed, batches, cases, labels), price, share)
    total, spent, loan = max(share * batches, SECOND), 0.0, max(SECOND / 4, 2 * price)
    for number, scored in enumerate(chosen, start=1):
        passes = int(scored.sum(1).max())
        spent += passes * price
        part = (total - SECOND / 2) / batches
        assert spent <= SECOND / 2 + number * part + loan + 1e-6
    assert spent <= total + loan + 1e-6


def test_all_are_scored_while_the_budget_holds_them():
    rows = labels_of(1, 20, 2, 5)
    for label, scored in zip(rows, paced(rows, price=0.001), strict=True):
        assert torch.equal(scored, torch.tensor(label) == 1)


def test_a_short_pass_has_aSECOND_of_them():
    rows = labels_of(2, 4, 2, 6, rate=1.0)
    scored = sum(int(each.sum()) for each in paced(rows, price=0.04, share=0.01))
    assert scored == 4 * 2 * 6  # 24 passes of 0.04 s, though four forwards of 1 s would give but 0.04 s
    assert sum(int(each.sum()) for each in paced(rows, price=0.08, share=0.01)) == 24  # half of them


def test_they_are_spread_over_the_whole_pass():
    chosen = paced(labels_of(3, 400, 2, 6, rate=0.6), price=1.0, share=0.5)
    quarters = [sum(int(each.sum()) for each in chosen[start : start + 100]) for start in range(0, 400, 100)]
    assert min(quarters) > 0.9 * max(quarters)


def test_a_rare_label_is_scored_as_often_as_a_common_one():
    rows = torch.tensor(labels_of(4, 300, 2, 8, rate=0.9))
    rows[..., 5] *= (torch.arange(300) % 10 == 0)[:, None]  # one batch in ten
    chosen = torch.stack(paced(rows.tolist(), price=1.0, share=0.5)).flatten(0, 1).sum(0)
    others = chosen[[0, 1, 2, 3, 4, 6, 7]]
    assert others.max() - others.min() <= 3
    assert chosen[5] > 0.4 * float(others.float().mean())  # by chance a tenth


def test_labels_of_a_case_come_together_since_they_are_compared():
    for scored in paced(labels_of(5, 200, 1, 6, rate=0.8), price=0.9, share=0.5):
        assert int(scored.sum()) != 1
    alone = paced(labels_of(5, 200, 1, 1, rate=0.8), price=0.9, share=0.5)
    assert sum(int(each.sum()) for each in alone) > 50  # of cases with one label that one


def test_endless_loaders_are_paced_too():
    chosen = paced(labels_of(6, 300, 2, 4, rate=1.0), price=1.0, share=0.5, batches=math.inf)
    assert sum(int(each.sum(1).max()) for each in chosen) == pytest.approx(150, abs=2)


@pytest.mark.parametrize("wrong", [0, -0.1, True, "0.1", math.inf, math.nan])
def test_a_wrong_budget_is_refused(wrong):
    with pytest.raises(InputError, match=r"map_budget= expects a positive number.*or None"):
        ct.AttentionMonitor(map_budget=wrong)


# In a Trainer -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_scored_pairs(kit, tmp_path, monkeypatch, no_second):
    cases, net = kit.make_cases(24), kit.make_net("mlp")
    spy, price = Spy(monkeypatch), price_of(kit, net)
    found, *_ = validate(kit, tmp_path, cases, net, map_budget=price)
    batch = torch.utils.data.default_collate(cases)
    label, scored = batch["label"], spy.pairs()
    assert 0 < scored.sum() < (label == 1).sum()
    assert not (scored & (label != 1)).any()
    maps = ct.explain(net, batch["image"], layer=MID, labels=scored)
    allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=maps.shape[2:])
    only = torch.where((label == 1) & ~scored, torch.nan, label)
    per_label = organ_iou(maps, allowed, only).nanmean(0)
    sensitivity = class_sensitivity(maps, only).nanmean(0)
    auroc = label_auroc(net(batch["image"]).detach(), label)  # of all cases
    share = scored.sum(0) / (label == 1).sum(0)
    for column, name in enumerate(kit.LABELS):
        assert found[f"val/organ_iou/{name}"] == pytest.approx(float(per_label[column]), abs=1e-5)
        assert found[f"val/auroc/{name}"] == pytest.approx(float(auroc[column]), abs=1e-6)
        assert found[f"val/scored_share/{name}"] == pytest.approx(float(share[column]))
        if not sensitivity[column].isnan():
            assert found[f"val/class_sensitivity/{name}"] == pytest.approx(float(sensitivity[column]), abs=1e-5)
    assert found["val/scored_share"] == pytest.approx(float(share.mean()))
    passes = [int(each.sum(1).max()) for each in spy.scored]
    assert 0 < sum(passes) <= 8  # eight batches, one pass for each
    assert spy.graphs.count(False) > 0
    assert all(graph for graph, each in zip(spy.graphs, passes, strict=True) if each)
    assert kit.hooks_of(net) == {}


def test_batches_that_are_not_mapped_give_the_same_logits_and_no_graph(kit, tmp_path, monkeypatch, no_second):
    cases, spy = kit.make_cases(24), Spy(monkeypatch)
    paced_by, *_ = validate(kit, tmp_path / "a", cases, map_budget=1e-6)
    assert spy.graphs == [True] + [False] * 7
    spy.graphs.clear()
    whole, *_ = validate(kit, tmp_path / "b", cases, map_budget=None)
    assert all(spy.graphs)
    for name in ("auroc", "auprc", "calibration_error"):
        keys = [key for key in whole if key.startswith(f"val/{name}")]
        assert len(keys) == 4
        assert {key: paced_by[key] for key in keys} == {key: whole[key] for key in keys}
    assert paced_by["val/loss"] == whole["val/loss"]
    assert 0 < paced_by["val/scored_share"] < 0.2  # of the first batch, on loan: never nothing at all
    assert not any(key.startswith("val/scored_share") for key in whole)


@pytest.mark.parametrize("options", [{}, {"map_budget": None}])
def test_small_sets_are_scored_whole(kit, tmp_path, options):
    cases, net = kit.make_cases(24), kit.make_net("mlp")
    found, *_ = validate(kit, tmp_path, cases, net, **options)
    batch = torch.utils.data.default_collate(cases)
    maps = ct.explain(net, batch["image"], layer=MID, labels=batch["label"] == 1)
    allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=maps.shape[2:])
    expected = organ_iou(maps, allowed, batch["label"]).nanmean(0)
    assert [found[f"val/organ_iou/{name}"] for name in kit.LABELS] == pytest.approx(expected.tolist(), abs=1e-5)
    assert not any("scored_share" in key for key in found)


def test_maps_that_need_no_pass_are_all_scored(kit, tmp_path, monkeypatch, no_second):
    spy = Spy(monkeypatch)
    found, *_ = validate(kit, tmp_path, kit.make_cases(12), kit.make_net("flatten"), layer=kit.LAYER, map_budget=1e-9)
    assert all(spy.graphs)
    assert not any("scored_share" in key for key in found)


@pytest.mark.parametrize("pictures", [0, 1])
def test_the_same_pairs_in_every_epoch_and_in_a_run_of_its_own(kit, tmp_path, monkeypatch, no_second, pictures):
    cases, spy = kit.make_cases(24), Spy(monkeypatch)
    price = price_of(kit, kit.make_net("mlp")) / (8 if pictures else 1)
    options = {"every_n_epochs": pictures, "panel_cases": 3, "alarms": [], "map_budget": price}
    monitor = ct.AttentionMonitor(MID, kit.TABLE, **options)
    trainer = kit.make_trainer(tmp_path, monitor, max_epochs=3, num_sanity_val_steps=2)
    module, per_epoch = kit.make_lit(kit.make_net("mlp")), []

    class Cut(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            if not trainer.sanity_checking:
                per_epoch.append(spy.pairs())
            spy.scored.clear()

    trainer.callbacks.append(Cut())
    trainer.fit(module, kit.loader(cases[:6]), kit.loader(cases))
    trainer.validate(module, kit.loader(cases), verbose=False)
    assert len(per_epoch) == 4
    assert 0 < per_epoch[0].sum() < sum(int(case["label"].sum()) for case in cases)
    for later in per_epoch[1:]:
        assert torch.equal(later, per_epoch[0])
    if pictures:
        entries = [row["case"] for row in monitor.publisher.run_dir.read_panel()["cases"]]
        assert len(set(entries)) == 3
        folder = monitor.publisher.run_dir.path / "epochs"
        drawn = [sorted(file.name for file in (folder / f"{epoch:04d}").glob("case*.*")) for epoch in range(3)]
        assert len(drawn[0]) >= 3
        assert drawn[1] == drawn[2] == drawn[0]  # all of them, also where the budget had rested
    assert kit.hooks_of(module) == {}


def test_a_test_scores_all(kit, tmp_path, no_second):
    cases, net = kit.make_cases(12), kit.make_net("mlp")
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], map_budget=1e-6)
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.test(kit.make_lit(net), kit.loader(cases), verbose=False)
    batch = torch.utils.data.default_collate(cases)
    maps = ct.explain(net, batch["image"], layer=MID, labels=batch["label"] == 1)
    allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=maps.shape[2:])
    expected = organ_iou(maps, allowed, batch["label"]).nanmean(0).nanmean()
    assert trainer.callback_metrics["test/organ_iou"].item() == pytest.approx(float(expected), abs=1e-5)
    assert "test/scored_share" not in trainer.callback_metrics


def test_it_is_told_once_and_stands_in_the_files(kit, tmp_path, caplog, no_second):
    with caplog.at_level(logging.INFO):
        _, monitor, trainer = validate(kit, tmp_path, kit.make_cases(24), map_budget=0.2, every_n_epochs=1)
        trainer.validate(kit.make_lit(kit.make_net("mlp")), kit.loader(kit.make_cases(24)), verbose=False)
    said = [r.getMessage() for r in caplog.records if "map_budget=0.2" in r.getMessage()]
    assert len(said) == 1
    assert f"a map of {MID} takes a backward pass, of about" in said[0]
    folder = monitor.publisher.run_dir.path
    assert "scored_share" in (folder / "scores.csv").read_text()
    assert "share of the present labels that were scored" in (folder / "report.html").read_text()


def test_several_layers_cost_a_pass_each(kit, tmp_path, no_second):
    net = kit.make_net("mlp")
    both = price_of(kit, net, "features.0") + price_of(kit, net, "features.1")
    found, monitor, _ = validate(
        kit, tmp_path, kit.make_cases(24), net, layer=["features.0", "features.1"], map_budget=both
    )
    assert monitor.budget._price[0] / monitor.budget._price[1] == pytest.approx(both, rel=1e-6)
    assert 0 < found["val/scored_share"] < 1


def test_cases_without_organs_and_labels_that_are_unknown_cost_nothing(kit, tmp_path, monkeypatch, no_second):
    cases = kit.make_cases(24)
    for row, case in enumerate(cases):
        if row < 12:
            case["organs"] = torch.zeros_like(case["organs"])
        case["label"][1] = torch.nan
    spy, price = Spy(monkeypatch), price_of(kit, kit.make_net("mlp"))
    validate(kit, tmp_path, cases, map_budget=price)
    label = torch.stack([case["label"] for case in cases])
    # What those four have left is enough for the others: two labels at most in each of four batches.
    assert torch.equal(spy.pairs(), (label == 1) & (torch.arange(24) >= 12)[:, None])


def test_without_a_table_labels_are_paced_all_the_same(kit, tmp_path, no_second):
    cases = [{key: case[key] for key in ("image", "label", "id")} for case in kit.make_cases(24)]
    monitor = ct.AttentionMonitor(MID, every_n_epochs=0, alarms=[], map_budget=0.5)
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.validate(kit.make_lit(kit.make_net("mlp")), kit.loader(cases), verbose=False)
    assert 0 < trainer.callback_metrics["val/scored_share"].item() < 1
    assert "val/class_sensitivity" in trainer.callback_metrics


def test_a_step_that_says_where_its_logits_are(kit, tmp_path, no_second):
    def validation_step(self, batch, batch_idx):
        return {"features": (features := self.net.features(batch["image"])), "logits": self.net.head(features)}

    cases, net = kit.make_cases(24), kit.make_net("mlp")
    monitor = ct.AttentionMonitor(
        "net.features.1", kit.TABLE, every_n_epochs=0, alarms=[], map_budget=0.2, logits="net.head"
    )
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.validate(kit.make_lit(net, validation_step=validation_step), kit.loader(cases), verbose=False)
    batch = torch.utils.data.default_collate(cases)
    auroc = label_auroc(net(batch["image"]).detach(), batch["label"]).nanmean()
    assert trainer.callback_metrics["val/auroc"].item() == pytest.approx(float(auroc), abs=1e-6)
    assert 0 < trainer.callback_metrics["val/scored_share"].item() < 1


def test_a_watch_without_a_graph_sees_the_logits_alone(kit):
    net = kit.make_lit(kit.make_net("mlp")).eval()
    image = torch.rand(2, 1, *kit.SIZE)
    watch = ModuleWatch(net, "net.features.1", cut=True)
    with torch.inference_mode():
        watch.start()
        before = net(image)
        _, logits = watch.take_all()
        watch.stop()
        watch.start(graph=False)
        given = net(image)
        assert torch.equal(given, before)
        assert given.is_inference() == before.is_inference()
        assert torch.is_inference_mode_enabled()
        sources, alone = watch.take_all()
        watch.stop()
    assert torch.equal(alone, logits)
    assert not alone.requires_grad
    assert not alone.is_inference()
    assert [source.numel() for source in sources.values()] == [0]
    watch.start()  # the next step has one again
    net(image)
    sources, logits = watch.take_all()
    assert logits.requires_grad
    assert sources["net.features.1"].numel()
    watch.stop()
    assert kit.hooks_of(net) == {}
