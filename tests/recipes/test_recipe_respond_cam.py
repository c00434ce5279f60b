"""The Respond-CAM recipe runs in a tiny form, goes on where it stopped, and tells what diverged."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from PIL import Image
from recipe_tools import RECIPES, run_recipe

SMALL = {"seeds": "1", "cases": "16", "test-cases": "10", "epochs": "1", "size": "16", "voxel": "1.5", "hidden": "8",
         "pictures": "12", "picture": "32", "picture-epochs": "1"}  # fmt: skip


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("respond_cam")


def options(folder):
    return [f"--{name}={value}" for name, value in (SMALL | {"out": str(folder)}).items()]


def run(folder):
    return run_recipe("respond_cam", "--widths", 2, 4, *options(folder), folder=folder.parent, COLUMNS="200")


@pytest.mark.slow
def test_small_form(recipe, monkeypatch, tmp_path):
    out = tmp_path / "out"
    text = run(out)
    rows = [line.split(" | ") for line in text.splitlines() if line.endswith(" of 1 |")]
    assert len(rows) == 18  # data x nets x methods
    exact = [float(row[4].split()[0]) for row in rows if row[3] == "Respond-CAM + biases"]
    assert len(exact) == 6
    assert max(exact) < 1e-5
    assert {row[-1] for row in rows} == {"0 of 1 |"}
    assert "The worst seed" in text
    assert (out / "respond_cam.md").read_text() in text.replace("\n\n\n", "\n\n")
    assert Image.open(out / "respond_cam.png").width == 720
    assert Image.open(out / "respond_cam_sums.png").size == (720, 900)
    assert len((out / "runs.jsonl").read_text().splitlines()) == 6
    nothing_is_trained_again(recipe, monkeypatch, out)


def nothing_is_trained_again(recipe, monkeypatch, out):
    monkeypatch.setattr(recipe, "train", lambda out, job: pytest.fail(f"{job} was trained again"))
    monkeypatch.setattr(recipe, "figures", lambda *_: "drawn")
    monkeypatch.setattr(sys, "argv", ["respond_cam.py", "--widths", "2", "4", *options(out)])
    recipe.main()
    assert len((out / "runs.jsonl").read_text().splitlines()) == 6
    assert "drawn" in (out / "respond_cam.md").read_text()


def test_a_diverged_seed_is_told(recipe):
    job = {"data": "noisy", "net": "cnn2", "seed": 0}
    scores = {"l1": 0.5, "l1_std": 0.1, "kendall_tau": 0.25, "kendall_tau_std": 0.2}
    good = {"skill": 0.75, "gradcam": scores, "respondcam": {**scores, "l1": 0.125}, "account": scores}
    runs = [{"job": job, "result": good}, {"job": {**job, "seed": 1}, "diverged": "weights are no longer finite"}]
    line = recipe.table(runs).splitlines()[3]
    assert line.startswith("| volumes, SNR 0.1 | CNN-2 | 0.750 | Respond-CAM | 0.125 ± 0.1 |")
    assert line.endswith("| 1 of 2 |")
    assert "| volumes, SNR 0.1 | CNN-2 | 1 | 0.2500 | 0.250 | no |" in recipe.verdict(runs)
    met = {**good, "respondcam": {**scores, "l1": 0.01, "kendall_tau": 0.96}}
    assert "| 2 | 0.2500 | 0.250 | no |" in recipe.verdict([*runs, {"job": job, "result": met}])
    assert "| 1 | 0.0200 | 0.960 | yes |" in recipe.verdict([{"job": job, "result": met}])
    assert "| 0 | nan | nan | no |" in recipe.verdict(runs[1:])


def test_weights_that_are_not_finite_are_divergence(recipe, tmp_path, monkeypatch):
    class Broken(recipe.pl.Trainer):
        def fit(self, model, data):
            torch.nn.init.constant_(model.net.head.bias, torch.nan)

    monkeypatch.setattr(recipe.pl, "Trainer", Broken)
    job = {"data": "clean", "net": "cnn2", "seed": 0, "widths": [2, 2], "hidden": 4, "cases": 2, "test_cases": 2,
           "epochs": 1, "size": 16, "voxel": 1.5}  # fmt: skip
    with pytest.raises(recipe._runs.Diverged, match="no longer finite"):
        recipe.train(tmp_path, job)
    assert not list(tmp_path.iterdir())
