"""The eight findings of the phantom, each a function that paints one into a healthy chest.

They differ in kind on purpose: a round solid, a faint patch, a dense patch, a fluid that follows gravity, a change of
size, bright specks, a local widening, and a rim. Each stays inside the organs that its label may be read from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from camtrain.data.phantom_body import (
    BLOOD,
    FLUID,
    HEART,
    LUNG_LEFT,
    LUNG_RIGHT,
    SPINE,
    VESSELS,
    Scene,
    heart_box,
    heart_coordinates,
    paint_heart,
)
from camtrain.data.phantom_frame import Bools, Box, Floats, Patch, Places, inside, places_in

LUNGS = (LUNG_LEFT, LUNG_RIGHT)


class Finding(NamedTuple):
    """One kind of finding.

    Attributes:
        organs: Ids of the organs that it lies in.
        paint: Paints it and returns its voxels, as parts of boxes or as places in the flat volume.
    """

    organs: tuple[int, ...]
    paint: Callable[[Scene, np.random.Generator], Sequence[Patch | Places]]


def paint_finding(scene: Scene, name: str, rng: np.random.Generator) -> None:
    """Paint one finding and note its voxels in `scene.lesions`.

    Args:
        scene: The scan to paint.
        name: A key of `FINDINGS`.
        rng: Place, size and density.
    """
    bit = np.uint8(1 << list(FINDINGS).index(name))
    for part in FINDINGS[name].paint(scene, rng):
        if isinstance(part, np.ndarray):
            scene.lesions.reshape(-1)[part] |= bit
        else:
            lesions = scene.lesions[part[0]]
            lesions |= part[1].view(np.uint8) * bit


def _free_lung(scene: Scene, box: Box, lungs: tuple[int, ...] = LUNGS) -> Bools:
    organs = scene.organs[box]
    free: Bools = organs == lungs[0]
    for other in lungs[1:]:
        free |= organs == other
    free &= scene.lesions[box] == 0
    return free


def _cardiomegaly(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    size = scene.anatomy.heart_scale * rng.uniform(1.27, 1.4)
    box = heart_box(scene, size)
    before = scene.organs[box] == HEART
    paint_heart(scene, size, size)
    return [(box, (scene.organs[box] == HEART) & ~before)]


# Up to which draw from 0 to 1 it is the aorta's stretch 1, 2, and so on; stretch 0, from the valve, is left out.
_STRETCHES = np.array([0.2, 0.15, 0.15, 0.15, 0.15, 0.2]).cumsum()


def _aneurysm(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """A widened stretch of the aorta, with a crescent of clot along its wall."""
    stretch = 1 + int(_STRETCHES.searchsorted(rng.random(), side="right"))
    start, end = scene.anatomy.aorta[stretch], scene.anatomy.aorta[stretch + 1]
    middle = start + (end - start) * rng.uniform(0.2, 0.6)
    along = (end - start) / np.linalg.norm(end - start) * rng.uniform(8, 15)
    box, dist = scene.frame.capsule(middle - along, middle + along, rng.uniform(26, 32))
    organs = scene.organs[box]
    blob = inside(dist, (organs != HEART) & (organs != SPINE) & scene.in_cavity(box))
    clot = blob & (dist > 0.7) & (scene.frame.at(box)[0] < middle[0])
    np.copyto(scene.hu[box], BLOOD + 15, where=blob)
    np.copyto(scene.hu[box], 90, where=clot)
    np.copyto(organs, VESSELS, where=blob)
    return [(box, blob)]


def _pericardial_effusion(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Fluid between the muscle and its sac: the sac grows a little, the muscle fills less of it."""
    thin = 0.5 * scene.frame.thin / float(scene.anatomy.heart_axes.min())
    rim = max(rng.uniform(0.14, 0.19), thin)
    size = scene.heart_outer
    return [paint_heart(scene, size * (1 + 0.35 * rim), size * (1 - rim))]


# Angle around the heart's long axis, and course along it: the groove between the ventricles in front, then the two that
# run beside the atria.
_ARCS = tuple(
    (angle, np.linspace(*ends, 7)) for angle, ends in ((1.2, (-0.4, 0.6)), (-2.5, (-0.45, 0.3)), (0.1, (-0.4, 0.3)))
)


def _coronary_calcification(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Chalk along the coronary arteries: bright specks on arcs just under the surface of the heart muscle."""
    reach = 1.1 * scene.heart_outer * float(scene.anatomy.heart_axes.max())
    box = scene.frame.box(scene.anatomy.heart - reach, scene.anatomy.heart + reach)
    heart = scene.organs[box] == HEART
    voxels = places_in(heart)
    at = heart_coordinates(scene.anatomy, *scene.frame.points(voxels, box))
    at /= scene.heart_inner
    size = max(7.5, 1.15 * scene.frame.thin) / 46
    outward = at[0] ** 2 + at[1] ** 2 + at[2] ** 2 > 0.3
    arcs = 2 + int(rng.integers(0, 2))
    turn, along = np.empty((arcs, 1)), np.empty((arcs, 7))
    for arc, (angle, course) in enumerate(_ARCS[:arcs]):
        turn[arc] = angle + rng.uniform(-0.2, 0.2)
        along[arc] = course + rng.uniform(-0.05, 0.05, 7)
    radius = 0.86 * np.sqrt(1 - along * along)
    points = np.array([along, radius * np.cos(turn), radius * np.sin(turn)], np.float32).reshape(3, -1)
    nearest = _nearest(at.compress(outward, axis=1), points)
    wall = np.zeros(heart.shape, bool)
    wall.reshape(-1)[voxels[outward]] = inside(nearest / np.float32(size**2), np.ones(nearest.shape, bool))
    np.copyto(scene.hu[box], rng.uniform(900, 1200), where=wall)
    return [(box, wall)]


def _nearest(voxels: Floats, points: Floats) -> Floats:
    """(n,) squared distance of each voxel, (3, n), from the nearest of some points, (3, m)."""
    squares = np.zeros((points.shape[1], voxels.shape[1]), voxels.dtype)
    away = np.empty_like(squares)
    for place, point in zip(voxels, points, strict=True):
        np.subtract(place, point[:, None], out=away)
        away *= away
        squares += away
    nearest: Floats = squares.min(axis=0, initial=np.inf)
    return nearest


def _effusion(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Fluid in the pleural space of a patient on the back: a level behind and below that climbs the side wall."""
    a, box = scene.anatomy, scene.chest
    x, _, z = scene.frame.at(box)
    depth, top, sides = rng.uniform(34, 52), rng.uniform(5, 55), int(rng.integers(0, 3))
    bottom = -a.cavity[1] * a.pose.scale[1] + a.pose.shift[1]
    fluid = _free_lung(scene, box, ((LUNG_LEFT,), (LUNG_RIGHT,), LUNGS)[sides])
    voxels = places_in(fluid)
    column, k = np.divmod(voxels, fluid.shape[2])
    side = np.maximum(np.abs(x.reshape(-1)) - 45, 0)
    side *= side
    slope = ((top + 0.02 * side)[column] - z[0, 0, k]) / (top + 55)
    slope = slope.clip(0, 1, out=slope) ** 0.7
    level = bottom + (depth + 0.006 * side)[column] * slope
    field = 1 + (scene.frame.front[0, box[1], 0][column % fluid.shape[1]] - level) / 10
    fluid.reshape(-1)[voxels] = inside(field, np.ones(field.shape, bool))
    np.copyto(scene.hu[box], FLUID + rng.uniform(-6, 6), where=fluid)
    return [(box, fluid)]


class _Room:
    """Lung without another lesion, above some height: where findings may lie that look for room."""

    def __init__(self, scene: Scene, above: float = -200) -> None:
        self.frame, self.chest = scene.frame, scene.chest
        self.free = np.zeros(scene.frame.size, bool)
        self.free[self.chest] = _free_lung(scene, self.chest)
        high = self.free[self.chest] & (self.frame.z[:, :, self.chest[2]] > above)
        self._voxels = places_in(high)

    def places(self, picks: NDArray[np.float64]) -> Floats:
        """(n, 3) body coordinates, mm, of n numbers from 0 to 1; (0, 3) where there is no room."""
        picked = (picks * len(self._voxels)).astype(np.intp) if len(self._voxels) else np.zeros(0, np.intp)
        return self.frame.points(self._voxels[picked], self.chest).T

    def roomiest(self, rng: np.random.Generator, radii: Floats, tries: int = 5) -> tuple[Box, Floats, Bools]:
        """An ellipsoid at that of a few random places where most of it finds room."""
        best, most = None, -1
        for center in self.places(rng.random(tries)):
            box, dist = self.frame.ellipsoid(center, radii)
            region = dist < 1
            region &= self.free[box]
            if (found := int(np.count_nonzero(region))) > most:  # at least the voxel in the middle
                best, most = (box, dist, region), found
        if best is None:
            box, dist = self.frame.ellipsoid((0, 0, 0), radii)
            best = box, dist, np.zeros(dist.shape, bool)
        return best


def _nodule(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Three to five round solids in the upper and middle lung."""
    room, tries = _Room(scene, above=-15), 5
    radii, picks, densities = [], [], []
    for _ in range(int(rng.integers(3, 6))):
        radii.append(rng.uniform(15, 19))
        picks.append(rng.random(tries))
        densities.append(rng.uniform(30, 80))
    centers = room.places(np.concatenate(picks))
    if not len(centers):
        return []
    places, ball = scene.frame.balls(centers, np.repeat(radii, 3 * tries).reshape(-1, 3))
    free = room.free.reshape(-1)
    lies_free = free[places]
    places, ball = places[lies_free], ball[lies_free]
    most = np.bincount(ball, minlength=len(radii) * tries).reshape(-1, tries).argmax(axis=1)
    parts: list[Patch | Places] = []
    for nodule, density in enumerate(densities):
        found = places[ball == nodule * tries + most[nodule]]
        found = found[free[found]]
        free[found] = False
        scene.hu.reshape(-1)[found] = density
        parts.append(found)
    return parts


def _consolidation(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Most of one lobe filled up, with air left in the bronchi."""
    side, half_width = (-1, 1)[rng.integers(0, 2)], scene.anatomy.cavity[0]
    height = (58.0, 8.0)[rng.integers(0, 2)]  # upper lobe; middle lobe or lingula
    place = np.array([side * 0.62 * half_width, 12.0, height]) + rng.uniform(-10, 10, 3)
    box, dist = scene.frame.ellipsoid(place, rng.uniform(34, 44, 3))
    patch = inside(dist, _free_lung(scene, box))
    air = rng.random(dist.shape) < 0.2
    np.copyto(scene.hu[box], rng.uniform(30, 60), where=patch)
    np.copyto(scene.hu[box], -550, where=patch & air)
    return [(box, patch)]


def _ground_glass(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """A haze that lets the vessels through: density is added, and fades at the border. Often on both sides."""
    room, hazes = _Room(scene), []
    region = np.zeros(scene.frame.size, bool)
    for _ in range(2):
        box, dist, patch = room.roomiest(rng, rng.uniform(38, 54, 3), tries=3)
        taken, hu = region[box], scene.hu[box]
        patch &= ~taken
        voxels = places_in(patch)
        grain = 1 + 0.15 * rng.standard_normal(dist.size, dtype=np.float32).take(voxels)
        fade = 2.5 * (1 - dist.reshape(-1).take(voxels))
        haze = rng.uniform(310, 390) * np.minimum(fade, 1, out=fade) * grain
        below = hu[patch]
        hu[patch] = np.minimum(below + haze, np.maximum(below, -150))
        taken |= patch
        hazes.append((box, patch))
    return hazes


FINDINGS = {
    "nodule": Finding(LUNGS, _nodule),
    "ground_glass": Finding(LUNGS, _ground_glass),
    "consolidation": Finding(LUNGS, _consolidation),
    "effusion": Finding(LUNGS, _effusion),
    "cardiomegaly": Finding((HEART,), _cardiomegaly),
    "coronary_calcification": Finding((HEART,), _coronary_calcification),
    "aneurysm": Finding((VESSELS,), _aneurysm),
    "pericardial_effusion": Finding((HEART,), _pericardial_effusion),
}

PAINTING_ORDER = (
    # What changes an organ's shape comes first, so that what lies in the lung lies in the lung that is left.
    *("cardiomegaly", "aneurysm", "pericardial_effusion", "coronary_calcification"),
    *("effusion", "nodule", "consolidation", "ground_glass"),
)
