"""A wrong byte order is seen in scans of any kind, and never in what is right or is noise."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.data.byte_order import swapped
from camtrain.data.manifest_files import read_image, read_volume
from camtrain.data.phantom_export import export_phantom

CT = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen" / "ct.nii.gz"
KINDS = ("i2", "u2", "i4", "f4", "f8")


def scans(folder):
    """HU of a drawn chest, and of a real abdomen where it is there."""
    manifest = export_phantom(folder, {"train": 1}, size=(40, 32, 36))
    yield np.asarray(nib.load(next(manifest.parent.glob("*_ct.nii.gz"))).dataobj)
    if CT.exists():
        yield np.asarray(nib.load(CT).dataobj)


def test_scans_of_all_kinds_of_numbers(tmp_path):
    for hu in scans(tmp_path):
        for kind in KINDS:
            data = (hu + 2048 if kind == "u2" else hu).astype(kind)
            for view in (data, np.asfortranarray(data), data.astype(np.dtype(kind).newbyteorder(">"))):
                assert not swapped(view), kind
                assert swapped(view.byteswap()), kind
        padded = np.where(hu < -900, -2000, hu).astype("i2")
        assert (swapped(padded), swapped(padded.byteswap())) == (False, True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_says_nothing_is_let_through(kind):
    rng, shape = np.random.default_rng(0), (24, 18, 30)
    for data in (
        rng.normal(0, 1000, shape),
        rng.integers(0, 4, shape),
        np.where(rng.random(shape) > 0.99, 30000, 7),  # single bright voxels
        np.indices(shape).sum(0) % 2 * 2000,
        np.zeros(shape),
        np.ones(shape[:1]),
        np.ones((2, 2, 2)),
    ):
        assert not swapped(data.astype(kind))
        assert not swapped(data.astype(kind).byteswap())


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("floor", [1e-8, 1e-3, 0.1])
def test_noisy_whole_numbers_in_floating_point_with_a_clamp_are_right(kind, floor):
    rng = np.random.default_rng(0)
    for counts in (rng.integers(0, 256, (32, 32, 24)), rng.poisson(3.0, (32, 32, 24))):
        assert not swapped(np.maximum(counts, floor).astype(kind))


def test_numbers_that_are_none_do_not_hide_it(tmp_path):
    data = next(scans(tmp_path)).astype("f4")
    data[::7] = np.nan
    assert (swapped(data), swapped(data.byteswap())) == (False, True)
    assert not swapped(np.full((8, 8, 8), np.nan, "f4"))
    assert not swapped(np.ones((8, 8, 8), bool))


def test_a_scan_is_refused_and_a_segmentation_is_not_asked(tmp_path):
    hu = next(scans(tmp_path)).astype("i2")
    nib.save(nib.Nifti1Image(hu.byteswap(), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz \(int16\) that is a scan in the other byte order"):
        read_image(tmp_path / "a.nii.gz")
    assert read_volume(tmp_path / "a.nii.gz").shape == (1, *hu.shape)
