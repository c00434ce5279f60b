"""The table after a fit: who needs help most comes first, and the bar is as long as the score."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from camtrain.reporting.need_table import by_need, need_table

NAN = float("nan")
SCORES = {
    "auroc": {"nodule": 0.9, "effusion": 0.8, "[b]stent": 0.7, "mass": NAN},
    "energy_inside": {"nodule": 0.25, "effusion": 0.9, "[b]stent": 0.5},
}


def lines(table):
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(table)
    return [line for line in console.export_text().splitlines() if line.strip()]


def test_order_of_need():
    assert by_need(SCORES) == ["nodule", "[b]stent", "effusion", "mass"]
    assert by_need(SCORES, {"effusion": ["drifting"], "mass": ["a", "b"]}) == ["mass", "effusion", "nodule", "[b]stent"]
    assert by_need(SCORES, bar="auroc") == ["[b]stent", "effusion", "nodule", "mass"]
    assert by_need({"organ_iou": {"only": NAN}}) == ["only"]


def test_bars_numbers_and_alarms():
    shown = lines(need_table(SCORES, {"effusion": ["drifting"]}, title="val"))
    rows = {line.split()[0]: line for line in shown}
    assert rows["effusion"].count("█") == 9
    assert rows["effusion"].rstrip().endswith("drifting")
    assert rows["nodule"].count("█") + rows["nodule"].count("▌") == 3
    assert rows["[b]stent"].count("█") == 5
    assert "-" in rows["mass"]
    assert "0.800" in rows["mean"]
    assert "bar: energy_inside" in shown[-1]


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_values_out_of_range_have_a_bar_all_the_same(value):
    shown = lines(need_table({"energy_inside": {"a": value}}))
    assert sum(line.count("█") for line in shown) == (10 if value > 1 else 0)


def test_many_labels():
    shown = lines(need_table({"auroc": {f"label{i:03d}": i / 200 for i in range(120)}}, {}))
    assert "label019" in "".join(shown)
    assert "label020" not in "".join(shown)
    assert "the 20 neediest of 120 labels, all are in scores.csv" in " ".join(" ".join(shown).split())
