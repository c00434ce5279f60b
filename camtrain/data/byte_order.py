"""Is a volume read in the wrong byte order? No header says so, the voxels do: neighbours have nothing in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LINES = 256
_SMOOTH = 0.3  # of scans 0.02 to 0.2, of noise 1.4, of a CT in the wrong order 0.5 to 0.7
_TIMES = 3.0


def swapped(data: NDArray[Any]) -> bool:
    """Would the other byte order make a far smoother volume?

    The measure is the mean step from a voxel to the next along the first axis, over the mean distance from the median:
    small where neighbours are alike, 1.4 where they are not, however rare and large single values are. The
    byte that weighs most decides it, so that a volume that is right never looks smoother when its bytes are exchanged;
    noise looks alike both ways and is never called swapped.

    Args:
        data: (X, ...) as the file holds it.

    Example:
        >>> waves = (1000 * np.sin(np.add.outer(np.arange(40), np.arange(30)) / 9)).astype("<i2")
        >>> swapped(waves), swapped(waves.view(">i2"))
        (False, True)
    """
    if data.dtype.kind not in "iuf" or data.dtype.itemsize < 2 or data.ndim < 2 or data.shape[0] < 4:
        return False
    if data.dtype == np.float16:  # any two bytes are a plausible number
        return False
    lines = data.reshape(data.shape[0], -1, order="A")
    lines = np.ascontiguousarray(lines[:, :: max(1, lines.shape[1] // _LINES)])
    if (found := _roughness(lines)) <= _SMOOTH or (data.dtype.kind == "f" and _plausible(lines)):
        return False
    other = _roughness(lines.byteswap().view(lines.dtype))
    return other < _SMOOTH and found > _TIMES * other


def _roughness(lines: NDArray[Any]) -> float:
    """Of the numbers among the values; infinite where all are equal."""
    with np.errstate(all="ignore"):
        values = lines.astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        steps = np.abs(np.diff(values, axis=0))
        if np.isnan(steps).all():
            return np.inf
        spread = float(np.nanmean(np.abs(values - np.nanmedian(values))))
        return float(np.nanmean(steps)) / spread if spread > 0 else np.inf


def _plausible(lines: NDArray[Any]) -> bool:
    """Are nearly all floating-point numbers of a size that images have? Whole numbers in the wrong order are 1e-41."""
    with np.errstate(all="ignore"):
        size = np.abs(lines[lines != 0])
        return bool(size.size) and float(((size > 1e-12) & (size < 1e12)).mean()) > 0.9
