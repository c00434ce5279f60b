"""MaskIoU against numpy's mean, std and percentile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from camtrain import InputError
from camtrain.metrics import MaskIoU, mask_iou


def _score(volume, allowed, threshold, k, percentile):
    volume = volume.astype(np.float64)
    if volume.max() <= 0 or volume.max() == volume.min():
        return np.nan
    if threshold == "mean_std":
        level = volume.mean() + k * volume.std()
    elif threshold == "percentile":
        level = np.percentile(volume, percentile)
    else:
        level = threshold * volume.max()
    attended = {i for i, value in enumerate(volume.flatten()) if value > level}
    region = {i for i, value in enumerate(allowed.flatten()) if value}
    return len(attended & region) / len(attended | region) if attended else np.nan


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"threshold": "mean_std", "k": 0.3},
        {"threshold": "mean_std", "k": 2.7},
        {"threshold": "percentile"},
        {"threshold": "percentile", "percentile": 33.0},
        {"threshold": "percentile", "percentile": 0},
        {"threshold": 0.15},
        {"threshold": 0},
    ],
)
def test_equals_numpy(make_case, reference, size, dtype, rule):
    case = make_case(size=size, dtype=dtype)
    full = {"threshold": "mean_std", "k": 1.0, "percentile": 95.0} | rule
    expected, counted = reference(lambda m, a: _score(m, a, **full), *case)
    np.testing.assert_allclose(mask_iou(*case, **rule), expected, atol=1e-12)
    metric = MaskIoU(7, "micro", **rule)
    metric.update(*case)
    known = expected[~np.isnan(expected)]
    np.testing.assert_allclose(metric.compute(), known.mean() if len(known) else np.nan, atol=1e-12)
    assert metric.undefined_rate().item() == pytest.approx(np.isnan(expected[counted]).mean())


def test_perfect_mask_is_one_and_a_constant_map_undefined():
    allowed = torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    allowed[..., 1:3] = True
    assert mask_iou(allowed.float(), allowed, torch.ones(1, 1)).item() == 1
    constant = torch.full((1, 1, 4, 5), 0.1, dtype=torch.float64)
    assert mask_iou(constant, allowed, torch.ones(1, 1)).isnan().all()
    assert mask_iou(constant, allowed, torch.ones(1, 1), threshold=0.5).isnan().all()


def test_charges_for_organ_that_is_not_attended():
    maps, allowed = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), torch.tensor([[[True, True, True, True]]])
    assert mask_iou(maps, allowed, torch.ones(1, 1), threshold=0.5).item() == 0.25


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"threshold": "mean-std"}, "nearest: mean_std"),
        ({"threshold": 1.5}, r"\[0, 1\).*got 1.5"),
        ({"k": float("inf")}, "finite k"),
        ({"threshold": "percentile", "percentile": 100}, r"\[0, 100\), got 100"),
    ],
)
def test_wrong_rules_are_refused(rule, says):
    with pytest.raises(InputError, match=says):
        MaskIoU(2, **rule)
