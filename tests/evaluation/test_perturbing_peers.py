"""The same numbers as torchcam's metrics where the definitions agree, and where they part.

They agree on baseline 0, maps of the image's size without ties, and steps that divide the voxels. torchcam stretches a
map before it enlarges it, adds 1e-7 to the probability that it divides by, scores however small that is, and breaks
ties by the order of the voxels.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from camtrain.evaluation.perturbing import masked_probabilities, perturbation_curves
from camtrain.evaluation.predicting import logits_of
from camtrain.metrics import AverageDrop, AverageIncrease, DeletionAUC, InsertionAUC

metrics = pytest.importorskip("torchcam.metrics")


class Extractor:
    """Hands out given maps as torchcam's extractors do: clipped at 0 and stretched to 0..1."""

    def __init__(self, model, maps, clipped=True):
        self.model, self.maps, self.clipped = model, maps, clipped

    def __call__(self, class_idx=None, scores=None, **kwargs):
        chosen = self.maps[range(len(self.maps)), class_idx]
        if not self.clipped:
            return [chosen]
        chosen = chosen.relu()
        space = tuple(range(1, chosen.ndim))
        low, high = chosen.amin(space, keepdim=True), chosen.amax(space, keepdim=True)
        return [(chosen - low) / (high - low)]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return nullcontext()


def _case(size, batch=6, labels=3):
    torch.manual_seed(4)
    voxels = 2 * torch.Size(size).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(voxels, 9), nn.Tanh(), nn.Linear(9, labels)).double().eval()
    # Far from linear, so that the images that are asked for matter.
    model[1].weight.data *= 4
    model[3].weight.data *= 6
    image = torch.rand(batch, 2, *size).double()
    maps = torch.randn(batch, labels, *size).double()
    classes = [i % labels for i in range(batch)]
    pairs = nn.functional.one_hot(torch.tensor(classes), labels).bool()
    return model, image, maps, classes, pairs


@pytest.mark.parametrize("size", [(40,), (6, 10), (4, 3, 5)])
def test_average_drop_and_increase(size):
    model, image, maps, classes, pairs = _case(size)
    theirs = metrics.ClassificationMetric(Extractor(model, maps), torch.sigmoid)
    theirs.update(image, classes)
    ours = AverageDrop(3, "micro", min_probability=0), AverageIncrease(3, "micro", min_probability=0)
    before, after = logits_of(model, image).sigmoid(), masked_probabilities(model, image, maps, pairs, 0.0)
    for metric in ours:
        metric.update(before, after, pairs.float())
    summary = theirs.summary()
    assert ours[0].compute().item() == pytest.approx(summary["avg_drop"], abs=1e-6)
    assert ours[1].compute().item() == pytest.approx(summary["conf_increase"])
    assert summary["avg_drop"] > 0
    assert 0 < summary["conf_increase"] < 1


@pytest.mark.parametrize("size", [(40,), (6, 10), (4, 3, 5)])
def test_insertion_and_deletion(size):
    model, image, maps, classes, pairs = _case(size)
    theirs = metrics.DeletionInsertionMetric(
        Extractor(model, maps, clipped=False),
        torch.sigmoid,
        steps=10,
        batch_size=7,
        baseline=lambda x: x.mean() + 0 * x,
    )
    theirs.update(image, classes)
    curves = perturbation_curves(model, image, maps, pairs, image.mean().item(), steps=10)
    insertion, deletion = InsertionAUC(3, "micro"), DeletionAUC(3, "micro")
    insertion.update(curves.insertion, curves.share, pairs.float())
    deletion.update(curves.deletion, curves.share, pairs.float())
    summary = theirs.summary()
    assert insertion.compute().item() == pytest.approx(summary["insertion_auc"], abs=1e-7)
    assert deletion.compute().item() == pytest.approx(summary["deletion_auc"], abs=1e-7)
    assert summary["insertion_auc"] != pytest.approx(summary["deletion_auc"], abs=1e-3)


def test_a_coarse_map_is_stretched_after_it_was_enlarged():
    """Enlarged first, the mask reaches 0 and 1 on the image; torchcam's need not."""
    model, image, *_, pairs = _case((8, 8), batch=1)
    maps = torch.zeros(1, 3, 3, 3).double()
    maps[..., 1, 1] = 1
    after = masked_probabilities(model, image, maps, pairs, 0.0)[0, 0]
    large = nn.functional.interpolate(maps[:, :1], (8, 8), mode="bilinear")
    theirs, ours = (torch.sigmoid(model(m * image))[0, 0] for m in (large, large / large.max()))
    torch.testing.assert_close(after, ours)
    assert large.max() < 0.95
    assert (after - theirs).abs() > 1e-6
