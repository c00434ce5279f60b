"""Which labels are scored where maps are dear: as many as the budget holds, evenly, and the same ones every time."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks import _map_budget
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._map_budget import MapBudget
from camtrain.callbacks._panel import Panel
from camtrain.callbacks._scores import ScoreBook
from camtrain.cam.price import WorkCount
from camtrain.cam.watch import ModuleWatch
from camtrain.metrics import class_sensitivity, label_auroc, organ_iou

MID = "features.1"
_second = _map_budget.SECOND


@pytest.fixture
def no_second(monkeypatch):
    """Nothing for short passes: what is spent is the share alone."""
    monkeypatch.setattr(_map_budget, "SECOND", 1e-9)
    monkeypatch.setattr(_map_budget, "_EACH", 0.0)


def price_of(kit, net, layer=MID, size=None, batch=3):
    """Of a pass in forwards of a batch."""
    count = WorkCount(net, [net.get_submodule(layer)])
    with count.counting(), torch.no_grad():
        net(torch.rand(batch, 1, *(size or kit.SIZE)))
    net.calls = 0
    return (count.behind(0).backward + count.behind(0).forward / 2) / count.whole.forward


class Spy:
    """Of each batch: which pairs were scored, and was a graph recorded?"""

    def __init__(self, monkeypatch):
        self.scored, self.graphs = [], []
        update, update_logits, start = ScoreBook.update, ScoreBook.update_logits, ModuleWatch.start

        def counted(book, logits, label):
            self.scored.append(torch.zeros_like(label, dtype=torch.bool))
            update_logits(book, logits, label)

        def updated(book, maps, allowed, label, has_organs, logits):
            self.scored[-1] = (label == 1) & has_organs[:, None]
            update(book, maps, allowed, label, has_organs, logits)

        def started(watch, graph=True):
            self.graphs.append(graph)
            start(watch, graph)

        monkeypatch.setattr(ScoreBook, "update_logits", counted)

        monkeypatch.setattr(ScoreBook, "update", updated)
        monkeypatch.setattr(ModuleWatch, "start", started)

    def pairs(self):
        return torch.cat(self.scored)


def validate(kit, folder, cases, net=None, layer=MID, batch=3, **options):
    options = {"every_n_epochs": 0, "alarms": [], **options}
    monitor = ct.AttentionMonitor(layer, kit.TABLE, **options)
    trainer = kit.make_trainer(folder, monitor)
    module = kit.make_lit(net or kit.make_net("mlp"))
    trainer.validate(module, kit.loader(cases, batch), verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}, monitor, trainer


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
    total, spent, loan = max(share * batches, _second), 0.0, max(_second / 4, 2 * price)
    for number, scored in enumerate(chosen, start=1):
        passes = int(scored.sum(1).max())
        spent += passes * price
        part = (total - _second / 2) / batches
        assert spent <= _second / 2 + number * part + loan + 1e-6
    assert spent <= total + loan + 1e-6


def test_all_are_scored_while_the_budget_holds_them():
    rows = labels_of(1, 20, 2, 5)
    for label, scored in zip(rows, paced(rows, price=0.001), strict=True):
        assert torch.equal(scored, torch.tensor(label) == 1)


def test_a_short_pass_has_a_second_of_them():
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
    assert found["val/scored_share"] == pytest.approx(float(scored.sum() / (label == 1).sum()))
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


# What a fresh pair of eyes found --------------------------------------------------------------------------------------


def test_the_share_begins_anew_in_every_epoch_and_one_step_is_counted(kit, tmp_path, monkeypatch, no_second):
    counted, shares, counting = [], [], WorkCount.counting
    monkeypatch.setattr(WorkCount, "counting", lambda count: counted.append(count) or counting(count))

    class Seen(pl.Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                shares.append(trainer.callback_metrics["val/scored_share"].item())

    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], map_budget=0.5)
    trainer = kit.make_trainer(tmp_path, monitor, Seen(), max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(kit.make_lit(kit.make_net("mlp")), kit.loader(kit.make_cases(3)), kit.loader(kit.make_cases(24)))
    assert len(counted) == 1
    assert len(shares) == 3
    assert 0 < shares[0] < 1
    assert shares[1:] == shares[:1] * 2


class Named(torch.utils.data.Dataset):
    """Cases with names, of which some are shown a second time in the place of broken ones."""

    def __init__(self, cases, order):
        self.cases, self.order, self.case_ids = cases, order, [case["id"] for case in cases]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        return self.cases[self.order[index]]


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0, 1.7])
def test_epochs_agree_where_cases_are_shown_twice(kit, tmp_path, monkeypatch, no_second, budget):
    cases, spy, per_epoch = kit.make_cases(24), Spy(monkeypatch), []
    order = [0, 1, 2, 3, 4, 0, 6, 7, 1, 9, 2, 3, 12, 13, 14, 0, 1, 17, 18, 4, 20, 21, 22, 1]
    data = torch.utils.data.DataLoader(Named(cases, order), batch_size=3)
    monitor = ct.AttentionMonitor(MID, kit.TABLE, panel_cases=3, alarms=[], map_budget=budget)

    class Cut(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            per_epoch.append(spy.pairs())
            spy.scored.clear()

    trainer = kit.make_trainer(tmp_path, monitor, Cut(), max_epochs=3)
    trainer.fit(kit.make_lit(kit.make_net("mlp")), kit.loader(cases[:3]), data)
    assert torch.equal(per_epoch[1], per_epoch[0])
    assert torch.equal(per_epoch[2], per_epoch[0])
    again = torch.tensor([case in order[:place] for place, case in enumerate(order)])
    assert not per_epoch[0][again].any()


def test_each_loader_has_a_budget_of_its_own(kit, tmp_path, no_second):
    cases, net = kit.make_cases(24), kit.make_net("mlp")
    other, budget = kit.make_cases(36, seed=3), price_of(kit, net)
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], map_budget=budget)
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.validate(kit.make_lit(net), [kit.loader(cases), kit.loader(other)], verbose=False)
    both = {key: value.item() for key, value in trainer.callback_metrics.items()}
    alone, *_ = validate(kit, tmp_path, other, kit.make_net("mlp"), map_budget=budget)
    share = {key: value for key, value in both.items() if key.startswith("val_1/scored_share")}
    assert share
    assert {key.replace("val_1", "val"): value for key, value in share.items()} == pytest.approx(
        {key: value for key, value in alone.items() if key.startswith("val/scored_share")}
    )


def test_a_second_is_shared_by_the_batches_of_each_loader(kit, tmp_path):
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], map_budget=1e-9)
    trainer = kit.make_trainer(tmp_path, monitor)
    loaders = [kit.loader(kit.make_cases(6)), kit.loader(kit.make_cases(24))]
    trainer.validate(kit.make_lit(kit.make_net("mlp")), loaders, verbose=False)
    for loader, batches in enumerate((2, 8)):
        trainer.validate_loop._max_batches = [2, 8]
        monitor.budget.begin()
        assert monitor.budget._credit_for(trainer, loader) == pytest.approx(
            _second / 2 + _second / 2 / batches, rel=1e-6
        )


@pytest.mark.parametrize("call", [0, -1])
def test_the_pass_goes_down_to_the_run_that_counts(kit, tmp_path, call):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.act, self.first, self.second = (
                torch.nn.Softplus(),
                torch.nn.Conv3d(1, 4, 3, 2),
                torch.nn.Conv3d(4, 6, 3, 2),
            )
            self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6 * 2 * 3 * 4, 5), torch.nn.Tanh())
            self.out = torch.nn.Linear(5, 3)

        def forward(self, image):
            return self.out(self.head(self.act(self.second(self.act(self.first(image))))))

    net, cases = Twice(), kit.make_cases(6)
    count = WorkCount(net, [net.act])
    with count.counting(), torch.no_grad():
        net(torch.stack([case["image"] for case in cases[:3]]))
    _, monitor, _ = validate(kit, tmp_path, cases, net, layer="act", call=call)
    behind = count.behind(0, call)
    expected = behind.backward + behind.forward / 2 + _map_budget._EACH
    assert monitor.budget._price == pytest.approx((expected, count.whole.forward))
    assert count.behind(0, 0).backward > 1.5 * count.behind(0, -1).backward


def test_a_reshaped_layer_takes_passes_whatever_the_head(kit, tmp_path, no_second):
    found, *_ = validate(
        kit, tmp_path, kit.make_cases(24), kit.make_net("flatten"), kit.LAYER, map_budget=1e-6,
        reshape=lambda output: output.flip(2),
    )  # fmt: skip
    assert 0 < found["val/scored_share"] < 1


def test_modules_of_torchscript_beside_the_network_do_no_harm(kit, tmp_path):
    module = kit.make_lit(kit.make_net("mlp"))
    module.norm = torch.jit.script(torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1)))
    trainer = kit.make_trainer(tmp_path, ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[]))
    trainer.validate(module, kit.loader(kit.make_cases(6)), verbose=False)
    assert "val/organ_iou" in trainer.callback_metrics


def test_an_adapter_is_called_once_for_each_batch(kit, tmp_path, no_second):
    calls = []

    def adapter(batch):
        calls.append(batch["image"])
        batch["label"] = batch.pop("truth")
        return batch

    def validation_step(self, batch, batch_idx):
        return self(batch["image"])

    cases = [
        {("truth" if key == "label" else key): value for key, value in case.items()} for case in kit.make_cases(12)
    ]
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], adapter=adapter, map_budget=0.1)
    module = kit.make_lit(kit.make_net("mlp"), validation_step=validation_step)
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.validate(module, kit.loader(cases), verbose=False)
    assert 0 < trainer.callback_metrics["val/scored_share"].item() < 1
    assert len(calls) == 4


def test_a_step_may_repair_the_labels(kit, tmp_path, no_second):
    def validation_step(self, batch, batch_idx):
        batch["label"].masked_fill_(batch["label"] < 0, torch.nan)
        return self(batch["image"])

    cases = kit.make_cases(12)
    for case in cases:
        case["label"][1] = -1.0
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], map_budget=0.1)
    trainer = kit.make_trainer(tmp_path, monitor)
    module = kit.make_lit(kit.make_net("mlp"), validation_step=validation_step)
    trainer.validate(module, kit.loader(cases), verbose=False)
    assert 0 < trainer.callback_metrics["val/scored_share"].item() < 1


def test_what_the_network_keeps_of_a_step_that_rested_is_of_use_later(kit, tmp_path, no_second):
    class Cached(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.features, self.head, self.grids = net.features, net.head, {}

        def forward(self, image):
            made = self.features(image)
            grid = self.grids.setdefault(tuple(made.shape), torch.ones(made.shape))
            return self.head(made * grid)

    cases = kit.make_cases(11)
    for case in cases[3:7]:
        case["label"][:] = 0
    batches = torch.utils.data.DataLoader(cases, batch_sampler=[[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]])
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[])
    trainer = kit.make_trainer(tmp_path, monitor)
    trainer.validate(kit.make_lit(Cached(kit.make_net("mlp"))), batches, verbose=False)
    assert "val/organ_iou" in trainer.callback_metrics


def test_pictures_of_paid_methods_are_whole(kit, tmp_path, no_second):
    drawn = {}
    for budget in (None, 1e-6):
        _, monitor, _ = validate(
            kit, tmp_path / str(budget), kit.make_cases(24), map_budget=budget, every_n_epochs=1,
            methods=["hirescam", {"name": "scorecam", "channels": 2}],
        )  # fmt: skip
        rows = (monitor.publisher.run_dir.path / "cases.csv").read_text().splitlines()
        drawn[budget] = sorted(",".join(row.split(",")[3:8:2]) for row in rows)
    assert any("scorecam" in row for row in drawn[None])
    assert drawn[1e-6] == drawn[None]


def test_what_was_planned_holds_where_fewer_labels_turn_out_to_be_there():
    budget = MapBudget(0.5)
    budget._price, budget._count = (1.0, 1.0), object()
    budget._scored, budget._credit = {"val": [3, 3, 3]}, {"val": 0.7}
    trainer = SimpleNamespace(testing=False, sanity_checking=False, num_val_batches=[1e9], datamodule=None)
    book = SimpleNamespace(share=SimpleNamespace(update=lambda *_: None))
    step, label = SimpleNamespace(watch=SimpleNamespace(graph=True)), torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    budget._told = step.watch
    assert budget.plan(trainer, label, 0) == 0  # one pass of three, and labels of a case come together
    shown_before = torch.tensor([[False] * 3, [False, True, False]])
    assert not budget.within(trainer, step, label, shown_before, 0, book).any()
    assert budget.plan(trainer, torch.tensor([[0.0, 1, 0]]), 0) == 1


def test_a_case_of_the_panel_is_drawn_once_and_its_other_patches_may_rest():
    panel, truth = Panel(2, 1), torch.tensor([[1.0, 0], [0, 1]])
    assert panel.may_draw(["c"])  # the choice is yet to be made
    panel.wanted(["a", "b"], truth, torch.ones(2, dtype=torch.bool), torch.full((2, 2), 0.5))
    panel.end()
    assert panel.may_draw(["c", "a"])
    assert not panel.may_draw(["c"])
    panel.wanted(["a"], truth[:1], torch.ones(1, dtype=torch.bool), torch.full((1, 2), 0.5))
    assert not panel.may_draw(["a", "c"])
    assert panel.may_draw(["b"])
    panel.begin()
    assert panel.may_draw(["a"])


def test_an_adapter_has_the_last_word_on_labels(kit):
    batch = {"label": torch.ones(2, 3), "id": ["a", "b"]}
    label, cases = RunContext(None, None, None, kit.LABELS, "fill").ahead(batch, 0)
    assert label.shape == (2, 3)
    assert cases == ["a", "b"]
    assert RunContext(None, None, lambda batch: batch, kit.LABELS, "fill").ahead(batch, 0) == (None, [])
    assert RunContext(None, None, None, kit.LABELS, "fill").ahead((1, 2), 0) == (None, [])


def test_what_memory_undid_is_scored_once(kit, tmp_path, monkeypatch, no_second):
    def collect(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Panel, "collect", collect)
    spy, cases = Spy(monkeypatch), kit.make_cases(24)
    with pytest.warns(RuntimeWarning, match="memory ended"):
        found, *_ = validate(kit, tmp_path, cases, map_budget=1.0, every_n_epochs=1)
    present = sum(int(case["label"].sum()) for case in cases)
    assert found["val/scored_share"] == pytest.approx(int(spy.pairs().sum()) / present)


def test_a_batch_without_cases_and_one_without_labels_take_nothing():
    budget = MapBudget(0.5)
    budget._price, budget._count = (1.0, 1.0), object()
    trainer = SimpleNamespace(testing=False, num_val_batches=[3], datamodule=None)
    budget._credit["val"] = -2.0
    assert budget.plan(trainer, torch.zeros(0, 3), 0) == budget.plan(trainer, torch.zeros(2, 3), 0) == 0
    assert budget.plan(trainer, None, 0) is None


def test_without_places_in_the_panel_steps_rest_too(kit, tmp_path, monkeypatch, no_second):
    spy = Spy(monkeypatch)
    validate(kit, tmp_path, kit.make_cases(24), map_budget=1e-6, every_n_epochs=1, panel_cases=0)
    assert spy.graphs == [True] + [False] * 7


def test_the_share_is_of_what_was_scored_where_memory_ends(kit, tmp_path, monkeypatch, no_second):
    from camtrain.callbacks._step_maps import StepMaps

    def make(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StepMaps, "make", make)
    spy = Spy(monkeypatch)
    with pytest.warns(RuntimeWarning, match="no map is made any more"):
        found, *_ = validate(kit, tmp_path, kit.make_cases(24), map_budget=1.0)
    assert found["val/scored_share"] == 0
    assert not any(spy.graphs[1:])  # and no graph is recorded for nothing


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_a_wrong_layer_is_told_though_no_label_is_present(kit, tmp_path, head):
    cases = kit.make_cases(6)
    for case in cases:
        case["label"][:] = 0
    with pytest.raises(InputError, match=r"expected \(B, K, \*S\) with spatial axes"):
        validate(kit, tmp_path, cases, kit.make_net(head), layer="head.1")
