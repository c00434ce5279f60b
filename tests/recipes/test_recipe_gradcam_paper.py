"""The recipe of Grad-CAM's tables runs in its small form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "gradcam_paper.py"


@pytest.mark.slow
def test_small_form(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable,
            str(RECIPE),
            "--cases",
            "16",
            "--epochs",
            "1",
            "--test-cases",
            "6",
            "--occluded",
            "1",
            "--seeds",
            "5",
            "--nets",
            "flatten",
            "--out",
            str(out),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    (run,) = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    rows = run["result"]["rows"]["relu"]
    assert {"gradcam", "guided_gradcam", "relevancecam", "random"} <= set(rows)
    assert set(rows["hirescam"]) >= {"finding", "organ", "recall", "rejecting_all", "air", "air+", "mean", "classes"}
    assert all(0 <= row["recall"] <= 1 for row in rows.values())
    for text in (done.stdout, (out / "tables.md").read_text()):
        assert "| hirescam |" in text
        assert "rejecting all: " in text
        assert "1 of 1 seeds" in text
