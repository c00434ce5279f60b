"""Both callbacks under DDP with two processes and uneven shares equal one process on the union of the batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LABELS, make_cases

SCRIPT = """
import importlib.util, os, sys
import torch
import camtrain as ct

spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
torch.set_num_threads(1)
folder, processes, shape, bare = sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]

cases = kit.make_cases(8)
for row, case in enumerate(cases):
    # With two processes the second one gets the odd cases: it may have few organs, or none ever.
    if row in (1, 3, 5) or (bare == "bare" and row % 2):
        case["organs"] = torch.zeros_like(case["organs"])
held_out = kit.make_cases(7, seed=5)
held_out[3]["organs"] = torch.zeros_like(held_out[3]["organs"])
if bare == "bare":
    for case in held_out[1::2]:
        case["organs"] = torch.zeros_like(case["organs"])

seen = []

def validation_step(self, batch, batch_idx):
    logits = self(batch["image"])
    seen.append((torch.is_grad_enabled(), logits.requires_grad))
    return logits

methods = {"validation_step": validation_step}
if shape == "flat":  # the layer lies in the LightningModule itself, which DDP calls
    def __init__(self, net):
        type(self).__mro__[1].__init__(self)
        self.features, self.head = net.features, net.head
    methods |= {"__init__": __init__, "forward": lambda self, image: self.head(self.features(image))}
module = kit.make_lit(kit.make_net("mlp"), **methods)
layers, methods = kit.LAYER, ["hirescam", "gradcam"]
if bare == "several":  # layers and methods; the second process may see no present label in a batch
    layers, methods = ["features.3", "features.1"], ["hirescam", "lrp", {"name": "scorecam", "channels": 3}]
    for case in held_out[1::2]:
        case["label"] = torch.zeros(3)
paced = {}
if bare == "paced":  # each process scores as many labels as its own budget holds; the second has none to score
    from camtrain.callbacks import _map_budget

    _map_budget.SECOND, layers, paced = 1e-9, "features.1", {"map_budget": 0.5}
    for case in held_out[1::2]:
        case["label"] = torch.zeros(3)
loss = ct.MaskLossCallback(layers, kit.TABLE, weight=2.0)
# Alarms ask a few cases of each process: with two these are others.
monitor = ct.AttentionMonitor(
    layers, kit.TABLE, methods=methods, every_n_epochs=2 if bare == "several" else 1, alarms=[], **paced
)
if bare == "memory" and os.environ.get("LOCAL_RANK") == "1":  # one process has less memory than the other
    from camtrain.callbacks._step_maps import StepMaps

    def make(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    StepMaps.make = make
strategy = {} if processes == 1 else {"devices": 2, "strategy": "ddp"}
trainer = kit.make_trainer(folder, loss, monitor, max_epochs=2, num_sanity_val_steps=1, **strategy)
train, val = kit.loader(cases, 4 // processes), kit.loader(held_out, 4 // processes)
if processes == 2:  # Lightning's own sampler would shuffle
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = torch.utils.data.DistributedSampler(cases, num_replicas=2, rank=rank, shuffle=False)
    train = torch.utils.data.DataLoader(cases, batch_size=2, sampler=sampler)
trainer.fit(module, train, val)
fitted = dict(trainer.callback_metrics)
trainer.validate(module, kit.loader(held_out[:5], 2), verbose=False)
again = dict(trainer.callback_metrics)
trainer.test(module, val, verbose=False)
weights = {k.removeprefix("net."): v for k, v in module.state_dict().items()}
result = {"fitted": fitted, "again": again, "tested": dict(trainer.callback_metrics), "weights": weights}
result |= {"seen": seen, "thresholds": monitor.thresholds, "hooks": kit.hooks_of(module)}
result["files"] = monitor.publisher.run_dir is not None
torch.save(result, f"{folder}/{trainer.global_rank}.pt")
"""


def launch(tmp_path, processes, shape, bare):
    folder = tmp_path / str(processes)
    folder.mkdir()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    kit = Path(__file__).with_name("conftest.py")
    command = [sys.executable, str(script), str(kit), str(folder), str(processes), shape, bare]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)], done.stderr


def numbers(metrics):
    return {key: value.item() for key, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "bare"), [("net", "some"), ("flat", "bare"), ("flat", "several")])
def test_two_processes_equal_one(tmp_path, shape, bare):
    (one,), _ = launch(tmp_path, 1, shape, bare)
    pair, said = launch(tmp_path, 2, shape, bare)
    for rank, two in enumerate(pair):
        for name, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=1e-4)
        for stage in ("fitted", "again", "tested"):
            assert numbers(two[stage]) == pytest.approx(numbers(one[stage]), abs=2e-4), (rank, stage)
        torch.testing.assert_close(two["thresholds"], one["thresholds"])
        assert two["hooks"] == {}
        assert two["files"] == (rank == 0)
        assert set(two["seen"]) == {(False, False)}
    assert len(list((tmp_path / "2" / "camtrain").glob("*"))) == 1
    assert one["fitted"]["train/cases_without_organs"] == (4 if bare == "bare" else 3)
    assert "sync_dist" not in said
    if bare == "several":
        assert {"train/mask_loss/features.3", "train/mask_loss/features.1"} <= set(one["fitted"])
        assert "val/energy_inside@scorecam" in one["fitted"]
        assert set(one["thresholds"]) == {"hirescam", "lrp", "scorecam"}


@pytest.mark.slow
def test_a_process_without_memory_for_maps_does_not_stop_the_other(tmp_path):
    pair, said = launch(tmp_path, 2, "net", "memory")
    one, two = (numbers(result["fitted"]) for result in pair)
    assert one == two
    assert {"val/auroc", "val/organ_iou", "val/energy_inside"} <= set(one)
    assert "memory ended in AttentionMonitor in process 1" in said
    assert "in process 0" not in said


@pytest.mark.slow
def test_processes_that_score_what_their_budgets_hold_count_together(tmp_path):
    pair, _ = launch(tmp_path, 2, "net", "paced")
    for stage in ("fitted", "again", "tested"):
        one, two = (numbers(result[stage]) for result in pair)
        assert one == two, stage
    # The first process has cases 0, 2, 4 and 6 of the held out ones.
    truths = torch.stack([case["label"] for case in make_cases(7, seed=5)[::2]]).sum(0)
    found = numbers(pair[0]["fitted"])
    shares = {key: value for key, value in found.items() if key.startswith("val/scored_share/")}
    pairs = [found[f"val/scored_share/{name}"] * int(n) for name, n in zip(LABELS, truths, strict=True) if n]
    assert len(shares) == len(pairs) > 0
    assert pairs == pytest.approx([round(n) for n in pairs], abs=1e-4)
    assert 0 < sum(pairs) < int(truths.sum())
    assert "test/scored_share" not in pair[0]["tested"]
    assert pair[0]["hooks"] == pair[1]["hooks"] == {}
