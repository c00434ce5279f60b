"""Where a budget of maps could go wrong: cases shown twice, adapters, repaired labels, caches, memory, panels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from budget_tools import MID, SECOND, Spy, price_of, validate

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks import _map_budget
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._map_budget import MapBudget
from camtrain.callbacks._panel import Panel
from camtrain.cam.price import WorkCount


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


def test_aSECOND_is_shared_by_the_batches_of_each_loader(kit, tmp_path):
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=[], map_budget=1e-9)
    trainer = kit.make_trainer(tmp_path, monitor)
    loaders = [kit.loader(kit.make_cases(6)), kit.loader(kit.make_cases(24))]
    trainer.validate(kit.make_lit(kit.make_net("mlp")), loaders, verbose=False)
    for loader, batches in enumerate((2, 8)):
        trainer.validate_loop._max_batches = [2, 8]
        monitor.budget.begin()
        assert monitor.budget._credit_for(trainer, loader) == pytest.approx(SECOND / 2 + SECOND / 2 / batches, rel=1e-6)


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
    present = sum(case["label"] for case in cases)
    assert found["val/scored_share"] == pytest.approx(float((spy.pairs().sum(0) / present).mean()))


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


@pytest.mark.parametrize("asked", [False, True])
def test_steps_that_rest_tell_how_the_network_is_asked_where_it_is(kit, tmp_path, monkeypatch, no_second, asked):
    alarms = [{"name": "reliance", "every_n_epochs": 1, "replacement": "blur", "cases": 9}] if asked else []
    spy, had, cases = Spy(monkeypatch), [], kit.make_cases(24)
    monitor = ct.AttentionMonitor(MID, kit.TABLE, every_n_epochs=0, alarms=alarms, map_budget=1e-6)
    net = kit.make_net("mlp")
    net.register_forward_pre_hook(lambda net, _: had.append(bool(net.features[1]._forward_hooks)))
    trainer = kit.make_trainer(tmp_path, monitor, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(kit.make_lit(net), kit.loader(cases[:3]), kit.loader(cases))
    assert spy.graphs == [True] + [False] * 7
    # One forward of training, then those of the validation: hooks on the layer itself only where they are needed.
    assert had[2:9] == [asked] * 7
    assert ("val/outside_share" in trainer.callback_metrics) == asked
