"""The VOC recipe in a tiny form: on drawn pictures, and again on a tree given by path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "voc_hirescam.py"


def _run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--epochs", "1", "--seeds", "1", "--out", "out", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_tiny(tmp_path):
    said = _run(tmp_path, "--cases", "24", "--size", "48", "--nets", "flatten", "pool")
    out = tmp_path / "out"
    assert (out / "voc_hirescam.md").read_text().strip() in said
    flatten, pool = (json.loads(line)["result"]["scores"] for line in (out / "runs.jsonl").read_text().splitlines())
    for scores in (flatten, pool):  # what holds by proof
        assert scores["hirescam"]["correlation with effect"] > 0.999
        assert scores["hirescam"]["gap of the sum"] < 1e-4
        assert not scores["hirescam"]["wrong place"] > 0  # NaN where no map has a positive cell
    assert pool["gradcam"]["correlation with effect"] > 0.999
    assert flatten["gradcam"]["correlation with effect"] < 0.999
    for name in ("flatten", "pool"):
        assert Image.open(out / f"{name}.png").width == 620
    tree = next(out.glob("tree_*"))
    again = _run(tmp_path, "--root", str(tree), "--size", "48", "--nets", "flatten")
    assert again.count("| FlattenNet |") == 2
