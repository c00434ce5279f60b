"""The table of the HiResCAM paper in a tiny form: it goes on where it stopped, and tells a diverged seed."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from recipe_tools import run_recipe

TINY = ["--cases", "16", "--test-cases", "16", "--epochs", "1", "--size", "24", "24", "18", "--arms", "AxialNet",
        "max over slices", "pool head"]  # fmt: skip


def run(folder, *arguments):
    return run_recipe("hirescam_paper", *TINY, *arguments, "--out", folder / "out", folder=folder)


def tables(text):
    """Header and rows of every table, cells apart."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block if "---" not in line]
            for block in blocks]  # fmt: skip


@pytest.mark.slow
def test_tiny(tmp_path):
    run(tmp_path, "--seeds", "0")
    out = tmp_path / "out"
    first = (out / "runs.jsonl").read_text()
    assert len(first.splitlines()) == 6
    # The second seed is a net that diverged.
    trained = [json.loads(line) for line in first.splitlines()]
    with (out / "runs.jsonl").open("a") as file:
        for done in trained:
            lost = {"job": done["job"] | {"seed": 1}, "diverged": "weights are not finite", "seconds": 1.0}
            file.write(json.dumps(lost) + "\n")
    printed = run(tmp_path, "--seeds", "0", "1")
    assert (out / "runs.jsonl").read_text().startswith(first)
    assert len((out / "runs.jsonl").read_text().splitlines()) == 12
    text = (out / "table.md").read_text()
    assert printed.endswith(text)
    assert text.count("weights are not finite") == 6
    organs, unseen, ratios = tables(text)
    assert len(organs) == len(unseen) == 1 + 3 * 2 * 2
    assert [row[0] for row in ratios[1:]] == ["AxialNet", "max over slices", "pool head"]
    # Under a pool head both methods give the same map, not so without; and the mask loss does something.
    scores = {(row[0], row[1], row[2]): row[3:] for row in unseen[1:]}
    assert scores["pool head", "no", "Grad-CAM"] == scores["pool head", "no", "HiResCAM"]
    assert scores["AxialNet", "no", "Grad-CAM"] != scores["AxialNet", "no", "HiResCAM"]
    plain, masked = (done["result"]["maps"]["hirescam"] for done in trained[:2])
    assert plain["energy_inside"] != masked["energy_inside"]
    for maps in (done["result"]["maps"]["hirescam"] for done in trained):
        assert maps["lesions pairs"] > 0
        assert 0 < maps["eroded chance"] < maps["organ chance"] < 1
    with Image.open(out / "hirescam_paper.png") as picture:
        assert picture.size == (1200, 780)
