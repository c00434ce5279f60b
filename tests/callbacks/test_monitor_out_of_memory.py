"""Where memory ends in the monitor it does less, says so once for each step down, and the training goes on."""

from __future__ import annotations

import importlib
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
from camtrain.callbacks import _alarm_questions, _pictures, _waiting_rows
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._fixed_cases import FixedCases
from camtrain.callbacks._panel import Panel, PanelEntry
from camtrain.callbacks._recording import Recorder
from camtrain.callbacks._relief import Relief
from camtrain.callbacks._scores import ScoreBook
from camtrain.callbacks._splits import Repeats
from camtrain.callbacks._step_maps import StepMaps
from camtrain.metrics import LabelAUROC, RelevanceRank

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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, True])
def test_what_was_half_counted_is_not_counted_twice(tmp_path, monkeypatch, waits):
    if not waits:
        monkeypatch.setattr(_waiting_rows, "ROWS", 0)
    update, calls, fatal = RelevanceRank.update_pairs, [], []

    def update_pairs(self, pairs):
        calls.append(pairs)
        if len(calls) in fatal:
            raise MemoryError
        return update(self, pairs)

    monkeypatch.setattr(RelevanceRank, "update_pairs", update_pairs)
    plain, *_ = fit(tmp_path / "plain", epochs=1)
    # A batch in the middle of the one epoch, or all that have waited, which four other scores have taken by then.
    fatal.append(len(calls) - (0 if waits else 1))
    calls.clear()
    scores, said, *_ = fit(tmp_path / "less", epochs=1)
    if waits:
        assert said == []  # one by one they are all counted, and the next batches need not know
        assert len(calls) > fatal[0]
    else:
        assert len(said) == 1
        assert "MemoryError" in said[0]
    assert scores == pytest.approx(plain, abs=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_alarm_without_memory_is_off(tmp_path, monkeypatch, caplog):
    def measure_pulls(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(_alarm_questions, "measure_pulls", measure_pulls)
    caplog.set_level("INFO")
    scores, said, *_ = fit(tmp_path, alarms=["reliance"])
    assert "alarm 'reliance' is off in this run" in caplog.text
    assert "val/organ_iou" in scores
    assert said == []


# What is replaced, from which of its calls on, and what the one warning says.
PLACES = {
    "read": (RunContext, "read", 2, "left out of the scores of maps"),
    "update_logits": (ScoreBook, "update_logits", 2, "left out of the scores of maps"),
    "wanted": (Panel, "wanted", 2, "left out of the scores of maps"),
    "recorded": (Recorder, "wanted", 2, "left out of the scores of maps"),
    "compute": (ScoreBook, "compute", 1, "in which it does not suffice to sum them up are left out"),
    "of_method": (ScoreBook, "_of_method", 1, "in which it does not suffice to sum them up are left out"),
    "thresholds": (ScoreBook, "thresholds", 1, "in which it does not suffice to sum them up are left out"),
    "draw": (PanelEntry, "draw", 1, "drawing failed (OutOfMemoryError"),
    "scale": (_pictures, "shared_scale", 1, "drawing failed (OutOfMemoryError"),
    "overview": (_pictures, "compose_overview", 1, "failed (OutOfMemoryError"),
    "report": (Recorder, "_write", 1, "the report is not complete (OutOfMemoryError"),
    "writing": (Recorder, "write", 1, "pictures, tables and the report"),
    "cases": (FixedCases, "offer", 1, None),
}


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    """Weights of the same training without a monitor."""
    module = make_lit(make_net())
    trainer = make_trainer(tmp_path_factory.mktemp("unwatched"), max_epochs=2)
    trainer.fit(module, loader(make_cases()), loader(make_cases(7, seed=5)))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_wherever_memory_ends_the_training_goes_on(tmp_path, monkeypatch, caplog, unwatched, place):
    owner, name, first, words = PLACES[place]
    original, calls = getattr(owner, name), []

    def ending(*args, **kwargs):
        calls.append(place)
        if len(calls) >= first:
            raise NO_MEMORY
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, ending)
    caplog.set_level("INFO")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alarms = [{"name": "reliance", "every_n_epochs": 1, "cases": 2}] if place == "cases" else []
        module = make_lit(make_net())
        monitor = ct.AttentionMonitor(LAYER, TABLE, alarms=alarms)
        trainer = make_trainer(tmp_path, monitor, max_epochs=2)
        trainer.fit(module, loader(make_cases()), loader(make_cases(7, seed=5)))
    said = [str(w.message) for w in caught if "Tried to allocate" in str(w.message)]
    assert [words in line for line in said] == ([True] if words else [])
    assert (words is None) == ("alarm 'reliance' is off in this run" in caplog.text)
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), unwatched)
    assert len(calls) >= first
    assert ("val/auroc" in trainer.callback_metrics) == (place != "compute")
    assert monitor.relief.level == 0


@pytest.mark.parametrize("may", [False, lambda: False])
def test_what_other_processes_wait_for_is_not_left_out(may):
    with pytest.raises(torch.OutOfMemoryError), Relief().sparing("", may):
        raise NO_MEMORY


def test_scores_and_labels_of_a_batch_are_kept_together_or_not_at_all(monkeypatch):
    metric, rows = LabelAUROC(1), [(torch.ones(2, 1), torch.zeros(2, 1)), (torch.zeros(1, 1), torch.ones(1, 1))]
    metric.update(*rows[0])
    module = importlib.import_module("camtrain.metrics.label_auroc")
    add, calls = module.add_block, []

    def add_block(blocks, fresh):
        calls.append(fresh)
        if len(calls) == 2:
            raise NO_MEMORY
        add(blocks, fresh)

    monkeypatch.setattr(module, "add_block", add_block)
    with pytest.raises(torch.OutOfMemoryError):
        metric.update(*rows[1])
    assert [len(each) for each in metric.rows()] == [2, 2]
    metric.update(*rows[1])
    assert [each[:, 0].tolist() for each in metric.rows()] == [[1, 1, 0], [0, 0, 1]]


def test_a_batch_that_was_left_out_moves_no_other(monkeypatch):
    """Of 7 cases rank 1 of 2 shows 1, 3, 5, and 0 again; the first batch of two never came to be counted."""
    data = torch.utils.data.TensorDataset(torch.zeros(7))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    shown = torch.utils.data.DataLoader(data, batch_size=2, sampler=sampler)
    monkeypatch.setattr("camtrain.callbacks._splits.loader_of", lambda *_: shown)
    label = Repeats().unknown(None, torch.ones(2, 1), None, 1, 0)
    assert label.isnan()[:, 0].tolist() == [False, True]


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
