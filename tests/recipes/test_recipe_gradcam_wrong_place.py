"""The recipe in a tiny form: HiResCAM and the pool head are never in a wrong place, Grad-CAM behind others is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "gradcam_wrong_place.py"


@pytest.mark.slow
def test_tiny(tmp_path):
    arguments = ["--cases", "24", "--epochs", "2", "--seeds", "1", "--size", "24", "24", "24", "--out", "out"]
    done = subprocess.run(
        [sys.executable, str(RECIPE), *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    out = tmp_path / "out"
    assert (out / "gradcam_wrong_place.md").read_text().strip() in done.stdout
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    shares = {run["job"]["net"]: run["result"]["shares"] for run in runs}
    assert list(shares) == ["flatten", "axial", "pool"]
    assert all(run["result"]["gap"] < 1e-4 for run in runs)
    for net, found in shares.items():
        for name in ("hirescam", *(("gradcam", "missed") if net == "pool" else ())):
            assert all(value < 1e-6 for value in found[name] if value == value)
    assert max(value for net in ("flatten", "axial") for value in shares[net]["gradcam"] if value == value) > 0.1
    pictures = list(out.glob("*.png"))  # none of a net without any positive map
    assert pictures
    assert Image.open(pictures[0]).width == 1100
