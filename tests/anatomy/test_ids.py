"""Comparing ids in bytes gives what torch's plain comparison gives, whatever the type and the number."""

from __future__ import annotations

import pytest
import torch

from camtrain.anatomy import OrganTable
from camtrain.anatomy._ids import narrowed, voxels_with


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_as_torch_compares(dtype):
    ids = torch.randint(-100 if dtype.is_signed else 0, 127, (2, 1, 5, 7), generator=torch.Generator().manual_seed(0))
    ids = ids.to(dtype)
    for number in (0, 3, 126, 300, -5):
        expected = ids.long() == number
        for given in (narrowed(ids), narrowed(ids.clamp(min=0)) if number > 0 else ids, ids.transpose(2, 3)):
            want = expected.transpose(2, 3) if given.shape != expected.shape else expected
            assert torch.equal(voxels_with(given, number), want)


def test_what_does_not_fit_into_a_byte_stays():
    for ids in ([0, 256], [-1, 3]):
        assert narrowed(torch.tensor(ids)).dtype == torch.int64
    assert narrowed(torch.zeros(0, dtype=torch.int16)).dtype == torch.int16


def test_an_id_beyond_a_byte_is_not_its_remainder():
    table = OrganTable.load({"organs": {"a": 300, "b": 44}, "labels": {"x": ["a"], "y": ["b"]}})
    organs = torch.full((1, 1, 4), 44, dtype=torch.uint8)
    assert table.allowed(organs).any(dim=2).tolist() == [[False, True]]


def test_an_id_beyond_a_signed_byte_is_not_its_remainder():
    ids = torch.tensor([-1, 0, 3], dtype=torch.int8)
    assert voxels_with(ids, 256).tolist() == [False] * 3
    assert voxels_with(ids, 255).tolist() == [False] * 3
