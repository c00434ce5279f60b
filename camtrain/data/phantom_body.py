"""A healthy chest on the scanner table: one patient's measures, and the painting of the scan and of its organs.

Numbers are millimetres in body coordinates (x to the right, y to the front, z up; the origin lies in mid-chest) and
Hounsfield units of a contrast-enhanced CT. They give the layout and the proportions of a supine adult, not an atlas.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from camtrain.data.phantom_frame import Bools, Box, Floats, Frame, Pose, inside

ORGANS = {"lung_left": 1, "lung_right": 2, "heart": 3, "great_vessels": 4, "mediastinum": 5, "spine": 6}
LUNG_LEFT, LUNG_RIGHT, HEART, VESSELS, MEDIASTINUM, SPINE = ORGANS.values()

AIR, FAT, SKIN, MUSCLE, BONE = -1000.0, -100.0, 20.0, 55.0, 480.0
BLOOD, MYOCARDIUM, FLUID, LIVER = 290.0, 150.0, 4.0, 110.0


@dataclass(frozen=True)
class Anatomy:
    """Measures of one patient, mm and HU."""

    pose: Pose
    width: float  # half-axes of the trunk
    depth: float
    fat: float  # thickness under the skin
    wall: float  # muscle and ribs
    lung_hu: float
    lung_gradient: float  # HU per mm towards the back
    dome_right: float  # height of the diaphragm
    dome_left: float
    rib_phase: float
    heart: Floats  # (3,) centre
    heart_axes: Floats  # (3,) half-axes: long axis, then the two short ones
    heart_frame: Floats  # (3, 3) rows: unit vectors of the axes; the first points to the apex
    heart_scale: float  # natural variation of size
    aorta: Floats  # (n, 3) centreline from the valve over the arch down to the abdomen
    aorta_radius: float

    @property
    def cavity(self) -> tuple[float, float]:
        """Half-axes of the inside of the rib cage."""
        return self.width - self.fat - self.wall, self.depth - self.fat - self.wall


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


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One patient from the population: pose, proportions, fat, density of the lungs, course of the aorta."""
    u = rng.uniform
    pose = Pose(
        shift=(u(-9, 9), u(-4, 8), u(-10, 10)),
        scale=(u(0.94, 1.06), u(0.94, 1.06), u(0.94, 1.06)),
        roll=u(-0.07, 0.07),
    )
    apex = np.array([-0.74 + u(-0.08, 0.08), 0.42 + u(-0.08, 0.08), -0.52 + u(-0.08, 0.08)])
    side = np.array([0.6, 0.75, 0.0])
    apex /= np.linalg.norm(apex)
    side -= apex * (side @ apex)
    side /= np.linalg.norm(side)
    fat = u(7, 20)
    return Anatomy(
        pose=pose,
        width=130 + 0.5 * fat + u(-5, 5),
        depth=88 + 0.4 * fat + u(-3, 3),
        fat=fat,
        wall=u(17, 21),
        lung_hu=u(-870, -810),
        lung_gradient=u(0.3, 0.9),
        dome_right=u(-52, -36),
        dome_left=u(-62, -46),
        rib_phase=u(0, 26),
        heart=np.array([-20 + u(-4, 4), 16 + u(-4, 4), -28 + u(-5, 5)], np.float32),
        heart_axes=np.array([53, 42, 44], np.float32),
        heart_frame=np.stack([apex, side, np.cross(apex, side)]).astype(np.float32),
        heart_scale=u(0.93, 1.03),
        aorta=_aorta(top=u(40, 52), back=u(-36, -30), left=u(-24, -16)),
        aorta_radius=u(11.5, 14),
    )


def _aorta(top: float, back: float, left: float) -> Floats:
    ascending = np.array([12.0, 16.0])
    descending = np.array([left, back])
    turn = np.linspace(0, np.pi, 6)
    t = (1 - np.cos(turn)) / 2
    arch = np.column_stack([ascending + t[:, None] * (descending - ascending), top + 18 * np.sin(turn)])
    return np.concatenate([[[-2.0, 14.0, -8.0]], arch, [[left, back - 3, -40.0], [left + 10, back - 2, -190.0]]])


def paint_body(anatomy: Anatomy, size: tuple[int, int, int], rng: np.random.Generator) -> Scene:
    """A healthy chest.

    Args:
        anatomy: The patient.
        size: Voxels per axis.
        rng: Course of the small vessels of the lung.

    Returns:
        The scan without findings, markers, blur and noise.
    """
    frame = Frame(size, anatomy.pose)
    hu = np.full(size, AIR, np.float32)
    scene = Scene(frame, anatomy, hu, np.zeros(size, np.uint8))
    _trunk(scene)
    _table(scene)
    _cavity(scene)
    _spine(scene)
    _airways(scene)
    paint_heart(scene, anatomy.heart_scale, anatomy.heart_scale)
    _great_vessels(scene)
    _lung_vessels(scene, rng)
    return scene


def shell(anatomy: Anatomy, frame: Frame) -> Floats:
    """(X, Y, Z) distance from the long axis of the trunk, 1 on the skin; the trunk tapers to the neck."""
    radius = np.sqrt((frame.x / anatomy.width) ** 2 + (frame.y / anatomy.depth) ** 2)
    taper: Floats = 1 - 0.3 * (np.clip(frame.z - 75, 0, None) / 75) ** 2
    result: Floats = radius / np.maximum(taper, 0.35)
    return result


def in_cavity(anatomy: Anatomy, frame: Frame, box: Box) -> Bools:
    """Voxels of a box inside the rib cage (lungs, heart, vessels, and the abdomen below the diaphragm)."""
    x, y, z = frame.at(box)
    half_width, half_depth = anatomy.cavity
    dome = np.clip((z - 10) / 108, 0, None) ** 2
    result: Bools = (np.abs(x / half_width) ** 2.3 + np.abs(y / half_depth) ** 2.3) < 1 - dome
    return result


def _table(scene: Scene) -> None:
    """A curved plastic slab that the patient lies on: in every scan, so it means nothing."""
    x, y, a = scene.frame.x, scene.frame.y, scene.anatomy
    top = -a.depth - 4 + 0.0012 * np.clip(np.abs(x) - 30, 0, None) ** 2
    slab = (y < top) & (y > top - max(7.0, 1.2 * scene.frame.spacing[1])) & (np.abs(x) < 128)
    scene.hu[np.broadcast_to(slab, scene.hu.shape)] = -150
    scene.hu[np.broadcast_to((y < top - 3) & (y > top - 5), scene.hu.shape) & slab] = -600


def _trunk(scene: Scene) -> None:
    a, f = scene.anatomy, scene.frame
    radius = shell(a, f)
    mean = (a.width + a.depth) / 2
    # Layers from the axis outwards, by one look-up on the distance in steps of 1/200.
    steps = np.arange(256) / 200
    layers = [steps < 1 - a.fat / mean, steps < 1 - 3 / mean, steps < 1]
    level = np.minimum(radius * 200, 255).astype(np.uint8)
    scene.hu[:] = np.select(layers, [MUSCLE, FAT, SKIN], AIR).astype(np.float32)[level]
    # Ribs run down towards the front, one every 26 mm.
    cage = (steps < 1 - (a.fat + 5) / mean) & (steps > 1 - (a.fat + a.wall - 3) / mean)
    turns = f.z / 26 + (0.4 * f.y + a.rib_phase) / 26
    ribs = cage[level] & (turns - np.floor(turns) < 0.42) & (f.z > -110)
    np.copyto(scene.hu, np.float32(BONE * 0.75), where=ribs)
    box = f.box((-17, a.depth - a.fat - 20, -40), (17, a.depth - a.fat - 8, 85))
    x, y, z = f.at(box)
    sternum = (np.abs(x) < 17) & (np.abs(y - a.depth + a.fat + 12) < max(5.5, f.thin)) & (np.abs(z - 22) < 62)
    scene.hu[box][sternum] = BONE * 0.6


def _cavity(scene: Scene) -> None:
    """Lungs, the tissue between them, and the abdomen below the two domes of the diaphragm."""
    a, f = scene.anatomy, scene.frame
    x, y, z = f.x, f.y, f.z
    everything = (slice(None), slice(None), slice(None))
    cavity = in_cavity(a, f, everything)
    dome = np.where(x > 0, np.float32(a.dome_right), np.float32(a.dome_left))
    hump = np.minimum(((np.abs(x) - 48) / 62) ** 2 + ((y - 8) / 72) ** 2, 1.6)
    above = z > dome - 48 * hump
    gap = 9 + 17 * np.exp(-(((y + 8) / 30) ** 2))
    right, left = x > gap, x < -gap - 2
    lung = cavity & above
    scene.organs[lung & right] = LUNG_RIGHT
    scene.organs[lung & left] = LUNG_LEFT
    scene.organs[lung & ~(right | left)] = MEDIASTINUM
    air = a.lung_hu - a.lung_gradient * y + 14 * np.sin(x / 23 + a.rib_phase)
    inner = np.where(right | left, air, np.float32(-25))
    belly = np.where(x > -18 - 0.25 * y, LIVER, np.where(y < 0, LIVER + 15, 35)).astype(np.float32)
    belly = np.where((np.abs(x) < 22) & (y < -12), -60, belly)
    np.copyto(scene.hu, np.where(above, inner, belly), where=cavity)
    box, dist = f.ellipsoid((-48, 34, a.dome_left - 42), (26, 14, 20))  # air in the stomach
    scene.hu[box][(dist < 1) & cavity[box] & ~above[box]] = -850


def _spine(scene: Scene) -> None:
    a, f = scene.anatomy, scene.frame
    back = -a.cavity[1] + 3
    box = f.box((-34, back - 50, -200), (34, back + 22, 200))
    x, y, z = f.at(box)
    y = y - back + 6 * np.cos(z / 90)
    body = (x / 19) ** 2 + (y / 15) ** 2 < 1
    disc = np.mod(z + a.rib_phase, 27) < 5
    canal = (x / 9) ** 2 + ((y + 21) / 8) ** 2 < 1
    arch = ((x / 16) ** 2 + ((y + 21) / 13) ** 2 < 1) | ((np.abs(x) < 5) & (y < -25) & (y > -44))
    wings = (np.abs(y + 20) < 6) & (np.abs(x) < 32)
    bone = np.where((x / 15) ** 2 + (y / 11) ** 2 < 1, 210.0, BONE)
    hu = np.where(body, np.where(disc, 85.0, bone), np.where(canal, 25.0, BONE))
    region = (body | canal | arch | (wings & ~disc)) & (z < 200)
    scene.hu[box][region] = hu[region]
    scene.organs[box][region] = SPINE


def _airways(scene: Scene) -> None:
    """Windpipe and the two main bronchi: air inside the mediastinum."""
    for start, end, radius in (
        ((0, -14, 200), (0, -14, 32), 8.5),
        ((0, -14, 32), (34, -10, 8), 6.5),
        ((0, -14, 32), (-38, -14, 6), 6.0),
    ):
        box, dist = scene.frame.capsule(start, end, radius)
        tube = (dist < 1) & np.isin(scene.organs[box], (MEDIASTINUM, 0))
        scene.hu[box][tube] = -970


def paint_heart(scene: Scene, outer: float, inner: float) -> Bools:
    """The heart: muscle and blood up to the size `inner`, pericardial fluid from there to `outer`.

    Vessels and spine stay, lung and mediastinum give way.

    Args:
        scene: The scan to paint.
        outer: Size of the pericardium, 1 = average.
        inner: Size of the muscle, 1 = average.

    Returns:
        (X, Y, Z) voxels between the two.
    """
    a, f = scene.anatomy, scene.frame
    reach = 1.25 * outer * float(a.heart_axes.max())
    box = f.box(a.heart - reach, a.heart + reach)
    long, short, third = heart_coordinates(scene, box)
    size = np.sqrt(long**2 + (short**2 + third**2) * (1 + 0.22 * long / outer))
    where = (scene.organs[box] != VESSELS) & (scene.organs[box] != SPINE) & in_cavity(a, f, box)
    heart = inside(size / outer, where)
    u, v, w = long / inner, short / inner, third / inner
    left = ((u - 0.12) / 0.62) ** 2 + ((v + 0.38) / 0.36) ** 2 + (w / 0.5) ** 2 < 1
    right = ((u - 0.05) / 0.6) ** 2 + ((v - 0.48) / 0.33) ** 2 + (w / 0.55) ** 2 < 1
    atria = ((u + 0.62) / 0.3) ** 2 + (v / 0.6) ** 2 + (w / 0.6) ** 2 < 1
    tissue = np.where(left | right | atria, BLOOD, MYOCARDIUM).astype(np.float32)
    rim = heart & (size >= inner)
    scene.hu[box][heart] = np.where(size < inner, tissue, FLUID)[heart]
    scene.organs[box][heart] = HEART
    scene.heart_outer, scene.heart_inner = outer, inner
    mask = np.zeros(f.size, bool)
    mask[box] = rim
    return mask


def heart_coordinates(scene: Scene, box: Box) -> tuple[Floats, Floats, Floats]:
    """Coordinates along the heart's own axes, in units of the average patient's half-axes."""
    a = scene.anatomy
    x, y, z = (v - c for v, c in zip(scene.frame.at(box), a.heart, strict=True))
    rows = a.heart_frame / a.heart_axes[:, None]
    first, second, third = (r[0] * x + r[1] * y + r[2] * z for r in rows)
    return first, second, third


def _great_vessels(scene: Scene) -> None:
    a = scene.anatomy
    tubes = [(p, q, a.aorta_radius) for p, q in zip(a.aorta[:-1], a.aorta[1:], strict=True)]
    tubes += [
        (np.array([30, 8, -5]), np.array([26, 4, 95]), 9.0),  # superior vena cava
        (np.array([-14, 22, -5]), np.array([-18, 8, 20]), 13.0),  # pulmonary trunk, then its two arteries
        (np.array([-18, 8, 20]), np.array([32, -2, 14]), 9.5),
        (np.array([-18, 8, 20]), np.array([-42, -6, 18]), 9.5),
    ]
    for start, end, radius in tubes:
        box, dist = scene.frame.capsule(start, end, radius)
        tube = (dist < 1) & (scene.organs[box] != SPINE) & (scene.organs[box] != HEART)
        scene.hu[box][tube] = BLOOD + 15
        scene.organs[box][tube] = VESSELS


def _lung_vessels(scene: Scene, rng: np.random.Generator, branches: int = 46) -> None:
    """Small vessels run from the two roots of the lung to random places in it and thin out on the way."""
    f = scene.frame
    steps = np.linspace(0, 1, 2 * max(f.size) // 3, dtype=np.float32)[None, :, None]
    thin = np.clip(6.7 / f.spacing.max(), 0.2, 1)
    for organ, root in ((LUNG_LEFT, (-40, -8, 12)), (LUNG_RIGHT, (36, -6, 10))):
        voxels = np.flatnonzero(scene.organs == organ)
        bends = rng.normal(0, 9, (branches, 1, 3)).astype(np.float32)
        picks = rng.random(branches)
        if not len(voxels):
            continue
        i, j, k = np.unravel_index(voxels[(picks * len(voxels)).astype(np.intp)], f.size)
        ends = np.stack([f.x[i, j, 0], f.y[i, j, 0], f.z[0, 0, k]], axis=1)[:, None]
        path = np.asarray(root) + steps * (ends - np.asarray(root)) + 4 * steps * (1 - steps) * bends
        at = f.index(path.reshape(-1, 3))
        flat = np.ravel_multi_index((at[:, 0], at[:, 1], at[:, 2]), f.size)
        value = np.broadcast_to(-300 - 380 * steps[:, :, 0] / thin, (branches, steps.shape[1])).reshape(-1)
        keep = scene.organs.reshape(-1)[flat] == organ
        target = scene.hu.reshape(-1)
        target[flat[keep]] = np.maximum(target[flat[keep]], value[keep])
