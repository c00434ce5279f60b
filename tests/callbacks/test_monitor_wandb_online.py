"""AttentionMonitor and W&B online, against a stand-in of its server: what arrives there, and what its loss costs."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT = 2  # seconds; W&B waits 19 unless WANDB_HTTP_TIMEOUT says otherwise

_TRAIN = """
import importlib, importlib.util, json, os, sys, threading, time, warnings
from pathlib import Path
import numpy as np
from wandb_server import KEY, WandbServer

server = WandbServer()
os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)

import torch
import camtrain as ct
from camtrain.reporting import wandb_sink
from pytorch_lightning.loggers import WandbLogger

torch.set_num_threads(1)
told, asked = {}, []
wandb_sink.SLOW = 1.0

def counted(method):
    def send(self, *args):
        asked.append(threading.current_thread().name)
        return method(self, *args)
    return send

Run = importlib.import_module("wandb.sdk.wandb_run").Run
Run.log_artifact = counted(Run.log_artifact)  # a table is logged as one, too: each asks the server

def fit(name, logger, epochs=3, before=None, **options):
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    starts, before_it = [], len(asked)

    def on_train_epoch_start(self):
        starts.append(time.monotonic())
        if before is not None:
            before(self.current_epoch)

    module = kit.make_lit(kit.make_net(), on_train_epoch_start=on_train_epoch_start)
    alarms = [{"name": "energy_below_chance", "threshold": 99.0, "patience": 2}]
    added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, panel_cases=2, labels_per_case=1, alarms=alarms)
    trainer = kit.make_trainer(folder, added, logger=logger, max_epochs=epochs)
    data = kit.loader(kit.make_cases())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module, data, data, **options)
    starts.append(time.monotonic())
    run = None if logger is False else logger.experiment
    told[name] = {
        "weights": [float(p.double().sum()) for p in module.parameters()],
        "epochs": np.diff(starts).tolist(),
        "asked_from": asked[before_it:],
        "said": [t for w in seen if (t := str(w.message)).startswith("camtrain") and "alarm" not in t],
        "folder": str(added.publisher.run_dir.path),
        "offline": None if run is None else bool(run.offline),
    }
    return trainer

def logger_of(name, **options):
    Path(name).mkdir(exist_ok=True)
    # Several runs at a time: one whose server is lost takes W&B minutes to finish.
    usual = {"save_dir": name, "project": "camtrain-test", "id": name, "resume": "allow", "reinit": "create_new"}
    return WandbLogger(**usual, **options)

fit("none", False)
first = logger_of("steady")
fit("steady", first, epochs=2).save_checkpoint("last.ckpt")
first.experiment.finish()
again = logger_of("steady")
told["resumed"] = bool(again.experiment.resumed)
fit("steady", again, ckpt_path="last.ckpt", weights_only=True)
again.experiment.finish()
told["server"] = {"alerts": server.alerts, "history": server.history("steady"), **server.runs["steady"]}
told["server"]["history"] = server.history("steady")
told["artifacts"] = [(a["artifactTypeName"], a["artifactCollectionName"]) for a in server.artifacts]

loggers = {name: logger_of(name) for name in ("slow", "hangs", "broken", "gone")}
for logger in loggers.values():
    _ = logger.experiment
fit("slow", loggers["slow"], before=lambda epoch: setattr(server, "how", "slow"))
server.how = "ok"
loggers["slow"].experiment.finish()
told["tables of slow"] = [entry["val/cases"]["nrows"] for entry in server.history("slow") if "val/cases" in entry]
fit("hangs", loggers["hangs"], before=lambda epoch: setattr(server, "how", "hang" if epoch == 1 else server.how))
fit("broken", loggers["broken"], before=lambda epoch: setattr(server, "how", "500"))
server.how = "ok"
fit("gone", loggers["gone"], before=lambda epoch: server.close() if epoch == 1 else None)
print("told " + json.dumps(told))
sys.stdout.flush()
os._exit(0)
"""


_NOBODY = """
import importlib.util, os, sys, warnings
from wandb_server import KEY
os.environ.update(WANDB_BASE_URL="http://127.0.0.1:1", WANDB_API_KEY=KEY, WANDB_INIT_TIMEOUT="1")
spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
import camtrain as ct
from pytorch_lightning.loggers import WandbLogger
logger = WandbLogger(save_dir=".", project="camtrain-test")
added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, every_n_epochs=0, alarms=[])
trainer = kit.make_trainer(".", added, logger=logger, max_epochs=1)
data = kit.loader(kit.make_cases())
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    trainer.fit(kit.make_lit(kit.make_net()), data, data)
said = [str(w.message) for w in seen if "W&B" in str(w.message)]
print(trainer.state.finished, logger.experiment.offline, *said)
logger.experiment.finish()
"""


def end_services_of(pid):
    """W&B's own process leaves the group of its parent and, once that is gone, goes on asking for the lost server."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            if "wandb-core" in words[0] and str(pid) in words[words.index("--pid") :]:
                os.kill(int(file.parent.name), signal.SIGKILL)


def in_a_process(script, folder, *args):
    """What a script prints; in a process of its own, since W&B reads its surroundings once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("DATA", "CACHE", "CONFIG")}
    environment |= {"WANDB_MODE": "online", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false",
                    "WANDB_HTTP_TIMEOUT": str(TIMEOUT), "OMP_NUM_THREADS": "1", "NETRC": str(folder / "netrc"),
                    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])}  # fmt: skip
    with (folder / "said.txt").open("w") as said:
        started = subprocess.Popen([sys.executable, "-c", script, *args], env=environment, stdout=said,
                                   stderr=subprocess.STDOUT, cwd=folder)  # fmt: skip
        try:
            code = started.wait(120)
        finally:
            started.kill()
            end_services_of(started.pid)
    text = (folder / "said.txt").read_text()
    assert code == 0, text[-4000:]
    return text


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    out = in_a_process(_TRAIN, folder, str(TESTS / "callbacks" / "conftest.py"))
    (line,) = [line for line in out.splitlines() if line.startswith("told ")]
    return json.loads(line.removeprefix("told ")) | {"at": folder}


@pytest.mark.slow
def test_an_online_run_arrives_alerts_and_goes_on_after_a_resume(told):
    server = told["server"]
    assert told["steady"]["offline"] is False
    assert told["resumed"]
    assert told["steady"]["said"] == []
    # Told once, though the alarm stands in the third epoch too; W&B sends again what a slow server has not confirmed.
    ((title, text),) = {(alert["title"], alert["text"]) for alert in server["alerts"]}
    alert = server["alerts"][0]
    assert title == "camtrain: energy_below_chance (val)"
    assert alert["runName"] == "steady"
    assert alert["severity"] == "WARN"
    assert "nodule" in text
    tables = [entry["val/cases"] for entry in server["history"] if "val/cases" in entry]
    assert [table["increment_num"] for table in tables] == [0, 1, 2]
    assert [e["trainer/global_step"] for e in server["history"] if "val/cases" in e] == [3, 6, 9]
    scores = [entry["val/auroc"] for entry in server["history"] if "val/auroc" in entry]
    assert len(scores) == 3
    assert server["summary"]["best/val/auroc"] == pytest.approx(max(scores))
    shown = [entry for entry in server["history"] if any(key.startswith("val/attention/") for key in entry)]
    assert len(shown) == 3
    for entry in shown:
        for key, value in entry.items():
            if key.startswith("val/attention/"):
                assert set(value["filenames"]) <= set(server["files"])
    kinds = [kind for kind, name in told["artifacts"] if name == "camtrain-steady"]
    assert kinds == ["camtrain"] * 2  # each fit tells what it was asked for


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "broken", "gone"])
def test_a_server_that_is_lost_costs_no_wait_and_one_warning(told, how):
    """Weights to the last bit as without a logger; all scores and the report in the run's folder.

    What asks the server is never the thread that trains.
    """
    mine, plain = told[how], told["none"]
    assert mine["weights"] == plain["weights"]
    assert len(mine["said"]) == 1, mine["said"]
    assert "asking W&B's server failed" in mine["said"][0]
    assert "Training goes on" in mine["said"][0]
    assert set(mine["asked_from"]) == {"camtrain: tables for W&B"}
    run = told["at"] / mine["folder"]
    for name in ("scores.csv", "cases.csv"):
        with (run / name).open() as file:
            assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}
    assert len(list(run.glob("epochs/*/overview.png"))) == 3
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_slow_server_gets_all_tables(told):
    assert told["slow"]["weights"] == told["none"]["weights"]
    with (told["at"] / told["slow"]["folder"] / "cases.csv").open() as file:
        assert sum(told["tables of slow"]) >= len(list(csv.DictReader(file))) > 0


@pytest.mark.slow
def test_a_run_that_cannot_be_opened_is_written_offline(tmp_path):
    """By Lightning itself, which opens its loggers before any hook of a callback."""
    said = in_a_process(_NOBODY, tmp_path, str(TESTS / "callbacks" / "conftest.py"))
    assert "True True camtrain: W&B cannot be opened online (" in said
    assert "`wandb sync` uploads it later" in said
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
