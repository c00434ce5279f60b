"""`localise` against scores counted by hand, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import ndimage
from torch import nn

import camtrain as ct
from camtrain.evaluation import erode, localise


class Shown(nn.Module):
    """Answers with a map of its image: HiResCAM of `show` is the image times a weight per label."""

    def __init__(self, weights):
        super().__init__()
        self.show = nn.ReLU()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, image):
        return self.show(image).flatten(1).sum(dim=1, keepdim=True) * self.weights


def batch(image, label, **regions):
    return {"image": torch.tensor(image)[:, None], "label": torch.tensor(label), **regions}


IMAGES = [[0.0, 1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0, 4.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
LABEL = [[1.0, 1.0], [1.0, 0.0], [float("nan"), 1.0]]
LESIONS = torch.tensor(
    [[[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]]
).bool()


def rows_of(found):
    return {(row.method, row.region, row.label): row for row in found}


def test_by_hand():
    model = Shown([1.0, 2.0])
    found = rows_of(localise(model, [batch(IMAGES, LABEL, lesions=LESIONS)], {"lesions": "lesions"}, names=["a", "b"]))
    a, b = (found["hirescam", "lesions", name] for name in "ab")
    # Label a counts in cases 0 and 1: 3 of 4 and 4 of 8; the highest voxel is inside, then outside.
    assert (a.pairs, a.energy, a.hits, a.chance) == (2, pytest.approx(0.625), 0.5, pytest.approx(0.3))
    # Label b: no lesion in case 0, absent in case 1; in case 2 everything lies beside it.
    assert (b.pairs, b.energy, b.hits, b.chance, b.undefined) == (1, 0.0, 0.0, pytest.approx(0.2), 0.0)
    macro, micro = (found["hirescam", "lesions", name] for name in ("macro", "micro"))
    assert (macro.pairs, macro.energy) == (3, pytest.approx(0.3125))
    assert (micro.pairs, micro.energy, micro.hits) == (3, pytest.approx(1.25 / 3), pytest.approx(1 / 3))


def test_batches_do_not_matter():
    model = Shown([1.0, 2.0])
    whole = [batch(IMAGES, LABEL, lesions=LESIONS)]
    single = [batch(IMAGES[i : i + 1], LABEL[i : i + 1], lesions=LESIONS[i : i + 1]) for i in range(3)]
    assert localise(model, whole, {"x": "lesions"}) == localise(model, single, {"x": "lesions"})


def test_negative_maps_are_misses_and_undefined():
    found = rows_of(localise(Shown([-1.0, 1.0]), [batch(IMAGES, LABEL, lesions=LESIONS)], {"x": "lesions"}))
    row = found["hirescam", "x", "0"]
    assert math.isnan(row.energy)
    assert (row.hits, row.undefined, row.pairs) == (0.0, 1.0, 2)


def test_a_tie_counts_by_its_share_inside():
    image, lesions = [[5.0, 0.0, 5.0, 5.0]], torch.tensor([[[True, True, True, False]]])
    row = localise(Shown([1.0]), [batch(image, [[1.0]], lesions=lesions)], {"x": "lesions"})[0]
    assert row.hits == pytest.approx(2 / 3)


def test_the_border_of_an_enlarged_map_is_no_miss():
    """Beyond the centres of the outermost cells a linear enlargement is flat: the highest voxels tie."""
    model = nn.Sequential(nn.AvgPool1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1, bias=False))
    nn.init.ones_(model[3].weight)
    lesions = torch.tensor([[[True] * 4 + [False] * 4]])
    sample = [batch([[1.0] * 4 + [0.0] * 4], [[1.0]], lesions=lesions)]
    row = localise(model, sample, {"x": "lesions"}, layer="1")[0]
    assert row.hits == 1.0
    assert row.energy < 1


def test_regions_may_be_made_of_the_batch_and_of_the_layer_s_grid(chest):
    model, batches, table = chest
    regions = {
        "lesions": "lesions",
        "organ": lambda b: table.allowed(b["organs"]),
        "eroded": lambda b: erode(table.allowed(b["organs"])),
    }
    found = rows_of(localise(model, batches, regions, ["hirescam", "gradcam"], "stack", names=list(table.labels)))
    organ, eroded = (found["gradcam", name, "micro"] for name in ("organ", "eroded"))
    assert 0 < eroded.chance < organ.chance < 0.5
    assert eroded.energy < organ.energy
    cells = {"organ": lambda b: table.allowed(b["organs"], size=(3, 3, 7))}
    row = rows_of(localise(model, batches, cells, ["gradcam"], "stack", size=None))["gradcam", "organ", "micro"]
    assert row.chance > organ.chance  # a cell is allowed when its organ fills a part of it


@pytest.fixture
def chest():
    from camtrain.data import PhantomDataModule
    from camtrain.models import AxialNet

    torch.manual_seed(0)
    data = PhantomDataModule(cases=4, val_cases=6, size=(20, 18, 21), shortcut=None, batch_size=4)
    net = AxialNet(8, "small", (20, 18), slice_axis=2)
    return net, data.val_dataloader(), data.table


@pytest.mark.parametrize("size", [(9,), (7, 6), (5, 8, 6)])
@pytest.mark.parametrize("voxels", [0, 1, 2])
def test_erode_like_scipy(size, voxels):
    region = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) < 0.9
    region[..., 2:5] = True
    expected = region.numpy()
    if voxels:
        cross = ndimage.generate_binary_structure(len(size), 1)[None, None]
        expected = ndimage.binary_erosion(expected, cross, iterations=voxels, border_value=1)
    before = region.clone()
    assert torch.equal(erode(region, voxels), torch.from_numpy(expected))
    assert torch.equal(region, before)


def refused(words, regions=None, **given):
    sample = batch(IMAGES, LABEL, lesions=LESIONS)
    with pytest.raises(ct.InputError, match=words):
        localise(Shown([1.0, 1.0]), [sample], regions or {"x": "lesions"}, **given)


def test_refusals():
    refused("no key 'lesion'", regions={"x": "lesion"})
    refused("expects .B, L, .S. bool", regions={"x": lambda b: b["lesions"].float()})
    refused("expects .B, L, .S. bool", regions={"x": lambda b: b["lesions"][:, :1]})
    refused("does not lie on maps", regions={"x": lambda b: b["lesions"][..., :4]})
    refused("expected 2 names", names=["a"])
    with pytest.raises(ct.InputError, match="at least one batch"):
        localise(Shown([1.0]), [], {"x": "lesions"})
    with pytest.raises(ct.InputError, match=r"label \(B, L\)"):
        localise(Shown([1.0]), [{"image": torch.zeros(1, 1, 4), "label": torch.zeros(1)}], {"x": "lesions"})
    with pytest.raises(ct.InputError, match="bool region"):
        erode(torch.ones(1, 1, 3))
