"""Shape operations on one region of one case: convex hull, closing, hole filling, dilation, for any number of axes.

Why they exist: a segmenter leaves consolidation, effusion and masses out of the lung, so that the mask is wrong exactly
where the finding is. The operations give such voxels back to the organ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

Region = NDArray[np.bool_]

COLUMNS_AT_ONCE = 2**22  # column x facet products held in memory while a hull is filled
SLACK = 1e-6  # relative slack for distances and half-spaces, so that rounding never costs a voxel


def convex_hull(region: Region) -> Region:
    """All voxels whose centre lies in the convex hull of the region's voxel centres.

    A region without volume (fewer voxels than a simplex has corners, or all in one plane) is returned as it is. The
    hull does not depend on the voxel spacing.

    Args:
        region: (*S) bool.

    Returns:
        (*S) bool, a superset of `region`.

    Example:
        >>> convex_hull(np.array([False, True, False, False, True])).astype(int)
        array([0, 1, 1, 1, 1])
    """
    if region.ndim == 1:
        return _between(region)
    box = _box(region)
    if box is None:
        return region.copy()
    inside = region[box]
    try:
        facets = ConvexHull(_line_ends(inside)).equations
    except QhullError:
        return region.copy()
    hull = region.copy()
    hull[box] |= _fill_hull(facets, inside.shape)
    return hull


def close(region: Region, radius_mm: float, spacing: Sequence[float]) -> Region:
    """Morphological closing with a ball: gaps and bays that the ball cannot enter are filled.

    Args:
        region: (*S) bool.
        radius_mm: Radius of the ball in mm.
        spacing: Size of a voxel along each axis in mm.

    Returns:
        (*S) bool, a superset of `region`.

    Example:
        >>> close(np.array([True, False, False, True, False]), radius_mm=3.0, spacing=[2.0]).astype(int)
        array([1, 1, 1, 1, 0])
    """
    box = _box(region)
    if box is None:
        return region.copy()
    # With this margin the ball always fits around the grown region: the border of the scan erodes nothing.
    margin = [(m, m) for m in _margin(radius_mm, spacing)]
    grown = _near(np.pad(region[box], margin), radius_mm, spacing)
    closed = ~_near(~grown, radius_mm, spacing)
    result = region.copy()
    result[box] |= closed[tuple(slice(m, n - m) for (m, _), n in zip(margin, closed.shape, strict=True))]
    return result


def dilate(region: Region, radius_mm: float, spacing: Sequence[float]) -> Region:
    """All voxels whose centre is at most `radius_mm` away from a voxel of the region.

    Args:
        region: (*S) bool.
        radius_mm: Distance in mm.
        spacing: Size of a voxel along each axis in mm.

    Returns:
        (*S) bool, a superset of `region`.

    Example:
        >>> dilate(np.array([False, False, True, False, False]), radius_mm=2.9, spacing=[1.5]).astype(int)
        array([0, 1, 1, 1, 0])
    """
    box = _box(region, _margin(radius_mm, spacing))
    if box is None:
        return region.copy()
    result = region.copy()
    result[box] = _near(region[box], radius_mm, spacing)
    return result


def fill_holes(region: Region) -> Region:
    """Fill the holes: background that touches neither the outside nor, by a voxel's face, background that does.

    Args:
        region: (*S) bool.

    Returns:
        (*S) bool, a superset of `region`.

    Example:
        >>> fill_holes(np.array([True, False, True, False])).astype(int)
        array([1, 1, 1, 0])
    """
    filled: Region = ndimage.binary_fill_holes(region)
    return filled


def _near(region: Region, radius_mm: float, spacing: Sequence[float]) -> Region:
    if not region.any():  # the distance to nothing is undefined in scipy
        return region.copy()
    distance = ndimage.distance_transform_edt(~region, sampling=tuple(spacing))
    near: Region = distance <= radius_mm * (1 + SLACK)
    return near


def _margin(radius_mm: float, spacing: Sequence[float]) -> list[int]:
    return [int(radius_mm / step) + 1 for step in spacing]


def _box(region: Region, margin: Sequence[int] | None = None) -> tuple[slice, ...] | None:
    """The bounding box, grown by a margin but not beyond the volume; None when the region is empty."""
    box: list[slice] = []
    for axis in range(region.ndim):
        used = np.flatnonzero(region.any(axis=tuple(a for a in range(region.ndim) if a != axis)))
        if not used.size:
            return None
        more = margin[axis] if margin else 0
        box.append(slice(max(0, int(used[0]) - more), int(used[-1]) + 1 + more))
    return tuple(box)


def _between(region: Region) -> Region:
    after_first: Region = np.logical_or.accumulate(region)
    before_last: Region = np.logical_or.accumulate(region[::-1])[::-1]
    return after_first & before_last


def _line_ends(region: Region) -> NDArray[np.float64]:
    """First and last voxel of every line along axis 0: no other voxel can be a corner of the hull."""
    lines = np.argwhere(region.any(axis=0))
    first = region.argmax(axis=0)[tuple(lines.T)]
    last = len(region) - 1 - region[::-1].argmax(axis=0)[tuple(lines.T)]
    return np.concatenate([np.column_stack([end, lines]) for end in (first, last)]).astype(np.float64)


def _fill_hull(facets: NDArray[np.float64], shape: tuple[int, ...]) -> Region:
    """Fill the half-spaces `normal . x + offset <= 0` line by line along axis 0: work grows with the hull's surface."""
    lead, rest, offset = facets[:, 0], facets[:, 1:-1], facets[:, -1]
    slack = SLACK * max(shape)
    lines = np.indices(shape[1:]).reshape(len(shape) - 1, -1)
    low, high = np.zeros(lines.shape[1]), np.full(lines.shape[1], shape[0] - 1.0)
    upright = np.abs(lead) > 1e-12
    for start in range(0, lines.shape[1], max(1, COLUMNS_AT_ONCE // len(facets))):
        part = slice(start, start + max(1, COLUMNS_AT_ONCE // len(facets)))
        side = rest @ lines[:, part] + offset[:, None] - slack
        bound = -side[upright] / lead[upright, None]
        low[part] = np.maximum(low[part], bound[lead[upright] < 0].max(axis=0, initial=0))
        high[part] = np.minimum(high[part], bound[lead[upright] > 0].min(axis=0, initial=np.inf))
        high[part] = np.where((side[~upright] > 0).any(axis=0), -1, high[part])
    steps = np.arange(shape[0])[:, None]
    filled: Region = ((steps >= low) & (steps <= high)).reshape(shape)
    return filled
