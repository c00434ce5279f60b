"""camtrain evaluate: one tidy table, recomputable from the NIfTI maps of camtrain explain, resumable, comparable."""

from __future__ import annotations

import csv
import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from camtrain.anatomy import OrganTable
from camtrain.cli.main import main

LABELS = ["effusion", "nodule"]
pytestmark = pytest.mark.slow
QUICK = ("--repeats", "60")


def table_of(folder, name="scores.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """The small model on the phantom cases as files, through a manifest."""
    folder = tmp_path_factory.mktemp("scored")
    config = folder / "files.yaml"
    content = yaml.safe_load(trained.config.read_text())
    content["data"] = {
        "class_path": "camtrain.data.ManifestDataModule",
        "init_args": {"manifest": str(trained.manifest), "table": "phantom", "labels": LABELS, "batch_size": 2},
    }
    config.write_text(yaml.safe_dump(content))
    words = ["--ckpt_path", str(trained.checkpoint), "--config", str(config), "--methods", "hirescam,gradcam"]
    for at in ("layer", "image"):
        out = str(folder / at)
        assert main(["evaluate", *words, "--cases", "all", "--at", at, "--out", out, *QUICK]) == 0
    return folder


def own_scores(values, region, threshold):
    """From a map and a region, as the definitions say."""
    positive = np.maximum(values, 0)
    height = positive - positive.min()
    height = height / height.max() if height.max() > 0 else height
    seen = height > threshold
    marked = values > values.mean() + values.std()
    order = np.argsort(-values, axis=None, kind="stable")[: region.sum()]
    return {
        "energy_inside": positive[region].sum() / positive.sum() if positive.sum() > 0 else math.nan,
        "organ_iou": seen[region].sum() / seen.sum() if seen.any() else math.nan,
        "pointing_game": float(region.flat[values.argmax()]) if values.max() > 0 else 0.0,
        "mask_iou": (marked & region).sum() / (marked | region).sum() if values.max() > 0 else math.nan,
        "relevance_rank": region.flat[order].mean() if values.max() > 0 else math.nan,
        "energy_inside_chance": region.mean(),
        "empty_map_rate": float(values.max() <= 0),
    }


@pytest.mark.parametrize(("at", "grid"), [("layer", "layer"), ("image", "scan")])
@pytest.mark.parametrize("method", ["hirescam", "gradcam"])
def test_a_table_recomputed_from_the_files_of_explain_agrees(scored, trained, tmp_path, run, at, grid, method):
    rows = {
        (r["label"], r["measure"]): r for r in table_of(scored / at) if r["split"] == "test" and r["method"] == method
    }
    thresholds = json.loads((scored / at / "thresholds.json").read_text())[f"{method}@net.relu"]
    table = OrganTable.load("phantom").select(LABELS)
    found = {(label, name): [] for label in LABELS for name in own_scores(np.eye(2), np.eye(2) > 0, 0.5)}
    for case in ("test-00000", "test-00001"):
        files = trained.manifest.parent
        out = tmp_path / case
        result = run(
            *("explain", "--ckpt_path", trained.checkpoint, "--image", files / f"{case}_ct.nii.gz", "--out", out),
            *("--organs", files / f"{case}_organs.nii.gz", "--method", method, "--grid", grid),
        )
        assert result.code == 0, result.err
        organs = np.asarray(nib.load(files / f"{case}_organs.nii.gz").dataobj)
        for label in LABELS:
            values = nib.load(out / f"{label}.nii.gz").get_fdata()
            if grid == "layer":
                region = nib.load(out / f"{label}.allowed.nii.gz").get_fdata() > 0
            else:
                region = table.select([label]).allowed(torch.from_numpy(organs)[None, None]).numpy()[0, 0]
            assert values.shape == region.shape
            for name, value in own_scores(values, region, thresholds[label]).items():
                found[label, name].append(value)
    for (label, name), values in found.items():
        row = rows[label, name]
        assert int(row["n"]) == 2
        if np.isnan(values).all():
            assert row["mean"] == ""
        else:
            assert float(row["mean"]) == pytest.approx(np.nanmean(values), abs=1e-3), (label, name)
        assert float(row["undefined"]) == pytest.approx(np.isnan(values).mean())


def test_files_and_what_they_say(scored):
    out = scored / "layer"
    assert {p.name for p in out.iterdir()} == {
        *("cases.jsonl", "settings.json", "scores.csv", "scores.json", "thresholds.json", "report.html")
    }
    rows = table_of(out)
    columns = ["split", "method", "layer", "label", "measure", "n", "mean", "low", "high", "undefined", "units"]
    assert list(rows[0]) == columns
    assert len({tuple(r[c] for c in columns[:5]) for r in rows}) == len(rows)
    assert {r["split"] for r in rows} == {"val", "test"}
    said = json.loads((out / "scores.json").read_text())
    assert said["made_by"] == "camtrain evaluate"
    assert len(said["rows"]) == len(rows)
    assert said["command"].startswith("camtrain evaluate --ckpt_path")
    page = (out / "report.html").read_text()
    assert "<table" in page
    assert "<svg" in page


def test_checkpoint_alone_with_a_baseline(trained, run, tmp_path):
    out = tmp_path / "e"
    words = ["evaluate", "--ckpt_path", trained.checkpoint, "--against", trained.checkpoint, "--out", out, *QUICK]
    first = run(*words, "--measures", "free,reliance", "--splits", "test", "--limit", "3")
    assert first.code == 0, first.err
    assert "shortcut_reliance" in first.out
    rows = table_of(out, "comparison.csv")
    assert rows
    assert {float(r["difference"]) for r in rows if r["difference"]} == {0.0}
    assert {float(r["p"]) for r in rows if r["p"]} == {1.0}
    lines = (out / "cases.jsonl").read_text()
    again = run(*words, "--measures", "free,reliance", "--splits", "test", "--limit", "3")
    assert again.code == 0, again.err
    assert (out / "cases.jsonl").read_text() == lines
    assert "3 cases were finished in an earlier run" in again.out
    other = run(*words, "--measures", "free", "--splits", "test", "--limit", "3")
    assert other.code == 2
    assert "measures" in other.err
    replaced = run(*words, "--measures", "free", "--splits", "test", "--limit", "3", "--overwrite")
    assert replaced.code == 0, replaced.err
    assert "shortcut_reliance" not in replaced.out


def test_yaml_options(trained, run, tmp_path):
    groups = tmp_path / "groups.yaml"
    groups.write_text("chest: [nodule, effusion]\n")
    result = run(
        *("evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "e", "--splits", "test", *QUICK),
        *("--methods", "[hirescam, {name: relevancecam, contrast: paper}]", "--groups", groups, "--limit", "2"),
        *("--layers", "net.relu,net.features.1", "--contrast_labels", "all", "--baseline", "0.2"),
    )
    assert result.code == 0, result.err
    rows = table_of(tmp_path / "e")
    assert {"relevancecam(contrast=paper)", "hirescam"} <= {r["method"] for r in rows}
    assert {"net.relu", "net.features.1"} <= {r["layer"] for r in rows}
    assert "group:chest" in {r["label"] for r in rows}


def test_config_options_reach_the_data(trained, run, tmp_path):
    result = run(
        *("evaluate", "--ckpt_path", trained.checkpoint, "--config", trained.config, "--out", tmp_path / "e"),
        *("--splits", "test", "--measures", "auroc", "--data.test_cases", "2", *QUICK),
    )
    assert result.code == 0, result.err
    assert len((tmp_path / "e" / "cases.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--measures", "auroc,enrgy_inside"], "nearest: energy_inside"),
        (["--cases", "false"], "known: all, positives, correct, fn, fp"),
        (["--level", "95"], "between 0 and 1"),
        (["--repeats", "1"], "repeats= expects"),
        (["--groups", "{x: [nodul]}"], "nearest: nodule"),
        (["--trained_with", "Case", "--measures", "reliance"], "nearest: case"),
        (["--methods", "hirescam,hirescam"], "twice"),
        (["--sanity", "-2"], "--sanity expects"),
        (["--methods", "hirescan"], "nearest: hirescam"),
        (["--layers", "net.rlu"], "net.rlu"),
        (["--splits", "tset"], "nearest: test"),
        (["--contrast_labels", "few"], "--contrast_labels expects"),
        (["--groups", "{x: nodule}"], "--groups expects"),
        (["--device", "gpu"], "--device 'gpu'"),
        (["--baseline", "water"], "water"),
        (["--replacements", "milk", "--measures", "reliance"], "milk"),
        (["--data.test_cases", "2"], "need --config"),
        (["--against", "nothing.ckpt"], "does not exist"),
        (["--thresholds", "nothing.json"], "cannot be read"),
    ],
)
def test_wrong_options(trained, refused, tmp_path, words, says):
    full = ["evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "e", "--limit", "2", *QUICK]
    measures = [] if "--measures" in words else ["--measures", "free" if "baseline" not in words[0] else "paid"]
    assert says in refused(*full, *measures, *words)


def test_a_folder_with_other_files_is_left_alone(trained, refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    words = ("evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path)
    assert "holds other files" in refused(*words, "--overwrite")
    assert (tmp_path / "thesis.txt").exists()


def test_overwrite_deletes_nothing_before_the_first_case(trained, run, refused, tmp_path):
    words = ("evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "e", "--splits", "test", *QUICK)
    assert run(*words, "--measures", "auroc").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    refused(*words, "--overwrite", "--methods", "hirescammm")
    refused(*words, "--overwrite", "--measures", "nonsense")
    refused(*words, "--overwrite", "--layers", "nowhere", "--measures", "energy_inside")
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()} == before


def test_a_first_attempt_that_fails_binds_nobody(trained, run, refused, tmp_path):
    words = ("evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "e", "--splits", "test", *QUICK)
    refused(*words, "--layers", "nowhere")
    assert run(*words, "--layers", "net.relu", "--measures", "auroc").code == 0
    (tmp_path / "e" / "settings.json").write_text('{"made_by": "camt')
    assert "--overwrite" in refused(*words, "--layers", "net.relu", "--measures", "auroc")
    assert run(*words, "--layers", "net.relu", "--measures", "auroc", "--overwrite").code == 0


def test_a_baseline_of_other_labels_is_refused_before_the_work(trained, refused, run, write, tmp_path):
    config = write(data__init_args__labels=["nodule"], trainer__default_root_dir=str(tmp_path / "other"))
    assert run("fit", "--config", config).code == 0
    (other,) = (tmp_path / "other").rglob("best.ckpt")
    said = refused("evaluate", "--ckpt_path", trained.checkpoint, "--against", other, "--out", tmp_path / "e")
    assert "has the labels effusion, nodule" in said
    assert not (tmp_path / "e" / "cases.jsonl").exists()


def test_an_interrupted_command_goes_on(trained, run, tmp_path, monkeypatch):
    from camtrain.evaluation.scoring import CaseScorer

    real, calls = CaseScorer.score, []

    def stopping(self, case):
        calls.append(case.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, case)

    monkeypatch.setattr(CaseScorer, "score", stopping)
    words = ("evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "e", "--splits", "test", *QUICK)
    stopped = run(*words)
    assert stopped.code == 130
    assert "2 finished cases are kept" in stopped.err
    monkeypatch.setattr(CaseScorer, "score", real)
    finished = run(*words)
    assert finished.code == 0, finished.err
    shutil.rmtree(tmp_path / "e" / "never", ignore_errors=True)
    whole = run(*words[:4], tmp_path / "whole", *words[5:])
    assert whole.code == 0
    assert table_of(tmp_path / "e") == table_of(tmp_path / "whole")


def test_sanity_check_beside_the_scores(trained, run, tmp_path):
    words = ("evaluate", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "e", "--splits", "test", *QUICK)
    result = run(*words, "--measures", "auroc", "--sanity", "2", "--methods", "hirescam,gradcam")
    assert result.code == 0, result.err
    assert "Do the maps depend on the weights?" in result.out
    rows = table_of(tmp_path / "e", "sanity.csv")
    assert {"hirescam", "gradcam", "relevancecam(contrast=none)"} == {r["method"] for r in rows}
    assert "net.head" in {r["module"] for r in rows}
    assert "Randomised networks" in (tmp_path / "e" / "report.html").read_text()
