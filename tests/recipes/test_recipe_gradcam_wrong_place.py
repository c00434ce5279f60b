"""The recipe in a tiny form: HiResCAM and the pool head are never in a wrong place, Grad-CAM behind others is."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from recipe_tools import run_recipe


@pytest.mark.slow
def test_tiny(tmp_path):
    arguments = ["--cases", "24", "--epochs", "2", "--seeds", "1", "--size", "24", "24", "24", "--out", "out"]
    printed = run_recipe("gradcam_wrong_place", *arguments, folder=tmp_path)
    out = tmp_path / "out"
    assert (out / "gradcam_wrong_place.md").read_text().strip() in printed
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
