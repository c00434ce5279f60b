"""Runs of the command line that end in a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
SIZE = [16, 20, 18]
CALLBACKS = "camtrain.callbacks"
# One that asks the network about cases it keeps, and one with a history and a patience.
ALARMS = [
    {"name": "reliance", "every_n_epochs": 1, "cases": 4, "threshold": 0.0, "outside": 0.0},
    {"name": "empty_maps", "threshold": 0.0},
]


def callbacks():
    """All of camtrain's that take part in training, and Lightning's checkpoints."""
    return [
        {"class_path": f"{CALLBACKS}.MaskLossCallback", "init_args": {"layer": "net.relu"}},
        {"class_path": f"{CALLBACKS}.OutsideSwap", "init_args": {"without_organs": "atlas"}},
        {
            "class_path": f"{CALLBACKS}.AttentionMonitor",
            "init_args": {"layer": "net.relu", "panel_cases": 2, "labels_per_case": 1, "alarms": ALARMS},
        },
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
    ]


def config(folder, **trainer):
    """A small phantom run with everything random switched on: 5 steps in each of 3 epochs."""
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": "r"}}
    data = {"labels": ["nodule", "effusion"], "cases": 18, "val_cases": 6, "test_cases": 1, "size": SIZE,
            "batch_size": 4, "seed": 1}  # fmt: skip
    return {
        "seed_everything": 3,
        "data": {"class_path": "fault_parts.Augmented", "init_args": data},
        "model": {"init_args": {"net": {"class_path": "fault_parts.DroppingNet"}, "schedule": "one_cycle"}},
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "logger": logger,
            "callbacks": callbacks(),
            **trainer,
        },
    }


class Runs:
    """Runs of one test, each in a process of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
            "WANDB_MODE": "offline",
        }

    callbacks = staticmethod(callbacks)

    def fit(self, name, *words, processes=1, **trainer):
        """One fit; what it writes lies in a folder of that name."""
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config(self.folder / name, **trainer)))
        return processes, ["fit", "--config", str(file), *map(str, words)]

    def ending(self, **how):
        """Words by which a fit ends at a step."""
        return [
            "--trainer.callbacks+=fault_parts.EndsAt",
            *(f"--trainer.callbacks.{k}={int(v)}" for k, v in how.items()),
        ]

    def __call__(self, *runs, seconds=300):
        """Run one after the other: (exit statuses, stdout and stderr, is a process left) of each."""
        order = self.folder / "order.json"
        order.write_text(json.dumps(runs))
        words = [sys.executable, str(HERE / "fault_runs.py"), str(order)]
        done = subprocess.run(
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(order.with_suffix(".done").read_text())


@pytest.fixture(scope="session")
def make_runs():
    return Runs
