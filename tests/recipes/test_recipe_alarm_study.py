"""The study of the alarms: it runs in a small form, and its table counts who was right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import alarm_study

    return alarm_study


def run_of(study, seed, falls, rates):
    """A run in which labels' AUROC falls by so much, with the empty-map rates of each epoch."""
    test, shifted = dict.fromkeys(study.LABELS, 0.9), {}
    for name in study.LABELS:
        shifted[name] = 0.9 - falls.get(name, 0.0)
    history = [{"empty_map_rate": {name: values[epoch] for name, values in rates.items()}} for epoch in range(8)]
    job = {"net": "flatten", "shortcut": 0.95, "mask": 0.0, "seed": seed}
    return {"job": job, "result": {"history": history, "auroc": {"test": test, "shift_reversed": shifted}}}


def test_the_table_counts_right_wrong_and_passing_alarms(study):
    rises, passes, never = [0.0] + [0.9] * 7, [0.0] + [0.9] * 4 + [0.0] * 3, [0.0] * 8
    runs = [
        run_of(study, 1, {"effusion": 0.5}, {"effusion": rises, "aneurysm": rises, "consolidation": passes}),
        run_of(study, 2, {"effusion": 0.5, "aneurysm": 0.05}, {"effusion": never}),
    ]
    (line,) = [line for line in study.table(runs).splitlines() if "flatten" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["flatten", "95%", "no", "2", "2 of 8"]
    # One biased label and one other at the end; a third one had passed.
    assert cells[5 + study.NAMES.index("empty_maps")] == "1 + 1 (3)"
    assert cells[5 + study.NAMES.index("reliance")] == "0 + 0 (0)"


@pytest.mark.slow
def test_small_form(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(RECIPES / "alarm_study.py"), "--cases", "16", "--epochs", "2", "--seeds", "4",
               "--nets", "flatten", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [len(run["result"]["history"]) for run in runs] == [2, 2]
    assert set(runs[1]["result"]["auroc"]) == {"test", "shift_reversed"}
    assert runs[0]["result"]["auroc"] == {}
    assert "outside_pull" in runs[1]["result"]["history"][1]
    assert (out / "tables.md").read_text().count("| flatten |") == 2
