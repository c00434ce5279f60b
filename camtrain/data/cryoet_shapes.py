"""Toy macromolecules: ten solids about the size of real ones, as signed distances in nanometres."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Points = Sequence[Floats]
"""Coordinates x, y and z of every voxel from the particle's middle, in nm, of one shape."""

REACH = 8.0
"""No part of any particle lies farther from its middle than this, in nm."""
EDGE = 0.6
"""Softness of the surface in nm: the density falls from 0.73 to 0.27 within it on either side."""


def globule(p: Points) -> Floats:
    """A ball of radius 4.5."""
    return _length(*p) - 4.5


def shell(p: Points) -> Floats:
    """A hollow ball of radius 5, its wall 2 thick, as a virus capsid."""
    return _wall(_length(*p), 5.0, 1.0)


def rod(p: Points) -> Floats:
    """A straight tube 12 long and 3.6 thick, with round ends."""
    return _capsule(p, (0, 0, -6.0), (0, 0, 6.0), 1.8)


def torus(p: Points) -> Floats:
    """A ring of radius 4.5 from a tube 3.4 thick."""
    return _length(_length(p[0], p[1]) - 4.5, p[2]) - 1.7


def dumbbell(p: Points) -> Floats:
    """Two balls on a thin bar."""
    return _joined(_balls(p, [(0, 0, -4.2), (0, 0, 4.2)], 2.8), _capsule(p, (0, 0, -4.2), (0, 0, 4.2), 1.0))


def tetramer(p: Points) -> Floats:
    """Four balls at the corners of a tetrahedron."""
    return _balls(p, 2.4 * np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]), 2.4)


def barrel(p: Points) -> Floats:
    """A pipe, open at both ends, as a proteasome."""
    return _cut(_wall(_length(p[0], p[1]), 3.4, 1.2), p[2], 5.5)


def disc(p: Points) -> Floats:
    """A flat cylinder."""
    return _cut(_length(p[0], p[1]) - 5.5, p[2], 1.3)


def helix(p: Points) -> Floats:
    """Two right-handed turns of 33 balls: the only one of the ten that differs from its mirror image."""
    turn = np.linspace(-2 * np.pi, 2 * np.pi, 33)
    return _balls(p, np.stack([3.5 * np.cos(turn), 3.5 * np.sin(turn), 5.0 * turn / (2 * np.pi)], axis=1), 1.3)


def tripod(p: Points) -> Floats:
    """Three arms from one point, not in one plane, as an antibody."""
    arms = [(5.4 * np.cos(a), 5.4 * np.sin(a), -2.4) for a in 2 * np.pi * np.arange(3) / 3]
    return _joined(*(_capsule(p, (0, 0, 1.6), arm, 1.6) for arm in arms))


SHAPES: dict[str, Callable[[Points], Floats]] = {
    shape.__name__: shape for shape in (globule, shell, rod, torus, dumbbell, tetramer, barrel, disc, helix, tripod)
}
"""Class -> distance to its surface in nm, negative inside, from the coordinates of voxels."""


def density_of(distance: Floats) -> NDArray[np.float32]:
    """Density from the distance to the surface: 1 deep inside, 0 far outside, one half on the surface.

    Args:
        distance: Signed distance in nm, any shape.

    Example:
        >>> density_of(np.array([-9.0, 0.0, 9.0])).round(2).tolist()
        [1.0, 0.5, 0.0]
    """
    density: NDArray[np.float32] = (0.5 - 0.5 * np.tanh(distance / (2 * EDGE))).astype(np.float32)
    return density


def rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """A rotation, all equally likely: a unit quaternion, uniform on its sphere, as a matrix (3, 3).

    Example:
        >>> turn = rotation(np.random.default_rng(0))
        >>> bool(np.allclose(turn @ turn.T, np.eye(3))), round(float(np.linalg.det(turn)), 6)
        (True, 1.0)
    """
    q = rng.standard_normal(4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def placed(size: Sequence[int], voxel: float, turn: Floats, shift: Sequence[float] | Floats) -> list[Floats]:
    """Coordinates of every voxel in the frame of a particle that is turned, then shifted from the volume's middle.

    Args:
        size: Voxels per axis, three numbers.
        voxel: Edge of a voxel in nm.
        turn: (3, 3) rotation matrix.
        shift: From the middle of the volume to that of the particle, in nm.

    Returns:
        x, y and z, each (X, Y, Z), in nm.

    Example:
        >>> [c[1, 1, 1].tolist() for c in placed((3, 3, 3), 2.0, np.eye(3), (1.0, 0.0, 0.0))]
        [-1.0, 0.0, 0.0]
    """
    axes = [(np.arange(n) - (n - 1) / 2) * voxel - s for n, s in zip(size, shift, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    # The inverse of a rotation is its transpose: column i of `turn` gives coordinate i.
    return [turn[0, i] * x + turn[1, i] * y + turn[2, i] * z for i in range(3)]


def _length(*parts: Floats) -> Floats:
    length: Floats = np.sqrt(np.add.reduce([part**2 for part in parts]))
    return length


def _joined(*solids: Floats) -> Floats:
    """Distance to the nearest of several solids."""
    nearest: Floats = np.minimum.reduce(solids)
    return nearest


def _cut(distance: Floats, along: Floats, half: float) -> Floats:
    """What of a solid lies within `half` of the middle along an axis."""
    rest: Floats = np.maximum(distance, np.abs(along) - half)
    return rest


def _wall(length: Floats, radius: float, half: float) -> Floats:
    """A wall of that half thickness at a radius."""
    wall: Floats = np.abs(length - radius) - half
    return wall


def _balls(p: Points, centres: Sequence[Sequence[float]] | Floats, radius: float) -> Floats:
    """Distance to the nearest of several balls."""
    squares = [sum((c - o) ** 2 for c, o in zip(p, centre, strict=True)) for centre in centres]
    distance: Floats = np.sqrt(np.minimum.reduce(squares)) - radius
    return distance


def _capsule(p: Points, start: Sequence[float], end: Sequence[float], radius: float) -> Floats:
    """Distance to a tube with round ends."""
    way = np.subtract(end, start)
    along = sum((c - o) * d for c, o, d in zip(p, start, way, strict=True)) / (way @ way)
    along = np.clip(along, 0, 1)
    return _length(*(c - o - along * d for c, o, d in zip(p, start, way, strict=True))) - radius
