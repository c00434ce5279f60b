"""The study of Relevance-CAM by depth and its pictures run in their small form, and go on with what is missing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ("--cases", "48", "--test-cases", "4", "--epochs", "6", "--size", "24", "20", "24", "--nets", "vgg")


sys.path.insert(0, str(RECIPES))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a recipe in this process, which has torch loaded already; what it printed."""

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_study_and_pictures(run, tmp_path):
    out = tmp_path / "study"
    text = run("relevance_cam", *SMALL, "--seeds", 1, "--out", out)
    table = (out / "table.md").read_text()
    assert table.strip() in text
    result, of_controls = (json.loads(line)["result"] for line in (out / "runs.jsonl").read_text().splitlines())
    assert set(result["seen"]) == {"stage1", "stage2", "stage3"}
    assert result["seen"]["stage1"] < result["seen"]["stage2"] < result["seen"]["stage3"] <= 1
    assert result["pairs"], "nothing was learnt, and nothing is tested"
    # Five methods, and the finding itself.
    assert len(result["scores"]) == 6
    for of in result["scores"]["gradcam++"].values():
        assert set(of) >= {"AD, paper", "average_drop", "Dice", "own finding", "channel_sparseness"}
    itself = result["scores"]["(the finding itself)"]
    assert itself["stage1"]["Dice"] > itself["stage3"]["Dice"]
    assert table.count("| relevancecam | stage") == 3
    assert set(of_controls["scores"]["(noise)"]["stage2"]) == {
        "average_drop",
        "average_increase",
        "AD, paper",
        "AI, paper",
    }
    assert table.count("| (noise) | stage") == 3
    before = (out / "runs.jsonl").stat().st_mtime_ns
    assert table.strip() in run("relevance_cam", *SMALL, "--seeds", 1, "--out", out)
    assert (out / "runs.jsonl").stat().st_mtime_ns == before, "a finished run is not done again"

    pictures = tmp_path / "pictures"
    small = (*SMALL, "--stages", 2, "--chart-cases", 2, "--models", out, "--out", pictures)
    run("relevance_pictures", *small)
    assert {p.name for p in pictures.iterdir()} == {f"{n}_vgg{e}" for n, e in (
        ("depth", ".png"), ("cascade", ".png"), ("cascade", ".csv"), ("cascade", "_chart.png"))}  # fmt: skip
    assert Image.open(pictures / "depth_vgg.png").width == 740
