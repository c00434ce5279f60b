"""A synthetic chest and the optional real scan, for tests and for looking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen"


def ellipsoid(shape, centre, radii):
    grid = np.indices(shape)
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1


@pytest.fixture(scope="session")
def chest():
    """(image in [0, 1], lungs): RAS, three different sizes; a nodule in the patient's right lung, in front."""
    shape = x, y, z = 40, 34, 28
    hu = np.full(shape, -1000.0)
    hu[ellipsoid(shape, (x / 2, y / 2, z / 2), (x * 0.46, y * 0.42, z * 0.9))] = 40
    right = ellipsoid(shape, (x * 0.70, y * 0.52, z * 0.5), (x * 0.15, y * 0.28, z * 0.42))
    left = ellipsoid(shape, (x * 0.30, y * 0.52, z * 0.5), (x * 0.14, y * 0.28, z * 0.42))
    hu[right | left] = -850
    hu[ellipsoid(shape, (x * 0.7, y * 0.65, z * 0.6), (2.5, 2.5, 2.5))] = 40
    hu += np.random.default_rng(0).normal(0, 25, shape)
    return ((hu + 1000) / 1800).clip(0, 1).astype(np.float32), right | left


@pytest.fixture(scope="session")
def abdomen():
    """(image, organs, affine) of the real scan."""
    if not REAL.exists():
        pytest.skip("the real scan is not here")
    nib = pytest.importorskip("nibabel")
    scan = nib.load(REAL / "ct.nii.gz")
    organs = np.asarray(nib.load(REAL / "organs.nii.gz").dataobj)
    return ((scan.get_fdata() + 1000) / 1800).clip(0, 1).astype(np.float32), organs, scan.affine
