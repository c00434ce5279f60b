"""The eight findings of the phantom, each a function that paints one into a healthy chest.

They differ in kind on purpose: a round solid, a faint patch, a dense patch, a fluid that follows gravity, a change of
size, bright specks, a local widening, and a rim. Each stays inside the organs that its label may be read from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

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
from camtrain.data.phantom_frame import Bools, Box, Floats, Patch, Places, inside

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
            scene.lesions[part[0]] |= part[1] * bit


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


def _aneurysm(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """A widened stretch of the aorta, with a crescent of clot along its wall."""
    stretch = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.2, 0.15, 0.15, 0.15, 0.15, 0.2]))
    start, end = scene.anatomy.aorta[stretch], scene.anatomy.aorta[stretch + 1]
    middle = start + (end - start) * rng.uniform(0.2, 0.6)
    along = (end - start) / np.linalg.norm(end - start) * rng.uniform(8, 15)
    box, dist = scene.frame.capsule(middle - along, middle + along, rng.uniform(26, 32))
    organs = scene.organs[box]
    blob = inside(dist, (organs != HEART) & (organs != SPINE) & scene.in_cavity(box))
    clot = blob & (dist > 0.7) & (scene.frame.at(box)[0] < middle[0])
    scene.hu[box][blob] = BLOOD + 15
    scene.hu[box][clot] = 90
    organs[blob] = VESSELS
    return [(box, blob)]


def _pericardial_effusion(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Fluid between the muscle and its sac: the sac grows a little, the muscle fills less of it."""
    thin = 0.5 * scene.frame.thin / float(scene.anatomy.heart_axes.min())
    rim = max(rng.uniform(0.14, 0.19), thin)
    size = scene.heart_outer
    return [paint_heart(scene, size * (1 + 0.35 * rim), size * (1 - rim))]


def _coronary_calcification(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Chalk along the coronary arteries: bright specks on arcs just under the surface of the heart muscle."""
    reach = 1.1 * scene.heart_outer * float(scene.anatomy.heart_axes.max())
    box = scene.frame.box(scene.anatomy.heart - reach, scene.anatomy.heart + reach)
    heart = scene.organs[box] == HEART
    voxels = np.flatnonzero(heart)
    column, k = np.divmod(voxels, heart.shape[2])
    x, y, z = scene.frame.at(box)
    at = heart_coordinates(scene.anatomy, x.reshape(-1)[column], y.reshape(-1)[column], z[0, 0, k])
    at /= scene.heart_inner
    size = max(7.5, 1.15 * scene.frame.thin) / 46
    outward = at[0] ** 2 + at[1] ** 2 + at[2] ** 2 > 0.3
    # Angle around the long axis: the groove between the ventricles in front, then the two that run beside the atria.
    specks = []
    for angle, start, end in ((1.2, -0.4, 0.6), (-2.5, -0.45, 0.3), (0.1, -0.4, 0.3))[: 2 + int(rng.integers(0, 2))]:
        turn = angle + rng.uniform(-0.2, 0.2)
        along = np.linspace(start, end, 7) + rng.uniform(-0.05, 0.05, 7)
        radius = 0.86 * np.sqrt(1 - along**2)
        specks.append(np.stack([along, radius * np.cos(turn), radius * np.sin(turn)], axis=1))
    points = np.concatenate(specks).astype(np.float32)
    nearest = _nearest(at.compress(outward, axis=1), points)
    wall = np.zeros(heart.shape, bool)
    wall.reshape(-1)[voxels[outward]] = inside(nearest / np.float32(size**2), np.ones(nearest.shape, bool))
    scene.hu[box][wall] = rng.uniform(900, 1200)
    return [(box, wall)]


def _nearest(voxels: Floats, points: Floats) -> Floats:
    """(n,) squared distance of each voxel, (3, n), from the nearest of some points, (m, 3)."""
    squares = np.zeros((len(points), voxels.shape[1]), voxels.dtype)
    for place, point in zip(voxels, points.T, strict=True):
        away = np.subtract(place, point[:, None])
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
    i, j, k = np.nonzero(fluid)
    side = np.clip(np.abs(x) - 45, 0, None)
    slope = np.clip(((top + 0.02 * side**2)[i, j, 0] - z[0, 0, k]) / (top + 55), 0, 1) ** 0.7
    level = bottom + (depth + 0.006 * side**2)[i, j, 0] * slope
    field = 1 + (scene.frame.front[0, box[1], 0][j] - level) / 10
    fluid[fluid] = inside(field, np.ones(field.shape, bool))
    scene.hu[box][fluid] = FLUID + rng.uniform(-6, 6)
    return [(box, fluid)]


class _Room:
    """Lung without another lesion, above some height: where findings may lie that look for room."""

    def __init__(self, scene: Scene, above: float = -200) -> None:
        self.frame, self.chest = scene.frame, scene.chest
        self.free = np.zeros(scene.frame.size, bool)
        self.free[self.chest] = _free_lung(scene, self.chest)
        high = self.free[self.chest] & (self.frame.z[:, :, self.chest[2]] > above)
        self._shape, self._voxels = high.shape, np.flatnonzero(high)

    def picked(self, rng: np.random.Generator, tries: int) -> Floats:
        """(tries, 3) random places, body coordinates in mm; (0, 3) where there is no room."""
        picks, (x, y, z) = rng.random(tries), self.frame.at(self.chest)
        voxels = self._voxels[(picks * len(self._voxels)).astype(np.intp)] if len(self._voxels) else self._voxels
        i, j, k = np.unravel_index(voxels, self._shape)
        return np.stack([x[i, j, 0], y[i, j, 0], z[0, 0, k]], axis=1)

    def roomiest(self, rng: np.random.Generator, radii: Floats, tries: int = 5) -> tuple[Box, Floats, Bools]:
        """An ellipsoid at that of a few random places where most of it finds room."""
        best, most = None, -1
        for center in self.picked(rng, tries):
            box, dist = self.frame.ellipsoid(center, radii)
            region = inside(dist, self.free[box])
            if (found := int(np.count_nonzero(region))) > most:
                best, most = (box, dist, region), found
        if best is None:
            box, dist = self.frame.ellipsoid((0, 0, 0), radii)
            best = box, dist, np.zeros(dist.shape, bool)
        return best


def _nodule(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Three to five round solids in the upper and middle lung."""
    room = _Room(scene, above=-15)
    radii, densities, centers = [], [], []
    for _ in range(int(rng.integers(3, 6))):
        radii.append(rng.uniform(15, 19))
        centers.append(room.picked(rng, 5))
        densities.append(rng.uniform(30, 80))
    tries = len(centers[0])
    if not tries:
        return []
    places, ball = scene.frame.balls(np.concatenate(centers), np.repeat(radii, tries)[:, None].repeat(3, axis=1))
    taken = ~room.free.reshape(-1)
    places, ball = places[~taken[places]], ball[~taken[places]]
    most = np.bincount(ball, minlength=len(radii) * tries).reshape(-1, tries).argmax(axis=1)
    parts: list[Patch | Places] = []
    for nodule, density in enumerate(densities):
        found = places[ball == nodule * tries + most[nodule]]
        found = found[~taken[found]]
        taken[found] = True
        scene.hu.reshape(-1)[found] = density
        parts.append(found)
    return parts


def _consolidation(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """Most of one lobe filled up, with air left in the bronchi."""
    side, half_width = int(rng.choice([-1, 1])), scene.anatomy.cavity[0]
    height = rng.choice([58.0, 8.0])  # upper lobe; middle lobe or lingula
    place = np.array([side * 0.62 * half_width, 12.0, height]) + rng.uniform(-10, 10, 3)
    box, dist = scene.frame.ellipsoid(place, rng.uniform(34, 44, 3))
    patch = inside(dist, _free_lung(scene, box))
    air = rng.random(dist.shape) < 0.2
    scene.hu[box][patch] = rng.uniform(30, 60)
    scene.hu[box][patch & air] = -550
    return [(box, patch)]


def _ground_glass(scene: Scene, rng: np.random.Generator) -> Sequence[Patch | Places]:
    """A haze that lets the vessels through: density is added, and fades at the border. Often on both sides."""
    room, hazes = _Room(scene), []
    region = np.zeros(scene.frame.size, bool)
    for _ in range(2):
        box, dist, patch = room.roomiest(rng, rng.uniform(38, 54, 3), tries=3)
        patch &= ~region[box]
        grain = 1 + 0.15 * rng.standard_normal(dist.shape, dtype=np.float32)[patch]
        haze = rng.uniform(310, 390) * np.clip(2.5 * (1 - dist[patch]), 0, 1) * grain
        below = scene.hu[box][patch]
        scene.hu[box][patch] = np.minimum(below + haze, np.maximum(below, -150))
        region[box] |= patch
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
