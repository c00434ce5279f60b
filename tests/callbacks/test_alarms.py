"""Alarms in real runs: what is logged, written and told, who pays, what is left behind, when training stops."""

from __future__ import annotations

import csv
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._fixed_cases import rule_to_ask
from camtrain.evaluation.reliance import reliance_probabilities
from camtrain.metrics import shortcut_reliance

NAMES = ["reliance", "depth", "energy_below_chance", "same_place", "empty_maps", "drifting", "bias_share"]
NOW = {"patience": 1}
ALWAYS = {"name": "energy_below_chance", "threshold": 100.0, "patience": 2}


def reliance(**options):
    return {"name": "reliance", "every_n_epochs": 1, "patience": 1, "replacements": ["blur"], **options}


def monitor(kit, *alarms, **options):
    usual = {"table": kit.TABLE, "every_n_epochs": 0, "alarms": list(alarms)}
    return ct.AttentionMonitor(kit.LAYER, **{**usual, **options})


def fit(kit, folder, added, *others, net=None, cases=None, epochs=2, ckpt_path=None, module=None, **options):
    trainer = kit.make_trainer(folder, added, *others, max_epochs=epochs, **options)
    data = kit.loader(cases or kit.make_cases())
    resume = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module or kit.make_lit(net or kit.make_net()), data, data, **resume)
    return trainer


def reactive(kit, cases):
    """A module whose probabilities move when a part of the image is replaced, and that training hardly changes."""
    net, image = kit.make_net(), torch.stack([case["image"] for case in cases])
    with torch.no_grad():
        net.head[1].weight.mul_(100.0)
        net.head[1].bias.sub_(net(image).median(0).values)
    net.calls = 0
    return kit.make_lit(net, configure_optimizers=lambda self: torch.optim.SGD(self.parameters(), 1e-7))


def logged(trainer, prefix="val/alarm/"):
    return {k.removeprefix(prefix): v.item() for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def rows(added):
    with (added.publisher.run_dir.path / "alarms.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_counts_are_logged_and_events_are_written_and_told(kit, tmp_path):
    added = monitor(kit, ALWAYS, name="mine")
    logger = importlib.import_module("pytorch_lightning.loggers").CSVLogger(tmp_path)
    trainer = kit.make_trainer(tmp_path, added, max_epochs=4, logger=logger)
    data = kit.loader(kit.make_cases())
    with pytest.warns(UserWarning, match="alarm energy_below_chance") as said:
        trainer.fit(kit.make_lit(kit.make_net()), data, data)
    told = [str(w.message) for w in said if "alarm energy_below_chance (val)" in str(w.message)]
    assert len(told) == 1
    assert "epoch 1" in told[0]
    assert "Try: " in told[0]
    assert all(label in told[0] for label in kit.LABELS)
    assert logged(trainer, "val/mine/alarm/") == {"energy_below_chance": 3.0}
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        curve = [row["val/mine/alarm/energy_below_chance"] for row in csv.DictReader(file)]
    assert [float(value) for value in curve if value] == [0.0, 3.0, 3.0, 3.0]
    assert [(r["epoch"], r["label"], r["state"]) for r in rows(added)] == [("1", n, "raised") for n in kit.LABELS]
    assert all(float(r["value"]) < float(r["threshold"]) == 100.0 for r in rows(added))
    assert not any("alarm" in row.measure for row in added.publisher.run_dir.read_scores())


def test_no_alarms_leave_no_keys_no_file_and_no_forward(kit, tmp_path):
    net = kit.make_net()
    added = monitor(kit)
    trainer = fit(kit, tmp_path, added, net=net)
    assert logged(trainer) == {}
    assert not (added.publisher.run_dir.path / "alarms.csv").exists()
    assert net.calls == 2 * 6


def test_defaults_watch_a_fit_and_nothing_else(kit, tmp_path):
    net = kit.make_net()
    added = monitor(kit, alarms=None)
    trainer = fit(kit, tmp_path, added, net=net, num_sanity_val_steps=1)
    assert set(logged(trainer)) == set(NAMES)
    asked = net.calls
    trainer.validate(trainer.lightning_module, kit.loader(kit.make_cases()), verbose=False)
    assert net.calls == asked + 3
    found = {(row.epoch, row.label) for row in added.publisher.run_dir.read_scores() if row.measure == "outside_effect"}
    assert found == {(1, label) for label in (*kit.LABELS, "mean")}


def test_reliance_is_that_of_the_evaluation(kit, tmp_path):
    cases = kit.make_cases(9)
    module = reactive(kit, cases)
    net = module.net
    added = monitor(kit, reliance(replacements=["blur", "mean"], cases=9))
    trainer = fit(kit, tmp_path, added, module=module, cases=cases, epochs=1)
    board = added.state_dict()["alarms"]
    assert board["questions"]["cases"] == [case["id"] for case in cases]
    # The questions, by hand: each case about one rule, in turn; then as an evaluation does it.
    batch, table = torch.utils.data.default_collate(cases), ct.OrganTable.load(kit.TABLE)
    label = torch.full_like(batch["label"], torch.nan)
    for row, group in enumerate(rule_to_ask(list(batch["label"]), [[0], [1], [2]])):
        label[row, group] = batch["label"][row, group]
    before = net.eval()(batch["image"]).sigmoid().detach()
    found = []
    for word in ("blur", "mean"):
        changed = reliance_probabilities(net, batch["image"], batch["organs"], table, label, word)
        found.append(shortcut_reliance(before, *changed, label))
    share = torch.stack([one.share for one in found]).amin(0)
    effect = torch.stack([one.outside_effect for one in found]).amin(0)
    assert share.isfinite().all()
    for name, value, moved in zip(kit.LABELS, share.tolist(), effect.tolist(), strict=True):
        assert trainer.callback_metrics[f"val/shortcut_reliance/{name}"].item() == pytest.approx(value, abs=2e-3)
        assert trainer.callback_metrics[f"val/outside_effect/{name}"].item() == pytest.approx(moved, abs=2e-3)


class Normed(nn.Module):
    """BatchNorm, dropout and a shortcut path: everything that a careless forward would disturb."""

    def __init__(self, labels=3):
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 6, 3, 2, 1)
        self.features = nn.Sequential(first, nn.BatchNorm3d(4), nn.ReLU(True), second, nn.ReLU(True))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, labels))

    def forward(self, image):
        return self.head(self.features(image))


@pytest.mark.parametrize("layer", ["features.2", "features.4"])
def test_training_goes_on_as_if_nobody_had_asked(kit, tmp_path, layer):
    weights, hooks = [], []
    for number, alarms in enumerate(([], [reliance(), {"name": "depth", "every_n_epochs": 1, "layer": "features.1"}])):
        # This user validates in train mode: our own forwards must not.
        module = kit.make_lit(Normed(), on_validation_model_eval=lambda self: None)
        torch.manual_seed(7)  # dropout draws from here on
        added = ct.AttentionMonitor(layer, kit.TABLE, every_n_epochs=0, alarms=alarms)
        fit(kit, tmp_path / str(number), added, module=module, epochs=3)
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
        weights[-1]["next draw"] = torch.rand(1)
        hooks.append(kit.hooks_of(module))
        assert module.net.features[1].training
        assert all(p.grad is None or not p.grad.requires_grad for p in module.parameters())
    assert hooks == [{}, {}]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_depth_compares_two_layers(kit, tmp_path):
    added = monitor(kit, {"name": "depth", "layer": "features.1", "every_n_epochs": 1, "patience": 1, "inside": 0.0,
                          "threshold": 50.0})  # fmt: skip
    trainer = fit(kit, tmp_path, added, net=kit.make_net("mlp"), epochs=1)
    assert logged(trainer) == {"depth": 3.0}
    values = {r["label"]: float(r["value"]) for r in rows(added)}
    mid = {n: trainer.callback_metrics[f"val/mid_energy_inside/{n}"].item() for n in kit.LABELS}
    chance = trainer.callback_metrics  # per label chances are logged beside
    for name in kit.LABELS:
        assert values[name] == pytest.approx(
            mid[name] / chance[f"val/mid_energy_inside_chance/{name}"].item(), rel=1e-4
        )


def test_an_automatic_mid_layer_is_told_and_remembered(kit, tmp_path, caplog):
    net = kit.make_net("mlp")
    net.features = nn.Sequential(nn.Conv3d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv3d(4, 6, 9, 4, 4), nn.ReLU(),
                                 nn.AdaptiveAvgPool3d((3, 4, 5)))  # fmt: skip
    net.features.append(nn.Conv3d(6, 6, 5, 1, 2))
    added = ct.AttentionMonitor("features.5", kit.TABLE, every_n_epochs=0,
                                alarms=[{"name": "depth", "every_n_epochs": 1}])  # fmt: skip
    trainer = fit(kit, tmp_path, added, net=net, epochs=1)
    assert added.state_dict()["alarms"]["questions"]["mid"] == "net.features.4"
    assert "val/mid_energy_inside/nodule" in trainer.callback_metrics


def test_outside_swap_is_judged_by_what_it_does_not_train_with(kit, tmp_path, caplog):
    net = kit.make_net()
    with torch.no_grad():
        net.head[1].weight.mul_(50.0)
    added = monitor(kit, reliance(replacements=["case", "air"]))
    fit(kit, tmp_path, added, ct.OutsideSwap(kit.TABLE, p=0.5), net=net, epochs=1)
    assert "judges with air, since OutsideSwap trains the network with case" in caplog.text
    added = monitor(kit, reliance(replacements=["case"]))
    fit(kit, tmp_path, added, ct.OutsideSwap(kit.TABLE, p=0.5), net=net, epochs=1)
    assert "judges with blur" in caplog.text


def test_stop_on_ends_the_training(kit, tmp_path):
    added = monitor(kit, ALWAYS, stop_on=["energy_below_chance"])
    trainer = fit(kit, tmp_path, added, epochs=9)
    assert trainer.current_epoch == 2
    assert trainer.should_stop
    assert [r["state"] for r in rows(added)] == ["raised"] * 3
    other = monitor(kit, ALWAYS, "drifting", stop_on="drifting")
    assert fit(kit, tmp_path, other, epochs=3).current_epoch == 3
    with pytest.raises(InputError, match="stop_on= names 'depth', which is not among the alarms"):
        monitor(kit, ALWAYS, stop_on=["depth"])


def test_resume_goes_on_with_cases_counters_and_checks(kit, tmp_path):
    slow = [{**ALWAYS, "patience": 3}, reliance(every_n_epochs=2, cases=3, threshold=0.0, outside=0.0, patience=2)]
    modules = [reactive(kit, kit.make_cases()) for _ in range(3)]
    first, second, whole = (monitor(kit, *slow) for _ in range(3))
    fit(kit, tmp_path / "a", first, module=modules[0], epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit(kit, tmp_path / "a", second, module=modules[1], epochs=4, ckpt_path=tmp_path / "last.ckpt",
                  num_sanity_val_steps=1)  # fmt: skip
    straight = fit(kit, tmp_path / "b", whole, module=modules[2], epochs=4)
    assert logged(resumed) == logged(straight)
    assert first.publisher.run_dir.path == second.publisher.run_dir.path
    told = [
        {(r["epoch"], r["alarm"], r["label"], r["state"]): float(r["value"]) for r in rows(m)} for m in (second, whole)
    ]
    assert told[0] == pytest.approx(told[1], abs=1e-4)
    assert {key[0] for key in told[0]} == {"2", "3"}
    states = [m.state_dict()["alarms"] for m in (second, whole)]
    assert states[0]["questions"] == states[1]["questions"]
    assert states[0]["questions"]["checked"] == {"reliance": 4}
    assert len(states[0]["questions"]["cases"]) == 3
    assert states[0]["board"]["told"] == states[1]["board"]["told"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_label_and_a_batch_of_one(kit, tmp_path, precision):
    cases = kit.make_cases(5, labels=1)
    table = {**kit.TABLE, "labels": {"nodule": ["lungs"]}}
    added = ct.AttentionMonitor(kit.LAYER, table, every_n_epochs=0, alarms=[reliance(), "same_place", "depth", ALWAYS])
    trainer = kit.make_trainer(tmp_path, added, max_epochs=2, precision=precision)
    data = kit.loader(cases, batch_size=1)
    trainer.fit(kit.make_lit(kit.make_net(outputs=1)), data, data)
    assert logged(trainer) == {"reliance": 0.0, "same_place": 0.0, "depth": 0.0, "energy_below_chance": 1.0}
    assert "val/outside_effect/nodule" in trainer.callback_metrics


def test_more_than_a_hundred_labels(kit, tmp_path):
    count = 104
    names = [f"finding {i}, <b>" for i in range(count)]
    table = {**kit.TABLE, "labels": {name: ["lungs" if i % 2 else "heart"] for i, name in enumerate(names)}}
    added = ct.AttentionMonitor(kit.LAYER, table, every_n_epochs=0, names=names, alarms=[reliance(), ALWAYS])
    net = kit.make_net(outputs=count)
    trainer = fit(kit, tmp_path, added, net=net, cases=kit.make_cases(8, labels=count))
    assert logged(trainer)["energy_below_chance"] > 80
    assert {r["label"] for r in rows(added)} <= set(names)
    # Two rules: each of the 8 cases is asked about one of them, for all its labels at once, 8 images a forward.
    assert net.calls == 2 * (6 + 1 + 2)


def test_nan_weights_and_scores_switch_a_check_off_and_end_nothing(kit, tmp_path, caplog):
    net = kit.make_net()
    with torch.no_grad():
        net.head[1].bias.fill_(torch.nan)
    added = monitor(kit, alarms=None)
    module = kit.make_lit(net, validation_step=lambda self, batch, batch_idx: self(batch["image"]),
                          training_step=lambda self, batch, batch_idx: self(batch["image"]).nansum() * 0)  # fmt: skip
    trainer = fit(kit, tmp_path, added, module=module, epochs=2)
    assert trainer.current_epoch == 2
    assert "alarm 'reliance' is off in this run" in caplog.text
    assert logged(trainer)["reliance"] == 0


def test_what_cannot_be_asked_is_told_and_the_rest_goes_on(kit, tmp_path, caplog):
    parts = kit.make_lit(kit.make_net(), validation_step=lambda self, batch, _: self.net.head(
        self.net.features(batch["image"])))  # fmt: skip
    added = monitor(kit, reliance(), ALWAYS, logits="head")
    trainer = fit(kit, tmp_path, added, module=parts)
    assert caplog.text.count("alarm 'reliance' is off in this run") == 1
    assert "parts of the network" in caplog.text
    assert logged(trainer) == {"reliance": 0.0, "energy_below_chance": 3.0}
    dark = [{**case, "image": case["image"] - 1.0} for case in kit.make_cases()]
    caplog.clear()
    fit(kit, tmp_path, monitor(kit, reliance(replacements=["air"])), cases=dark)
    assert "the baseline 'air' is 0.0" in caplog.text


def test_without_organs_only_what_needs_none(kit, tmp_path):
    cases = [{k: v for k, v in case.items() if k != "organs"} for case in kit.make_cases()]
    net = kit.make_net()
    added = ct.AttentionMonitor(kit.LAYER, every_n_epochs=0)
    trainer = fit(kit, tmp_path, added, net=net, cases=cases)
    assert net.calls == 2 * 6
    assert set(logged(trainer)) == set(NAMES)


def test_an_online_run_is_alerted_once(kit, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr("camtrain.callbacks._alarms.alert", lambda loggers, title, text: heard.append((title, text)))
    fit(kit, tmp_path, monitor(kit, ALWAYS, name="mine"), epochs=4)
    ((title, text),) = heard
    assert title == "camtrain mine: energy_below_chance (val)"
    assert "nodule" in text
    fit(kit, tmp_path, monitor(kit, ALWAYS), fast_dev_run=3)
    assert len(heard) == 1


def test_scores_in_the_progress_bar_and_the_table_after_fit(kit, tmp_path, capsys):
    added = monitor(kit, ALWAYS, table_after_fit=True, in_bar=["energy_inside"])
    trainer = fit(kit, tmp_path, added, epochs=3)
    assert set(trainer.progress_bar_metrics) == {"val/energy_inside"}
    shown = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert sum("energy_below_chance" in line for line in shown) == 3
    assert shown[0].startswith("val, the neediest label first")
    quiet = fit(kit, tmp_path, monitor(kit, in_bar=[]))
    assert quiet.progress_bar_metrics == {}
    assert capsys.readouterr().out == ""
