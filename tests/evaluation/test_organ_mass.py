"""OrganMass against a loop over voxels."""

from __future__ import annotations

import pytest
import torch

from camtrain import InputError
from camtrain.evaluation import organ_mass

TABLE = {"organs": {"lung": [1, 2], "heart": 3}, "labels": {"nodule": ["lung"], "stent": ["heart"]}}


@pytest.mark.parametrize("size", [(11,), (6, 4), (4, 3, 2)])
def test_on_the_grid_of_the_image_against_a_loop(size):
    generator = torch.Generator().manual_seed(7)
    maps = torch.randn(2, 3, *size, generator=generator)
    organs = torch.randint(0, 5, (2, 1, *size), generator=generator)
    found = organ_mass(maps, organs, TABLE)
    assert found.names == ("lung", "heart", "no organ")
    part = {1: 0, 2: 0, 3: 1}
    for b in range(2):
        for k in range(3):
            sums = [0.0, 0.0, 0.0]
            for value, organ in zip(maps[b, k].flatten().tolist(), organs[b, 0].flatten().tolist(), strict=True):
                sums[part.get(organ, 2)] += max(value, 0)
            assert found.shares[b, k].tolist() == pytest.approx([s / sum(sums) for s in sums])
    torch.testing.assert_close(found.volume.sum(1), torch.ones(2, dtype=torch.float64))
    assert found.volume[0, 1].item() == pytest.approx((organs[0] == 3).float().mean().item())


def test_a_coarse_cell_counts_for_each_organ_by_its_share():
    organs = torch.tensor([[[1, 1, 3, 0, 0, 0, 0, 0]]])
    found = organ_mass(torch.tensor([[[2.0, 1.0]]]), organs, TABLE)
    assert found.shares[0, 0].tolist() == pytest.approx([2 * 0.5 / 3, 2 * 0.25 / 3, (2 * 0.25 + 1) / 3])


def test_a_map_and_its_counterfactual_share_nothing():
    maps = torch.tensor([[[1.0, -2.0, 3.0, -4.0]]])
    organs = torch.tensor([[[1, 3, 1, 3]]])
    assert organ_mass(maps, organs, TABLE).shares[0, 0].tolist() == [1, 0, 0]
    assert organ_mass(-maps, organs, TABLE).shares[0, 0].tolist() == [0, 1, 0]


def test_nothing_positive_and_not_computed_have_no_shares():
    maps = torch.stack([torch.zeros(4), -torch.ones(4), torch.full((4,), torch.nan)])[None]
    assert organ_mass(maps, torch.tensor([[[1, 3, 1, 0]]]), TABLE).shares.isnan().all()


def test_bad_input():
    for organs in (torch.ones(2, 1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)):
        with pytest.raises(InputError, match="expected organs"):
            organ_mass(torch.rand(1, 2, 4), organs, TABLE)
