"""Reads back what an offline run of W&B has logged: a LevelDB log of protobuf records."""

from __future__ import annotations

import importlib
import json
import struct
import time
from pathlib import Path


def offline_logger(folder, monkeypatch, namespace="pytorch_lightning", **options):
    """A WandbLogger that writes below `folder` and talks to nobody."""
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(folder / name.lower()))
    loggers = importlib.import_module(f"{namespace}.loggers")
    return loggers.WandbLogger(offline=True, save_dir=str(folder), project="camtrain-test", **options)


class OfflineRun:
    """One `offline-run-*` folder, once the run is finished.

    Attributes:
        media: The run's folder `files/media`.
        records: All records.
    """

    def __init__(self, file: Path) -> None:
        self.media = file.parent / "files" / "media"
        # W&B's background process may still be writing when finish() returns; its last record is of the kind "exit".
        end = time.monotonic() + 60
        while not any(r.WhichOneof("record_type") == "exit" for r in _records(file)) and time.monotonic() < end:
            time.sleep(0.1)
        self.records = list(_records(file))

    @classmethod
    def in_folder(cls, folder: Path) -> list[OfflineRun]:
        """All runs below a WandbLogger's save_dir, the oldest first."""
        return [cls(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]

    def of_kind(self, kind: str) -> list:
        return [getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind]

    @property
    def history(self) -> list[dict]:
        """What `log` was given, one dict per step of W&B."""
        return [_unfolded(record.item) for record in self.of_kind("history")]

    @property
    def summary(self) -> dict:
        return _merged(record.update for record in self.of_kind("summary"))

    @property
    def config(self) -> dict:
        return _merged(record.update for record in self.of_kind("config"))

    @property
    def metrics(self) -> dict:
        """Key -> how it was defined."""
        return {record.name: record for record in self.of_kind("metric") if record.name}

    def table(self, value: dict) -> dict:
        """The table that an entry of the history stands for."""
        return json.loads((self.media.parent / value["path"]).read_text())


def _records(path: Path):
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return  # still being written
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def _unfolded(items) -> dict:
    entry = {}
    for item in items:
        *outer, last = [item.key] if item.key else item.nested_key
        place = entry
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return entry


def _merged(updates) -> dict:
    merged = {}
    for items in updates:
        for key, value in _unfolded(items).items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key].update(value)
            else:
                merged[key] = value
    return merged
