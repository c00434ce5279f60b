"""The table after a fit: who needs help most comes first, and the bar is as long as the score."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from camtrain.reporting import comparison_table, score_table
from camtrain.reporting.need_table import MEASURES, by_need, need_table

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


MANY = ["auroc", "auprc", "calibration_error", "organ_iou", "energy_inside", "pointing_game", "mask_iou"]
MANY += ["relevance_rank", "empty_map_rate", "class_sensitivity", "sum_to_score_l1", "bias_share", "outside_share"]
LONG = ["nodule", "coronary_calcification", "[b]pericardial_effusion", "ground_glass"]
RAISED = {"nodule": ["reliance", "energy_below_chance"], "ground_glass": ["label_leaves_organ"], "all": ["same_place"]}


def words_in(text):
    """All words of a text, folded ones put together again."""
    return "".join(text.split())


@pytest.mark.parametrize(
    ("width", "gone"), [(40, 5), (60, 3), (80, 1), (100, 0), (120, 0), (160, 0)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("terminal", [True, False])
def test_whatever_is_shown_is_whole_at_every_width(width, gone, terminal):
    scores = {m: {label: (j + i / 20) / 3.5 - 0.1 for j, label in enumerate(LONG)} for i, m in enumerate(MANY)}
    table = need_table(
        scores, RAISED, title="val, [b]" + "x " * 40, full="/data/[old]/x[/b]/scores.csv", measures=MEASURES
    )
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, no_color=True, legacy_windows=False)
    console.begin_capture()
    console.print(table)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", console.end_capture())
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= width
    rows = shown.splitlines()
    kept = MEASURES[: len(MEASURES) - gone]
    for label in LONG:
        numbers = [f"{scores[measure][label]:.3f}" for measure in kept]
        assert any(re.findall(r"-?\d\.\d{3}", row) == numbers for row in rows), label
    whole = words_in(shown)
    assert "".join(("[b]", "x" * 40)) in whole
    assert "/data/[old]/x[/b]/scores.csv" in whole
    assert "all13measuresarein" in whole
    assert "raisedforall:same_place" in whole
    left = ",".join(MEASURES[len(MEASURES) - gone :])
    assert (f"noroomfor{left}" in whole) == (gone > 0)
    for piece in ("energy_", "below_", "chance", "reliance,", "leaves_", "organ", "auroc", "█", "label"):
        assert piece in shown


def test_names_without_a_place_to_fold_are_broken_not_cut():
    scores = {"auroc": {"x" * 90: 0.5, "胸部" * 30: 0.25, "a\nb": 0.125}}
    shown = "".join(lines(need_table(scores, {}, title="t")))
    assert shown.count("x") == 90
    assert shown.count("胸") == 30
    assert all(number in shown for number in ("0.500", "0.250", "0.125", "a b"))
    console = Console(width=50, file=io.StringIO(), record=True)
    console.print(score_table(scores | {"auprc": {}}, title="a [/b] val", full="x[old]", measures=["auroc"]))
    text = console.export_text()
    assert text.count("x") == 91
    assert "[/b]" in text
    assert "x[old]" in text


def test_brackets_in_names_are_no_markup_in_a_comparison():
    scores = {"auroc": {"[b]a": 0.5, "[/b]c": 0.25}}
    console = Console(width=90, file=io.StringIO(), record=True)
    console.print(comparison_table(scores, scores, titles=("[/x]", "[old]"), title="a [/b]", full="[/f]", worst=1))
    text = console.export_text()
    assert all(word in text for word in ("[/x]", "[old]", "a [/b]", "[/f]", "[/b]c"))
