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
        self.x = ((cos * right[:, None] + sin * front[None, :]) / np.float32(pose.scale[0]))[:, :, None]
        self.y = ((cos * front[None, :] - sin * right[:, None]) / np.float32(pose.scale[1]))[:, :, None]
        self.z = (up / np.float32(pose.scale[2]))[None, None, :]

    def index(self, points: Floats) -> NDArray[np.intp]:
        """Voxel that holds each body point, (..., 3), clipped to the scan."""
        cos, sin = np.cos(self.pose.roll), np.sin(self.pose.roll)
        x, y, z = (points[..., axis] * scale for axis, scale in enumerate(self.pose.scale))
        voxels = np.empty((3, *points.shape[:-1]), np.intp)
        for axis, place in enumerate((cos * x - sin * y, sin * x + cos * y, z)):
            place += self.pose.shift[axis]
            place += FIELD_OF_VIEW[axis] / 2
            place /= self.spacing[axis]
            np.minimum(np.maximum(place, 0, out=place), self.size[axis] - 1, out=place)
            voxels[axis] = place
        return np.moveaxis(voxels, 0, -1)

    def box(self, low: Point, high: Point) -> Box:
        """Voxels that cover the body block from `low` to `high` (mm), one voxel of margin, never empty."""
        (x0, y0, z0), (x1, y1, z1), (right, front, up) = _three(low), _three(high), self.pose.scale
        x, y, z = right * (x0 + x1) / 2, front * (y0 + y1) / 2, up * (z0 + z1) / 2
        wide, deep, high_ = right * (x1 - x0) / 2, front * (y1 - y0) / 2, up * (z1 - z0) / 2
        cos, sin, turned = self._cos, self._sin, abs(self._sin)
        return (
            self._cover(0, cos * x - sin * y, cos * wide + turned * deep),
            self._cover(1, sin * x + cos * y, turned * wide + cos * deep),
            self._cover(2, z, high_),
        )

    def _cover(self, axis: int, center: float, reach: float) -> slice:
        shift, extent, n = self.pose.shift[axis], FIELD_OF_VIEW[axis], self.size[axis]
        first = math.floor((center - reach + shift + extent / 2) * n / extent) - 1
        last = math.floor((center + reach + shift + extent / 2) * n / extent) + 2
        first = min(max(first, 0), n - 1)
        return slice(first, max(min(last, n), first + 1))

    def at(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """Body coordinates inside a box."""
        return self.x[box[:2]], self.y[box[:2]], self.z[:, :, box[2]]

    def ellipsoid(self, center: Point, radii: Point) -> tuple[Box, Floats]:
        """Field of an ellipsoid: squared distance in units of the radii."""
        c, r = np.asarray(center, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        box = self.box(c - r, c + r)
        x, y, z = ((v - o) / s for v, o, s in zip(self.at(box), c.tolist(), r.tolist(), strict=True))
        return box, (x * x + y * y) + z * z

    def capsule(self, start: Point, end: Point, radius: float) -> tuple[Box, Floats]:
        """Field of a tube with round ends: squared distance from the line in units of the radius."""
        a, b, r = np.asarray(start, np.float32), np.asarray(end, np.float32), np.float32(max(radius, self.thin))
        box = self.box(np.minimum(a, b) - r, np.maximum(a, b) + r)
        x, y, z = (v - o for v, o in zip(self.at(box), a.tolist(), strict=True))
        line = b - a
        p, q, s = line.tolist()
        along = (x * p + y * q) + z * s
        along /= max(float(line @ line), 1e-6)
        np.maximum(along, 0, out=along)
        np.minimum(along, 1, out=along)
        field: Floats = np.zeros_like(along)
        for axis, step in ((x, p), (y, q), (z, s)):  # in place: tubes are small, and arrays cost more than sums
            away = along * step
            np.subtract(axis, away, out=away)
            np.multiply(away, away, out=away)
            field += away
        field /= r**2
        return box, field

    def tubes(self, starts: Floats, ends: Floats, radii: Sequence[float]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Voxels inside tubes with round ends, as `capsule` has them, of all tubes at once.

        Args:
            starts: (n, 3).
            ends: (n, 3).
            radii: n.

        Returns:
            (voxels,) place of each in the flat volume, and (voxels,) number of its tube.
        """
        a, b = np.asarray(starts, np.float32), np.asarray(ends, np.float32)
        r = [np.float32(max(radius, self.thin)) for radius in radii]
        reach = np.array(r)[:, None]
        cells = _Cells(self, np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        lines = b - a
        length = np.array([max(float(line @ line), 1e-6) for line in lines], np.float32)
        (ax, ay, az), (p, q, s) = a.T[:, cells.solid], lines.T[:, cells.solid]
        x, y = self.x[cells.i, cells.j, 0] - ax, self.y[cells.i, cells.j, 0] - ay
        column, flat = cells.column, x * p + y * q
        z = self.z[0, 0][cells.k] - az[column]
        along = z * s[column]
        np.add(flat[column], along, out=along)
        along /= length[cells.solid][column]
        np.minimum(np.maximum(along, 0, out=along), 1, out=along)
        field = np.zeros_like(along)
        for axis, step in ((x[column], p), (y[column], q), (z, s)):
            axis -= along * step[column]
            axis *= axis
            field += axis
        field /= np.array([one**2 for one in r])[cells.solid][column]
        return cells.where(field < 1)

    def balls(self, centers: Floats, radii: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Voxels inside ellipsoids, as `ellipsoid` has them, of all at once; `centers` and `radii` (n, 3)."""
        c, r = np.asarray(centers, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        cells = _Cells(self, c - r, c + r)
        (cx, cy, cz), (rx, ry, rz) = c.T[:, cells.solid], r.T[:, cells.solid]
        flat = ((self.x[cells.i, cells.j, 0] - cx) / rx) ** 2 + ((self.y[cells.i, cells.j, 0] - cy) / ry) ** 2
        z = ((self.z[0, 0][cells.k] - cz[cells.column]) / rz[cells.column]) ** 2
        return cells.where(flat[cells.column] + z < 1)


class _Cells:
    """The voxels of many boxes in one list, column by column: numpy takes longer for a call than for a small box.

    Args:
        frame: Coordinates.
        low: (n, 3) body points, mm.
        high: (n, 3).

    Attributes:
        solid: (columns,) whose box.
        i: (columns,) index along the first axis.
        j: (columns,) along the second.
        column: (voxels,) which column.
        k: (voxels,) index along the third axis.
    """

    def __init__(self, frame: Frame, low: Floats, high: Floats) -> None:
        self._size = frame.size
        first, count = _boxes(frame, low.astype(np.float64), high.astype(np.float64))
        self.solid, place = _ragged(count[:, 0] * count[:, 1])
        i, j = np.divmod(place, count[self.solid, 1])
        self.i, self.j = i + first[self.solid, 0], j + first[self.solid, 1]
        self.column, k = _ragged(count[self.solid, 2])
        self.k = k + first[self.solid, 2][self.column]

    def where(self, inside: Bools) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Places in the flat volume, and whose box they are of."""
        found = np.flatnonzero(inside)
        column = self.column[found]
        places = (self.i * self._size[1] + self.j)[column] * self._size[2] + self.k[found]
        return places, self.solid[column]


def _ragged(counts: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Whose each entry is, and its number there.

    Example:
        >>> [a.tolist() for a in _ragged(np.array([2, 1]))]
        [[0, 0, 1], [0, 1, 0]]
    """
    ends = counts.cumsum()
    whose = np.repeat(np.arange(len(counts)), counts)
    return whose, np.arange(len(whose)) - (ends - counts)[whose]


def _boxes(frame: Frame, low: Floats, high: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First voxel and number of voxels, (n, 3) each, of boxes as `Frame.box` makes them."""
    scale, size = np.array(frame.pose.scale), np.array(frame.size)
    cos, sin = math.cos(frame.pose.roll), math.sin(frame.pose.roll)
    turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]) * (scale / 2)[:, None]
    center = (low + high) @ turn + [
        shift + extent / 2 for shift, extent in zip(frame.pose.shift, FIELD_OF_VIEW, strict=True)
    ]
    reach = (high - low) @ np.abs(turn)
    first = np.floor((center - reach) / frame.spacing).astype(np.intp) - 1
    last = np.floor((center + reach) / frame.spacing).astype(np.intp) + 2
    first = np.minimum(np.maximum(first, 0), size - 1)
    return first, np.maximum(np.minimum(last, size) - first, 1)


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


def inside(field: Floats, where: Bools) -> Bools:
    """Voxels of a solid within a region; on a coarse grid at least the voxel that comes nearest, if the region has one.

    Example:
        >>> inside(np.array([3.0, 2.0, 0.5]), np.array([True, True, False])).tolist()
        [False, True, False]
    """
    found: Bools = (field < 1) & where
    if not found.any() and where.any():
        found.flat[int(np.argmin(np.where(where, field, np.inf)))] = True
    return found
