"""The phantom's coordinates: where each voxel lies in the patient, and simple solids in millimetres.

World coordinates are RAS millimetres around the middle of the scan; body coordinates are the same for a patient who
lies shifted, turned and scaled. All solids are fields: below 1 inside, above 1 outside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Point = Sequence[float] | Floats
Patch = tuple[Box, Bools]
"""A box, and which of its voxels."""
Places = NDArray[np.intp]
"""Places in the flat volume."""

FIELD_OF_VIEW = (320.0, 240.0, 300.0)
"""Physical size of every phantom scan in mm, whatever its number of voxels."""


@dataclass(frozen=True)
class Pose:
    """How the patient lies: shift in mm, scale per axis, roll around the long axis in radians."""

    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    roll: float = 0.0


def affine_of(size: Sequence[int]) -> NDArray[np.float64]:
    """Voxel index to world millimetres (RAS) of a phantom scan.

    Args:
        size: Voxels per axis, three numbers.

    Returns:
        (4, 4): the spacing on the diagonal, the middle of the scan at the origin.

    Example:
        >>> affine_of((32, 24, 30))[0].tolist()
        [10.0, 0.0, 0.0, -155.0]
    """
    return _affine(tuple(size)).copy()


@functools.lru_cache(maxsize=16)
def _affine(size: tuple[int, ...]) -> NDArray[np.float64]:
    spacing = np.array(FIELD_OF_VIEW) / np.array(size)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (spacing - FIELD_OF_VIEW) / 2
    return affine


class Frame:
    """Body coordinates of every voxel of one scan, kept as thin arrays that broadcast to the volume.

    Args:
        size: Voxels per axis.
        pose: How the patient lies.

    Attributes:
        plane: (2, X, Y) body coordinates to the patient's right and to the front, mm.
        x: (X, Y, 1) body coordinate to the patient's right, mm.
        y: (X, Y, 1) body coordinate to the front, mm.
        z: (1, 1, Z) body coordinate upwards, mm.
        front: (1, Y, 1) world coordinate to the front, mm: what gravity sees of a patient on the back.
        thin: Smallest half-thickness that a line can have and still hit voxels, mm.
    """

    def __init__(self, size: tuple[int, int, int], pose: Pose) -> None:
        self.size = size
        self.pose = pose
        self.spacing, world = _grid(size)
        self.thin = 0.62 * float(self.spacing.max())
        self._cos, self._sin = math.cos(pose.roll), math.sin(pose.roll)
        cos, sin = np.float32(np.cos(pose.roll)), np.float32(np.sin(pose.roll))
        right, front, up = (w - np.float32(c) for w, c in zip(world, pose.shift, strict=True))
        self.front = world[1][None, :, None]
        self.plane = np.empty((2, *size[:2]), np.float32)
        np.add(cos * right[:, None], sin * front, out=self.plane[0])
        np.subtract(cos * front, sin * right[:, None], out=self.plane[1])
        self.plane /= np.array(pose.scale[:2], np.float32)[:, None, None]
        self.x, self.y = self.plane[:, :, :, None]
        self.z = (up / np.float32(pose.scale[2]))[None, None, :]

    def places(self, points: Floats) -> Places:
        """Voxels that hold body points, clipped to the scan: (3, n, m) mm become (n, m) places in the flat volume."""
        turn, shift = self.to_voxels
        voxels = (turn.T @ points.reshape(3, -1)).reshape(points.shape)
        voxels += shift[:, None, None] + 0.5  # whole numbers at the borders of voxels
        last = np.array(self.size)[:, None, None] - 1
        i, j, k = voxels.clip(0, last, out=voxels).astype(np.intp)
        i *= self.size[1]
        i += j
        i *= self.size[2]
        i += k
        found: Places = i
        return found

    def points(self, voxels: Places, box: Box) -> Floats:
        """(3, n) body coordinates of voxels, places in a box."""
        right, front, up = box
        column, k = np.divmod(voxels, up.stop - up.start)
        points = np.empty((3, len(voxels)), np.float32)
        points[:2] = self.plane[:, right, front].reshape(2, -1).take(column, axis=1)
        points[2] = self.z[0, 0, up][k]
        return points

    @functools.cached_property
    def to_voxels(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(3, 3) and (3,): body points times the one plus the other are places on the grid, 0 in the first voxel."""
        (right, front, up), (wide, deep, high) = self.pose.scale, self.spacing.tolist()
        turn = [
            [self._cos * right / wide, self._sin * right / deep, 0.0],
            [-self._sin * front / wide, self._cos * front / deep, 0.0],
            [0.0, 0.0, up / high],
        ]
        shift = [
            s / step + (n - 1) / 2 for s, step, n in zip(self.pose.shift, (wide, deep, high), self.size, strict=True)
        ]
        return np.array(turn), np.array(shift)

    def box(self, low: Point, high: Point) -> Box:
        """Voxels that cover the body block from `low` to `high` (mm), one voxel of margin, never empty."""
        (x0, y0, z0), (x1, y1, z1), (right, front, up) = _three(low), _three(high), self.pose.scale
        x, y, z = right * (x0 + x1) / 2, front * (y0 + y1) / 2, up * (z0 + z1) / 2
        wide, deep, high_ = right * (x1 - x0) / 2, front * (y1 - y0) / 2, up * (z1 - z0) / 2
        cos, sin, turned = self._cos, self._sin, abs(self._sin)
        bands = (
            (cos * x - sin * y, cos * wide + turned * deep),
            (sin * x + cos * y, turned * wide + cos * deep),
            (z, high_),
        )
        box = []
        for (center, reach), shift, extent, n in zip(bands, self.pose.shift, FIELD_OF_VIEW, self.size, strict=True):
            first = math.floor((center - reach + shift + extent / 2) * n / extent) - 1
            last = math.floor((center + reach + shift + extent / 2) * n / extent) + 2
            first = 0 if first < 0 else n - 1 if first >= n else first
            last = n if last > n else first + 1 if last <= first else last
            box.append(slice(first, last))
        return box[0], box[1], box[2]

    def at(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """Body coordinates inside a box."""
        return self.x[box[:2]], self.y[box[:2]], self.z[:, :, box[2]]

    def ellipsoid(self, center: Point, radii: Point) -> tuple[Box, Floats]:
        """Field of an ellipsoid: squared distance in units of the radii."""
        c, r = np.asarray(center, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        box = self.box(c - r, c + r)
        right, front, up = box
        flat = self.plane[:, right, front] - c[:2, None, None]
        flat /= r[:2, None, None]
        flat *= flat
        z = (self.z[:, :, up] - c[2]) / r[2]
        return box, (flat[0] + flat[1])[:, :, None] + z * z

    def capsule(self, start: Point, end: Point, radius: float) -> tuple[Box, Floats]:
        """Field of a tube with round ends: squared distance from the line in units of the radius."""
        a, b, r = np.asarray(start, np.float32), np.asarray(end, np.float32), np.float32(max(radius, self.thin))
        box = self.box(np.minimum(a, b) - r, np.maximum(a, b) + r)
        x, y, z = (v - o for v, o in zip(self.at(box), a.tolist(), strict=True))
        line = b - a
        p, q, s = line.tolist()
        along = (x * p + y * q) + z * s
        along /= max(float(line @ line), 1e-6)
        along.clip(0, 1, out=along)
        field: Floats = np.zeros_like(along)
        for axis, step in ((x, p), (y, q), (z, s)):  # in place: tubes are small, and arrays cost more than sums
            away = along * step
            np.subtract(axis, away, out=away)
            np.multiply(away, away, out=away)
            field += away
        field /= r**2
        return box, field

    def tubes(self, starts: Floats, ends: Floats, radii: Sequence[float]) -> tuple[Places, NDArray[np.intp]]:
        """Voxels inside tubes with round ends, as `capsule` has them, of all tubes at once.

        Args:
            starts: (n, 3).
            ends: (n, 3).
            radii: n.

        Returns:
            (voxels,) place of each in the flat volume, and (voxels,) number of its tube.
        """
        a, b = np.asarray(starts, np.float32), np.asarray(ends, np.float32)
        r = np.maximum(radii, self.thin).astype(np.float32)
        # As `capsule` has it: numpy rounds squares of arrays another way.
        square = np.array([one**2 for one in r], np.float32)
        lines = b - a
        length = np.maximum(lines[:, None] @ lines[:, :, None], np.float32(1e-6))[:, 0]
        columns, tube, x, y = self._columns_near(a, lines, r)
        # From here on (Z, columns): numpy starts a loop for each row, and there are more columns than levels.
        per_column = np.concatenate([a[:, 2:], lines, length, square[:, None]], axis=1).take(tube, axis=0)
        az, p, q, s, length, square = np.ascontiguousarray(per_column.T)
        z = self.z.reshape(-1, 1) - az
        along = z * s
        along += x * p + y * q
        along /= length
        along.clip(0, 1, out=along)
        field, away = np.zeros_like(along), np.empty_like(along)
        for axis, step in ((x, p), (y, q), (z, s)):
            np.multiply(along, step, out=away)
            np.subtract(axis, away, out=away)
            away *= away
            field += away
        k, column = np.divmod(places_in(field < square), len(columns))
        return columns[column] * self.size[2] + k, tube[column]

    def _columns_near(
        self, starts: Floats, lines: Floats, radii: Floats
    ) -> tuple[Places, NDArray[np.intp], Floats, Floats]:
        """Columns of voxels that may hold some of a tube, for each tube: seen from above they lie within its radius.

        Returns:
            (columns,) place in the flat plane, number of the tube, and way from the tube's start to the right and to
            the front.
        """
        low, high = np.minimum(starts, starts + lines), np.maximum(starts, starts + lines)
        reach = float(radii.max())
        right, front, _ = self.box(low.min(axis=0) - reach, high.max(axis=0) + reach)
        x, y = (c[right, front].reshape(-1) - start for c, start in ((self.x, starts[:, :1]), (self.y, starts[:, 1:2])))
        p, q = lines[:, :1], lines[:, 1:2]
        along = x * p
        along += y * q
        along /= np.maximum(p * p + q * q, np.float32(1e-6))
        along.clip(0, 1, out=along)
        away, aside = x - along * p, y - along * q
        away *= away
        aside *= aside
        away += aside
        near = places_in(away < (1.01 * radii * radii)[:, None])
        tube, column = np.divmod(near, x.shape[1])
        i, j = np.divmod(column, front.stop - front.start)
        columns = (i + right.start) * self.size[1] + (j + front.start)
        return columns, tube, x.reshape(-1)[near], y.reshape(-1)[near]

    def balls(self, centers: Floats, radii: Floats) -> tuple[Places, NDArray[np.intp]]:
        """Voxels inside ellipsoids, as `ellipsoid` has them, of all at once; `centers` and `radii` (n, 3)."""
        c, r = np.asarray(centers, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        first, window = self._windows(c, r.max(axis=0))
        i, j, k = (first[:, axis, None] + np.arange(count) for axis, count in enumerate(window))
        columns = (i[:, :, None] * self.size[1] + j[:, None, :]).reshape(len(c), -1)
        flat = self.plane.reshape(2, -1).take(columns, axis=1) - c.T[:2, :, None]
        flat /= r.T[:2, :, None]
        flat *= flat
        z = (self.z[0, 0].take(k) - c[:, 2:]) / r[:, 2:]
        z *= z
        found = places_in((flat[0] + flat[1])[:, :, None] + z[:, None, :] < 1)
        column, level = np.divmod(found, window[2])
        ball = column // columns.shape[1]
        return columns.reshape(-1).take(column) * self.size[2] + (first[ball, 2] + level), ball

    def _windows(self, centers: Floats, reach: Floats) -> tuple[NDArray[np.intp], list[int]]:
        """Windows of one size in the grid, around the body points (n, 3) and as far from them as `reach`, (3,), says.

        Blocks of their own sizes would need a list of voxels; a field is soon computed for some voxels more.

        Returns:
            (n, 3) first voxel, and how many along each axis.
        """
        turn, shift = self.to_voxels
        wide = reach @ np.abs(turn) + 0.01  # rounding
        count = [min(math.ceil(2 * w) + 1, n) for w, n in zip(wide.tolist(), self.size, strict=True)]
        first = np.ceil(centers @ turn + (shift - wide))
        return first.clip(0, np.subtract(self.size, count)).astype(np.intp), count


@functools.lru_cache(maxsize=16)
def _grid(size: tuple[int, int, int]) -> tuple[NDArray[np.float64], tuple[NDArray[np.float32], ...]]:
    """Voxel size, and the world coordinate of every voxel along each axis, mm."""
    spacing = np.array(FIELD_OF_VIEW) / np.array(size)
    world = tuple(
        ((np.arange(n) + 0.5) * s - f / 2).astype(np.float32)
        for n, s, f in zip(size, spacing, FIELD_OF_VIEW, strict=True)
    )
    for array in (spacing, *world):
        array.setflags(write=False)  # all scans of this size share them
    return spacing, world


def _three(point: Point) -> Sequence[float]:
    return point.tolist() if isinstance(point, np.ndarray) else point


def places_in(mask: Bools) -> Places:
    """Places of the true entries in the flat array; of several indices numpy makes a list ten times as slowly.

    Example:
        >>> places_in(np.array([[False, True], [True, True]])).tolist()
        [1, 2, 3]
    """
    return mask.reshape(-1).nonzero()[0]


def inside(field: Floats, where: Bools) -> Bools:
    """Voxels of a solid within a region; on a coarse grid at least the voxel that comes nearest, if the region has one.

    Example:
        >>> inside(np.array([3.0, 2.0, 0.5]), np.array([True, True, False])).tolist()
        [False, True, False]
    """
    found: Bools = field < 1
    found &= where
    if not np.count_nonzero(found) and where.any():
        found.flat[int(np.argmin(np.where(where, field, np.inf)))] = True
    return found
