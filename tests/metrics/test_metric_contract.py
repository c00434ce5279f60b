"""What all scores promise alike: the classes agree with their twins, and behave as torchmetrics' users expect."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from camtrain import InputError
from camtrain._grid import to_grid
from camtrain.metrics import (
    EmptyMapRate,
    EnergyInside,
    LabelAUROC,
    MaskIoU,
    OrganIoU,
    PointingGame,
    RelevanceRank,
    empty_map_rate,
    energy_inside,
    mask_iou,
    organ_iou,
    pointing_game,
    relevance_rank,
)

# class, twin, settings: sweeping thresholds is left to its own tests, since it mixes batches.
SCORES = {
    "organ_iou": (OrganIoU, organ_iou, {"thresholds": 0.3}),
    "organ_iou_authors": (OrganIoU, organ_iou, {"thresholds": 0.3, "authors_edge_case": True}),
    "energy_inside": (EnergyInside, energy_inside, {}),
    "pointing_game": (PointingGame, pointing_game, {}),
    "pointing_game_near": (PointingGame, pointing_game, {"tolerance": 1.5}),
    "mask_iou": (MaskIoU, mask_iou, {}),
    "mask_iou_percentile": (MaskIoU, mask_iou, {"threshold": "percentile", "percentile": 80}),
    "relevance_rank": (RelevanceRank, relevance_rank, {}),
    "empty_map_rate": (EmptyMapRate, empty_map_rate, {}),
}
every_score = pytest.mark.parametrize("name", SCORES)


def _metric(name, average="macro", labels=7):
    kind, _, options = SCORES[name]
    return kind(labels, average, **options)


def _twin(name, *case):
    _, function, options = SCORES[name]
    return function(*case, **options)


@every_score
def test_averages_of_the_twin_over_batches(make_case, name):
    metric = _metric(name)
    cases = [make_case(batch=b, seed=b) for b in (3, 4, 6)]
    for case in cases:
        metric.update(*case)
    table = torch.cat([_twin(name, *case) for case in cases]).numpy()
    per_label = np.array([c[~np.isnan(c)].mean() if (~np.isnan(c)).any() else np.nan for c in table.T])
    assert np.isnan(per_label[-1])
    np.testing.assert_allclose(metric.averaged("none"), per_label, atol=1e-12)
    np.testing.assert_allclose(metric.compute(), np.nanmean(per_label), atol=1e-12)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(table), atol=1e-12)
    for average in ("none", "macro", "micro"):
        fresh = _metric(name, average)
        for case in cases:
            fresh.update(*case)
        torch.testing.assert_close(fresh.compute(), metric.averaged(average), equal_nan=True)


@every_score
def test_undefined_and_counted_pairs_are_told(make_case, reference, name):
    case = make_case()
    counted = reference(lambda m, a: 0.0, *case)[1]
    table = _twin(name, *case).numpy()
    assert np.isnan(table[~counted]).all()
    lost = (np.isnan(table) & counted).sum(0)
    metric = _metric(name, "none")
    metric.update(*case)
    assert metric.pairs.tolist() == counted.sum(0).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(metric.undefined_rate(), lost / counted.sum(0))
    assert metric.undefined_rate("micro").item() == pytest.approx(lost.sum() / counted.sum())
    assert metric.undefined_rate("macro").item() == pytest.approx(np.nanmean(metric.undefined_rate().numpy()))


@every_score
def test_cases_without_organs_do_not_count(make_case, name):
    case = make_case()
    segmented = torch.tensor([True, False, True, False, True])
    table = _twin(name, *case, segmented)
    assert table[~segmented].isnan().all()
    torch.testing.assert_close(table[segmented], _twin(name, *case)[segmented], equal_nan=True)
    metric = _metric(name)
    metric.update(*case, has_organs=segmented)
    torch.testing.assert_close(metric.averaged("micro"), table.nanmean())


@every_score
@pytest.mark.parametrize("fine", [(8, 9, 7), (2, 3, 5)])
def test_regions_of_another_resolution_go_to_the_grid_of_the_maps(make_case, name, fine):
    case = make_case()
    allowed = torch.rand(5, 7, *fine, generator=torch.Generator().manual_seed(0)) < 0.2
    allowed[1, 2] = False
    expected = _twin(name, case.maps, to_grid(allowed, (4, 3, 6)), case.label)
    torch.testing.assert_close(_twin(name, case.maps, allowed, case.label), expected, equal_nan=True)


@every_score
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_scored_in_float32(make_case, name, dtype):
    case = make_case(dtype=dtype)
    expected = _twin(name, case.maps.float(), case.allowed, case.label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = _twin(name, *case)
        metric = _metric(name)
        metric.update(*case)
    torch.testing.assert_close(scores, expected, equal_nan=True)
    torch.testing.assert_close(metric.averaged("micro"), expected.nanmean())


@every_score
def test_nothing_to_count_is_no_score(make_case, name):
    case = make_case()
    metric = _metric(name)
    metric.update(case.maps, case.allowed, torch.zeros(5, 7))
    metric.update(case.maps, torch.zeros_like(case.allowed), torch.ones(5, 7))
    metric.update(torch.full_like(case.maps, torch.nan), case.allowed, torch.ones(5, 7))
    metric.update(case.maps[:0], case.allowed[:0], torch.ones(0, 7))
    assert metric.compute().isnan()
    assert metric.undefined_rate().isnan()
    assert metric.pairs.tolist() == [0] * 7
    metric.update(*case)
    torch.testing.assert_close(metric.averaged("micro"), _twin(name, *case).nanmean())


@every_score
def test_gradients_and_inputs_are_left_alone(make_case, name):
    case = make_case()
    maps = case.maps.clone().requires_grad_()
    before = [t.clone() for t in case]
    assert not _twin(name, maps, case.allowed, case.label).requires_grad
    _metric(name).update(maps, case.allowed, case.label)
    for now, then in zip(case, before, strict=True):
        torch.testing.assert_close(now, then, equal_nan=True)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(list(SCORES)), seed=st.integers(0, 10_000), power=st.integers(-20, 20))
def test_a_positive_factor_changes_nothing(name, seed, power):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 2, 4, 5, generator=generator)
    allowed = torch.rand(3, 2, 4, 5, generator=generator) < 0.5
    scores = _twin(name, maps, allowed, torch.ones(3, 2))
    torch.testing.assert_close(_twin(name, maps * 2.0**power, allowed, torch.ones(3, 2)), scores, equal_nan=True)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(list(SCORES)), seed=st.integers(0, 10_000))
def test_order_of_labels_cases_and_directions_do_not_matter(name, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, 2, 5, generator=generator)
    allowed = torch.rand(3, 4, 2, 5, generator=generator) < 0.5
    label = (torch.rand(3, 4, generator=generator) < 0.7).float()
    scores = _twin(name, maps, allowed, label)
    labels, cases = torch.randperm(4, generator=generator), torch.randperm(3, generator=generator)
    moved = _twin(name, *(t[cases][:, labels] for t in (maps, allowed, label)))
    torch.testing.assert_close(moved, scores[cases][:, labels], equal_nan=True)
    flipped = _twin(name, maps.flip(2, 3), allowed.flip(2, 3), label)
    torch.testing.assert_close(flipped, scores, equal_nan=True)


@every_score
def test_torchmetrics_habits(make_case, name):
    first, second = make_case(seed=3), make_case(seed=4)
    metric = _metric(name, "none")
    assert not metric.state_dict()
    assert (metric.is_differentiable, metric.full_state_update) == (False, False)
    assert isinstance(metric.higher_is_better, bool)
    on_batch = metric(*first)  # forward: the value of this batch, and the batch added
    alone = _metric(name, "none")
    alone.update(*first)
    torch.testing.assert_close(on_batch, alone.compute(), equal_nan=True)
    metric(*second)
    alone.update(*second)
    torch.testing.assert_close(metric.compute(), alone.compute(), equal_nan=True)
    copies = metric.clone(), pickle.loads(pickle.dumps(metric))  # noqa: S301 - our own bytes
    for copy in copies:
        torch.testing.assert_close(copy.compute(), metric.compute(), equal_nan=True)
        copy.reset()
        copy.update(*first)
        torch.testing.assert_close(copy.compute(), on_batch, equal_nan=True)
    assert hash(metric) != hash(copies[0])


@every_score
def test_inference_mode_before_and_after(make_case, name):
    case = make_case()
    metric = _metric(name)
    metric.update(*case)
    expected = metric.compute()
    with torch.inference_mode():
        metric.reset()
        metric.update(*make_case())
        torch.testing.assert_close(metric.compute(), expected)
        metric.reset()
    metric.update(*case)
    torch.testing.assert_close(metric.compute(), expected)


@every_score
def test_machines_without_float64_sum_in_float32(make_case, name, monkeypatch):
    case = make_case()
    expected = _twin(name, *case)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    metric = _metric(name)
    metric.update(*case)
    answers = [metric.averaged("micro"), metric.undefined_rate(), _twin(name, *case), *metric.metric_state.values()]
    assert torch.float64 not in {answer.dtype for answer in answers}
    torch.testing.assert_close(answers[0].double(), expected.nanmean(), atol=1e-6, rtol=0)


def test_collection_keeps_scores_apart_after_a_batch_without_pairs(make_case):
    case = make_case()
    scores = {name: _metric(name) for name in SCORES}
    scores |= {"sweep": OrganIoU(7), "frozen": OrganIoU(7, thresholds=0.9), "share": MaskIoU(7, threshold=0.5)}
    collection = MetricCollection({k: v.clone() for k, v in scores.items()})
    for metric in (collection, *scores.values()):
        metric.update(case.maps, case.allowed, torch.zeros(5, 7))
        metric.update(*case)
    together = collection.compute()
    for name, metric in scores.items():
        torch.testing.assert_close(together[name], metric.compute(), msg=name)


@every_score
def test_groups_of_labels(make_case, name):
    cases = [make_case(seed=3), make_case(seed=4)]
    metric = _metric(name)
    for case in cases:
        metric.update(*case)
    table = torch.cat([_twin(name, *case) for case in cases])
    groups = {"one": [2], "some": (5, 0, 3), "shared": range(4), "never present": [6]}
    for average in ("micro", "macro", "none"):
        found = metric.grouped(groups, average)
        assert list(found) == list(groups)
        for group, columns in groups.items():
            part = table[:, list(columns)]
            means = part.nanmean(dim=0)
            expected = {"micro": part.nanmean(), "macro": means.nanmean(), "none": means}[average]
            torch.testing.assert_close(found[group], expected, equal_nan=True, msg=f"{group}, {average}")
    torch.testing.assert_close(metric.grouped(groups), metric.grouped(groups, "micro"), equal_nan=True)
    torch.testing.assert_close(metric.grouped({"all": range(7)}, "macro")["all"], metric.averaged("macro"))
    assert metric.grouped({}) == {}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ([], "group 'lungs' has no labels"),
        ([1, 7], r"group 'lungs' names column 7, expected integers in 0\.\.6"),
        ([-1], "names column -1"),
        ([True], "names column True"),
        (["nodule"], "names column 'nodule'"),
        ([2, 3, 2], "names a column twice"),
    ],
)
def test_wrong_groups_are_refused(columns, says):
    with pytest.raises(InputError, match=says):
        EnergyInside(7).grouped({"heart": [0], "lungs": columns})
    with pytest.raises(InputError, match="nearest: macro"):
        EnergyInside(7).grouped({"heart": [0]}, "marco")


def test_one_label_keeps_its_axis_where_asked(make_case):
    case = make_case(labels=1, awkward=False)
    metric = EnergyInside(1, "none")
    metric.update(*case)
    assert metric.compute().shape == ()
    assert metric.averaged("none").shape == (1,)


def test_integer_and_bool_labels_are_understood(make_case):
    case = make_case(awkward=False)
    expected = energy_inside(*case)
    for kind in (torch.long, torch.bool):
        torch.testing.assert_close(
            energy_inside(case.maps, case.allowed, case.label.to(kind)), expected, equal_nan=True
        )


def _wrong(**change):
    good = {
        "maps": torch.rand(2, 3, 4, 5),
        "allowed": torch.ones(2, 3, 4, 5, dtype=torch.bool),
        "label": torch.ones(2, 3),
    }
    return good | change


@every_score
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"maps": torch.rand(2, 3)}, r"maps of shape \(B, L, \*S\)"),
        ({"maps": torch.ones(2, 3, 4, 5, dtype=torch.long)}, "floating point"),
        ({"maps": torch.rand(2, 3, 0, 5)}, "at least one cell"),
        ({"allowed": torch.ones(2, 3, 4, 5)}, "allowed as bool"),
        ({"allowed": torch.ones(2, 1, 4, 5, dtype=torch.bool)}, r"rank of maps \(2, 3, 4, 5\), got \(2, 1, 4, 5\)"),
        ({"label": torch.ones(2)}, r"\(2, 3\), got \(2,\)"),
        ({"label": torch.full((2, 3), 0.25)}, "got 0.25"),
        ({"has_organs": torch.ones(3)}, r"has_organs of shape \(B,\) = \(2,\), got \(3,\)"),
    ],
)
def test_wrong_input_is_refused(name, change, says):
    with pytest.raises(InputError, match=says):
        _metric(name, labels=3).update(**_wrong(**change))


@every_score
def test_wrong_number_of_labels_or_averaging_is_refused(name):
    with pytest.raises(InputError, match="made for 7 labels, got 3"):
        _metric(name).update(**_wrong())
    with pytest.raises(InputError, match="nearest: macro"):
        _metric(name, "marco")
    with pytest.raises(InputError, match="positive integer, got 0"):
        _metric(name, labels=0)


def test_number_of_labels_of_the_auroc_is_checked():
    with pytest.raises(InputError, match="positive integer"):
        LabelAUROC(0)
