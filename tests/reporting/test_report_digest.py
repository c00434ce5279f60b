"""What the scores say: who looks at the wrong place, since when; the worst first; differences of two runs."""

from __future__ import annotations

import pytest

from camtrain.reporting import Score
from camtrain.reporting.report_digest import Curves, differences, headline, heat_rows, sparkline, verdicts


def curves(**series):
    """Label -> energy inside over the epochs; None: not scored in that epoch."""
    rows = []
    for label, values in series.items():
        for epoch, value in enumerate(values):
            rows.append(Score(epoch, epoch, "val", "", label, "auroc", 0.7))
            if value is not None:
                rows.append(Score(epoch, epoch, "val", "hirescam", label, "energy_inside", value))
    return Curves(rows)


def judged(**series):
    return {v.label: v for v in verdicts(curves(**series), list(series), "val", "hirescam")}


@pytest.mark.parametrize(
    ("values", "state", "since", "note"),
    [
        ([0.2, 0.3], "outside", 0, "since the first epoch"),
        ([0.9, 0.8, 0.3, 0.2], "outside", 2, "since epoch 2; 0.80 inside in epoch 1"),
        ([0.2, 0.9, 0.3], "outside", 2, "since epoch 2; 0.90 inside in epoch 1"),
        ([0.2, 0.5], "partly", 1, "since epoch 1"),
        ([0.2, 0.8], "inside", 1, "since epoch 1"),
        ([0.2, 0.3, None], "outside", 0, "since the first epoch; last scored in epoch 1 of 2"),
        ([0.4], "outside", 0, "in epoch 0"),
        ([None, None], "unscored", None, "no present case with its organs, or no organ table"),
    ],
)
def test_states_and_since_when(values, state, since, note):
    found = judged(label=values)["label"]
    assert (found.state, found.since, found.note) == (state, since, note)
    assert found.auroc == 0.7


def test_the_worst_come_first_and_free_labels_are_not_judged():
    series = curves(a=[0.9], b=[0.3], c=[0.1], d=[0.6], e=[0.1], f=[None])
    found = verdicts(series, list("abcdef"), "val", "hirescam", free=["e"])
    assert [v.label for v in found] == ["c", "b", "d", "a", "e", "f"]
    assert [v.state for v in found] == ["outside", "outside", "partly", "inside", "free", "unscored"]
    assert found[4].words == "may be read anywhere"


def test_headlines():
    def said(**series):
        return headline(list(judged(**series).values())).replace("\u00a0", " ")

    assert said(a=[0.9, 0.2], b=[0.9, 0.9]) == "1 of 2 labels looks mostly outside the organs: a since epoch 1."
    assert said(a=[0.1], b=[0.2]) == "Both labels look mostly outside the organs: a in epoch 0, b in epoch 0."
    assert said(a=[0.1], b=[0.2], c=[0.3], d=[0.4]).endswith(
        "All 4 labels look mostly outside the organs, worst a and b."
    )
    assert said(a=[0.9], b=[0.6]) == "No label looks mostly outside its organs; 1 of 2 partly."
    assert said(a=[0.9]) == "The label looks inside its organs."
    assert said(a=[None]) == "No label could be compared with an organ yet."


def test_a_repeated_epoch_counts_once_with_its_last_value():
    rows = [Score(0, step, "val", "cam", "a", "energy_inside", value) for step, value in ((1, 0.1), (2, 0.9))]
    assert Curves(rows).points("val", "cam", "energy_inside", "a") == {0: 0.9}


def test_heat_has_the_newest_scores_and_shades_by_what_is_bad():
    rows = [
        Score(0, 0, "val", "cam", "a", "energy_inside", 0.9),
        Score(1, 1, "val", "cam", "a", "energy_inside", 0.1),
        Score(1, 1, "val", "cam", "a", "empty_map_rate", 0.9),
        Score(1, 1, "val", "cam", "a", "bias_share", -0.5),
        Score(1, 1, "val", "", "a", "auroc", 0.5),
        Score(1, 1, "val", "cam", "mean", "organ_iou_micro", 0.5),
        Score(1, 1, "val", "other", "a", "mask_iou", 0.5),
    ]
    found = Curves(rows)
    assert found.measures("val", "cam") == ["energy_inside", "auroc", "empty_map_rate", "bias_share"]
    ((label, cells),) = heat_rows(found, ["a"], "val", "cam")
    assert label == "a"
    assert [(cell.text, cell.shade) for cell in cells] == [("0.10", 4), ("0.50", 4), ("0.90", 4), ("−0.50", None)]
    assert [c.text for c in heat_rows(found, ["b"], "val", "cam")[0][1]] == ["–"] * 4


def test_differences_are_signed_by_what_is_better():
    def run(inside, empty):
        named = {"energy_inside": inside, "empty_map_rate": empty}
        return Curves([Score(0, 0, "val", "cam", label, m, v[label]) for m, v in named.items() for label in v])

    first = run({"a": 0.5, "b": 0.2, "c": 0.5}, {"a": 0.1, "b": 0.1, "c": 0.1})
    second = run({"a": 0.5, "b": 0.9, "c": 0.3}, {"a": 0.5, "b": 0.1, "c": 0.1})
    measures, rows = differences(first, second, ["a", "b", "c"], "val", ("cam", "cam"))
    assert measures == ["energy_inside", "empty_map_rate"]
    assert [label for label, _ in rows] == ["b", "c", "a", "mean"]
    texts = {label: [(d.text, d.shade) for _, _, d in cells] for label, cells in rows}
    assert texts["b"] == [("+0.70", 0), ("+0.00", None)]
    assert texts["c"] == [("−0.20", 4), ("+0.00", None)]
    assert texts["a"] == [("+0.00", None), ("+0.40", 4)]
    assert texts["mean"] == [("–", None)] * 2


def test_curves_of_long_runs_are_thinned_and_keep_the_last_epoch():
    rows = [Score(e, e, "val", "cam", "a", "energy_inside", 0.5) for e in range(1001)]
    shown = Curves(rows).for_script()["val"]
    assert len(shown["epochs"]) <= 200
    assert shown["epochs"][-1] == 1000
    assert len(shown["data"]["cam"]["energy_inside"]["a"]) == len(shown["epochs"])


def test_a_sparkline_needs_two_points():
    assert sparkline({0: 0.5}) == ""
    assert sparkline({0: 0.0, 1: 1.0}).count("polyline") == 1
