"""The recipe of Grad-CAM's tables runs in its small form."""

from __future__ import annotations

import json

import pytest
from recipe_tools import run_recipe


@pytest.mark.slow
def test_small_form(tmp_path):
    out = tmp_path / "out"
    words = ("--cases", 16, "--epochs", 1, "--test-cases", 6, "--occluded", 1, "--seeds", 5, "--nets", "flatten")
    printed = run_recipe("gradcam_paper", *words, "--out", out, folder=tmp_path)
    (run,) = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    rows = run["result"]["rows"]["relu"]
    assert {"gradcam", "guided_gradcam", "relevancecam", "random"} <= set(rows)
    assert set(rows["hirescam"]) >= {"finding", "organ", "recall", "rejecting_all", "air", "air+", "mean", "classes"}
    assert all(0 <= row["recall"] <= 1 for row in rows.values())
    for text in (printed, (out / "tables.md").read_text()):
        assert "| hirescam |" in text
        assert "rejecting all: " in text
        assert "1 of 1 seeds" in text
