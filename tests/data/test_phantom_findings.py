"""Each finding changes its own region, inside its own organ, in its own way."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label

from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.phantom import LABELS, Phantom, unpack
from camtrain.data.phantom_body import ORGANS
from camtrain.data.phantom_findings import FINDINGS, PAINTING_ORDER

SIZE = (36, 28, 36)
NONE = dict.fromkeys(LABELS, False)
TABLE = OrganTable.load("phantom")


def pair(name, index, **kwargs):
    """One patient without and with one finding, and the finding's voxels."""
    phantom = Phantom(size=SIZE, **kwargs)
    without = phantom.case("train", index, label=NONE, marker=NONE)
    with_it = phantom.case("train", index, label=NONE | {name: True}, marker=NONE)
    return without, with_it, unpack(with_it.lesion_bits, [name])[0]


def test_registry():
    assert set(PAINTING_ORDER) == set(FINDINGS)
    assert TABLE.labels == list(FINDINGS)
    assert len(FINDINGS) == 8


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", LABELS)
class TestEach:
    def test_changes_its_region_only(self, name, index):
        without, with_it, lesion = pair(name, index)
        assert lesion.sum() >= 5
        changed = abs(with_it.hu - without.hu) > 1
        assert changed[lesion].mean() > 0.5
        region = lesion
        if name in ("cardiomegaly", "pericardial_effusion"):  # the chambers move with the wall
            region = lesion | (with_it.organs == ORGANS["heart"])
        # The scanner's blur carries one voxel further along each axis.
        assert not (changed & ~binary_dilation(region, iterations=3)).any()

    def test_lies_in_the_organ_that_the_table_allows(self, name, index):
        _, with_it, lesion = pair(name, index)
        assert set(np.unique(with_it.organs[lesion])) <= set(FINDINGS[name].organs)
        assert {ORGANS[o] for o in _allowed(name)} == set(FINDINGS[name].organs)

    def test_holes_take_the_lesion_out_of_the_organ(self, name, index):
        _, exact, lesion = pair(name, index)
        _, holes, _ = pair(name, index, organs="holes")
        assert (holes.organs[lesion] == 0).all()
        assert np.array_equal(holes.organs[~lesion], exact.organs[~lesion])
        assert np.array_equal(holes.hu, exact.hu)


def _allowed(name):
    """Organs of a label by the shipped table, found by asking it about each organ alone."""
    import torch

    found = []
    for organ, i in ORGANS.items():
        allowed = TABLE.allowed(torch.full((1, 1, 2, 2, 2), i))
        if allowed[0, TABLE.labels.index(name)].all():
            found.append(organ)
    return found


@pytest.mark.parametrize("index", range(20))
def test_all_findings_together_stay_in_their_organs(index):
    phantom = Phantom(size=(24, 20, 24))
    case = phantom.case("train", index, label=dict.fromkeys(LABELS, True))
    for name, lesion in zip(LABELS, unpack(case.lesion_bits, LABELS), strict=True):
        assert set(np.unique(case.organs[lesion])) <= set(FINDINGS[name].organs), name
        assert lesion.any(), name


@pytest.mark.parametrize("index", range(6))
class TestKinds:
    def test_nodules_are_round_solids(self, index):
        _, case, lesion = pair("nodule", index)
        parts, count = label(lesion)
        assert count >= 1
        widest = max((parts == k).sum() for k in range(1, count + 1))
        assert 8 <= widest < 300
        assert case.hu[lesion].mean() > -450

    def test_ground_glass_is_fainter_than_consolidation(self, index):
        plain, glass, haze = pair("ground_glass", index)
        _, dense, patch = pair("consolidation", index)
        assert 100 < (glass.hu - plain.hu)[haze].mean() < 400
        assert dense.hu[patch].mean() > glass.hu[haze].mean() + 150

    def test_effusion_is_fluid_at_the_dependent_base(self, index):
        plain, case, lesion = pair("effusion", index)
        lung = np.isin(plain.organs, FINDINGS["effusion"].organs)
        fluid, lungs = np.argwhere(lesion).mean(0), np.argwhere(lung).mean(0)
        assert fluid[1] < lungs[1] - 2  # behind
        assert fluid[2] < lungs[2] - 2  # below
        deep = lesion & (np.arange(SIZE[1])[None, :, None] < fluid[1])
        assert abs(np.median(case.hu[deep])) < 60

    def test_cardiomegaly_widens_the_heart(self, index):
        plain, case, _ = pair("cardiomegaly", index)

        def ratio(organs):
            """Cardiothoracic ratio, as a radiologist measures it."""
            chest = np.isin(organs, (1, 2, 3, 5)).any((1, 2))
            return (organs == ORGANS["heart"]).any((1, 2)).sum() / chest.sum()

        assert ratio(case.organs) > 1.15 * ratio(plain.organs)
        heart = (plain.organs == ORGANS["heart"]).sum()
        assert (case.organs == ORGANS["heart"]).sum() > 1.5 * heart

    def test_coronary_calcification_is_bright_and_near_the_surface(self, index):
        plain, case, lesion = pair("coronary_calcification", index)
        assert case.hu[lesion].max() > 450
        assert (case.hu - plain.hu)[lesion].mean() > 200
        assert lesion.sum() < 0.12 * (case.organs == ORGANS["heart"]).sum()

    def test_aneurysm_widens_the_aorta(self, index):
        plain, case, lesion = pair("aneurysm", index)
        before, after = (c.organs == ORGANS["great_vessels"] for c in (plain, case))
        assert not (before & ~after).any()
        assert (after & ~before).sum() > 15
        assert (lesion & before).any()  # it stands on the vessel
        assert case.hu[lesion].mean() > 60

    def test_pericardial_effusion_is_a_rim_around_the_heart(self, index):
        _, case, lesion = pair("pericardial_effusion", index)
        heart = case.organs == ORGANS["heart"]
        core = heart & ~lesion
        assert core.any()
        assert case.hu[lesion].mean() < case.hu[core].mean() - 60
        assert abs(np.median(case.hu[lesion])) < 60  # water
        # Seen from the muscle, the fluid lies outwards.
        middle = np.argwhere(heart).mean(0)
        distance = [np.linalg.norm(np.argwhere(v) - middle, axis=1).mean() for v in (core, lesion)]
        assert distance[1] > distance[0]
