"""AttentionMonitor and real loggers: CSV, TensorBoard, W&B offline, several at once; the user's own logging stays."""

from __future__ import annotations

import csv
import importlib
import json
import struct
import time
from pathlib import Path

import pytest

import camtrain as ct

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def run(kit, folder, logger, namespace="pytorch_lightning", module=None, **options):
    added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, **options)
    loss = ct.MaskLossCallback(kit.LAYER, kit.TABLE)
    trainer = kit.make_trainer(folder, added, loss, namespace=namespace, logger=logger, max_epochs=2)
    data = kit.loader(kit.make_cases())
    trainer.fit(module or kit.make_lit(kit.make_net(), namespace), data, data)
    return added


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
    pictures = [tag for tag in tags["images"] if tag.startswith("val/attention/stent/")]
    assert pictures
    assert [e.step for e in events.Images(pictures[0])] == [3, 6]
    assert added.publisher.run_dir.path.parent == Path(logger.log_dir) / "camtrain"


def records(path):
    """An offline run is a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path):
    end = time.monotonic() + 60
    while not any(r.WhichOneof("record_type") == "exit" for r in records(path)) and time.monotonic() < end:
        time.sleep(0.1)
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            entry = {}
            for item in record.history.item:
                *outer, last = [item.key] if item.key else item.nested_key
                place = entry
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            yield entry


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_wandb_offline_beside_csv(kit, tmp_path, monkeypatch, namespace):
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    loggers = importlib.import_module(f"{namespace}.loggers")
    wandb = loggers.WandbLogger(offline=True, save_dir=str(tmp_path), project="camtrain-test")

    def training_step(self, batch, batch_idx):
        loss = kit.bce(self(batch["image"]), batch["label"])
        wandb.experiment.log({"mine": float(loss), "trainer/global_step": self.global_step})
        self.log("train/loss", loss)
        return loss

    module = kit.make_lit(kit.make_net(), namespace, training_step=training_step)
    added = run(kit, tmp_path, [wandb, loggers.CSVLogger(tmp_path)], namespace, module, max_label_keys=2)
    wandb.experiment.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    entries = list(history(file))
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
    media = list((file.parent / "files" / "media").rglob("*.png"))
    assert len(media) == len(list(added.publisher.run_dir.path.glob("epochs/*/*.png"))) > 0
