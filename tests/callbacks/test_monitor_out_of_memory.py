"""Where memory ends in the monitor it does less, says so once for each step down, and the training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYER, TABLE, loader, make_cases, make_lit, make_net, make_trainer
from PIL import Image

import camtrain as ct
from camtrain.callbacks import _alarm_questions
from camtrain.callbacks._step_maps import StepMaps
from camtrain.metrics import RelevanceRank

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
MAKE = StepMaps.make


def fit(tmp_path, head="flatten", net=None, **options):
    module = make_lit(make_net(head) if net is None else net)
    epochs = options.pop("epochs", 2)
    monitor = ct.AttentionMonitor(LAYER, TABLE, alarms=options.pop("alarms", []), **options)
    trainer = make_trainer(tmp_path, monitor, max_epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(make_cases()), loader(make_cases(7, seed=5)))
    said = [str(w.message) for w in caught if "memory ended" in str(w.message)]
    scores = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    return scores, said, torch.cat([p.detach().flatten() for p in module.parameters()]), monitor


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_one_by_one_the_scores_and_pictures_are_the_same(tmp_path, monkeypatch, head):
    options = {"methods": ["hirescam", "gradcam", {"name": "scorecam", "channels": 3}], "epochs": 1}
    plain, quiet, weights, _ = fit(tmp_path / "plain", head, **options)

    def make(self, present, shown, recorded=False, rows=None):
        if rows is None:
            raise NO_MEMORY
        return MAKE(self, present, shown, recorded, rows)

    monkeypatch.setattr(StepMaps, "make", make)
    scores, said, same, monitor = fit(tmp_path / "less", head, **options)
    assert quiet == []
    assert len(said) == 1
    assert "one by one" in said[0]
    assert "Tried to allocate" in said[0]
    assert scores == pytest.approx(plain, abs=1e-6)
    assert torch.equal(same, weights)
    pictures = [
        {f.name: np.array(Image.open(f)).astype(int) for f in folder.rglob("epochs/0000/*.png")}
        for folder in (tmp_path / "plain", tmp_path / "less")
    ]
    assert set(pictures[0]) == set(pictures[1]) != set()
    for name, drawn in pictures[0].items():
        # One row of a product is rounded another way than eight.
        assert np.abs(drawn - pictures[1][name]).mean() < 0.01
    assert monitor.relief.level == 1


def test_what_was_half_counted_is_not_counted_twice(tmp_path, monkeypatch):
    update, calls, fatal = RelevanceRank.update_pairs, [], []

    def update_pairs(self, pairs):
        calls.append(pairs)
        if len(calls) in fatal:
            raise MemoryError
        return update(self, pairs)

    monkeypatch.setattr(RelevanceRank, "update_pairs", update_pairs)
    plain, *_ = fit(tmp_path / "plain", epochs=1)
    fatal.append(len(calls) - 1)  # a batch in the middle of the one epoch, which four other scores have taken by then
    calls.clear()
    scores, said, *_ = fit(tmp_path / "less", epochs=1)
    assert len(said) == 1
    assert "MemoryError" in said[0]
    assert scores == pytest.approx(plain, abs=1e-6)


def test_at_last_no_maps_but_the_scores_of_logits_and_the_same_training(tmp_path, monkeypatch):
    plain, _, weights, _ = fit(tmp_path / "plain")
    asked = []

    def make(self, present, shown, recorded=False, rows=None):
        asked.append((rows, len(present), recorded))
        raise NO_MEMORY

    monkeypatch.setattr(StepMaps, "make", make)
    scores, said, same, monitor = fit(tmp_path / "less", methods=["hirescam", "lrp"])
    assert [line.split("from now on ")[1].split(" ")[0] for line in said] == ["the", "one", "no"]
    assert len(asked) == 3  # and never again
    assert asked[2][1:] == (1, False)
    assert scores["val/auroc"] == plain["val/auroc"]
    assert "val/organ_iou" in plain
    assert "val/organ_iou" not in scores
    assert torch.equal(same, weights)
    assert list((tmp_path / "less").glob("camtrain/*/report.html"))
    # The next call of the Trainer tries again.
    monitor.setup(make_trainer(tmp_path / "more", monitor), make_lit(make_net()), "validate")
    assert monitor.relief.level == 0


def test_fewer_cases_are_scored_where_a_batch_has_a_large_one(tmp_path, monkeypatch):
    def make(self, present, shown, recorded=False, rows=None):
        if rows is None or recorded or len(self.asked) > 1:
            raise NO_MEMORY
        return MAKE(self, present, shown, recorded, rows)

    monkeypatch.setattr(StepMaps, "make", make)
    scores, said, _, monitor = fit(tmp_path, methods=["hirescam", "lrp"])
    assert len(said) == 2
    assert monitor.relief.level == 2
    assert "val/organ_iou" in scores
    assert "val/organ_iou@lrp" not in scores


class Hungry(torch.nn.Module):
    """A network for which memory ends as soon as a watch keeps something for gradients."""

    def __init__(self, net, at):
        super().__init__()
        self.features, self.head, self.at, self.hungry = net.features, net.head, at, 0

    def forward(self, image):
        found = self.head(self.features(image))
        if not self.training and found.requires_grad:
            self.hungry += 1
            if self.hungry == self.at:
                raise NO_MEMORY
        return found


@pytest.mark.parametrize("at", [1, 5])
def test_where_the_watch_itself_is_too_much_the_step_runs_without(tmp_path, at):
    plain, _, weights, _ = fit(tmp_path / "plain")
    scores, said, same, monitor = fit(tmp_path / "less", net=Hungry(make_net(), at))
    assert len(said) == 1
    assert "no longer watched" in said[0]
    assert scores["val/auroc"] == plain["val/auroc"]
    assert ("val/organ_iou" in scores) == (at > 3)
    assert torch.equal(same, weights)
    assert monitor.relief.blind


def test_the_users_own_end_of_memory_stays_an_error(tmp_path):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, image):
            return self.net(image)

    def validation_step(self, batch, batch_idx):
        self(batch["image"])
        raise NO_MEMORY

    module = make_lit(make_net(), validation_step=validation_step)
    trainer = make_trainer(tmp_path, ct.AttentionMonitor(LAYER, TABLE, alarms=[]))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(module, loader(make_cases()), loader(make_cases(7, seed=5)))


def test_an_alarm_without_memory_is_off(tmp_path, monkeypatch, caplog):
    def measure_pulls(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(_alarm_questions, "measure_pulls", measure_pulls)
    caplog.set_level("INFO")
    scores, said, *_ = fit(tmp_path, alarms=["reliance"])
    assert "alarm 'reliance' is off in this run" in caplog.text
    assert "val/organ_iou" in scores
    assert said == []


SCRIPT = """
import importlib.util, resource, sys, warnings
import torch
import camtrain as ct

spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
torch.set_num_threads(1)
torch.manual_seed(0)
size = (40, 40, 40)
cases = kit.make_cases(16, labels=3, size=size)
table = {**kit.TABLE, "labels": {f"label_{i}": ["heart"] for i in range(60)}}
for number, case in enumerate(cases):
    case["label"] = torch.zeros(60)
    case["label"][number : number + 4] = 1
net = torch.nn.Sequential(
    torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(2, 60)
)
module = kit.make_lit(net)
monitor = ct.AttentionMonitor("0", table, alarms=[], every_n_epochs=0)
trainer = kit.make_trainer(sys.argv[2], monitor)
loader = kit.loader(cases, 8)
for more in (0, 150):
    if more:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), resource.RLIM_INFINITY))
    trainer.validate(module, loader, verbose=False)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    scores = (f"{k}={v.item():.5f}" for k, v in sorted(trainer.callback_metrics.items()) if k.count("/") == 1)
    print("LEVEL", int(monitor.relief.level), *scores)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much memory a process has")
def test_with_a_real_end_of_memory(tmp_path):
    script, kit = tmp_path / "run.py", Path(__file__).with_name("conftest.py")
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(kit), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, one_by_one = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LEVEL")]
    assert plain[0] == "0"
    assert one_by_one == ["1", *plain[1:]]
    assert "memory ended" in done.stderr
