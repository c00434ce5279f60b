"""AttentionMonitor and W&B, read back from the offline run: what was really logged."""

from __future__ import annotations

import csv
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wandb_files import OfflineRun, offline_logger

import camtrain as ct
from camtrain.reporting import read_cases

pytestmark = pytest.mark.slow
METHODS = ["hirescam", "gradcam"]


def fit(kit, folder, logger, added, epochs=3, module=None, cases=None, **options):
    trainer = kit.make_trainer(folder, added, logger=logger, max_epochs=epochs)
    data = kit.loader(cases or kit.make_cases())
    trainer.fit(module or kit.make_lit(kit.make_net()), data, data, **options)
    return trainer


@pytest.fixture(scope="module")
def watched(kit, tmp_path_factory):
    """One run of three epochs with two methods: (monitor, what W&B has, the run's folder)."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        logger = offline_logger(folder, patch)
        added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, methods=METHODS, panel_cases=8)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*camtrain.*")
            fit(kit, folder, logger, added)
        logger.experiment.finish()
    (read,) = OfflineRun.in_folder(folder)
    return added, read, added.publisher.run_dir


def pictures(read):
    """(step, key, number, caption, picture, name -> mask) of everything shown."""
    for entry in read.history:
        for key, value in entry.items():
            if key.startswith("val/attention/"):
                for number, (caption, path) in enumerate(zip(value["captions"], value["filenames"], strict=True)):
                    masks = {n: np.asarray(Image.open(read.media.parent / m["path"])) for n, m in
                             value["all_masks"][number].items()}  # fmt: skip
                    picture = np.asarray(Image.open(read.media.parent / path))
                    yield entry["trainer/global_step"], key, number, caption, picture, masks


def test_pictures_are_the_same_cases_in_every_epoch_with_masks(kit, watched):
    _, read, run = watched
    shown = list(pictures(read))
    by_step = {}
    for step, key, _, caption, _, _ in shown:
        by_step.setdefault(step, []).append((key, caption.split("  ·  ")[0]))
    assert list(by_step) == [3, 6, 9]
    assert sorted(by_step[3]) == sorted(by_step[6]) == sorted(by_step[9])
    assert {key for key, _ in by_step[3]} == {f"val/attention/{label}" for label in kit.LABELS}
    for _, _, _, _, picture, masks in shown:
        assert set(masks) == {"allowed region", "attention hirescam", "attention gradcam"}
        assert all(mask.shape == picture.shape[:2] for mask in masks.values())
        assert set(np.unique(masks["allowed region"])) == {0, 1}
        assert set(np.unique(masks["attention hirescam"])) <= {0, 1, 2, 3, 4}
        # Masks lie over the image alone, which is grey; the colours stand below it.
        region = masks["allowed region"] > 0
        grey = np.ptp(picture.astype(int), axis=-1) < 30
        assert grey[region].mean() > 0.9
        assert not grey.all()
    assert any(masks["attention hirescam"].any() for *_, masks in shown)
    named = read.config["_wandb"]["mask/class_labels"]["val/attention/nodule_wandb_delimeter_attention hirescam"]
    assert named["value"] == {"1": "against, strong", "2": "against, weak", "3": "for, weak", "4": "for, strong"}
    assert len({(row.case, row.label) for row in read_cases(run)}) == len(by_step[3])


def test_captions_say_what_cases_csv_says(watched):
    _, read, run = watched
    rows = {(row.step, row.case, row.label, row.method): row for row in read_cases(run)}
    for step, key, _, caption, _, _ in pictures(read):
        case, label = caption.split("  ·  ")[0], key.rsplit("/", 1)[1]
        row = rows[step, case, label, "hirescam"]
        assert f"{label}: {'present' if row.truth else 'absent'}, p = {row.probability:.2f}" in caption
        if row.organ_iou is not None:
            assert f"OrganIoU {row.organ_iou:.2f} (above {row.threshold:.2g})" in caption
        if row.energy_inside is not None:
            assert f"energy inside {row.energy_inside:.2f}" in caption


def test_the_table_of_cases_grows_by_its_own_rows(watched):
    _, read, run = watched
    entries = [e["val/cases"] for e in read.history if "val/cases" in e]
    tables = [read.table(entry) for entry in entries]
    assert [entry["_type"] for entry in entries] == ["incremental-table-file"] * 3
    assert [entry["increment_num"] for entry in entries] == [0, 1, 2]
    rows = read_cases(run)
    for epoch, table in enumerate(tables):
        found = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert {row["epoch"] for row in found} == {epoch}
        assert len(found) == sum(row.epoch == epoch for row in rows)
        errors = [row["error"] for row in found]
        assert errors == sorted(errors, reverse=True)
        assert {row["kind"] for row in found} == {"positive", "hard", "negative"}
        one = found[0]
        (same,) = [
            r for r in rows if (r.epoch, r.case, r.label, r.method) == (epoch, one["case"], one["label"], one["method"])
        ]
        assert one["energy_inside"] == same.energy_inside
        assert one["error"] == pytest.approx(abs(same.truth - same.probability))


def test_summary_has_the_last_and_the_best(watched):
    added, read, _ = watched
    for key in (
        "val/auroc",
        "val/energy_inside/stent",
        "val/empty_map_rate",
        "val/organ_iou_micro",
        "val/mask_iou@gradcam",
    ):
        seen = [entry[key] for entry in read.history if key in entry]
        better = min if "empty" in key else max
        assert len(seen) == 3
        assert read.summary[key] == pytest.approx(seen[-1])
        assert read.summary[f"best/{key}"] == pytest.approx(better(seen))
    assert "best/val/bias_share" not in read.summary  # neither more nor less of it is better
    assert added.state_dict()["best"]["val/auroc"] == pytest.approx(read.summary["best/val/auroc"])


def test_charts_config_and_artifact(kit, watched):
    _, read, _ = watched
    hidden = {name: metric.options.hidden for name, metric in read.metrics.items()}
    assert not hidden["val/organ_iou"]
    assert not hidden["val/auprc"]
    assert hidden["val/auprc/nodule"]
    assert hidden["val/calibration_error/nodule"]
    assert not hidden["val/energy_inside/nodule"]
    assert hidden["val/energy_inside@gradcam/nodule"]
    assert not hidden["val/energy_inside@gradcam"]
    assert hidden["val/relevance_rank/nodule"]
    assert all(m.step_metric == "trainer/global_step" for name, m in read.metrics.items() if name.startswith("val/"))
    config = read.config["camtrain"]
    assert config["layers"] == [kit.LAYER]
    assert config["labels"] == kit.LABELS
    assert [method["name"] for method in config["methods"]] == METHODS
    (artifact,) = [a for a in read.of_kind("artifact") if a.type == "camtrain"]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(files) == {"camtrain.json", "organ_table.json"}
    told = json.loads(files["camtrain.json"].read_text())
    assert told["labels"] == kit.LABELS
    asked = told["config"]["callbacks"]["AttentionMonitor"]
    assert asked["layer"] == kit.LAYER
    assert asked["alarms"] is None
    assert {"stop_on", "every_n_epochs", "panel_cases", "mode", "table", "max_label_keys"} <= set(asked)
    assert told["config"]["trainer"]["max_epochs"] == 3
    assert "python" in told["command"]
    assert told["versions"]["camtrain"] == ct.__version__


def test_a_resumed_run_goes_on(kit, tmp_path, monkeypatch):
    logger = offline_logger(tmp_path, monkeypatch, id="one")
    first = ct.AttentionMonitor(kit.LAYER, kit.TABLE)
    fit(kit, tmp_path, logger, first, epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    logger.experiment.finish()
    again = offline_logger(tmp_path, monkeypatch, id="one")
    second = ct.AttentionMonitor(kit.LAYER, kit.TABLE)
    fit(kit, tmp_path, again, second, epochs=4, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    again.experiment.finish()
    before, after = OfflineRun.in_folder(tmp_path)
    assert [e["trainer/global_step"] for e in after.history if "val/cases" in e] == [9, 12]
    assert first.publisher.run_dir.path == second.publisher.run_dir.path
    seen = [e["val/auroc"] for run in (before, after) for e in run.history if "val/auroc" in e]
    assert len(seen) == 4
    assert after.summary["best/val/auroc"] == pytest.approx(max(seen))  # best of all, not of what came after
    shown = [{(k, c.split("  ·  ")[0]) for _, k, _, c, _, _ in pictures(run)} for run in (before, after)]
    assert shown[0] == shown[1]
    with second.publisher.run_dir.cases_path.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)][-1] == "3"


def test_many_labels_are_a_few_dozen_charts(kit, tmp_path, monkeypatch):
    labels = [f"<b>finding {i:02d}</b>" for i in range(80)]
    labels[:3] = ["../../out", "ü λ", "<script>alert(1)</script>"]
    table = {"organs": {"lung": 1}, "labels": {name: ["lung"] for name in labels}}
    logger = offline_logger(tmp_path, monkeypatch)
    added = ct.AttentionMonitor(kit.LAYER, table, panel_cases=12)
    cases, module = kit.make_cases(labels=80), kit.make_lit(kit.make_net(outputs=80))
    fit(kit, tmp_path, logger, added, epochs=1, cases=cases, module=module)
    logger.experiment.finish()
    (read,) = OfflineRun.in_folder(tmp_path)
    keys = {key for entry in read.history for key in entry if key.startswith("val/")}
    assert len(keys) < 48
    (scores,) = [e["val/scores"] for e in read.history if "val/scores" in e]
    assert [row[0] for row in read.table(scores)["data"]] == labels
    stored = {p.relative_to(read.media / "images" / "val" / "attention") for p in tmp_path.rglob("wandb/**/*.jpg")}
    assert Path("__/__") in {p.parent for p in stored}  # a label does not lead out of the folder


@pytest.mark.parametrize("count", [3, 120])
def test_over_a_hundred_labels_and_names_of_over_a_hundred_characters(kit, tmp_path, monkeypatch, count):
    """Every label is known by its full name in the tables, whatever a file can be called."""
    labels = [f"<i>λ/{i:03d}</i> " + "very long finding " * 15 for i in range(count)]
    table = {"organs": {"lung": 1}, "labels": {name: ["lung"] for name in labels}}
    logger = offline_logger(tmp_path, monkeypatch)
    added = ct.AttentionMonitor(kit.LAYER, table, panel_cases=6, wandb_budget_mb=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*camtrain.*")
        fit(kit, tmp_path, logger, added, epochs=2, cases=kit.make_cases(labels=count),
            module=kit.make_lit(kit.make_net(outputs=count)))  # fmt: skip
    logger.experiment.finish()
    (read,) = OfflineRun.in_folder(tmp_path)
    keys = {key for entry in read.history for key in entry if key.startswith("val/")}
    assert len(keys) < 100
    shown = {case["label"] for case in added.publisher.run_dir.read_panel()["cases"]}
    pictures_of = [value for entry in read.history for key, value in entry.items() if "attention/" in key]
    assert {label for label in shown for value in pictures_of if any(label in c for c in value["captions"])} == shown
    for value in pictures_of:
        assert all((read.media.parent / path).is_file() for path in value["filenames"])
    if count > 100:
        scores = [read.table(entry["val/scores"]) for entry in read.history if "val/scores" in entry]
        assert [[row[0] for row in one["data"]] for one in scores] == [labels, labels]
        assert not any(label in key for key in keys for label in labels if "attention" not in key)
    else:
        assert all(sum(f"val/auroc/{label}" in entry for entry in read.history) == 2 for label in labels)
    report = added.publisher.run_dir.report_path.read_text(encoding="utf-8")
    assert "<i>λ" not in report
    assert "&lt;i&gt;λ/000&lt;/i&gt;" in report


def children_of(pid):
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (folder / "cmdline").read_text()
            except (OSError, ValueError):
                continue
            if parent == pid:
                yield int(folder.name), words


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the service in /proc")
def test_a_dead_service_does_not_stop_the_training(kit, tmp_path):
    """In a process of its own: what is left of W&B's client must not reach other tests."""
    import subprocess
    import sys

    script = tmp_path / "train.py"
    script.write_text(_DEAD_SERVICE)
    kit_file, here = Path(__file__).with_name("conftest.py"), Path(__file__)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), *sys.path]),
    }
    environment.pop("WANDB_SERVICE", None)  # not the service of this process
    done = subprocess.run(
        [sys.executable, str(script), str(kit_file), str(here), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "trained to the end" in done.stdout, done.stderr[-4000:]
    said = [line for line in done.stderr.splitlines() if "camtrain" in line and "failed" in line]
    assert len(said) == 1, done.stderr[-4000:]
    assert "WandbLogger failed (Connection" in said[0]
    (scores,) = tmp_path.glob("**/scores.csv")
    with scores.open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2", "3"}
    with scores.with_name("cases.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2", "3"}
    assert len(list(scores.parent.glob("epochs/*/overview.png"))) == 4


_DEAD_SERVICE = """
import importlib.util, os, signal, sys, time
from pathlib import Path
import pytest
import camtrain as ct

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

kit, tests = load("kit", sys.argv[1]), load("tests", sys.argv[2])
folder = Path(sys.argv[3])
patch = pytest.MonkeyPatch()
logger = tests.offline_logger(folder, patch)
durations = []

def on_train_epoch_start(self):
    durations.append(time.monotonic())
    if self.current_epoch == 1:
        for pid, words in tests.children_of(os.getpid()):
            if "wandb" in words:
                os.kill(pid, signal.SIGKILL)

module = kit.make_lit(kit.make_net(), on_train_epoch_start=on_train_epoch_start)
trainer = kit.make_trainer(folder, ct.AttentionMonitor(kit.LAYER, kit.TABLE), logger=logger, max_epochs=4)
data = kit.loader(kit.make_cases())
trainer.fit(module, data, data)
assert trainer.current_epoch == 4
assert "log_metrics" not in vars(logger)
print("trained to the end")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
