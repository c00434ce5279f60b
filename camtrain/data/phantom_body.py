"""A healthy chest on the scanner table: the painting of the scan and of its organs.

Numbers are millimetres in body coordinates (x to the right, y to the front, z up; the origin lies in mid-chest) and
Hounsfield units of a contrast-enhanced CT. They give the layout and the proportions of a supine adult, not an atlas.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from camtrain.data.phantom_anatomy import Anatomy
from camtrain.data.phantom_frame import Bools, Box, Floats, Frame, Patch, inside, places_in

ORGANS = {"lung_left": 1, "lung_right": 2, "heart": 3, "great_vessels": 4, "mediastinum": 5, "spine": 6}
LUNG_LEFT, LUNG_RIGHT, HEART, VESSELS, MEDIASTINUM, SPINE = ORGANS.values()

AIR, FAT, SKIN, MUSCLE, BONE = -1000.0, -100.0, 20.0, 55.0, 480.0
RIB = 0.75 * BONE
BLOOD, MYOCARDIUM, FLUID, LIVER = 290.0, 150.0, 4.0, 110.0


@dataclass
class Scene:
    """A scan while it is painted.

    Attributes:
        frame: Coordinates.
        anatomy: The patient.
        hu: (X, Y, Z) float32 Hounsfield units.
        organs: (X, Y, Z) uint8 ids of `ORGANS`.
        lesions: (X, Y, Z) uint8, one bit per finding.
        markers: (X, Y, Z) uint8, one bit per marker.
        heart_outer: Size of the pericardium, 1 = the average patient's heart.
        heart_inner: Size of the muscle inside it.
    """

    frame: Frame
    anatomy: Anatomy
    hu: NDArray[np.float32]
    organs: NDArray[np.uint8]
    lesions: NDArray[np.uint8] = field(init=False)
    markers: NDArray[np.uint8] = field(init=False)
    heart_outer: float = 1.0
    heart_inner: float = 1.0

    def __post_init__(self) -> None:
        self.lesions = np.zeros(self.frame.size, np.uint8)
        self.markers = np.zeros(self.frame.size, np.uint8)

    @functools.cached_property
    def chest(self) -> Box:
        """Box that holds the inside of the rib cage."""
        within = self._round[:, :, 0] < self._roof.max()
        return span(within.any(1)), span(within.any(0)), span(self._roof[0, 0] > self._round.min())

    @functools.cached_property
    def _round(self) -> Floats:
        half_width, half_depth = self.anatomy.cavity
        result: Floats = np.abs(self.frame.x / half_width) ** 2.3 + np.abs(self.frame.y / half_depth) ** 2.3
        return result

    @functools.cached_property
    def _roof(self) -> Floats:
        result: Floats = 1 - np.maximum((self.frame.z - 10) / 108, 0) ** 2
        return result

    def in_cavity(self, box: Box) -> Bools:
        """Voxels of a box inside the rib cage (lungs, heart, vessels, and the abdomen below the diaphragm)."""
        result: Bools = self._round[box[:2]] < self._roof[:, :, box[2]]
        return result


def paint_bodies(
    anatomies: Sequence[Anatomy], size: tuple[int, int, int], rngs: Sequence[np.random.Generator]
) -> list[Scene]:
    """Healthy chests, painted part by part: the same part of the next patient takes less time than the next part.

    Args:
        anatomies: The patients.
        size: Voxels per axis.
        rngs: Of each patient the course of the small vessels of the lung.

    Returns:
        The scans without findings, markers, blur and noise.
    """
    scenes = [Scene(Frame(size, a.pose), a, np.empty(size, np.float32), np.zeros(size, np.uint8)) for a in anatomies]
    for paint in (_trunk, _table, _cavity, _spine):
        for scene in scenes:
            paint(scene)
    tubes = [_tubes(scene) for scene in scenes]
    for scene, (air, _) in zip(scenes, tubes, strict=True):
        _airways(scene, air)
    for scene in scenes:
        paint_heart(scene, scene.anatomy.heart_scale, scene.anatomy.heart_scale)
    for scene, (_, blood) in zip(scenes, tubes, strict=True):
        _great_vessels(scene, blood)
    for scene, rng in zip(scenes, rngs, strict=True):
        _lung_vessels(scene, rng)
    return scenes


_NECK = 75.0
"""mm; from here upwards the trunk tapers."""


def shell(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> Floats:
    """(X, Y, Z) distance from the long axis of the trunk, 1 on the skin; the trunk tapers to the neck."""
    result: Floats = _radius(anatomy, x, y) / _taper(z)
    return result


def _radius(anatomy: Anatomy, x: Floats, y: Floats) -> Floats:
    radius: Floats = np.sqrt((x / anatomy.width) ** 2 + (y / anatomy.depth) ** 2)
    return radius


def _taper(z: Floats) -> Floats:
    taper: Floats = 1 - 0.3 * (np.maximum(z - _NECK, 0) / 75) ** 2
    return np.maximum(taper, 0.35, out=taper)


def span(where: Bools) -> slice:
    """From the first to the last true entry; never empty."""
    first = int(where.argmax())
    return slice(first, max(len(where) - int(where[::-1].argmax()), first + 1))


def _table(scene: Scene) -> None:
    """A curved plastic slab that the patient lies on: in every scan, so it means nothing."""
    x, y, a = scene.frame.x[:, :, 0], scene.frame.y[:, :, 0], scene.anatomy
    top = -a.depth - 4 + 0.0012 * np.maximum(np.abs(x) - 30, 0) ** 2
    slab = (y < top) & (y > top - max(7.0, 1.2 * scene.frame.spacing[1])) & (np.abs(x) < 128)
    scene.hu[slab] = -150
    scene.hu[(y < top - 3) & (y > top - 5) & slab] = -600


_STEPS = (np.arange(256) / 200).tolist()


def _trunk(scene: Scene) -> None:
    """Skin, fat, muscle and ribs: layers from the axis outwards, by one look-up on the distance in steps of 1/200."""
    a, f = scene.anatomy, scene.frame
    mean = (a.width + a.depth) / 2
    muscle, fat, skin = (bisect.bisect_left(_STEPS, 1 - depth / mean) for depth in (a.fat, 3, 0))
    values = np.full(len(_STEPS), AIR, np.float32)
    values[:skin], values[:fat], values[:muscle] = SKIN, FAT, MUSCLE
    bone_from = bisect.bisect_right(_STEPS, 1 - (a.fat + a.wall - 3) / mean)
    bone_to = bisect.bisect_left(_STEPS, 1 - (a.fat + 5) / mean)
    hu, x, y, z = scene.hu.reshape(-1, f.size[2]), f.x.reshape(-1, 1), f.y.reshape(-1, 1), f.z[0]
    # Below the neck one plane is as the other, but for the ribs.
    neck = bisect.bisect_right(z[0].tolist(), _NECK)
    radius = _radius(a, x, y)
    plane = (radius * 200).astype(np.intp)
    below = values.take(plane, mode="clip")
    hu[:, :neck], hu[:, neck:] = below, AIR
    # Ribs run down towards the front, one every 26 mm.
    phase, turns = (0.4 * y + a.rib_phase) / 26, z / 26
    bony = places_in((plane >= bone_from) & (plane < bone_to))
    ribs = _in_rib(turns[:, :neck] + phase[bony])
    ribs &= z[:, :neck] > -110
    hu[bony, :neck] = np.where(ribs, np.float32(RIB), below[bony])
    inner = places_in(plane < skin)  # the trunk is nowhere wider
    levels = (radius[inner] / _taper(z[:, neck:]) * 200).astype(np.intp)
    above = values.take(levels, mode="clip")
    bony = places_in((levels >= bone_from) & (levels < bone_to))
    column, k = np.divmod(bony, max(levels.shape[1], 1))
    ribs = _in_rib(turns[0, neck:][k] + phase[inner[column], 0])
    above.reshape(-1)[bony[ribs]] = RIB
    hu[inner, neck:] = above
    _breastbone(scene)


def _in_rib(turns: Floats) -> Bools:
    turns -= np.floor(turns)
    found: Bools = turns < 0.42
    return found


def _breastbone(scene: Scene) -> None:
    a, f = scene.anatomy, scene.frame
    box = f.box((-17, a.depth - a.fat - 20, -40), (17, a.depth - a.fat - 8, 85))
    right, front, up = f.at(box)
    flat = (np.abs(right) < 17) & (np.abs(front - a.depth + a.fat + 12) < max(5.5, f.thin))
    np.copyto(scene.hu[box], BONE * 0.6, where=flat & (np.abs(up - 22) < 62))


def _cavity(scene: Scene) -> None:
    """Lungs, the tissue between them, and the abdomen below the two domes of the diaphragm."""
    a, f = scene.anatomy, scene.frame
    x, y, z = f.at(scene.chest)
    cavity = scene.in_cavity(scene.chest)
    dome = np.where(x > 0, np.float32(a.dome_right), np.float32(a.dome_left))
    hump = np.minimum(((np.abs(x) - 48) / 62) ** 2 + ((y - 8) / 72) ** 2, 1.6)
    lung = z > dome - 48 * hump
    lung &= cavity
    gap = 9 + 17 * np.exp(-(((y + 8) / 30) ** 2))
    right, left = x > gap, x < -gap - 2
    organ = np.where(right, np.uint8(LUNG_RIGHT), np.where(left, np.uint8(LUNG_LEFT), np.uint8(MEDIASTINUM)))
    np.multiply(organ, lung.view(np.uint8), out=scene.organs[scene.chest])  # nothing else has an organ yet
    air = a.lung_hu - a.lung_gradient * y + 14 * np.sin(x / 23 + a.rib_phase)
    air = np.where(right | left, air, np.float32(-25))
    soft = np.where(x > -18 - 0.25 * y, LIVER, np.where(y < 0, LIVER + 15, 35)).astype(np.float32)
    soft = np.where((np.abs(x) < 22) & (y < -12), np.float32(-60), soft)
    np.copyto(scene.hu[scene.chest], soft, where=cavity)
    np.copyto(scene.hu[scene.chest], air, where=lung)
    box, dist = f.ellipsoid((-48, 34, a.dome_left - 42), (26, 14, 20))  # air in the stomach
    gas = scene.in_cavity(box)
    gas &= scene.organs[box] == 0
    gas &= dist < 1
    np.copyto(scene.hu[box], -850, where=gas)


def _spine(scene: Scene) -> None:
    a, f = scene.anatomy, scene.frame
    back = -a.cavity[1] + 3
    box = f.box((-34, back - 50, -200), (34, back + 22, 200))
    x, y, z = f.at(box)
    y = y - back + 6 * np.cos(z / 90)
    behind, aside = y + 21, np.abs(x)
    body = (x / 19) ** 2 + (y / 15) ** 2 < 1
    disc = np.mod(z + a.rib_phase, 27) < 5
    canal = (x / 9) ** 2 + (behind / 8) ** 2 < 1
    arch = ((x / 16) ** 2 + (behind / 13) ** 2 < 1) | ((aside < 5) & (y < -25) & (y > -44))
    wings = (np.abs(y + 20) < 6) & (aside < 32)
    marrow = (x / 15) ** 2 + (y / 11) ** 2 < 1
    region = body | canal | arch | (wings & ~disc)
    hu = scene.hu[box]
    for value, where in ((BONE, region), (25.0, canal), (BONE, body), (210.0, marrow & body), (85.0, body & disc)):
        np.copyto(hu, value, where=where)
    np.copyto(scene.organs[box], SPINE, where=region)


def _tubes(scene: Scene) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Voxels of the airways and the great vessels: places in the flat volume (those of the air, of the blood)."""
    a = scene.anatomy
    starts = np.concatenate([_AIRWAYS[:, 0], a.aorta[:-1], _VESSELS[:, 0]])
    ends = np.concatenate([_AIRWAYS[:, 1], a.aorta[1:], _VESSELS[:, 1]])
    radii = (*_AIRWAY_RADII, *([a.aorta_radius] * (len(a.aorta) - 1)), *_VESSEL_RADII)
    places, tube = scene.frame.tubes(starts, ends, radii)
    air = tube < len(_AIRWAYS)
    return places[air], places[~air]


def _airways(scene: Scene, tubes: NDArray[np.intp]) -> None:
    """Windpipe and the two main bronchi: air inside the mediastinum."""
    organs = scene.organs.reshape(-1)[tubes]
    scene.hu.reshape(-1)[tubes[(organs == MEDIASTINUM) | (organs == 0)]] = -970


def heart_box(scene: Scene, outer: float) -> Box:
    """Voxels that hold a heart of this size."""
    a = scene.anatomy
    # The heart bulges beyond the ellipsoid of its half-axes by less than 5 %.
    reach = 1.05 * outer * a.heart_reach
    return scene.frame.box(a.heart - reach, a.heart + reach)


def paint_heart(scene: Scene, outer: float, inner: float) -> Patch:
    """The heart: muscle and blood up to the size `inner`, pericardial fluid from there to `outer`.

    Vessels and spine stay, lung and mediastinum give way.

    Args:
        scene: The scan to paint.
        outer: Size of the pericardium, 1 = average.
        inner: Size of the muscle, 1 = average.

    Returns:
        Voxels between the two.
    """
    box = heart_box(scene, outer)
    along = heart_coordinates(scene.anatomy, *scene.frame.at(box))
    size = _heart_size(along, outer)
    organs, hu = scene.organs[box], scene.hu[box]
    where = scene.in_cavity(box)
    where &= organs != VESSELS
    where &= organs != SPINE
    heart = inside(size / outer, where)
    voxels = places_in(heart)
    chambers = along.reshape(3, 1, -1).take(voxels, axis=2)
    chambers /= inner
    chambers = chambers - _MIDDLES
    chambers /= _REACHES
    chambers *= chambers
    left, right, atria = chambers[0] + chambers[1] + chambers[2] < 1
    hu[heart] = np.where(left | right | atria, np.float32(BLOOD), np.float32(MYOCARDIUM))
    rim = heart & (size >= inner)
    np.copyto(hu, FLUID, where=rim)
    np.copyto(organs, HEART, where=heart)
    scene.heart_outer, scene.heart_inner = outer, inner
    return box, rim


# Left ventricle, right ventricle, atria: middles and half-axes along each of the heart's axes.
_MIDDLES = np.array([[0.12, 0.05, -0.62], [-0.38, 0.48, 0.0], [0.0, 0.0, 0.0]], np.float32)[:, :, None]
_REACHES = np.array([[0.62, 0.6, 0.3], [0.36, 0.33, 0.6], [0.5, 0.55, 0.6]], np.float32)[:, :, None]


def heart_coordinates(anatomy: Anatomy, x: Floats, y: Floats, z: Floats) -> Floats:
    """(3, ...) coordinates along the heart's own axes, in units of the average patient's half-axes."""
    right, front, up = anatomy.heart_rows.reshape(3, 3, *[1] * x.ndim)
    a, b, c = anatomy.heart
    flat = right * (x - a)
    flat += front * (y - b)
    result: Floats = np.add(flat, up * (z - c), order="C")  # axis by axis: numpy would choose point by point
    return result


def _heart_size(along: Floats, outer: float) -> Floats:
    """Size of the heart that has a point on its surface: an ellipsoid that is thicker towards the apex."""
    long, short, third = along * along
    size = 0.22 * along[0]
    size /= outer
    size += 1
    short += third
    size *= short
    size += long
    result: Floats = np.sqrt(size, out=size)
    return result


def _great_vessels(scene: Scene, tubes: NDArray[np.intp]) -> None:
    organs = scene.organs.reshape(-1)[tubes]
    blood = tubes[(organs != SPINE) & (organs != HEART)]
    scene.hu.reshape(-1)[blood] = BLOOD + 15
    scene.organs.reshape(-1)[blood] = VESSELS


_AIRWAYS = np.array([[(0, -14, 200), (0, -14, 32)], [(0, -14, 32), (34, -10, 8)], [(0, -14, 32), (-38, -14, 6)]])
# Superior vena cava; pulmonary trunk and its two arteries.
_TRUNK = (-18, 8, 20)
_VESSELS = np.array(
    [[(30, 8, -5), (26, 4, 95)], [(-14, 22, -5), _TRUNK], [_TRUNK, (32, -2, 14)], [_TRUNK, (-42, -6, 18)]]
)
_AIRWAY_RADII, _VESSEL_RADII = (8.5, 6.5, 6.0), (9.0, 13.0, 9.5, 9.5)
_ROOTS = {LUNG_LEFT: (-40.0, -8.0, 12.0), LUNG_RIGHT: (36.0, -6.0, 10.0)}


def _lung_vessels(scene: Scene, rng: np.random.Generator, branches: int = 46) -> None:
    """Small vessels run from the two roots of the lung to random places in it and thin out on the way."""
    f = scene.frame
    steps, bow, value = _way(max(f.size), float(f.spacing.max()))
    organs = scene.organs[scene.chest].reshape(-1)
    bends, picked, lungs = [], [], []
    for organ in _ROOTS:
        voxels = places_in(organs == organ)
        bend = rng.normal(0, 9, (branches, 3))
        picks = rng.random(branches)
        if len(voxels):
            bends.append(bend.astype(np.float32))
            picked.append(voxels.take((picks * len(voxels)).astype(np.intp)))
            lungs.append(organ)
    if not lungs:
        return
    roots = np.repeat([_ROOTS[organ] for organ in lungs], branches, axis=0).T
    paths = np.multiply.outer(f.points(np.concatenate(picked), scene.chest) - roots, steps)
    paths += roots[:, :, None]
    paths += np.multiply.outer(np.concatenate(bends).T, bow)
    places = f.places(paths)
    own = scene.organs.reshape(-1).take(places) == np.repeat(np.array(lungs, np.uint8), branches)[:, None]
    found, hu = places_in(own), scene.hu.reshape(-1)
    places = places.reshape(-1).take(found)
    hu[places] = np.maximum(hu[places], value.take(found % len(value)))


@functools.lru_cache(maxsize=16)
def _way(longest: int, spacing: float) -> tuple[Floats, Floats, Floats]:
    """Steps from 0 to 1, so many that a line leaves no gap; how far a bent line strays there; HU of a vessel there."""
    steps = np.linspace(0, 1, 2 * longest // 3, dtype=np.float32)
    value = -300 - 380 * steps / np.clip(6.7 / np.float64(spacing), 0.2, 1)
    return steps.astype(np.float64), 4 * steps * (1 - steps), value.astype(np.float32)
