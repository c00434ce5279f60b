"""The sanity recipe runs in its small form, and leaves tables and pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "sanity_checks.py"


@pytest.mark.slow
def test_quick(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--quick", "--nets", "flatten", "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    for phrase in ("guided_backprop*", "Do the maps depend on the weights?", "Maps of two models", "Tables and pict"):
        assert phrase in done.stdout
    out = tmp_path / "out"
    header, *rows = (out / "flatten.csv").read_text().splitlines()
    assert header.startswith("stage,module,share,method,control")
    assert {row.split(",")[0] for row in rows} == {"1", "9"}
    assert (out / "flatten_shuffled.csv").exists()
    assert Image.open(out / "flatten.png").size == (1200, 520)
    assert Image.open(out / "flatten_strip.jpg").width == 800
