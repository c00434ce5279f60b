"""The sanity recipe runs in its small form, and leaves tables and pictures."""

from __future__ import annotations

import pytest
from PIL import Image
from recipe_tools import run_recipe


@pytest.mark.slow
def test_quick(tmp_path):
    printed = run_recipe("sanity_checks", "--quick", "--nets", "flatten", "--out", tmp_path / "out", folder=tmp_path)
    for phrase in ("guided_backprop*", "Do the maps depend on the weights?", "Maps of two models", "Tables and pict"):
        assert phrase in printed
    out = tmp_path / "out"
    header, *rows = (out / "flatten.csv").read_text().splitlines()
    assert header.startswith("stage,module,share,method,control")
    assert {row.split(",")[0] for row in rows} == {"1", "9"}
    assert (out / "flatten_shuffled.csv").exists()
    assert Image.open(out / "flatten.png").size == (1200, 520)
    assert Image.open(out / "flatten_strip.jpg").width == 800
