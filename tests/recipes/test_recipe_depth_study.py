"""The study of the alarm `depth`: its tables come from the runs that are kept, and one network is trained in small."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from recipe_tools import RECIPES

DOCS = Path(__file__).parents[2] / "docs"
RUNS = DOCS / "results" / "runs" / "depth_study.jsonl.gz"


@pytest.fixture
def runs():
    return [json.loads(line) for line in gzip.decompress(RUNS.read_bytes()).decode().splitlines()]


def test_the_page_tells_what_the_runs_say(runs, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    from _depth_tables import tables

    made = [line for line in tables(runs, ["relevancecam", "hirescam"], [1, 2, 3]).splitlines() if line[:1] == "|"]
    page = (DOCS / "alarms.md").read_text(encoding="utf-8").split("### `depth`, where tidy maps")[1].splitlines()
    told = [line for line in page if line.startswith("|")]
    assert len(told) > 20
    assert set(told) <= set(made)


@pytest.mark.slow
def test_a_small_form_trains_and_asks_in_both_ways(runs, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import depth_study

    job = {"shortcut": 0.975, "mask": 3.0, "cases": 8, "epochs": 2, "seed": 1}
    result = depth_study.train(job)
    assert result["mid"] == {"relevancecam": "net.mixing.2", "hirescam": "net.early"}
    assert set(result["auroc"]) == {"test", "shift_reversed"}
    assert all("mid_energy_inside" in rows[-1] for rows in result["history"].values())
    text = depth_study.tables([*runs, {"job": job, "result": result}], list(depth_study.RULES), [1])
    assert "without a marker" in text
