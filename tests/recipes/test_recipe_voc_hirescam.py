"""The VOC recipe in a tiny form, on drawn pictures: what holds by proof does hold."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from recipe_tools import run_recipe


@pytest.mark.slow
def test_tiny(tmp_path):
    arguments = ["--cases", "24", "--size", "48", "--nets", "flatten", "pool", "--epochs", "1", "--seeds", "1"]
    printed = run_recipe("voc_hirescam", *arguments, "--out", "out", folder=tmp_path)
    out = tmp_path / "out"
    assert (out / "voc_hirescam.md").read_text().strip() in printed
    flatten, pool = (json.loads(line)["result"]["scores"] for line in (out / "runs.jsonl").read_text().splitlines())
    for scores in (flatten, pool):  # what holds by proof
        assert scores["hirescam"]["correlation with effect"] > 0.999
        assert scores["hirescam"]["gap of the sum"] < 1e-4
        assert not scores["hirescam"]["wrong place"] > 0  # NaN where no map has a positive cell
    assert pool["gradcam"]["correlation with effect"] > 0.999
    assert flatten["gradcam"]["correlation with effect"] < 0.999
    for name in ("flatten", "pool"):
        assert Image.open(out / f"{name}.png").width == 620
