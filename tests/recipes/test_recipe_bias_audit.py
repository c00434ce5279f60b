"""The bias audit: it runs in a small form, and its tables count what they say."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from recipe_tools import RECIPES, run_recipe


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import _bias_tables

    return _bias_tables


def run_of(tables, seed, labels):
    """A run with labels {name: (fall, verdict, share)}."""
    figures = dict.fromkeys((*tables.FIGURES, tables.MARKER), 1.0)
    said = {
        name: {
            "suspect": suspect,
            "figures": figures | {"shortcut_reliance/case": share, "shortcut_reliance/air": share + 0.1},
            "flags": dict.fromkeys(figures, share > 0.5),
        }
        for name, (_, suspect, share) in labels.items()
    }
    auroc = {"test": dict.fromkeys(labels, 0.9), "shift_reversed": {n: 0.9 - v[0] for n, v in labels.items()}}
    job = {"net": "flatten", "shortcut": 0.95, "seed": seed}
    return {"job": job, "result": {"epochs": {"1": said, "2": said}, "auroc": auroc}, "seconds": 1.0}


def test_rates_count_hits_and_quiet_ones(tables):
    runs = [
        run_of(tables, 1, {"a": (0.5, True, 0.9), "b": (0.3, False, 0.6), "c": (0.0, False, 0.1)}),
        run_of(tables, 2, {"a": (0.6, True, 0.8), "b": (0.0, True, 0.7), "c": (0.05, None, 0.2)}),
    ]
    rows = tables.pairs(runs)
    assert len(rows) == 6
    assert tables.rates(rows, lambda r: r["suspect"]) == ["2 of 3; 0.75 (0.50-1.00)", "2 of 3; 0.75 (0.50-1.00)"]
    text = tables.judges(rows)
    # Shares rank the labels by their fall but for one pair: 0.7 (no fall) before 0.6 (fall 0.3).
    (line,) = [line for line in text.splitlines() if "the lower one" in line]
    assert "| 3 of 3; 1.00 (1.00-1.00) | 2 of 3; 0.75 (0.50-1.00) | 0.89 |" in line
    assert "3 / 3 of 6" in tables.arms(rows, runs)
    assert tables.by_epoch(runs).count("2 of 3; 0.75") == 4


@pytest.mark.slow
def test_small_form(tmp_path):
    out = tmp_path / "out"
    words = ("--cases", 16, "--epochs", 1, "--seeds", 4, "--nets", "flatten", "--out", out)
    printed = run_recipe("bias_audit", *words, folder=tmp_path)
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [run["job"]["shortcut"] for run in runs] == [0.95, 0.75, 0.5]
    result = runs[0]["result"]
    assert list(result["epochs"]) == ["1"]
    assert set(result["auroc"]) == {"test", "shift_reversed"}
    assert "energy_on_marker@hirescam" in result["epochs"]["1"]["aneurysm"]["figures"]
    for text in (printed, (out / "tables.md").read_text()):
        assert "biased / suspect labels" in text
        assert "| flatten | **verdict** |" in text
        assert "torch" in text
    assert Image.open(out / "bias_audit.png").width > 800
