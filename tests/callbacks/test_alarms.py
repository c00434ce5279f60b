"""Alarms in real runs: what is logged, written and told, who pays, what is left behind, when training stops."""

from __future__ import annotations

import csv
import importlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.anatomy.baselines import make_baseline
from camtrain.anatomy.replacing import replace_inside, replace_outside
from camtrain.callbacks._fixed_cases import FixedCases
from camtrain.callbacks._pulls import questions

NAMES = ["reliance", "depth", "energy_below_chance", "same_place", "empty_maps", "drifting", "bias_share"]
NOW = {"patience": 1}
ALWAYS = {"name": "energy_below_chance", "threshold": 100.0, "patience": 2}


def reliance(**options):
    return {"name": "reliance", "every_n_epochs": 1, "patience": 1, "replacement": "blur", **options}


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
    """A module whose logits move when a part of the image is replaced, that training hardly changes, and that tells the
    truths of its labels apart: they are set to what it says."""
    net, image = kit.make_net(), torch.stack([case["image"] for case in cases])
    with torch.no_grad():
        net.head[1].weight.mul_(100.0)
        net.head[1].bias.sub_(net(image).median(0).values)
        for case, truth in zip(cases, (net(image) > 0).float(), strict=True):
            case["label"] = truth
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
    cases = kit.make_cases(12)
    module = reactive(kit, cases)
    net = module.net
    added = monitor(kit, alarms=None)
    trainer = fit(kit, tmp_path, added, module=module, cases=cases, num_sanity_val_steps=1)
    assert set(logged(trainer)) == set(NAMES)
    asked = net.calls
    trainer.validate(trainer.lightning_module, kit.loader(cases), verbose=False)
    assert net.calls == asked + 4
    found = {(row.epoch, row.label) for row in added.publisher.run_dir.read_scores() if row.measure == "outside_pull"}
    assert found == {(1, label) for label in (*kit.LABELS, "mean")}


@pytest.mark.parametrize("replacement", ["case", "blur"])
def test_pulls_by_hand_with_two_images_per_case(kit, tmp_path, replacement):
    cases = kit.make_cases(9)
    module = reactive(kit, cases)
    net, images = module.net, []
    net.register_forward_pre_hook(lambda _, given: images.append(len(given[0])))
    added = monitor(kit, reliance(replacement=replacement, cases=9, margin=0.1, threshold=0.0, outside=-9.0))
    trainer = fit(kit, tmp_path, added, module=module, cases=cases, epochs=1)
    table = ct.OrganTable.load(kit.TABLE)
    fixed = FixedCases(9, 2**30)
    batch = torch.utils.data.default_collate(cases)
    fixed.offer(batch["id"], batch["image"], batch["organs"], batch["label"], torch.ones(9, dtype=torch.bool))
    asked = questions(fixed, table, replacement)
    assert sum(images) == 9 + 9 + 2 * len(asked)  # training, validation, and two forwards per case
    assert len(asked) == 9
    before = net.eval()(batch["image"]).detach()
    moved = {name: {side: {0.0: [], 1.0: []} for side in range(2)} for name in kit.LABELS}
    for one in asked:
        row = batch["id"].index(one.case.id)
        for column in one.columns:
            region = table.select([kit.LABELS[column]]).allowed(batch["organs"][row : row + 1], size=None)
            near = F.max_pool3d(region.float(), (3, 5, 5), 1, (1, 2, 2)) > 0  # a tenth of 12 x 16 x 20 voxels
            image = batch["image"][row : row + 1]
            other = make_baseline(image, "blur") if one.donor is None else one.donor.image.float()[None]
            truth = batch["label"][row, column].item()
            for side, changed in enumerate((replace_outside(image, other, near), replace_inside(image, other, near))):
                move = (net(changed) - before[row])[0, column].item()
                moved[kit.LABELS[column]][side][truth].append(
                    abs(move) if one.donor is None else move * (1 - 2 * truth)
                )
    for column, name in enumerate(kit.LABELS):
        truth = batch["label"][:, column] == 1
        gap = (before[truth, column].mean() - before[~truth, column].mean()).item()
        pulls = [
            sum(sum(v) / len(v) for v in moved[name][side].values() if v)
            / sum(bool(v) for v in moved[name][side].values()) / gap
            for side in range(2)
        ]  # fmt: skip
        for word, value in zip(("outside_pull", "inside_pull"), pulls, strict=True):
            assert trainer.callback_metrics[f"val/{word}/{name}"].item() == pytest.approx(value, abs=5e-3)
        share = max(pulls[0], 0) / (max(pulls[0], 0) + max(pulls[1], 0))
        assert trainer.callback_metrics[f"val/outside_share/{name}"].item() == pytest.approx(share, abs=5e-3)


@pytest.mark.slow
def test_a_window_of_checks_is_pooled_and_outlives_a_checkpoint(kit, tmp_path):
    cases = kit.make_cases(9)
    modules = [reactive(kit, cases) for _ in range(2)]
    seen = []
    for number, module in enumerate(modules):
        added = monitor(kit, reliance(replacement="case", window=2))
        trainer = fit(kit, tmp_path / str(number), added, module=module, cases=cases, epochs=2 if number else 3)
        seen.append(trainer)
    seen[1].save_checkpoint(tmp_path / "two.ckpt")
    again = monitor(kit, reliance(replacement="case", window=2))
    on = fit(kit, tmp_path / "1", again, module=modules[1], cases=cases, epochs=3, ckpt_path=tmp_path / "two.ckpt")
    for name in kit.LABELS:
        key = f"val/outside_pull/{name}"
        assert on.callback_metrics[key].item() == pytest.approx(seen[0].callback_metrics[key].item(), abs=1e-4)
        assert on.callback_metrics[key].item() != pytest.approx(seen[1].callback_metrics[key].item(), abs=1e-4)
    assert len(again.state_dict()["alarms"]["questions"]["answers"]) == 2


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


@pytest.mark.slow
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
    added = monitor(kit, reliance(replacement="case"))
    fit(kit, tmp_path, added, ct.OutsideSwap(kit.TABLE, p=0.5), net=net, epochs=1)
    assert "judges with blur, since OutsideSwap trains the network with case" in caplog.text
    caplog.clear()
    added = monitor(kit, reliance(replacement="air"))
    fit(kit, tmp_path, added, ct.OutsideSwap(kit.TABLE, p=0.5), net=net, epochs=1)
    assert "judges with" not in caplog.text


@pytest.mark.slow
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


@pytest.mark.slow
def test_resume_goes_on_with_cases_counters_and_checks(kit, tmp_path):
    slow = [{**ALWAYS, "patience": 3}, reliance(every_n_epochs=2, cases=6, threshold=0.0, outside=-9.0, patience=2)]
    cases = kit.make_cases()
    modules = [reactive(kit, cases) for _ in range(3)]
    first, second, whole = (monitor(kit, *slow) for _ in range(3))
    fit(kit, tmp_path / "a", first, module=modules[0], cases=cases, epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit(kit, tmp_path / "a", second, module=modules[1], cases=cases, epochs=4, num_sanity_val_steps=1,
                  ckpt_path=tmp_path / "last.ckpt")  # fmt: skip
    straight = fit(kit, tmp_path / "b", whole, module=modules[2], cases=cases, epochs=4)
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
    assert len(states[0]["questions"]["cases"]) == 6
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
    assert net.calls == 2 * (6 + 2)


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
    fit(kit, tmp_path, monitor(kit, reliance(replacement="air")), cases=dark)
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
    assert shown[0].startswith("val, scores and alarms of epoch 2 (the last), the neediest label first")
    quiet = fit(kit, tmp_path, monitor(kit, in_bar=[]))
    assert quiet.progress_bar_metrics == {}
    assert capsys.readouterr().out == ""
