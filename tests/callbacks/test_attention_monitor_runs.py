"""AttentionMonitor in whole runs: stages, checkpoints, thresholds, several loaders, clashes, panel, run folder."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import camtrain as ct
from camtrain.metrics import OrganIoU

LP = "lightning.pytorch"
NAMESPACES = ["pytorch_lightning", LP]


def monitor(kit, **options):
    return ct.AttentionMonitor(**{"layer": kit.LAYER, "table": kit.TABLE, "every_n_epochs": 0, "alarms": [], **options})


def fit(kit, folder, *callbacks, module=None, namespace="pytorch_lightning", cases=None, ckpt_path=None, **options):
    trainer = kit.make_trainer(folder, *callbacks, namespace=namespace, **options)
    data = kit.loader(cases or kit.make_cases())
    resume = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
    trainer.fit(module or kit.make_lit(kit.make_net(), namespace), data, data, **resume)
    return trainer


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def scores_in(folder):
    with (folder / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def runs_in(folder):
    return sorted((Path(folder) / "camtrain").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["pytorch_lightning", pytest.param(LP, marks=pytest.mark.slow)])
def test_one_object_through_all_stages(kit, tmp_path, namespace):
    added = monitor(kit, every_n_epochs=1, methods=["hirescam", "gradcam"], panel_cases=1)
    module, data = kit.make_lit(kit.make_net(), namespace), kit.loader(kit.make_cases())
    trainer = kit.make_trainer(tmp_path, added, ct.MaskLossCallback(kit.LAYER, kit.TABLE), namespace=namespace,
                               max_epochs=2, num_sanity_val_steps=2)  # fmt: skip
    trainer.validate(module, data, verbose=False)
    first = trainer.callback_metrics["val/organ_iou"].item()
    trainer.fit(module, data, data)
    fitted = {score.key("val", "hirescam"): score.value for score in added.scores["val"]}
    assert {k: trainer.callback_metrics[k].item() for k in fitted} == pytest.approx(fitted)
    (again,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    assert {k: v for k, v in again.items() if k != "val/loss"} == pytest.approx(fitted)
    assert fitted["val/organ_iou"] != first
    assert {k.replace("test/", "val/"): v for k, v in tested.items()} == pytest.approx(fitted)
    # The first validation is a run of its own; what follows the fit belongs to the fit.
    before, run = sorted(runs_in(tmp_path), key=lambda p: len(files_in(p)))
    assert {row["split"] for row in scores_in(before)} == {"val"}
    wanted = {"label": "mean", "measure": "organ_iou", "method": "gradcam"}
    means = [row for row in scores_in(run) if row.items() >= wanted.items()]
    assert [(r["split"], r["epoch"], r["step"]) for r in means] == [
        ("val", "0", "3"), ("val", "1", "6"), ("val", "2", "6"), ("test", "2", "6"),
    ]  # fmt: skip
    assert {name.split("/")[1] for name in files_in(run) if name.startswith("epochs/")} == {"0000", "0001", "0002"}
    assert any(name.startswith("epochs/0002/test/") for name in files_in(run))
    assert {case["split"] for case in json.loads((run / "panel.json").read_text())["cases"]} == {"val", "test"}


def test_the_sanity_check_is_neither_logged_nor_drawn(kit, tmp_path):
    seen = []

    class Look(ct.AttentionMonitor):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            seen.append((trainer.sanity_checking, len(trainer.callback_metrics), len(files_in(tmp_path))))

    fit(kit, tmp_path, Look(kit.LAYER, kit.TABLE), num_sanity_val_steps=2)
    assert seen[0][0]
    assert seen[0][2] == 0
    assert seen[0][1] <= 1  # the module's own val/loss
    assert seen[1][1] > 10
    assert seen[1][2] > 2


def test_fast_dev_run_writes_nothing(kit, tmp_path):
    trainer = fit(kit, tmp_path, monitor(kit, every_n_epochs=1), fast_dev_run=True, logger=True)
    assert "val/energy_inside" in trainer.callback_metrics
    assert files_in(tmp_path) == []


def test_limit_val_batches(kit, tmp_path):
    trainer = fit(kit, tmp_path, monitor(kit), limit_val_batches=1, max_epochs=2)
    module = kit.make_lit(trainer.lightning_module.net)
    alone = kit.make_trainer(tmp_path, monitor(kit))
    alone.validate(module, kit.loader(kit.make_cases()[:3]), verbose=False)
    assert trainer.callback_metrics["val/energy_inside"] == alone.callback_metrics["val/energy_inside"]
    fit(kit, tmp_path, monitor(kit), limit_val_batches=0)


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_monitor_keys_are_fresh_every_epoch(kit, tmp_path, namespace):
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    seen, options = [], {"monitor": "val/organ_iou", "mode": "max"}

    class Follow(callbacks.EarlyStopping):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            seen.append(trainer.callback_metrics["val/organ_iou"].item())

    best = callbacks.ModelCheckpoint(tmp_path / "best", filename="{epoch}", save_top_k=-1, **options)
    added = monitor(kit, every_n_epochs=2, panel_cases=1)
    trainer = fit(kit, tmp_path, added, Follow(patience=9, **options), best, namespace=namespace,
                  max_epochs=4, enable_checkpointing=True)  # fmt: skip
    rows = [r for r in scores_in(runs_in(tmp_path)[0]) if r["measure"] == "organ_iou" and r["label"] == "mean"]
    assert [float(r["value"]) for r in rows] == pytest.approx(seen)
    assert len(set(seen)) == 4
    epochs = {name.split("/")[1] for name in files_in(runs_in(tmp_path)[0]) if name.startswith("epochs/")}
    assert epochs == {"0000", "0002", "0003"}  # the last one is always drawn
    scores = {int(Path(path).stem.split("=")[1]): value.item() for path, value in best.best_k_models.items()}
    assert scores == pytest.approx(dict(enumerate(seen)))
    # Every checkpoint carries the thresholds of its own epoch, and test takes them.
    module, data = kit.make_lit(kit.make_net(), namespace), kit.loader(kit.make_cases(6, seed=3))
    trainer.test(module, data, ckpt_path="best", weights_only=True, verbose=False)
    state = torch.load(best.best_model_path, weights_only=True)["callbacks"][added.state_key]
    batch = torch.utils.data.default_collate(kit.make_cases(6, seed=3))
    maps = ct.explain(module.net, batch["image"], layer=kit.LAYER)
    allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=maps.shape[2:])
    wanted = OrganIoU(3, thresholds=state["thresholds"]["hirescam"])
    wanted.update(maps, allowed, batch["label"])
    assert trainer.callback_metrics["test/organ_iou"].item() == pytest.approx(wanted.compute().item())
    assert torch.equal(added.thresholds["hirescam"], state["thresholds"]["hirescam"])


def test_thresholds_of_the_last_validation_are_frozen_for_test(kit, tmp_path):
    added, module = monitor(kit), kit.make_lit(kit.make_net())
    trainer = kit.make_trainer(tmp_path, added)
    with pytest.warns(UserWarning, match="no validation has run, so OrganIoU thresholds are chosen on 'test' itself"):
        trainer.test(module, kit.loader(kit.make_cases(6, seed=3)), verbose=False)
    swept = trainer.callback_metrics["test/organ_iou"].item()
    trainer.validate(module, kit.loader(kit.make_cases()), verbose=False)
    assert added.thresholds["hirescam"].shape == (3,)
    trainer.test(module, kit.loader(kit.make_cases(6, seed=3)), verbose=False)
    assert trainer.callback_metrics["test/organ_iou"].item() < swept


@pytest.mark.slow
def test_several_loaders(kit, tmp_path):
    pl = importlib.import_module("pytorch_lightning")
    sets = [kit.loader(kit.make_cases(6, seed=seed)) for seed in range(3)]

    class Data(pl.LightningDataModule):
        test_splits = ("test", "shift_free")

        def val_dataloader(self):
            return sets

        test_dataloader = val_dataloader

    added, module = monitor(kit, every_n_epochs=1, panel_cases=1), kit.make_lit(kit.make_net())
    trainer = kit.make_trainer(tmp_path, added)
    rows = trainer.validate(module, datamodule=Data(), verbose=False)
    merged = {k: v for row in rows for k, v in row.items()}
    tested = {k: v for row in trainer.test(module, datamodule=Data(), verbose=False) for k, v in row.items()}
    names = {"val": "test", "val_1": "shift_free", "val_2": "test_2"}
    for one_set, (split, named) in zip(sets, names.items(), strict=True):
        alone = kit.make_trainer(tmp_path / "alone", monitor(kit))
        alone.validate(module, one_set, verbose=False)
        assert merged[f"{split}/organ_iou"] == pytest.approx(alone.callback_metrics["val/organ_iou"].item())
        assert merged[f"{split}/auroc/stent"] == pytest.approx(alone.callback_metrics["val/auroc/stent"].item())
        assert tested[f"{named}/energy_inside"] == pytest.approx(merged[f"{split}/energy_inside"])
    panel = json.loads((runs_in(tmp_path)[0] / "panel.json").read_text())
    assert {case["split"] for case in panel["cases"]} == {"val", "val_1", "val_2", "test", "shift_free", "test_2"}


def test_clashes_with_the_module(kit, tmp_path):
    def in_step(self, batch, batch_idx):
        self(batch["image"])
        self.log("val/auroc", 0.3)

    def at_end(self):
        self.log("val/organ_iou", -3.0, prog_bar=True)

    with pytest.raises(ct.InputError, match=r"'val/auroc' is logged by camtrain and by somebody else.*name="):
        fit(kit, tmp_path, monitor(kit), module=kit.make_lit(kit.make_net(), validation_step=in_step))
    with pytest.raises(ct.InputError, match="'val/organ_iou' is logged by camtrain and by somebody else"):
        fit(kit, tmp_path, monitor(kit), module=kit.make_lit(kit.make_net(), on_validation_epoch_end=at_end))
    module = kit.make_lit(kit.make_net(), on_validation_epoch_end=at_end)
    trainer = fit(kit, tmp_path, monitor(kit, name="maps"), module=module, max_epochs=2)
    assert trainer.callback_metrics["val/organ_iou"] == -3
    assert 0 <= trainer.callback_metrics["val/maps/organ_iou"] <= 1


def test_areas_that_the_module_logs_itself_are_left_to_it(kit, tmp_path):
    def at_end(self):
        self.log("val/auprc", 7.0)

    added = monitor(kit)
    module = kit.make_lit(kit.make_net(), on_validation_epoch_end=at_end)
    metrics = fit(kit, tmp_path, added, module=module, max_epochs=2).callback_metrics
    assert metrics["val/auprc"] == 7
    assert not any(key.startswith("val/auprc/") for key in metrics)  # not two definitions under one name
    assert {key for key in metrics if key.startswith("val/calibration_error/")}
    kept = {row.label: row.value for row in added.publisher.run_dir.read_scores() if row.measure == "auprc"}
    assert 0 < kept["mean"] <= 1
    assert set(kept) > {"mean"}


def test_two_monitors(kit, tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AttentionMonitor`"):
        fit(kit, tmp_path, monitor(kit), monitor(kit, layer="features.1"))
    module = kit.make_lit(kit.make_net("mlp"))
    options = {"every_n_epochs": 1, "panel_cases": 1}
    pair = [monitor(kit, **options), monitor(kit, layer="features.1", name="early", **options)]
    trainer = fit(kit, tmp_path, *pair, module=module)
    metrics = trainer.callback_metrics
    assert metrics["val/energy_inside"] != metrics["val/early/energy_inside"]
    assert metrics["val/auroc"] == metrics["val/early/auroc"]
    assert "validation_step" not in vars(module)
    assert kit.hooks_of(module) == {}
    assert pair[0].publisher.run_dir.path != pair[1].publisher.run_dir.path


def test_more_than_twenty_labels_go_to_one_table(kit, tmp_path):
    labels, loggers = 23, importlib.import_module("pytorch_lightning.loggers")
    names = [f"finding_{i:02d}" for i in range(labels)]
    table = {"organs": {"lung": 1}, "labels": {name: ["lung"] for name in names}}
    cases = kit.make_cases(labels=labels)
    for case in cases:
        case["label"][4:] = torch.nan  # few labels have scores: it is the number of labels that counts
    logger = loggers.CSVLogger(tmp_path)
    trainer = fit(kit, tmp_path, monitor(kit, table=table, methods=["hirescam", "gradcam"]), cases=cases,
                  module=kit.make_lit(kit.make_net(outputs=labels)), logger=logger)  # fmt: skip
    assert "val/energy_inside@gradcam/finding_01" in trainer.callback_metrics
    header = next(csv.reader((Path(logger.log_dir) / "metrics.csv").open()))
    assert {"val/auroc", "val/energy_inside@gradcam"} <= set(header)
    assert not any("finding" in column for column in header)
    (written,) = Path(logger.log_dir).rglob("tables/*.csv")
    rows = list(csv.reader(written.open()))
    assert rows[0][:5] == ["label", "auroc", "auprc", "calibration_error", "organ_iou"]
    assert "organ_iou@gradcam" in rows[0]
    assert [row[0] for row in rows[1:]] == names
    assert rows[1][1]
    assert not any(rows[-1][1:])


@pytest.mark.slow
def test_the_panel_is_the_same_every_epoch(kit, tmp_path, monkeypatch):
    from camtrain.callbacks import _panel

    drawn, cases = [], kit.make_cases()
    cases[7]["label"] = torch.zeros(3)  # a case without any finding
    original = _panel.PanelEntry.draw
    monkeypatch.setattr(
        _panel.PanelEntry, "draw", lambda e, scale, *more: drawn.append((e, dict(scale))) or original(e, scale, *more)
    )
    fit(kit, tmp_path, monitor(kit, every_n_epochs=1, panel_cases=6, labels_per_case=1), max_epochs=3, cases=cases)
    per_epoch = len(drawn) // 3
    epochs = [[(e.case, e.label, e.kind) for e, _ in drawn[i * per_epoch : (i + 1) * per_epoch]] for i in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    positive = {label for _, label, kind in epochs[0] if kind == "positive"}
    assert positive == set(kit.LABELS)
    (negative,) = [case for case, _, kind in epochs[0] if kind == "negative"]
    assert not next(case for case in cases if case["id"] == negative)["label"].any()
    assert sum(kind == "hard" for *_, kind in epochs[0]) == 1
    assert len({tuple(scale.items()) for _, scale in drawn}) == 1
    for entry, _ in drawn:
        case = next(c for c in cases if c["id"] == entry.case)
        assert case["label"][kit.LABELS.index(entry.label)] == entry.present
        assert entry.kind != "positive" or entry.present
        assert entry.shape == kit.SIZE
        (organ, *_) = entry.scenes.values()
        height = organ.point[2]
        assert np.array_equal(organ.plane("axial", height).T[::-1, ::-1], case["image"][0, :, :, height])
        assert organ.allowed.shape == kit.SIZE
        assert not torch.from_numpy(entry.maps["hirescam"]).isnan().any()
    # The maps are those of the epoch.
    assert not torch.equal(*(torch.from_numpy(drawn[i][0].maps["hirescam"]) for i in (0, per_epoch)))
    names = [name for name in files_in(runs_in(tmp_path)[0]) if name.startswith("epochs/0002/") and ".png" in name]
    assert sorted(["epochs/0002/overview.png", *(f"epochs/0002/{c}_{label}.png" for c, label, _ in epochs[0])]) == names


@pytest.mark.slow
def test_what_only_the_panel_shows_is_not_scored(kit, tmp_path):
    """Scores with pictures, whose panel asks for maps of absent labels too, equal scores without."""
    both = []
    for every in (0, 1):
        added = monitor(kit, every_n_epochs=every, panel_cases=12, methods=["hirescam", "gradcam"])
        fit(kit, tmp_path / str(every), added, module=kit.make_lit(kit.make_net("mlp")))
        both.append({(s.measure, s.method, s.label): s.value for s in added.scores["val"]})
    assert both[0] == pytest.approx(both[1])
    shown = json.loads((runs_in(tmp_path / "1")[0] / "panel.json").read_text())["cases"]
    assert any(not case["present"] for case in shown)


@pytest.mark.slow
def test_a_shuffled_validation_set_keeps_its_panel(kit, tmp_path):
    trainer = kit.make_trainer(tmp_path, monitor(kit, every_n_epochs=1), max_epochs=2)
    data = torch.utils.data.DataLoader(kit.make_cases(), batch_size=3, shuffle=True)
    trainer.fit(kit.make_lit(kit.make_net()), data, data)
    names = [name.split("/", 2)[1:] for name in files_in(runs_in(tmp_path)[0]) if name.startswith("epochs/")]
    assert [n for e, n in names if e == "0000"] == [n for e, n in names if e == "0001"]


@pytest.mark.slow
def test_resume_keeps_run_folder_panel_and_scale(kit, tmp_path):
    first = monitor(kit, every_n_epochs=1, panel_cases=2)
    trainer = fit(kit, tmp_path, first, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = monitor(kit, every_n_epochs=1, panel_cases=5)  # the panel is that of the checkpoint
    resumed = fit(kit, tmp_path, second, max_epochs=3, ckpt_path=tmp_path / "last.ckpt", num_sanity_val_steps=2)
    (run,) = runs_in(tmp_path)
    assert second.publisher.run_dir.path == first.publisher.run_dir.path == run
    whole = monitor(kit, every_n_epochs=1, panel_cases=2)
    straight = fit(kit, tmp_path / "straight", whole, max_epochs=3)
    wanted = {k: v.item() for k, v in straight.callback_metrics.items()}
    assert {k: v.item() for k, v in resumed.callback_metrics.items()} == pytest.approx(wanted, abs=1e-5)
    (other,) = runs_in(tmp_path / "straight")
    assert files_in(run) == files_in(other)
    assert [r["epoch"] for r in scores_in(run)] == [r["epoch"] for r in scores_in(other)]
    assert (run / "cases.csv").read_text().count("\n") == (other / "cases.csv").read_text().count("\n")
    panels = [json.loads((folder / "panel.json").read_text()) for folder in (run, other)]
    assert panels[0]["cases"] == panels[1]["cases"]
    assert panels[0]["scale"] == pytest.approx(panels[1]["scale"])


def test_state_is_plain(kit, tmp_path):
    added = monitor(kit, every_n_epochs=1)
    fit(kit, tmp_path, added)
    torch.save(added.state_dict(), tmp_path / "state.pt")
    other = monitor(kit)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    states = [monitor_.state_dict() for monitor_ in (added, other)]
    thresholds = [state.pop("thresholds") for state in states]
    maps = [state["past"].pop("maps") for state in states]
    assert len(maps[0]) == len(maps[1]) > 0
    for one, same in zip(*maps, strict=True):
        assert one[:4] == same[:4]
        torch.testing.assert_close(one[4], same[4], rtol=0, atol=0)
    assert states[0] == states[1]
    assert states[0]["panels"]["val"]
    torch.testing.assert_close(*thresholds)
    other.load_state_dict({})
    assert added.state_key != monitor(kit, name="other").state_key


def test_every_fit_is_a_run_of_its_own(kit, tmp_path):
    added = monitor(kit)
    for number in (1, 2):
        fit(kit, tmp_path, added)
        assert len(runs_in(tmp_path)) == number
    assert files_in(runs_in(tmp_path)[0]) == ["report.html", "run.json", "scores.csv"]


def test_the_colour_scale_grows_with_the_maps(kit, tmp_path):
    added = monitor(kit, every_n_epochs=1, panel_cases=2)
    lit = fit(kit, tmp_path, added, max_epochs=1).lightning_module
    before = added.state_dict()["scale"]["hirescam"]
    with torch.no_grad():
        for parameter in lit.parameters():
            parameter.mul_(3)
    again = monitor(kit, every_n_epochs=1, panel_cases=2)
    again.load_state_dict(added.state_dict())
    pl.Trainer(logger=False, default_root_dir=tmp_path, enable_progress_bar=False, callbacks=[again]).validate(
        lit, kit.loader(kit.make_cases()), verbose=False
    )
    assert again.state_dict()["scale"]["hirescam"] > 2 * before > 0
