"""The phantom's coordinates: where each voxel lies in the patient, and simple solids in millimetres.

World coordinates are RAS millimetres around the middle of the scan; body coordinates are the same for a patient who
lies shifted, turned and scaled. All solids are fields: below 1 inside, above 1 outside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    affine.setflags(write=False)
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
        self.spacing, self.thin, self._bounds, world = _grid(size)
        self._cos, self._sin = math.cos(pose.roll), math.sin(pose.roll)
        cos, sin = np.float32(np.cos(pose.roll)), np.float32(np.sin(pose.roll))
        right, front, up = (w - np.float32(c) for w, c in zip(world, pose.shift, strict=True))
        self.front = world[1][None, :, None]
        self.x = ((cos * right[:, None] + sin * front[None, :]) / np.float32(pose.scale[0]))[:, :, None]
        self.y = ((cos * front[None, :] - sin * right[:, None]) / np.float32(pose.scale[1]))[:, :, None]
        self.z = (up / np.float32(pose.scale[2]))[None, None, :]

    def places(self, points: Floats) -> Places:
        """Voxel that holds each body point, clipped to the scan: (3, n, m) mm to (n, m) places in the flat volume."""
        scale, shift = np.array([self.pose.scale, self.pose.shift])[:, :, None, None]
        extent, spacing, last = self._bounds
        cos, sin = np.cos(self.pose.roll), np.sin(self.pose.roll)
        world = points * scale
        x, y = world[:2].copy()
        world[0] *= cos
        world[0] -= sin * y
        world[1] *= cos
        x *= sin
        world[1] += x
        world += shift
        world += extent
        world /= spacing
        np.minimum(np.maximum(world, 0, out=world), last, out=world)
        voxels: Places = world.astype(np.intp)
        i, j, k = voxels
        i *= self.size[1]
        i += j
        i *= self.size[2]
        i += k
        found: Places = i
        return found

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
            first = min(max(first, 0), n - 1)
            box.append(slice(first, max(min(last, n), first + 1)))
        return box[0], box[1], box[2]

    def at(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """Body coordinates inside a box."""
        return self.x[box[:2]], self.y[box[:2]], self.z[:, :, box[2]]

    def ellipsoid(self, center: Point, radii: Point) -> tuple[Box, Floats]:
        """Field of an ellipsoid: squared distance in units of the radii."""
        c, r = np.asarray(center, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        box = self.box(c - r, c + r)
        (cx, cy, cz), (rx, ry, rz) = c.tolist(), r.tolist()
        x, y, z = (self.x[box[:2]] - cx) / rx, (self.y[box[:2]] - cy) / ry, (self.z[:, :, box[2]] - cz) / rz
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
        sizes = {radius: np.float32(max(radius, self.thin)) for radius in set(radii)}
        reach = np.array([sizes[radius] for radius in radii])[:, None]
        cells = _Cells(self, np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        lines, squares = b - a, {radius: size**2 for radius, size in sizes.items()}
        solids = np.empty((8, len(a)), np.float32)
        solids[:3], solids[3:6] = a.T, lines.T
        solids[6] = np.maximum(np.matmul(lines[:, None, :], lines[:, :, None])[:, 0, 0], np.float32(1e-6))
        solids[7] = [squares[radius] for radius in radii]
        columns = np.empty((9, len(cells.solid)), np.float32)
        solids.take(cells.solid, axis=1, out=columns[1:], mode="clip")
        x, y, p, q = self.x.reshape(-1)[cells.place], self.y.reshape(-1)[cells.place], columns[4], columns[5]
        x -= columns[1]
        y -= columns[2]
        columns[0], columns[1], columns[2] = x * p + y * q, x, y
        along, x, y, z0, p, q, s, length, square = columns.repeat(cells.heights, axis=1)
        z = self.z[0, 0].take(cells.k)
        z -= z0
        along += z * s
        along /= length
        np.minimum(np.maximum(along, 0, out=along), 1, out=along)
        for axis, step in ((x, p), (y, q), (z, s)):
            step *= along
            axis -= step
            axis *= axis
        x += y
        x += z
        # As x / square < 1: rounding never lifts a quotient of two different numbers to 1.
        return cells.where(x < square)

    def balls(self, centers: Floats, radii: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Voxels inside ellipsoids, as `ellipsoid` has them, of all at once; `centers` and `radii` (n, 3)."""
        c, r = np.asarray(centers, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        cells = _Cells(self, c - r, c + r)
        cx, cy, cz, rx, ry, rz = np.concatenate([c, r], axis=1).T.take(cells.solid, axis=1)
        x, y = self.x.reshape(-1)[cells.place], self.y.reshape(-1)[cells.place]
        flat = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
        flat, cz, rz = np.stack([flat, cz, rz]).repeat(cells.heights, axis=1)
        z = self.z[0, 0].take(cells.k)
        z -= cz
        z /= rz
        z *= z
        z += flat
        return cells.where(z < 1)


class _Cells:
    """The voxels of many boxes in one list, column by column: numpy takes longer for a call than for a small box.

    Only voxels whose middle lies in a box, or so close beside it that rounding decides.

    Args:
        frame: Coordinates.
        low: (n, 3) body points, mm.
        high: (n, 3).

    Attributes:
        solid: (columns,) whose box.
        place: (columns,) place in the flat plane of the first two axes.
        heights: (columns,) voxels.
        column: (voxels,) which column.
        k: (voxels,) index along the third axis.
    """

    def __init__(self, frame: Frame, low: Floats, high: Floats) -> None:
        self._size = frame.size
        first, count = _boxes(frame, low.astype(np.float64), high.astype(np.float64))
        self.solid, place = _ragged(count[0] * count[1])
        i0, j0, k0, across, self.heights = np.concatenate([first, count[1:]]).take(self.solid, axis=1)
        i, j = np.divmod(place, across)
        self.place = (i + i0) * frame.size[1] + (j + j0)
        self.column, self.k = _ragged(self.heights, k0)

    def where(self, inside: Bools) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Places in the flat volume, and whose box they are of."""
        found = np.flatnonzero(inside)
        column = self.column.take(found)
        places = (self.place * self._size[2]).take(column)
        places += self.k.take(found)
        return places, self.solid.take(column)


def _ragged(counts: Places, first: Places | int = 0) -> tuple[Places, Places]:
    """Whose each entry is, and its number there, from `first` on.

    Example:
        >>> [a.tolist() for a in _ragged(np.array([2, 1]), np.array([5, 0]))]
        [[0, 0, 1], [5, 6, 0]]
    """
    whose = np.arange(len(counts)).repeat(counts)
    numbers = np.arange(len(whose))
    numbers -= (counts.cumsum() - counts - first).repeat(counts)
    return whose, numbers


def _boxes(frame: Frame, low: Floats, high: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First voxel and number of voxels, (3, n) each, of those whose middle lies in boxes, or a hundredth of one off."""
    cos, sin = math.cos(frame.pose.roll), math.sin(frame.pose.roll)
    (right, front, up), (wide, deep, high_) = frame.pose.scale, frame.spacing.tolist()
    turn = np.array(
        [
            [cos * right / wide / 2, -sin * front / wide / 2, 0.0],
            [sin * right / deep / 2, cos * front / deep / 2, 0.0],
            [0.0, 0.0, up / high_ / 2],
        ]
    )
    shift = [
        [shift / step + n / 2 - 0.5]
        for shift, step, n in zip(frame.pose.shift, (wide, deep, high_), frame.size, strict=True)
    ]
    center, reach = turn @ (low + high).T + shift, np.abs(turn) @ (high - low).T + 0.01
    first = np.ceil(np.maximum(center - reach, 0)).astype(np.intp)
    last = np.minimum(np.floor(center + reach), np.array(frame.size)[:, None] - 1).astype(np.intp)
    return first, np.maximum(last - first + 1, 0)


class _Grid(NamedTuple):
    """What all scans of one size share.

    Attributes:
        spacing: (3,) voxel size, mm.
        thin: See `Frame`.
        bounds: (3, 3, 1, 1) half the field of view, voxel size, and the last voxel, along each axis.
        world: World coordinate of every voxel along each axis, mm.
    """

    spacing: NDArray[np.float64]
    thin: float
    bounds: NDArray[np.float64]
    world: tuple[NDArray[np.float32], ...]


@functools.lru_cache(maxsize=16)
def _grid(size: tuple[int, int, int]) -> _Grid:
    spacing = np.array(FIELD_OF_VIEW) / np.array(size)
    world = tuple(
        ((np.arange(n) + 0.5) * s - f / 2).astype(np.float32)
        for n, s, f in zip(size, spacing, FIELD_OF_VIEW, strict=True)
    )
    bounds = np.array([np.array(FIELD_OF_VIEW) / 2, spacing, np.array(size) - 1])[:, :, None, None]
    for array in (spacing, bounds, *world):
        array.setflags(write=False)
    return _Grid(spacing, 0.62 * float(spacing.max()), bounds, world)


def _three(point: Point) -> Sequence[float]:
    return point.tolist() if isinstance(point, np.ndarray) else point


def inside(field: Floats, where: Bools) -> Bools:
    """Voxels of a solid within a region; on a coarse grid at least the voxel that comes nearest, if the region has one.

    Example:
        >>> inside(np.array([3.0, 2.0, 0.5]), np.array([True, True, False])).tolist()
        [False, True, False]
    """
    found: Bools = field < 1
    found &= where
    if not found.any() and where.any():
        found.flat[int(np.argmin(np.where(where, field, np.inf)))] = True
    return found
