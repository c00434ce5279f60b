"""OcclusionCorrelation against scipy, and what counts."""

from __future__ import annotations

import pickle

import pytest
import torch
from scipy.stats import spearmanr

from camtrain import InputError
from camtrain.metrics import OcclusionCorrelation, occlusion_correlation


def case(batch=5, labels=3, size=(4, 3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that ranks tie.
    maps = torch.randint(-3, 4, (batch, labels, *size), generator=generator).float()
    falls = maps + torch.randn(batch, labels, *size, generator=generator)
    label = (torch.rand(batch, labels, generator=generator) < 0.6).float()
    label[0, 0] = torch.nan
    return maps, falls, label


def test_against_scipy():
    maps, falls, label = case()
    found = occlusion_correlation(maps, falls, label)
    for b in range(5):
        for k in range(3):
            if label[b, k] == 1:
                expected = spearmanr(maps[b, k].flatten(), falls[b, k].flatten()).statistic
                assert found[b, k].item() == pytest.approx(expected, abs=1e-12)
            else:
                assert found[b, k].isnan()


def test_all_maps_count_without_labels():
    maps, falls, _ = case()
    assert not occlusion_correlation(maps, falls).isnan().any()


@pytest.mark.parametrize("average", ["none", "macro", "micro"])
def test_class_and_twin_agree_over_batches(average):
    metric = OcclusionCorrelation(3, average)
    batches = [case(batch=b, seed=b) for b in (2, 4, 5)]
    for batch in batches:
        metric.update(*batch)
    table = torch.cat([occlusion_correlation(*batch) for batch in batches])
    per_label = table.nanmean(dim=0)
    expected = {"none": per_label, "macro": per_label.nanmean(), "micro": table.nanmean()}[average]
    torch.testing.assert_close(metric.compute(), expected)
    again = pickle.loads(pickle.dumps(metric))  # noqa: S301 - our own
    torch.testing.assert_close(again.compute(), expected)


def test_constant_and_broken_maps_are_undefined_and_uncomputed_ones_do_not_count():
    maps, falls, label = case(labels=4)
    label[:] = 1
    maps[:, 0] = 2.0
    maps[:, 1] = torch.nan
    maps[:, 2, 0, 0, 0] = torch.inf
    falls[1:, 3] = 0.0
    metric = OcclusionCorrelation(4, "none")
    metric.update(maps, falls, label)
    assert metric.pairs.tolist() == [5, 0, 5, 5]
    assert metric.undefined_rate().tolist()[0] == 1
    assert metric.undefined_rate().tolist()[2:] == [1, 0.8]
    assert metric.compute().isnan().tolist() == [True, True, True, False]


def test_only_the_order_counts():
    maps, falls, _ = case()
    found = occlusion_correlation(maps, falls)
    torch.testing.assert_close(occlusion_correlation(7 * maps + 1, falls.exp()), found)
    torch.testing.assert_close(occlusion_correlation(-maps, falls), -found)


@pytest.mark.parametrize(
    ("maps", "falls", "label", "says"),
    [
        (torch.rand(2, 3, 4), torch.rand(2, 3, 5), None, "of one shape"),
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int), None, "floating point"),
        (torch.rand(2, 3), torch.rand(2, 3), None, "of one shape"),
        (torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.ones(2), r"\(2, 3\), got \(2,\)"),
    ],
)
def test_bad_input(maps, falls, label, says):
    with pytest.raises(InputError, match=says):
        OcclusionCorrelation(3).update(maps, falls, label)
    with pytest.raises(InputError, match="made for 2 labels, got 3"):
        OcclusionCorrelation(2).update(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.ones(2, 3))
