"""The gallery of errors is made in its small form: page, picture and table."""

from __future__ import annotations

import re

import pytest
from PIL import Image
from recipe_tools import run_recipe


@pytest.mark.slow
def test_small_form(tmp_path):
    out = tmp_path / "out"
    words = ("--cases", 24, "--epochs", 1, "--test-cases", 8, "--shown", 1, "--out", out)
    run_recipe("error_gallery", *words, folder=tmp_path)
    page = (out / "errors.html").read_text()
    table = (out / "tables.md").read_text()
    counts = [tuple(map(int, row)) for row in re.findall(r"^\| \w+ \| (\d+) \| (\d+) \|$", table, flags=re.MULTILINE)]
    assert len(counts) == 4
    # One shown of every kind and label that occurs; after one epoch the network is wrong somewhere.
    assert page.count("<article>") == sum(min(n, 1) for row in counts for n in row) > 0
    assert page.count("data:image/png;base64,") == page.count("<article>")
    assert "counterfactual mass" in page
    assert "share of the volume" in page
    assert "marker is" in page
    assert Image.open(out / "errors.png").width == 1000
