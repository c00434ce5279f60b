"""Both callbacks as LightningCLI entries: the table as path, shipped name, inline mapping and from the data module."""

from __future__ import annotations

import importlib

import pytest
import yaml

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import LitClassifier

LABELS = ["nodule", "effusion"]
INLINE = {"organs": {"lung_left": 1, "lung_right": 2}, "labels": {"nodule": ["lung_left"], "effusion": "anywhere"}}


def cli(
    folder,
    table,
    namespace="pytorch_lightning",
    layer="features",
    methods=("hirescam", "gradcam"),
    watched=None,
    **more,
):
    entries = [
        {"class_path": "camtrain.callbacks.MaskLossCallback", "init_args": {"form": "l2", "scale": 135, **more}},
        {
            "class_path": "camtrain.callbacks.AttentionMonitor",
            "init_args": {"methods": list(methods), **(watched or {})},
        },
    ]
    for entry in entries:
        entry["init_args"] |= {"layer": layer} | ({} if table is None else {"table": table})
    config = {
        "model": {
            "net": {"class_path": "camtrain.models.FlattenNet", "init_args": {"size": 16, "widths": [2, 2, 2, 2]}},
            "labels": LABELS,
        },
        "data": {"labels": LABELS, "cases": 4, "size": 16, "batch_size": 2, "val_cases": 3, "test_cases": 2},
        "trainer": {"callbacks": entries, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
                    "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": str(folder)},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    module = importlib.import_module(f"{namespace}.cli")
    return module.LightningCLI(
        LitClassifier,
        PhantomDataModule,
        args=["--config", str(folder / "config.yaml")],
        save_config_callback=None,
        run=False,
    )


def callbacks_of(found):
    kinds = (ct.MaskLossCallback, ct.AttentionMonitor)
    return [c for c in found.trainer.callbacks if isinstance(c, kinds)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "shipped name", "mapping", "data module"])
def test_a_table_of_every_kind(tmp_path, kind):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(INLINE))
    table = {"path": str(path), "shipped name": "phantom", "mapping": INLINE, "data module": None}[kind]
    found = cli(tmp_path, table, logits="net", names=LABELS)
    found.trainer.fit(found.model, datamodule=found.datamodule)
    loss, monitor = callbacks_of(found)
    assert loss.loss_fn.scale == 135
    wanted = ct.OrganTable.load(INLINE if kind in ("path", "mapping") else "phantom").select(LABELS)
    for callback in (loss, monitor):
        assert callback.context._selected.to_dict()["labels"] == wanted.to_dict()["labels"]
    assert found.trainer.callback_metrics["train/mask_loss"] > 0
    assert "val/auroc" in found.trainer.callback_metrics


@pytest.mark.slow
def test_several_layers_and_methods_with_options(tmp_path):
    methods = ["hirescam", {"name": "scorecam", "channels": 1}, {"name": "lrp", "rules": "epsilon", "box": [-1, 1]}]
    found = cli(tmp_path, "phantom", layer=["features.1", "features"], methods=methods)
    found.trainer.fit(found.model, datamodule=found.datamodule)
    loss, monitor = callbacks_of(found)
    assert loss.layer == monitor.layer == ["features.1", "features"]
    assert monitor.methods == ["hirescam", "scorecam", "lrp"]
    metrics = found.trainer.callback_metrics
    each = [metrics[f"train/mask_loss/{layer}"] for layer in loss.layer]
    assert metrics["train/mask_loss"].item() == pytest.approx(sum(each).item() / 2)
    assert {"val/energy_inside", "val/energy_inside@scorecam", "val/energy_inside@lrp"} <= set(metrics)


@pytest.mark.slow
def test_alarms_with_options(tmp_path):
    watched = {
        "alarms": ["drifting", {"name": "reliance", "threshold": 0.6, "replacement": "blur", "every_n_epochs": 1}],
        "stop_on": ["drifting"],
        "in_bar": ["organ_iou"],
    }
    found = cli(tmp_path, "phantom", watched=watched)
    found.trainer.fit(found.model, datamodule=found.datamodule)
    _, monitor = callbacks_of(found)
    rule = monitor.alarms.questions.reliance
    assert (rule.threshold, rule.replacement, rule.patience) == (0.6, "blur", 2)
    assert monitor.alarms.stop_on == ["drifting"]
    metrics = {key for key in found.trainer.callback_metrics if "alarm" in key}
    assert metrics == {"val/alarm/drifting", "val/alarm/reliance"}
    assert "val/organ_iou" in found.trainer.progress_bar_metrics
    with pytest.raises(ValueError, match="alarm 'reliance': patience= expects a whole number of at least 1, got 0"):
        cli(tmp_path, "phantom", watched={"alarms": [{"name": "reliance", "patience": 0}]})


def test_a_wrong_option_of_a_method(tmp_path):
    # jsonargparse reports what a constructor refuses in its own words, with ours inside.
    with pytest.raises(ValueError, match=r"has the options channels, .*, got chanels=; nearest: channels"):
        cli(tmp_path, "phantom", methods=["hirescam", {"name": "scorecam", "chanels": 1}])


def test_a_wrong_table_is_named_in_the_error(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**INLINE, "labels": {"nodule": ["lung_lefd"]}}))
    found = cli(tmp_path, str(path))
    with pytest.raises(ct.InputError, match=r"wrong\.yaml.*lung_lefd.*lung_left"):
        found.trainer.fit(found.model, datamodule=found.datamodule)
    found = cli(tmp_path, str(tmp_path / "missing.yaml"))
    with pytest.raises(ct.InputError, match=r"missing\.yaml"):
        found.trainer.fit(found.model, datamodule=found.datamodule)


def test_an_unknown_argument_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(tmp_path, "phantom", wait=3)
    assert "wait" in capsys.readouterr().err


def test_the_other_lightning_takes_the_entries_too(tmp_path):
    module = importlib.import_module("lightning.pytorch.cli")
    parser = module.LightningArgumentParser()
    parser.add_argument("--callback", type=importlib.import_module("lightning.pytorch").Callback)
    for name in ("MaskLossCallback", "AttentionMonitor"):
        given = {"class_path": f"camtrain.callbacks.{name}", "init_args": {"table": "phantom"}}
        made = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
        assert type(made).__name__ == name
