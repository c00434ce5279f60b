from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.evaluation import Evaluation, rank_layers
from camtrain.reporting.evaluation_rows import ScoreRow


def evaluation(scores, method="gradcam", split="val"):
    """An evaluation that holds macro means only: (layer, measure) -> mean."""
    rows = [
        ScoreRow(split, method, layer, "macro", measure, 4, mean, None, None, 0.0, "cases")
        for (layer, measure), mean in scores.items()
    ]
    return Evaluation(rows, {}, ["a"], [], {}, {}, {}, [])


def table(drop, iou, blind):
    layers = ["early", "middle", "late"]
    return evaluation(
        {(layer, m): value for m, values in (("average_drop", drop), ("mask_iou", iou), ("class_sensitivity", blind))
         for layer, value in zip(layers, values, strict=True)}
    )  # fmt: skip


def said(rows):
    return {row.layer: (row.rank, row.taken) for row in rows}


def test_mean_of_ranks_lower_drop_higher_iou_lower_sensitivity():
    found = said(rank_layers(table([0.5, 0.2, 0.1], [0.3, 0.4, 0.2], [0.5, 0.1, 0.2])))
    # Ranks: drop 3 2 1, IoU 2 1 3, sensitivity 3 1 2.
    assert found == {"early": (8 / 3, False), "middle": (4 / 3, True), "late": (2.0, False)}


def test_blind_layers_are_not_taken_however_good():
    rows = rank_layers(table([0.0, 0.2, 0.3], [0.9, 0.4, 0.2], [0.9, 0.1, 0.2]))
    assert said(rows) == {"early": (None, False), "middle": (1.0, True), "late": (2.0, False)}
    assert [row.blind for row in rows] == [True, False, False]
    assert not any(row.taken for row in rank_layers(table([0, 0, 0], [1, 1, 1], [1, 0.95, 0.9])))


def test_ties_share_ranks_and_the_smaller_seen_share_wins():
    same = table([0.2] * 3, [0.4] * 3, [0.1] * 3)
    rows = rank_layers(same, seen={"early": 0.4, "middle": 0.1, "late": 1.0})
    assert said(rows) == {"early": (2.0, False), "middle": (2.0, True), "late": (2.0, False)}
    assert [row.seen for row in rows] == [0.4, 0.1, 1.0]
    assert said(rank_layers(same))["early"] == (2.0, True), "without shares the first"


def test_undefined_ranks_last_and_is_not_blind():
    found = said(rank_layers(table([None, 0.9, 0.8], [0.3, 0.4, 0.5], [None, 0.1, 0.2])))
    assert found == {"early": (3.0, False), "middle": (5 / 3, False), "late": (4 / 3, True)}


def test_method_measures_and_split_are_chosen():
    scores = {("one", "average_drop"): 0.1, ("two", "average_drop"): 0.2}
    both = evaluation(scores)
    other = evaluation({k: 1 - v for k, v in scores.items()}, method="relevancecam")
    joined = Evaluation([*both.rows, *other.rows], {}, ["a"], [], {}, {}, {}, [])
    assert said(rank_layers(joined, "gradcam", ["average_drop"], split="val"))["one"] == (1.0, True)
    assert said(rank_layers(joined, "relevancecam", ["average_drop"]))["two"] == (1.0, True)
    with pytest.raises(ct.InputError, match="rows fit"):
        rank_layers(joined, measures=["average_drop"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"measures": ["iou"]}, "'iou'"),
        ({"measures": ["bias_share"]}, "better end"),
        ({"measures": []}, "measures= is empty"),
        ({"method": "hirescam"}, "no layer of hirescam"),
        ({"measures": ["insertion_auc"]}, "no row of 'insertion_auc'"),
        ({"split": "test"}, "no row"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ct.InputError, match=words):
        rank_layers(table([0.1] * 3, [0.1] * 3, [0.1] * 3), **arguments)


def test_on_a_real_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(5 * 6 * 4, 3)),
    )
    batch = {"image": torch.rand(5, 1, 12, 8), "label": torch.ones(5, 3), "organs": torch.randint(0, 3, (5, 1, 12, 8))}
    organs = {"organs": {"x": 1, "y": 2}, "labels": {"a": ["x"], "b": ["y"], "c": ["x", "y"]}}
    measures = ["mask_iou", "class_sensitivity"]
    found = ct.evaluate(model, [batch], organs, ["hirescam"], ["1", "4"], measures=measures, repeats=20, progress=False)
    rows = rank_layers(found, measures=measures)
    assert [row.layer for row in rows] == ["1", "4"]
    for row in rows:
        for measure in measures:
            assert row.scores[measure] == found.row(measure, layer=row.layer).mean
    assert sum(row.taken for row in rows) == 1
