"""Alarms under DDP with two processes: one verdict, one file, training stopped on both alike."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import importlib.util, os, sys
import torch
import camtrain as ct

spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
torch.set_num_threads(1)
folder = sys.argv[2]
held_out = kit.make_cases(7, seed=5)
for case in held_out[1::2]:  # the second process has nothing to ask about, and nothing to count
    case["organs"] = torch.zeros_like(case["organs"])
net = kit.make_net()
with torch.no_grad():
    net.head[1].weight.mul_(100.0)
with torch.no_grad():  # truths that the network tells apart: others it is not asked about
    truth = net.eval()(torch.stack([case["image"] for case in held_out]))
for case, row in zip(held_out, (truth > truth.median(0).values).float()):
    case["label"] = row
module = kit.make_lit(net, configure_optimizers=lambda self: torch.optim.SGD(self.parameters(), 1e-7))
often = {"every_n_epochs": 1, "patience": 1}
monitor = ct.AttentionMonitor(kit.LAYER, kit.TABLE, every_n_epochs=0, stop_on=["energy_below_chance"], alarms=[
    {"name": "reliance", "replacement": "blur", "cases": 6, **often},
    {"name": "depth", "layer": "features.1", "cases": 6, **often},
    {"name": "energy_below_chance", "threshold": 100.0, "patience": 2}, "same_place"])
trainer = kit.make_trainer(folder, monitor, max_epochs=6, devices=2, strategy="ddp", num_sanity_val_steps=1)
trainer.fit(module, kit.loader(kit.make_cases(8), 2), kit.loader(held_out, 2))
state = monitor.state_dict()["alarms"]
result = {"metrics": dict(trainer.callback_metrics), "epoch": trainer.current_epoch, "stop": trainer.should_stop}
result |= {"board": state["board"], "questions": state["questions"], "hooks": kit.hooks_of(module)}
torch.save(result, f"{folder}/{trainer.global_rank}.pt")
"""


def numbers(result):
    """What is ours; the module's own loss is each process's own."""
    return {key: value.item() for key, value in result["metrics"].items() if key != "val/loss"}


@pytest.mark.slow
def test_one_verdict_though_one_process_has_nothing_to_ask(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    kit = Path(__file__).with_name("conftest.py")
    done = subprocess.run([sys.executable, str(script), str(kit), str(tmp_path)], env=environment, text=True,
                          capture_output=True, timeout=300, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert (one["epoch"], one["stop"]) == (two["epoch"], two["stop"]) == (2, True)
    assert one["board"] == two["board"]
    assert one["hooks"] == two["hooks"] == {}
    assert numbers(one) == numbers(two)
    assert one["metrics"]["val/alarm/energy_below_chance"] > 0
    assert "val/outside_pull" in one["metrics"]
    assert "val/mid_energy_inside" in one["metrics"]
    # Each process asks about its own share of the cases, of which the second one has none with organs; it is the first
    # one's checkpoint that both go on from, so each keeps the names of all.
    assert one["questions"]["cases"] == two["questions"]["cases"]
    assert len(one["questions"]["cases"]) == 3
    (file,) = (tmp_path / "camtrain").glob("*/alarms.csv")
    rows = list(csv.DictReader(file.open(newline="")))
    assert {row["epoch"] for row in rows if row["alarm"] == "energy_below_chance"} == {"1"}
    assert done.stderr.count("alarm energy_below_chance (val), epoch 1") == 1
