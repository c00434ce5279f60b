"""The phantom's coordinates: where each voxel lies in the patient, and simple solids in millimetres.

World coordinates are RAS millimetres around the middle of the scan; body coordinates are the same for a patient who
lies shifted, turned and scaled. All solids are fields: below 1 inside, above 1 outside.
"""

from __future__ import annotations

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
        self.spacing = np.array(FIELD_OF_VIEW) / np.array(size)
        self.thin = 0.62 * float(self.spacing.max())
        world = [
            ((np.arange(n) + 0.5) * s - f / 2).astype(np.float32)
            for n, s, f in zip(size, self.spacing, FIELD_OF_VIEW, strict=True)
        ]
        cos, sin = np.float32(np.cos(pose.roll)), np.float32(np.sin(pose.roll))
        right, front, up = (w - np.float32(c) for w, c in zip(world, pose.shift, strict=True))
        self.front = world[1][None, :, None]
        self.x = ((cos * right[:, None] + sin * front[None, :]) / np.float32(pose.scale[0]))[:, :, None]
        self.y = ((cos * front[None, :] - sin * right[:, None]) / np.float32(pose.scale[1]))[:, :, None]
        self.z = (up / np.float32(pose.scale[2]))[None, None, :]

    def index(self, points: Floats) -> NDArray[np.intp]:
        """Voxel that holds each body point, (n, 3), clipped to the scan."""
        cos, sin = np.cos(self.pose.roll), np.sin(self.pose.roll)
        x, y, z = (points * np.array(self.pose.scale)).T
        world = np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1) + self.pose.shift
        voxel = np.floor((world + np.array(FIELD_OF_VIEW) / 2) / self.spacing).astype(np.intp)
        clipped: NDArray[np.intp] = np.clip(voxel, 0, np.array(self.size) - 1)
        return clipped

    def box(self, low: Point, high: Point) -> Box:
        """Voxels that cover the body block from `low` to `high` (mm), one voxel of margin, never empty."""
        cos, sin = math.cos(self.pose.roll), math.sin(self.pose.roll)
        middle = [s * (float(a) + float(b)) / 2 for s, a, b in zip(self.pose.scale, low, high, strict=True)]
        half = [s * (float(b) - float(a)) / 2 for s, a, b in zip(self.pose.scale, low, high, strict=True)]
        center = (cos * middle[0] - sin * middle[1], sin * middle[0] + cos * middle[1], middle[2])
        reach = (cos * half[0] + abs(sin) * half[1], abs(sin) * half[0] + cos * half[1], half[2])
        slices = []
        for c, r, shift, fov, n in zip(center, reach, self.pose.shift, FIELD_OF_VIEW, self.size, strict=True):
            first = math.floor((c - r + shift + fov / 2) * n / fov) - 1
            last = math.floor((c + r + shift + fov / 2) * n / fov) + 2
            first = min(max(first, 0), n - 1)
            slices.append(slice(first, max(min(last, n), first + 1)))
        return slices[0], slices[1], slices[2]

    def at(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """Body coordinates inside a box."""
        return self.x[box[:2]], self.y[box[:2]], self.z[:, :, box[2]]

    def ellipsoid(self, center: Point, radii: Point) -> tuple[Box, Floats]:
        """Field of an ellipsoid: squared distance in units of the radii."""
        c, r = np.asarray(center, np.float32), np.maximum(np.asarray(radii, np.float32), self.thin)
        box = self.box(c - r, c + r)
        x, y, z = self.at(box)
        return box, ((x - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((z - c[2]) / r[2]) ** 2

    def capsule(self, start: Point, end: Point, radius: float) -> tuple[Box, Floats]:
        """Field of a tube with round ends: squared distance from the line in units of the radius."""
        a, b, r = np.asarray(start, np.float32), np.asarray(end, np.float32), np.float32(max(radius, self.thin))
        box = self.box(np.minimum(a, b) - r, np.maximum(a, b) + r)
        x, y, z = (v - o for v, o in zip(self.at(box), a, strict=True))
        d = b - a
        along = np.clip((x * d[0] + y * d[1] + z * d[2]) / max(float(d @ d), 1e-6), 0, 1)
        return box, ((x - along * d[0]) ** 2 + (y - along * d[1]) ** 2 + (z - along * d[2]) ** 2) / r**2


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
