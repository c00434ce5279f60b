"""The unsupervised partition against a slow one written from its description, its fallback, and many files."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
import torch

from camtrain import InputError, OrganTable
from camtrain.anatomy import partition
from camtrain.anatomy.partition import (
    box_of,
    lung_is_missing,
    lungs_of,
    partition_files,
    read_segmap,
    rough_organs,
    split_organs,
)


def components(region, steps):
    """Components of a bool array as lists of voxels, by flooding."""
    left = {tuple(int(i) for i in voxel) for voxel in np.argwhere(region)}
    found = []
    while left:
        group, todo = [], [left.pop()]
        while todo:
            voxel = todo.pop()
            group.append(voxel)
            for step in steps:
                other = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if other in left:
                    left.remove(other)
                    todo.append(other)
        found.append(group)
    return found


def slow_lungs(hu, least, air=-300):
    found = np.zeros(hu.shape, dtype=bool)
    around = [s for s in product((-1, 0, 1), repeat=2) if any(s)]
    for z, section in enumerate(hu):
        edges = {0, hu.shape[1] - 1}, {0, hu.shape[2] - 1}
        every = components(section < air, around)
        groups = [group for group in every if not any(y in edges[0] or x in edges[1] for y, x in group)]
        sizes = sorted(len(g) for g in groups)
        for group in groups:
            if len(groups) <= 2 or len(group) >= sizes[-2]:
                for y, x in group:
                    found[z, y, x] = True
    lungs = np.zeros(hu.shape, dtype=bool)
    faces = [tuple(s * (axis == a) for a in range(3)) for axis in range(3) for s in (-1, 1)]
    for group in components(found, faces):
        if len(group) >= least:
            for voxel in group:
                lungs[voxel] = True
    return lungs


def slow_organs(lungs):
    where = np.argwhere(lungs)
    (z0, y0, x0), (z1, y1, x1) = where.min(0), where.max(0) + 1
    quarter = int((x1 - x0) / 4.0)
    organs = np.zeros(lungs.shape, dtype=int)
    for z, y, x in np.ndindex(*lungs.shape):
        if lungs[z, y, x]:
            organs[z, y, x] = 1 if x < int(lungs.shape[2] / 2.0) else 3
        elif z0 <= z < z1 and y0 <= y < y1 and x0 + quarter <= x < x1 - int(0.5 * quarter):
            organs[z, y, x] = 2
    return organs


def blobs(seed, shape=(5, 17, 23)):
    """Noise with structure: many components of all sizes, some of them at the edge."""
    rng = np.random.default_rng(seed)
    field = rng.random(shape)
    field = field + np.roll(field, 1, 1) + np.roll(field, 1, 2) + np.roll(field, 1, 0)
    return np.where(field < 1.75, -800, 40).astype(np.int16)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [1, 9, 40])
def test_lungs_equal_those_of_a_slow_reference(seed, least):
    hu = blobs(seed)
    lungs = lungs_of(hu, least)
    assert np.array_equal(lungs, slow_lungs(hu, least))
    assert lungs.any() or least == 40


@pytest.mark.parametrize("seed", range(3))
def test_organs_equal_those_of_a_slow_reference(seed):
    lungs = lungs_of(blobs(seed), least=4)
    organs = split_organs(lungs, borders=None)
    assert np.array_equal(organs, slow_organs(lungs))
    assert set(np.unique(organs)) == {0, 1, 2, 3}


def test_components_of_equal_size_are_all_kept():
    hu = np.full((1, 5, 13), 40)
    for start in (1, 5, 9):
        hu[0, 1:4, start : start + 2] = -900
    hu[0, 2, 12] = -900  # at the edge
    assert lungs_of(hu, 1).sum() == 18


def test_a_volume_without_air_has_no_lungs():
    lungs = lungs_of(np.zeros((2, 5, 6)))
    assert not lungs.any()
    assert box_of(lungs) is None
    assert split_organs(lungs) is None


def test_what_tells_that_a_lung_is_missing():
    whole = ((0, 9), (0, 9), (130, 300))
    assert not lung_is_missing(whole)
    assert lung_is_missing(((0, 9), (0, 9), (131, 300)))
    assert lung_is_missing(((0, 9), (0, 9), (130, 299)))
    assert not lung_is_missing(((0, 9), (0, 9), (200, 210)), None)
    assert lung_is_missing(None, None)


def test_rough_organs_are_the_authors_regions_on_the_grid_of_the_maps():
    """Heart = columns 1 to 4 of six, right lung = the first three, left lung = the last three."""
    table = OrganTable.load("rad_chestct").select(["heart_cabg", "lung_nodule"])
    organs = torch.from_numpy(rough_organs((6, 12, 30)))[None, None]
    for mode in ("nearest", "fill", "any"):
        told = torch.tensor([[[True] * 5, [True, True, False, True, False]]])
        heart, right = table.allowed(organs, (2, 6, 6), mode=mode, allowed_organs=told)[0]
        assert heart.float().mean((0, 1)).tolist() == [0, 1, 1, 1, 1, 0]
        assert right.float().mean((0, 1)).tolist() == [1, 1, 1, 0, 0, 0]
        assert table.allowed(organs, (2, 6, 6), mode=mode)[0, 1].all()


# Many files ----------------------------------------------------------------------------------------------------------


def read_or_fail(path):
    """A reader for worker processes."""
    if path.stem == "broken":
        raise InputError(f"{path}: broken")
    return np.load(path)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "broken", "c")):
        np.save(folder / f"{name}.npy", blobs(seed))
    return {file.stem: file for file in sorted(folder.iterdir())}


def test_files_are_made_once_and_failures_do_not_stop_the_others(scans, tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "lungs"
    failed = partition_files(scans, out, read_or_fail, least=9)
    assert list(failed) == ["broken"]
    assert "broken" in failed["broken"]
    assert sorted(f.name for f in out.iterdir()) == ["a_seg.npz", "b_seg.npz", "c_seg.npz"]  # nothing half written
    assert np.array_equal(read_segmap(out / "b_seg.npz"), lungs_of(np.load(scans["b"]), 9))
    assert "4/4" in capsys.readouterr().err
    before = (out / "a_seg.npz").stat().st_mtime_ns
    (out / "c_seg.npz").unlink()
    seen = []
    monkeypatch.setattr(partition, "lungs_of", lambda hu, least: seen.append(1) or np.ones(hu.shape, bool))
    partition_files(scans, out, read_or_fail, progress=False)
    assert len(seen) == 1  # only what was missing
    assert (out / "a_seg.npz").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_several_processes_write_the_same_files(scans, tmp_path):
    failed = partition_files(scans, tmp_path / "two", read_or_fail, workers=2, least=9, progress=False)
    assert list(failed) == ["broken"]
    for name in ("a", "b", "c"):
        assert np.array_equal(read_segmap(tmp_path / "two" / f"{name}_seg.npz"), lungs_of(np.load(scans[name]), 9))


def test_wrong_folders_arguments_and_files(scans, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="expected a folder to write the lungs to"):
        partition_files(scans, file, read_or_fail, progress=False)
    with pytest.raises(InputError, match="from 1 on, got 0"):
        partition_files(scans, tmp_path, read_or_fail, workers=0)
    bad = tmp_path / "x_seg.npz"
    for content, says in (({"lungs": np.zeros((2, 2, 2))}, "KeyError"), ({"segmap": np.full((2, 2, 2), 7)}, "0 and 1")):
        np.savez(bad, **content)
        with pytest.raises(InputError, match=f"{re.escape(str(bad))}.*{says}"):
            read_segmap(bad)
    bad.write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="run the partition again"):
        read_segmap(bad)
