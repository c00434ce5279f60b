"""Pictures in the manner of photographs, made here: textured grounds, clutter, and animals and things in front.

They stand in for PASCAL VOC where it is absent, so that a recipe runs anywhere; every picture follows from the
generator that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Colour = tuple[float, float, float]


class Part(NamedTuple):
    """A piece of an object: where it is, its colour (0 to 1), and how strongly the object's pattern shows on it."""

    where: Bools
    colour: Colour
    pattern: float


class Patch(NamedTuple):
    """Something to paint: where in its window it is (h, w), its colours (h, w, 3), and the window's corner."""

    where: Bools
    colours: Floats
    place: tuple[int, int]


@dataclass(frozen=True)
class Drawn:
    """One object of a picture.

    Attributes:
        name: Its class.
        whole: (H, W) bool, the object as if nothing stood before it, cut at the border of the picture.
        visible: (H, W) bool, what can be seen of it.
        cut: Part of it lies outside the picture.
    """

    name: str
    whole: Bools
    visible: Bools
    cut: bool


def draw_picture(names: Sequence[str], size: tuple[int, int], rng: np.random.Generator) -> tuple[Floats, list[Drawn]]:
    """A ground with clutter, one object per name (later ones stand before earlier ones), and a little before them.

    Args:
        names: Classes of the objects, keys of `OBJECTS`.
        size: Height and width in pixels.
        rng: Source of everything random.

    Returns:
        (H, W, 3) float32 in 0..1, and the objects in the order of `names`.

    Example:
        >>> picture, objects = draw_picture(["cat"], (48, 64), np.random.default_rng(0))
        >>> picture.shape, objects[0].name
        ((48, 64, 3), 'cat')
    """
    picture = _ground(size, rng)
    for _ in range(int(rng.integers(3, 9))):
        _paint(picture, _clutter(size, rng, 0.12))
    patches = [_object(name, size, rng) for name in names]
    wholes = [_paint(picture, patch) for patch in patches]
    cuts = [bool(p.where.sum() > w.sum()) for p, w in zip(patches, wholes, strict=True)]
    front = np.zeros(size, dtype=bool)
    for _ in range(int(rng.integers(0, 3))):
        front |= _paint(picture, _clutter(size, rng, 0.09))
    drawn = []
    for name, whole, cut in zip(reversed(names), reversed(wholes), reversed(cuts), strict=True):
        drawn.append(Drawn(name, whole, whole & ~front, cut))
        front |= whole
    picture = gaussian_filter(picture, (0.5, 0.5, 0)) * rng.uniform(0.75, 1.15)
    picture += rng.normal(0, 0.015, picture.shape)
    return np.clip(picture, 0, 1).astype(np.float32), drawn[::-1]


def _paint(picture: Floats, patch: Patch) -> Bools:
    """Put a patch into the picture, in place; returns the pixels (H, W) that it covers."""
    covered = np.zeros(picture.shape[:2], dtype=bool)
    (top, left), (height, width) = patch.place, patch.where.shape
    rows = slice(max(0, top), max(0, min(picture.shape[0], top + height)))
    columns = slice(max(0, left), max(0, min(picture.shape[1], left + width)))
    inside = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    covered[rows, columns] = patch.where[inside]
    picture[covered] = patch.colours[inside][patch.where[inside]]
    return covered


def clouds(size: tuple[int, int], rng: np.random.Generator, coarse: int = 3, octaves: int = 4) -> Floats:
    """Smooth noise of several scales, mean 0, deviation 1, (H, W): finer scales are weaker, as in photographs."""
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        cells = coarse * 2**octave
        grid = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        total += np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC)) / 1.7**octave
    even: Floats = (total - total.mean()) / (total.std() + np.float32(1e-6))
    return even


def _ground(size: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Two textured areas that meet at a slanting line, such as meadow and sky, or floor and wall."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32) / np.float32(max(size))
    line = rng.uniform(0.1, 0.7) + rng.uniform(-0.25, 0.25) * columns + 0.03 * clouds(size, rng)
    areas = [_texture(size, rng) for _ in range(2)]
    picture = np.where((rows < line)[..., None], *areas).astype(np.float32)
    light = 1 + 0.15 * clouds(size, rng, coarse=2, octaves=1)
    return picture * light[..., None]


def _texture(size: tuple[int, int], rng: np.random.Generator) -> Floats:
    """(H, W, 3): noise, or stripes that noise bends, around a muted colour."""
    pattern = clouds(size, rng, coarse=int(rng.integers(2, 10)))
    if rng.random() < 0.4:
        rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.06, 0.25) * max(size)
        pattern = np.sin(2 * np.pi * (np.cos(angle) * rows + np.sin(angle) * columns) / period + pattern)
    base = rng.uniform(0.2, 0.8, 3) * 0.6 + rng.uniform(0.15, 0.7) * 0.4
    tint = rng.uniform(0.3, 1.0, 3) * rng.uniform(0.04, 0.16)
    textured: Floats = (base + tint * pattern[..., None]).astype(np.float32)
    return textured


def _clutter(size: tuple[int, int], rng: np.random.Generator, reach: float) -> Patch:
    """A stone, a plank or a shard of any colour."""
    half = rng.uniform(0.3, 1.0) * reach * max(size)
    u, v, place = _window(size, rng.uniform(0, 1, 2), half, rng.uniform(0, np.pi), 1.0)
    kind, slim = int(rng.integers(3)), rng.uniform(0.2, 1.0)
    if kind == 0:
        where = _ellipse(u, v, 0, 0, 1, slim)
    elif kind == 1:
        where = _box(u, v, -1.3, -slim / 2, 1.3, slim / 2)
    else:
        where = _polygon(u, v, [(-1, -slim), (1, -0.3 * slim), (0.2, slim)])
    return Patch(where, _texture((u.shape[0], u.shape[1]), rng), place)


def _object(name: str, size: tuple[int, int], rng: np.random.Generator) -> Patch:
    half, mirror = rng.uniform(0.17, 0.36) * min(size), rng.choice([-1.0, 1.0])
    u, v, place = _window(size, rng.uniform(0.15, 0.85, 2), half, rng.uniform(-0.3, 0.3), mirror)
    parts, pattern = OBJECTS[name](u, v, rng)
    where, colours = np.zeros(u.shape, dtype=bool), np.zeros((*u.shape, 3), dtype=np.float32)
    shade = (1 - 0.18 * v)[..., None]
    for part in parts:
        tone = 1 + part.pattern * pattern[part.where]
        colours[part.where] = np.asarray(part.colour, dtype=np.float32) * tone[:, None] * shade[part.where]
        where |= part.where
    return Patch(where, colours, place)


def _window(
    size: tuple[int, int], centre: NDArray[np.float64], half: float, angle: float, mirror: float
) -> tuple[Floats, Floats, tuple[int, int]]:
    """A square around an object that reaches `half` pixels to either side, and where it lies in the picture.

    Returns:
        Coordinates u (right) and v (down), -1 to 1 on the object, turned and mirrored; row and column of the corner.
    """
    side = int(np.ceil(2.7 * half))
    top, left = np.round(centre * size - side / 2).astype(int)
    down, right = ((np.mgrid[:side, :side] + 0.5 - side / 2) / half).astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.float32(mirror) * (cos * right + sin * down), cos * down - sin * right, (int(top), int(left))


def _ellipse(u: Floats, v: Floats, at_u: float, at_v: float, half_u: float, half_v: float) -> Bools:
    inside: Bools = ((u - at_u) / half_u) ** 2 + ((v - at_v) / half_v) ** 2 < 1
    return inside


def _box(u: Floats, v: Floats, left: float, top: float, right: float, bottom: float) -> Bools:
    inside: Bools = (u > left) & (u < right) & (v > top) & (v < bottom)
    return inside


def _polygon(u: Floats, v: Floats, corners: Sequence[tuple[float, float]]) -> Bools:
    """Convex, in any direction of turning."""
    sides = [
        (q[0] - p[0]) * (v - p[1]) - (q[1] - p[1]) * (u - p[0])
        for p, q in zip(corners, [*corners[1:], corners[0]], strict=True)
    ]
    inside: Bools = np.all([s > 0 for s in sides], axis=0) | np.all([s < 0 for s in sides], axis=0)
    return inside


def _varied(rng: np.random.Generator, *choices: Colour) -> Colour:
    red, green, blue = np.clip(np.array(choices[int(rng.integers(len(choices)))]) + rng.normal(0, 0.05, 3), 0.03, 1)
    return float(red), float(green), float(blue)


def _dark(colour: Colour, by: float = 0.55) -> Colour:
    return colour[0] * by, colour[1] * by, colour[2] * by


Drawing = tuple[list[Part], Floats]


def _bird(u: Floats, v: Floats, rng: np.random.Generator) -> Drawing:
    colour = _varied(rng, (0.45, 0.32, 0.2), (0.2, 0.35, 0.7), (0.75, 0.2, 0.15), (0.15, 0.15, 0.17))
    slim = rng.uniform(0.28, 0.42)
    parts = [
        Part(_polygon(u, v, [(-0.35, -0.1), (-1.0, 0.15), (-0.9, 0.45), (-0.3, 0.2)]), _dark(colour), 0.1),
        Part(_box(u, v, -0.05, 0.2, 0.02, 0.8) | _box(u, v, 0.15, 0.2, 0.22, 0.8), (0.6, 0.4, 0.1), 0.0),
        Part(_ellipse(u, v, 0, 0, 0.6, slim), colour, 0.25),
        Part(_ellipse(u, v, -0.12, 0.0, 0.42, 0.6 * slim), _dark(colour, 0.7), 0.3),
        Part(_ellipse(u, v, 0.55, -0.36, 0.25, 0.23), colour, 0.15),
        Part(_polygon(u, v, [(0.76, -0.46), (1.05, -0.32), (0.76, -0.24)]), (0.9, 0.6, 0.1), 0.0),
        Part(_ellipse(u, v, 0.62, -0.42, 0.05, 0.05), (0.02, 0.02, 0.02), 0.0),
    ]
    return parts, clouds((u.shape[0], u.shape[1]), rng, coarse=24, octaves=2)


def _bottle(u: Floats, v: Floats, rng: np.random.Generator) -> Drawing:
    colour = _varied(rng, (0.1, 0.4, 0.2), (0.4, 0.2, 0.07), (0.55, 0.7, 0.75))
    half = rng.uniform(0.22, 0.32)
    parts = [
        Part(_box(u, v, -half, -0.25, half, 1.0), colour, 0.25),
        Part(_ellipse(u, v, 0, -0.25, half, 0.3), colour, 0.25),
        Part(_box(u, v, -0.4 * half, -0.95, 0.4 * half, -0.3), colour, 0.25),
        Part(_box(u, v, -0.45 * half, -1.0, 0.45 * half, -0.88), _varied(rng, (0.8, 0.1, 0.1), (0.9, 0.8, 0.3)), 0.0),
        Part(_box(u, v, -half, 0.15, half, 0.65), _varied(rng, (0.9, 0.88, 0.8), (0.8, 0.75, 0.3)), 0.05),
    ]
    return parts, np.exp(-(((u + 0.45 * half) / (0.3 * half)) ** 2)) * 4 - 0.5


def _car(u: Floats, v: Floats, rng: np.random.Generator) -> Drawing:
    colour = _varied(rng, (0.75, 0.1, 0.1), (0.1, 0.2, 0.6), (0.85, 0.85, 0.87), (0.12, 0.12, 0.13), (0.8, 0.7, 0.1))
    roof = rng.uniform(-0.55, -0.4)
    glass = (0.35, 0.45, 0.5)
    parts = [
        Part(_polygon(u, v, [(-0.65, 0.0), (-0.4, roof), (0.3, roof), (0.65, 0.0)]), colour, 0.1),
        Part(_polygon(u, v, [(-0.5, -0.02), (-0.33, 0.85 * roof), (-0.05, 0.85 * roof), (-0.05, -0.02)]), glass, 0.1),
        Part(_polygon(u, v, [(0.02, -0.02), (0.02, 0.85 * roof), (0.25, 0.85 * roof), (0.5, -0.02)]), glass, 0.1),
        Part(_box(u, v, -1.0, -0.05, 1.0, 0.35), colour, 0.1),
        Part(_box(u, v, 0.88, 0.02, 1.0, 0.14), (0.95, 0.9, 0.6), 0.0),
    ]
    for at in (-0.55, 0.55):
        parts.append(Part(_ellipse(u, v, at, 0.35, 0.24, 0.24), (0.06, 0.06, 0.06), 0.0))
        parts.append(Part(_ellipse(u, v, at, 0.35, 0.11, 0.11), (0.6, 0.6, 0.62), 0.0))
    return parts, np.float32(1) - np.abs(v) * np.float32(4)


def _cat(u: Floats, v: Floats, rng: np.random.Generator) -> Drawing:
    colour = _varied(rng, (0.8, 0.5, 0.2), (0.5, 0.48, 0.46), (0.35, 0.26, 0.2))
    tail = np.abs(np.hypot(u + 0.62, v - 0.05) - 0.38) < 0.075
    parts = [
        Part(tail & (u < -0.5) & (v < 0.3), colour, 0.3),
        Part(_ellipse(u, v, -0.12, 0.3, 0.58, 0.42), colour, 0.3),
        Part(_box(u, v, 0.15, 0.4, 0.3, 0.95) | _box(u, v, -0.5, 0.4, -0.34, 0.95), colour, 0.3),
        Part(_polygon(u, v, [(0.2, -0.45), (0.22, -1.0), (0.55, -0.55)]), _dark(colour, 0.8), 0.0),
        Part(_polygon(u, v, [(0.9, -0.35), (0.95, -0.95), (0.55, -0.6)]), _dark(colour, 0.8), 0.0),
        Part(_ellipse(u, v, 0.55, -0.25, 0.4, 0.37), colour, 0.2),
        Part(_ellipse(u, v, 0.42, -0.3, 0.07, 0.08) | _ellipse(u, v, 0.7, -0.3, 0.07, 0.08), (0.7, 0.8, 0.2), 0.0),
        Part(_ellipse(u, v, 0.57, -0.14, 0.07, 0.05), (0.85, 0.5, 0.5), 0.0),
    ]
    return parts, np.sin((u + 0.2 * v) * rng.uniform(16, 22))


def _plant(u: Floats, v: Floats, rng: np.random.Generator) -> Drawing:
    green = _varied(rng, (0.15, 0.5, 0.15), (0.3, 0.55, 0.1), (0.1, 0.4, 0.25))
    pot = _varied(rng, (0.7, 0.35, 0.2), (0.85, 0.83, 0.8), (0.25, 0.3, 0.5))
    parts = []
    for turn in np.linspace(-1.35, 1.35, int(rng.integers(5, 9))):
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        along, across = -cos * (v - 0.3) + sin * u, cos * u + sin * (v - 0.3)
        tone = _dark(green, float(rng.uniform(0.7, 1.15)))
        parts.append(Part(_ellipse(along, across, 0.62, 0, 0.62, 0.15), tone, 0.2))
    parts.append(Part(_polygon(u, v, [(-0.4, 0.3), (0.4, 0.3), (0.28, 1.0), (-0.28, 1.0)]), pot, 0.05))
    parts.append(Part(_box(u, v, -0.46, 0.25, 0.46, 0.4), _dark(pot, 0.85), 0.0))
    return parts, clouds((u.shape[0], u.shape[1]), rng, coarse=16, octaves=2)


def _sheep(u: Floats, v: Floats, rng: np.random.Generator) -> Drawing:
    wool = _varied(rng, (0.88, 0.85, 0.78), (0.75, 0.7, 0.6))
    face = _varied(rng, (0.12, 0.1, 0.1), (0.8, 0.75, 0.68))
    body = _ellipse(u, v, -0.1, 0, 0.6, 0.38)
    for turn in np.linspace(0, 2 * np.pi, 14, endpoint=False):
        body |= _ellipse(u, v, -0.1 + 0.6 * float(np.cos(turn)), 0.4 * float(np.sin(turn)), 0.17, 0.15)
    legs = [_box(u, v, at, 0.2, at + 0.1, 0.9) for at in (-0.55, -0.35, 0.1, 0.3)]
    parts = [
        Part(np.any(legs, axis=0), _dark(face, 0.9), 0.0),
        Part(body, wool, 0.16),
        Part(_ellipse(u, v, 0.72, -0.18, 0.24, 0.3), face, 0.05),
        Part(_ellipse(u, v, 0.55, -0.4, 0.2, 0.13), wool, 0.16),
    ]
    return parts, np.sin(u * 20 + rng.uniform(0, 6)) * np.sin(v * 20 + rng.uniform(0, 6))


OBJECTS: dict[str, Callable[[Floats, Floats, np.random.Generator], Drawing]] = {
    "bird": _bird,
    "bottle": _bottle,
    "car": _car,
    "cat": _cat,
    "pottedplant": _plant,
    "sheep": _sheep,
}
"""Classes that can be drawn, under their names in PASCAL VOC."""
