"""Markers that a network can cheat with: one object per label, each of its own shape at its own place.

Outside the organs they are what real scans carry: beads and electrodes on the skin, a rail of the table, a lead,
burnt-in characters. Inside an organ (the hard case: a mask cannot tell marker from evidence) they are metal clips.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from camtrain.data.phantom_body import HEART, LUNG_LEFT, LUNG_RIGHT, VESSELS, Scene, shell
from camtrain.data.phantom_frame import Bools, inside

PLACES = ("skin", "other_organ", "own_organ")
METAL = 1500.0
"""HU of every marker; above the window of the image, so that it shows at full brightness."""

Vector = tuple[float, float, float]
Rods = tuple[tuple[Vector, Vector], ...]

_R = ("11110", "10001", "10001", "11110", "10100", "10010", "10001")


class Marker(NamedTuple):
    """The shortcut of one label.

    Attributes:
        outside: Voxels it takes at its place outside the organs, before the organs are cut away.
        clip: Offsets in mm of the ends of the rods that make its shape inside an organ.
        own: Organ id and body point, mm, inside the label's own organ.
        other: The same inside an organ that the label may not be read from and another label may.
    """

    outside: Callable[[Scene], Bools]
    clip: Rods
    own: tuple[int, Vector]
    other: tuple[int, Vector]


def paint_marker(scene: Scene, name: str, place: str) -> None:
    """Paint the marker of one label and note its voxels in `scene.markers`.

    Args:
        scene: The finished scan; markers stay sharp.
        name: A key of `MARKERS`.
        place: One of `PLACES`.
    """
    marker = MARKERS[name]
    if place == "skin":
        region = marker.outside(scene) & (scene.organs == 0)
    else:
        region = _clip(scene, marker.clip, *(marker.own if place == "own_organ" else marker.other))
    scene.hu[region] = METAL
    scene.markers[region] |= np.uint8(1 << list(MARKERS).index(name))


def _clip(scene: Scene, rods: Rods, organ: int, point: Vector) -> Bools:
    """Metal rods in an organ, around the voxel of the organ that lies nearest to a point."""
    f, region = scene.frame, np.zeros(scene.frame.size, bool)
    voxels = np.argwhere(scene.organs == organ)
    if not len(voxels):
        return region
    i, j, k = voxels.T
    body = np.stack([f.x[i, j, 0], f.y[i, j, 0], f.z[0, 0, k]], axis=1)
    center = body[np.argmin(((body - np.asarray(point)) ** 2).sum(1))]
    for start, end in rods:
        box, dist = f.capsule(center + start, center + end, 8.0)
        region[box] |= inside(dist, scene.organs[box] == organ)
    return region


def _on_skin(scene: Scene, angle: float, height: float, z: float) -> tuple[float, float, float]:
    """Body point above the skin: angle in degrees (0 = right, 90 = front), height above the skin and z in mm."""
    a = scene.anatomy
    taper = 1 - 0.3 * (max(z - 75, 0) / 75) ** 2
    turn = np.radians(angle)
    return (a.width * taper + height) * float(np.cos(turn)), (a.depth * taper + height) * float(np.sin(turn)), z


def _balls(scene: Scene, points: list[tuple[float, float, float]], radius: float) -> Bools:
    region = np.zeros(scene.frame.size, bool)
    radius = max(radius, 1.6 * scene.frame.thin)  # some voxels each on a coarse grid too
    for point in points:
        box, dist = scene.frame.ellipsoid(_on_skin(scene, *point), (radius, radius, radius))
        region[box] |= dist < 1
    return region


def _bead(scene: Scene) -> Bools:
    return _balls(scene, [(62, 5, 55)], 11.0)


def _character(scene: Scene) -> Bools:
    """The letter R as the scanner burns it into a corner of the middle slices."""
    return _burnt_in(scene, _R, left=7, front=112, z=(-35, 35), cell=6.0)


def _ruler(scene: Scene) -> Bools:
    """A scale bar with ticks along the edge of the picture, burnt into the upper slices."""
    ticks = ("111", "001", "011", "001", "111", "001", "011", "001", "111")
    return _burnt_in(scene, ticks, left=292, front=112, z=(25, 95), cell=7.5)


def _burnt_in(
    scene: Scene, rows: tuple[str, ...], left: float, front: float, z: tuple[float, float], cell: float
) -> Bools:
    """Pixels of a small bitmap, fixed to the scan and not to the patient; one voxel each where voxels are larger."""
    f, region = scene.frame, np.zeros(scene.frame.size, bool)
    step = np.maximum(1, np.round(cell / f.spacing[:2]).astype(int))
    # Scans are shown from the feet: the patient's right on the left. Characters must read well in that view.
    bits = np.kron(np.array([[c == "1" for c in r] for r in rows]).T[::-1, ::-1], np.ones(step, bool))
    bits = bits[: f.size[0], : f.size[1]]
    first = min(int(left / f.spacing[0]), f.size[0] - bits.shape[0])
    last = min(int((front + 120) / f.spacing[1]), f.size[1])
    last = max(last, bits.shape[1])
    low, high = (int((v + 150) / f.spacing[2]) for v in z)
    region[first : first + bits.shape[0], last - bits.shape[1] : last, low : high + 1] = bits[:, :, None]
    return region


def _rail(scene: Scene) -> Bools:
    """A metal rail along the right edge of the table."""
    a = scene.anatomy
    box, dist = scene.frame.capsule((126, -a.depth + 10, -400), (126, -a.depth + 10, 400), 6.5)
    region = np.zeros(scene.frame.size, bool)
    region[box] = dist < 1
    return region


def _lead(scene: Scene) -> Bools:
    """A wire that lies on the front of the chest, from the right shoulder across to the left."""
    steps = np.linspace(0, 1, 13)
    points = [_on_skin(scene, 48 + 82 * t, 3.0, 82 - 105 * t) for t in steps]
    region = np.zeros(scene.frame.size, bool)
    for start, end in pairwise(points):
        box, dist = scene.frame.capsule(start, end, 3.0)
        region[box] |= dist < 1
    return region


def _electrode(scene: Scene) -> Bools:
    """A flat patch on the left flank."""
    f = scene.frame
    radius = shell(scene.anatomy, f)
    near = ((f.y - 10) / 24) ** 2 + ((f.z + 45) / 24) ** 2 < 1
    thick = max(5.0, 0.8 * float(f.spacing[0])) / scene.anatomy.width
    patch: Bools = near & (radius > 1 - thick / 2) & (radius < 1 + thick) & (f.x < 0)
    return patch


def _buttons(scene: Scene) -> Bools:
    """A row of buttons down the front."""
    return _balls(scene, [(90, 4, z) for z in (-90.0, -62.0, -34.0, -6.0)], 7.0)


def _plate(scene: Scene) -> Bools:
    """A flat electrode pad between the back and the table."""
    f, a = scene.frame, scene.anatomy
    thick = max(3.5, f.thin)
    flat = (np.abs(f.x + 30) < 34) & (np.abs(f.y + a.depth + 3) < thick)
    region: Bools = flat & (np.abs(f.z - 40) < 26)
    return region


def _rods(*ends: Vector) -> Rods:
    return tuple(((-x, -y, -z), (x, y, z)) for x, y, z in ends)


MARKERS = {
    "nodule": Marker(_bead, _rods((0, 0, 0)), (LUNG_LEFT, (-70, 10, 40)), (HEART, (-55, 35, -50))),
    "ground_glass": Marker(_character, _rods((12, 0, 0)), (LUNG_RIGHT, (70, 10, 40)), (VESSELS, (-16, -36, -75))),
    "consolidation": Marker(_rail, _rods((0, 12, 0)), (LUNG_LEFT, (-60, 0, 75)), (VESSELS, (-4, -5, 62))),
    "effusion": Marker(_lead, _rods((0, 0, 12)), (LUNG_RIGHT, (65, -35, -20)), (HEART, (10, 10, -20))),
    "cardiomegaly": Marker(_electrode, _rods((10, 10, 0)), (HEART, (-30, 40, -15)), (LUNG_RIGHT, (60, 0, 70))),
    "coronary_calcification": Marker(
        _ruler, _rods((10, 0, 10), (10, 0, -10)), (HEART, (-20, 10, -45)), (LUNG_LEFT, (-75, 25, 20))
    ),
    "aneurysm": Marker(_buttons, _rods((12, 0, 0), (0, 12, 0)), (VESSELS, (-18, -36, -30)), (LUNG_RIGHT, (80, 20, 0))),
    "pericardial_effusion": Marker(
        _plate, _rods((0, 12, 0), (0, 0, 12)), (HEART, (0, 20, -25)), (LUNG_LEFT, (-55, -20, 55))
    ),
}
