"""OrganIoU against the authors' loop: 53 thresholds, each compared on its own."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from camtrain import InputError
from camtrain.metrics import DEFAULT_THRESHOLD, THRESHOLDS, OrganIoU, organ_iou

AUTHORS = [0.004, 0.008, 0.012, 0.016] + [0.02 * n for n in range(1, 50)]


def _score(volume, allowed, threshold, authors):
    """One pair, as published: clip, shift, divide, threshold, count."""
    volume = np.maximum(volume, 0)
    volume = volume - volume.min()
    if volume.max() > 0:
        volume = volume / volume.max()
    attended = volume > volume.dtype.type(threshold)
    inside, outside = (attended & allowed).sum(), (attended & ~allowed).sum()
    if authors:
        return inside / (inside + outside) if inside != 0 and outside != 0 else 0.0
    return inside / (inside + outside) if inside + outside else np.nan


def _swept(reference, case, authors):
    """(53, B, L), then the first best threshold of each label."""
    table = np.stack([reference(lambda m, a, t=t: _score(m, a, t, authors), *case)[0] for t in THRESHOLDS])
    best = []
    for k in range(table.shape[2]):
        column = table[:, :, k]
        known = ~np.isnan(column[0])
        best.append(int(np.argmax(column[:, known].mean(axis=1).round(13))) if known.any() else THRESHOLDS.index(0.5))
    return table, np.array(best)


def test_thresholds_are_the_authors():
    assert len(THRESHOLDS) == 53
    np.testing.assert_allclose(THRESHOLDS, AUTHORS, atol=1e-12)
    assert DEFAULT_THRESHOLD in THRESHOLDS


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("size", [(11,), (5, 4), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweep_equals_one_comparison_per_threshold(make_case, reference, authors, size, dtype):
    case = make_case(size=size, dtype=dtype, seed=len(size))
    table, best = _swept(reference, case, authors)
    metric = OrganIoU(7, "none", authors_edge_case=authors)
    metric.update(*case)
    chosen = table[best, :, np.arange(7)].T
    with np.errstate(all="ignore"):
        expected = np.array([c[~np.isnan(c)].mean() if (~np.isnan(c)).any() else np.nan for c in chosen.T])
    np.testing.assert_allclose(metric.compute(), expected, atol=1e-12)
    np.testing.assert_array_equal(metric.best_thresholds(), np.array(THRESHOLDS)[best])
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(chosen), atol=1e-12)
    np.testing.assert_allclose(organ_iou(*case, authors_edge_case=authors), chosen, atol=1e-12)


def test_comparison_is_strict_at_every_threshold():
    # Heights that sit exactly on the thresholds: a cell on a threshold is not above it.
    heights = torch.tensor([*THRESHOLDS, 1.0], dtype=torch.float64).reshape(1, 1, -1)
    allowed = torch.zeros(1, 1, 54, dtype=torch.bool)
    allowed[..., 20] = True
    heights[..., 0] = 0.0  # a minimum of 0, else everything is shifted
    allowed[..., -1] = True
    metric = OrganIoU(1)
    metric.update(heights, allowed, torch.ones(1, 1))
    above = [sum(h > t for h in heights.flatten().tolist()) for t in THRESHOLDS]
    inside = [sum(h > t for h in (THRESHOLDS[20], 1.0)) for t in THRESHOLDS]
    np.testing.assert_allclose(metric.organ_iou[0], np.array(inside) / np.array(above), atol=1e-15)


def test_frozen_thresholds_score_test_data(make_case, reference):
    validation, test = make_case(seed=1), make_case(seed=2)
    swept = OrganIoU(7)
    swept.update(*validation)
    frozen = swept.best_thresholds()
    metric = OrganIoU(7, "none", thresholds=frozen)
    metric.update(*test)
    expected = np.full((5, 7), np.nan)
    for k, threshold in enumerate(frozen.tolist()):
        expected[:, k] = reference(lambda m, a, t=threshold: _score(m, a, t, False), *test)[0][:, k]
    np.testing.assert_allclose(organ_iou(*test, thresholds=frozen), expected, atol=1e-12)
    np.testing.assert_allclose(metric.averaged("micro"), np.nanmean(expected), atol=1e-12)
    torch.testing.assert_close(metric.best_thresholds(), frozen)
    # Freezing what the sweep found gives the sweep's own score back.
    again = OrganIoU(7, "none", thresholds=frozen)
    again.update(*validation)
    torch.testing.assert_close(again.averaged("none"), swept.averaged("none"), equal_nan=True)


def test_all_attention_inside_is_one_and_the_authors_zero():
    maps, allowed = torch.tensor([[[5.0, 0.0, -1.0]]]), torch.tensor([[[True, True, False]]])
    assert organ_iou(maps, allowed, torch.ones(1, 1)).item() == 1
    assert organ_iou(maps, allowed, torch.ones(1, 1), authors_edge_case=True).item() == 0


def test_empty_maps_are_undefined_and_the_authors_zero():
    maps = torch.stack([torch.zeros(2, 3), -torch.rand(2, 3), torch.full((2, 3), 2.0)])[:, None]
    allowed = torch.tensor([[True, False, False]] * 2).expand(3, 1, 2, 3)
    ours, theirs = OrganIoU(1), OrganIoU(1, authors_edge_case=True)
    for metric in (ours, theirs):
        metric.update(maps, allowed, torch.ones(3, 1))
    assert ours.compute().isnan()
    assert ours.undefined_rate() == 1
    assert theirs.compute() == 0
    assert theirs.undefined_rate() == 0


def test_label_without_pairs_gets_the_documented_threshold():
    metric = OrganIoU(2, "none")
    metric.update(torch.rand(1, 2, 5), torch.ones(1, 2, 5, dtype=torch.bool), torch.tensor([[1.0, 0.0]]))
    assert metric.best_thresholds().tolist() == [0.004, 0.5]
    assert metric.compute()[1].isnan()


def test_big_grids_are_taken_in_parts(make_case, monkeypatch):
    case = make_case()
    whole = organ_iou(*case)
    # The package shows the function under the file's name, so the module itself is fetched by import.
    monkeypatch.setattr(importlib.import_module("camtrain.metrics.organ_iou"), "_CELLS", 150)
    torch.testing.assert_close(organ_iou(*case), whole, equal_nan=True)


LABELS = ("a", "b", "c", "d", "e", "f", "g")


def test_thresholds_by_name_follow_their_labels_into_another_order(make_case):
    validation, test = make_case(seed=1), make_case(seed=2)
    swept = OrganIoU(7, labels=LABELS)
    swept.update(*validation)
    named = swept.named_thresholds()
    assert named == swept.named_thresholds(list(LABELS))
    assert list(named) == list(LABELS)
    assert list(named.values()) == swept.best_thresholds().tolist()
    assert len(set(named.values())) > 2
    order = [4, 6, 0, 2, 5, 1, 3]
    moved = type(test)(*(t[:, order] for t in test))
    names = [LABELS[at] for at in order]
    metric = OrganIoU(7, "none", thresholds=named, labels=names)
    metric.update(*moved)
    expected = organ_iou(*test, thresholds=swept.best_thresholds())[:, order]
    torch.testing.assert_close(organ_iou(*moved, thresholds=named, labels=names), expected, equal_nan=True)
    torch.testing.assert_close(metric.averaged("micro"), expected.nanmean())
    assert metric.named_thresholds() == named
    assert list(metric.named_thresholds()) == names


@pytest.mark.parametrize(
    ("thresholds", "labels", "says"),
    [
        ({"a": 0.1, "b": 0.2}, None, "need labels="),
        ({"a": 0.1}, ["a", "b"], "frozen for other labels, no threshold for 'b': freeze the named_thresholds()"),
        ({"a": 0.1, "b": 0.2, "c": 0.3}, ["a", "b"], "frozen for other labels, unknown 'c'"),
        (
            {"nodul": 0.1, "mass": 0.2},
            ["mass", "nodule"],
            "no threshold for 'nodule'; unknown 'nodul'; nearest: nodule:",
        ),
        ({"a": 0.1, "b": 1.5}, ["a", "b"], "in [0, 1), got [0.1, 1.5]"),
        (0.5, ["a", "a"], "2 different names"),
        (None, ["a", "b", "c"], "2 different names"),
        (None, "ab", "2 different names"),
    ],
)
def test_thresholds_of_other_labels_are_refused(thresholds, labels, says):
    with pytest.raises(InputError) as error:
        OrganIoU(2, thresholds=thresholds, labels=labels)
    assert says in str(error.value)
    pairs = torch.rand(1, 2, 4), torch.ones(1, 2, 4, dtype=torch.bool), torch.ones(1, 2)
    with pytest.raises(InputError) as error:
        organ_iou(*pairs, thresholds=thresholds, labels=labels)
    assert says in str(error.value)


def test_thresholds_cannot_be_named_without_names():
    with pytest.raises(InputError, match="pass labels="):
        OrganIoU(2).named_thresholds()
    with pytest.raises(InputError, match="2 different names"):
        OrganIoU(2, labels=["a", "b"]).named_thresholds(["a"])


@pytest.mark.parametrize(
    ("thresholds", "says"),
    [
        ([0.1, 0.2], "each of the 3 labels, got shape (2,)"),
        (1.0, "in [0, 1), got [1.0"),
        ([0.1, float("nan"), 0], "in [0, 1)"),
    ],
)
def test_wrong_thresholds_are_refused(thresholds, says):
    with pytest.raises(InputError) as error:
        OrganIoU(3, thresholds=thresholds)
    assert says in str(error.value)
