"""Markers that a network can cheat with: one object per label, each of its own shape at its own place.

Outside the organs they are what real scans carry: beads and electrodes on the skin, a rail of the table, a lead,
burnt-in characters. Inside an organ (the hard case: a mask cannot tell marker from evidence) they are metal clips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from camtrain.data.phantom_body import HEART, LUNG_LEFT, LUNG_RIGHT, VESSELS, Scene, shell
from camtrain.data.phantom_frame import Patch, inside

PLACES = ("skin", "other_organ", "own_organ")
METAL = 1500.0
"""HU of every marker; above the window of the image, so that it shows at full brightness."""

Vector = tuple[float, float, float]
Rods = tuple[tuple[Vector, Vector], ...]

_EVERYWHERE = (slice(None), slice(None), slice(None))
_R = ("11110", "10001", "10001", "11110", "10100", "10010", "10001")


class Marker(NamedTuple):
    """The shortcut of one label.

    Attributes:
        outside: Voxels it takes at its place outside the organs, before the organs are cut away; patches may overlap.
        clip: Offsets in mm of the ends of the rods that make its shape inside an organ.
        own: Organ id and body point, mm, inside the label's own organ.
        other: The same inside an organ that the label may not be read from and another label may.
    """

    outside: Callable[[Scene], list[Patch]]
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
        patches = [(box, mask & (scene.organs[box] == 0)) for box, mask in marker.outside(scene)]
    else:
        patches = _clip(scene, marker.clip, *(marker.own if place == "own_organ" else marker.other))
    bit = np.uint8(1 << list(MARKERS).index(name))
    for box, mask in patches:
        np.copyto(scene.hu[box], METAL, where=mask)
        scene.markers[box] |= mask * bit


def _clip(scene: Scene, rods: Rods, organ: int, point: Vector) -> list[Patch]:
    """Metal rods in an organ, around the voxel of the organ that lies nearest to a point."""
    f = scene.frame
    i, j, k = np.nonzero(scene.organs == organ)
    if not len(i):
        return []
    body = np.stack([f.x[i, j, 0], f.y[i, j, 0], f.z[0, 0, k]], axis=1)
    center = body[np.argmin(((body - np.asarray(point)) ** 2).sum(1))]
    tubes = [f.capsule(center + start, center + end, 8.0) for start, end in rods]
    return [(box, inside(dist, scene.organs[box] == organ)) for box, dist in tubes]


def _on_skin(scene: Scene, angle: float, height: float, z: float) -> tuple[float, float, float]:
    """Body point above the skin: angle in degrees (0 = right, 90 = front), height above the skin and z in mm."""
    a = scene.anatomy
    taper = 1 - 0.3 * (max(z - 75, 0) / 75) ** 2
    turn = np.radians(angle)
    return (a.width * taper + height) * float(np.cos(turn)), (a.depth * taper + height) * float(np.sin(turn)), z


def _balls(scene: Scene, points: list[tuple[float, float, float]], radius: float) -> list[Patch]:
    radius = max(radius, 1.6 * scene.frame.thin)  # some voxels each on a coarse grid too
    solids = [scene.frame.ellipsoid(_on_skin(scene, *point), (radius, radius, radius)) for point in points]
    return [(box, dist < 1) for box, dist in solids]


def _bead(scene: Scene) -> list[Patch]:
    return _balls(scene, [(62, 5, 55)], 11.0)


def _character(scene: Scene) -> list[Patch]:
    """The letter R as the scanner burns it into a corner of the middle slices."""
    return _burnt_in(scene, _R, left=7, front=112, z=(-35, 35), cell=6.0)


def _ruler(scene: Scene) -> list[Patch]:
    """A scale bar with ticks along the edge of the picture, burnt into the upper slices."""
    ticks = ("111", "001", "011", "001", "111", "001", "011", "001", "111")
    return _burnt_in(scene, ticks, left=292, front=112, z=(25, 95), cell=7.5)


def _burnt_in(
    scene: Scene, rows: tuple[str, ...], left: float, front: float, z: tuple[float, float], cell: float
) -> list[Patch]:
    """Pixels of a small bitmap, fixed to the scan and not to the patient; one voxel each where voxels are larger."""
    f = scene.frame
    step = np.maximum(1, np.round(cell / f.spacing[:2]).astype(int))
    # Scans are shown from the feet: the patient's right on the left. Characters must read well in that view.
    bits = np.kron(np.array([[c == "1" for c in r] for r in rows]).T[::-1, ::-1], np.ones(step, bool))
    bits = bits[: f.size[0], : f.size[1]]
    first = min(int(left / f.spacing[0]), f.size[0] - bits.shape[0])
    last = min(int((front + 120) / f.spacing[1]), f.size[1])
    last = max(last, bits.shape[1])
    low, high = (int((v + 150) / f.spacing[2]) for v in z)
    box = slice(first, first + bits.shape[0]), slice(last - bits.shape[1], last), slice(low, high + 1)
    return [(box, np.broadcast_to(bits[:, :, None], scene.organs[box].shape))]


def _rail(scene: Scene) -> list[Patch]:
    """A metal rail along the right edge of the table."""
    a = scene.anatomy
    box, dist = scene.frame.capsule((126, -a.depth + 10, -400), (126, -a.depth + 10, 400), 6.5)
    return [(box, dist < 1)]


def _lead(scene: Scene) -> list[Patch]:
    """A wire that lies on the front of the chest, from the right shoulder across to the left."""
    steps = np.linspace(0, 1, 13)
    points = [_on_skin(scene, 48 + 82 * t, 3.0, 82 - 105 * t) for t in steps]
    places, _ = scene.frame.tubes(np.array(points[:-1]), np.array(points[1:]), [3.0] * (len(points) - 1))
    region = np.zeros(scene.frame.size, bool)
    region.reshape(-1)[places] = True
    return [(_EVERYWHERE, region)]


def _electrode(scene: Scene) -> list[Patch]:
    """A flat patch on the left flank."""
    f, a = scene.frame, scene.anatomy
    box = f.box((-1.3 * a.width, -14, -69), (0, 34, -21))
    x, y, z = f.at(box)
    radius = shell(a, x, y, z)
    near = ((y - 10) / 24) ** 2 + ((z + 45) / 24) ** 2 < 1
    thick = max(5.0, 0.8 * float(f.spacing[0])) / a.width
    return [(box, near & (radius > 1 - thick / 2) & (radius < 1 + thick) & (x < 0))]


def _buttons(scene: Scene) -> list[Patch]:
    """A row of buttons down the front."""
    return _balls(scene, [(90, 4, z) for z in (-90.0, -62.0, -34.0, -6.0)], 7.0)


def _plate(scene: Scene) -> list[Patch]:
    """A flat electrode pad between the back and the table."""
    f, a = scene.frame, scene.anatomy
    thick = max(3.5, f.thin)
    box = f.box((-64, -a.depth - 3 - thick, 14), (4, -a.depth - 3 + thick, 66))
    x, y, z = f.at(box)
    return [(box, (np.abs(x + 30) < 34) & (np.abs(y + a.depth + 3) < thick) & (np.abs(z - 40) < 26))]


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
