"""AttentionMonitor and real loggers: CSV, TensorBoard, W&B offline, several at once; the user's own logging stays."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
from wandb_files import OfflineRun, offline_logger

import camtrain as ct

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def run(kit, folder, logger, namespace="pytorch_lightning", module=None, **options):
    added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, **options)
    loss = ct.MaskLossCallback(kit.LAYER, kit.TABLE)
    trainer = kit.make_trainer(folder, added, loss, namespace=namespace, logger=logger, max_epochs=2)
    data = kit.loader(kit.make_cases())
    trainer.fit(module or kit.make_lit(kit.make_net(), namespace), data, data)
    return added


@pytest.mark.slow
def test_csv(kit, tmp_path):
    logger = importlib.import_module("pytorch_lightning.loggers").CSVLogger(tmp_path)
    added = run(kit, tmp_path, logger)
    assert added.publisher.run_dir.path.parent == Path(logger.log_dir) / "camtrain"
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    found = [float(row["val/organ_iou"]) for row in rows if row["val/organ_iou"]]
    assert len(found) == 2
    stored = [r.value for r in added.publisher.run_dir.read_scores() if (r.measure, r.label) == ("organ_iou", "mean")]
    assert found == pytest.approx(stored)
    assert sum(bool(row["train/mask_loss"]) for row in rows) == 2
    assert {"val/auroc/stent", "val/mask_iou/effusion", "val/energy_inside_chance"} <= set(rows[0])
    assert len(list(added.publisher.run_dir.path.glob("epochs/*/*.png"))) >= 6


@pytest.mark.slow
def test_tensorboard(kit, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = importlib.import_module("pytorch_lightning.loggers").TensorBoardLogger(tmp_path)
    added = run(kit, tmp_path, logger, max_label_keys=2)
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert [e.step for e in events.Scalars("val/organ_iou")] == [2, 5]
    assert not any(tag.startswith("val/organ_iou/") for tag in tags["scalars"])
    assert "val/scores/text_summary" in tags["tensors"]
    cases = events.Tensors("val/cases/text_summary")
    assert [e.step for e in cases] == [3, 6]
    assert b"| energy_inside |" in cases[-1].tensor_proto.string_val[0]
    pictures = [tag for tag in tags["images"] if tag.startswith("val/attention/stent/")]
    assert pictures
    assert [e.step for e in events.Images(pictures[0])] == [3, 6]
    assert added.publisher.run_dir.path.parent == Path(logger.log_dir) / "camtrain"


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_wandb_offline_beside_csv(kit, tmp_path, monkeypatch, namespace):
    loggers = importlib.import_module(f"{namespace}.loggers")
    wandb = offline_logger(tmp_path, monkeypatch, namespace)

    def training_step(self, batch, batch_idx):
        loss = kit.bce(self(batch["image"]), batch["label"])
        wandb.experiment.log({"mine": float(loss), "trainer/global_step": self.global_step})
        self.log("train/loss", loss)
        return loss

    module = kit.make_lit(kit.make_net(), namespace, training_step=training_step)
    added = run(kit, tmp_path, [wandb, loggers.CSVLogger(tmp_path)], namespace, module, max_label_keys=2)
    wandb.experiment.finish()
    (read,) = OfflineRun.in_folder(tmp_path)
    entries = read.history
    # Nothing of the user's was dropped, and every entry lies on the Trainer's own step.
    assert [e["trainer/global_step"] for e in entries if "mine" in e] == [0, 1, 2, 3, 4, 5]
    assert sum("train/loss" in e for e in entries) == 6
    assert [e["trainer/global_step"] for e in entries if "val/organ_iou" in e] == [2, 5]
    assert [e["trainer/global_step"] for e in entries if "val/attention/nodule" in e] == [3, 6]
    assert sum("train/outside_evidence" in e for e in entries) == 2
    assert sum("val/scores" in e for e in entries) == 2
    assert not any(key.startswith("val/organ_iou/") for e in entries for key in e)
    shown = {key for e in entries for key in e if key.startswith("val/attention/")}
    assert shown == {f"val/attention/{label}" for label in kit.LABELS}
    folder = added.publisher.run_dir.path.glob("epochs/*/*.png")
    assert len(list(read.media.rglob("*.jpg"))) == sum(p.name != "overview.png" for p in folder) > 0
