from __future__ import annotations

import csv
import io
import math

import pytest
from rich.console import Console

from camtrain._errors import InputError
from camtrain.reporting import as_csv, as_markdown, as_rows, comparison_table, score_table
from camtrain.reporting.score_table import mean_of, rows_as_markdown, worst_first

NAN = float("nan")
SCORES = {
    "auroc": {"nodule": 0.91, "effusion": 0.83, "fracture": NAN},
    "empty_map_rate": {"nodule": 0.1, "effusion": 0.4},
}


def text(table):
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_table():
    shown = text(score_table(SCORES, title="scores"))
    rows = [line for line in shown.splitlines() if line.strip()]
    lines = {line.split()[0]: line for line in rows[rows.index(next(r for r in rows if "──" in r)) + 1 :]}
    assert list(lines) == ["nodule", "effusion", "fracture", "mean"]
    assert "0.910" in lines["nodule"]
    assert lines["fracture"].count("-") == 2
    assert "0.870" in lines["mean"]
    assert "0.250" in lines["mean"]


def test_worst_first_knows_which_way_is_worse():
    assert worst_first(SCORES, "auroc") == ["effusion", "nodule", "fracture"]
    assert worst_first(SCORES, "empty_map_rate") == ["effusion", "nodule", "fracture"]
    assert worst_first(SCORES, "empty_map_rate", lower_is_better=()) == ["nodule", "effusion", "fracture"]
    with pytest.raises(InputError, match="nearest: auroc"):
        worst_first(SCORES, "auroq")


def test_many_labels_show_the_worst():
    scores = {"organ_iou": {f"label{i:02d}": i / 80 for i in range(80)}}
    shown = text(score_table(scores))
    assert "label00" in shown
    assert "label19" in shown
    assert "label20" not in shown
    assert "the 20 worst of 80 labels by organ_iou; all are in scores.csv" in " ".join(shown.split())
    assert f"{sum(range(80)) / 80 / 80:.3f}" in shown  # the mean is that of all


def test_comparison():
    after = {"auroc": {"nodule": 0.95, "effusion": 0.73, "fracture": 0.5}, "empty_map_rate": {"nodule": 0.2}}
    table = comparison_table(SCORES, after, title="two runs")
    shown = text(table)
    assert "+0.040" in shown
    assert "-0.100" in shown
    assert "-0.030" in shown  # mean over nodule and effusion, which both runs scored
    styles = [[getattr(c, "style", "") for c in column.cells] for column in table.columns]
    assert styles[3] == ["green", "red", "", "red"]
    assert styles[6] == ["red", "", "", "red"]  # a rate that rises is worse
    assert "plain" in shown
    assert "mask loss" in shown
    with pytest.raises(InputError, match="no measure in common"):
        comparison_table(SCORES, {"other": {}})


def test_no_change_has_no_colour():
    table = comparison_table({"auroc": {"a": 0.5}}, {"auroc": {"a": 0.50001}})
    assert [str(getattr(c, "style", "")) for c in table.columns[3].cells] == ["", ""]


def test_csv_and_markdown():
    rows = list(csv.DictReader(io.StringIO(as_csv(SCORES, sort="auroc"))))
    assert [r["label"] for r in rows] == ["effusion", "nodule", "fracture", "mean"]
    assert rows[2]["auroc"] == ""
    assert float(rows[3]["auroc"]) == pytest.approx(0.87)
    lines = as_markdown(SCORES).splitlines()
    assert lines[1] == "|---|---:|---:|"
    assert lines[4] == "| fracture | - | - |"
    assert all(line.count("|") == 4 for line in lines)
    assert rows_as_markdown(["a"], [["x|y\nz"]]).splitlines()[2] == "| x\\|y z |"
    assert as_rows({})[1] == [["mean"]]


def test_mean_of_nothing_is_undefined():
    assert math.isnan(mean_of({"a": NAN}))
    assert math.isnan(mean_of({}))
    assert text(score_table({"auroc": {}})).count("-") >= 1


def test_a_comparison_of_two_measures_fits_a_terminal_of_80_columns():
    scores = {name: {"coronary_calcification": 0.5, "nodule": 0.25} for name in ("reversed", "OrganIoU")}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(comparison_table(scores, scores))
    shown = console.export_text()
    assert "…" not in shown
    assert all(word in shown for word in ("reversed", "OrganIoU", "coronary_calcification"))
