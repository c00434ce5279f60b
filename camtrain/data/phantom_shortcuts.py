"""Markers that a network can cheat with: one object per label, each of its own shape at its own place.

Outside the organs they are what real scans carry: beads and electrodes on the skin, a rail of the table, a lead,
burnt-in characters. Inside an organ (the hard case: a mask cannot tell marker from evidence) they are metal clips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from camtrain.data.phantom_anatomy import Anatomy
from camtrain.data.phantom_body import HEART, LUNG_LEFT, LUNG_RIGHT, VESSELS, Scene, shell
from camtrain.data.phantom_frame import FIELD_OF_VIEW, Floats, Patch, Places, inside

PLACES = ("skin", "other_organ", "own_organ")
METAL = 1500.0
"""HU of every marker; above the window of the image, so that it shows at full brightness."""

Vector = tuple[float, float, float]
Rods = tuple[tuple[Vector, Vector], ...]

_R = ("11110", "10001", "10001", "11110", "10100", "10010", "10001")


class Marker(NamedTuple):
    """The shortcut of one label.

    Attributes:
        outside: Voxels it takes at its place outside the organs, before the organs are cut away; parts may overlap.
        clip: Offsets in mm of the ends of the rods that make its shape inside an organ.
        own: Organ id and body point, mm, inside the label's own organ.
        other: The same inside an organ that the label may not be read from and another label may.
    """

    outside: Callable[[Scene], Sequence[Patch | Places]]
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
    bit, outside = np.uint8(1 << list(MARKERS).index(name)), place == "skin"
    if outside:
        parts = marker.outside(scene)
    else:
        parts = _clip(scene, marker.clip, *(marker.own if place == "own_organ" else marker.other))
    for part in parts:
        if isinstance(part, np.ndarray):
            free = part[scene.organs.reshape(-1)[part] == 0]
            scene.hu.reshape(-1)[free] = METAL
            scene.markers.reshape(-1)[free] |= bit
            continue
        box, mask = part
        if outside:
            mask = mask & (scene.organs[box] == 0)
        np.copyto(scene.hu[box], METAL, where=mask)
        markers = scene.markers[box]
        markers |= mask.view(np.uint8) * bit


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


class _Skin:
    """Points at some height above the skin of every patient.

    Args:
        angles: (n,) degrees around the long axis: 0 = right, 90 = front.
        height: mm above the skin.
        z: (n,) mm.
    """

    def __init__(self, angles: Sequence[float] | Floats, height: float, z: Sequence[float] | Floats) -> None:
        turn = np.radians(angles)
        self._cos, self._sin, self._z, self._height = np.cos(turn), np.sin(turn), np.array(z), height
        self._taper = 1 - 0.3 * (np.maximum(self._z - 75, 0) / 75) ** 2

    def of(self, anatomy: Anatomy) -> Floats:
        """(n, 3) body points of one patient."""
        right = (anatomy.width * self._taper + self._height) * self._cos
        front = (anatomy.depth * self._taper + self._height) * self._sin
        return np.stack([right, front, self._z], axis=1)


_BEAD = _Skin([62], 5, [55])
_BUTTONS = _Skin([90] * 4, 4, [-90, -62, -34, -6])
_STEPS = np.linspace(0, 1, 13)
_LEAD = _Skin(48 + 82 * _STEPS, 3.0, 82 - 105 * _STEPS)


def _bead(scene: Scene) -> Sequence[Patch | Places]:
    radius = max(11.0, 1.6 * scene.frame.thin)  # some voxels on a coarse grid too
    box, dist = scene.frame.ellipsoid(_BEAD.of(scene.anatomy)[0], [radius] * 3)
    return [(box, dist < 1)]


def _character(scene: Scene) -> Sequence[Patch | Places]:
    """The letter R as the scanner burns it into a corner of the middle slices."""
    return _burnt_in(scene, _R, left=7, front=112, z=(-35, 35), cell=6.0)


def _ruler(scene: Scene) -> Sequence[Patch | Places]:
    """A scale bar with ticks along the edge of the picture, burnt into the upper slices."""
    ticks = ("111", "001", "011", "001", "111", "001", "011", "001", "111")
    return _burnt_in(scene, ticks, left=292, front=112, z=(25, 95), cell=7.5)


def _burnt_in(
    scene: Scene, rows: tuple[str, ...], left: float, front: float, z: tuple[float, float], cell: float
) -> list[Patch]:
    """Pixels of a small bitmap, fixed to the scan and not to the patient; one voxel each where voxels are larger."""
    return [_pixels(scene.frame.size, rows, left, front, z, cell)]


@functools.lru_cache(maxsize=16)
def _pixels(
    size: tuple[int, int, int], rows: tuple[str, ...], left: float, front: float, z: tuple[float, float], cell: float
) -> Patch:
    spacing = np.array(FIELD_OF_VIEW) / np.array(size)
    step = np.maximum(1, np.round(cell / spacing[:2]).astype(int))
    # Scans are shown from the feet: the patient's right on the left. Characters must read well in that view.
    bits = np.kron(np.array([[c == "1" for c in r] for r in rows]).T[::-1, ::-1], np.ones(step, bool))
    bits = bits[: size[0], : size[1]]
    first = min(int(left / spacing[0]), size[0] - bits.shape[0])
    last = min(int((front + 120) / spacing[1]), size[1])
    last = max(last, bits.shape[1])
    low, high = (int((v + 150) / spacing[2]) for v in z)
    box = slice(first, first + bits.shape[0]), slice(last - bits.shape[1], last), slice(low, high + 1)
    return box, np.broadcast_to(bits[:, :, None], (*bits.shape, len(range(size[2])[box[2]])))


def _rail(scene: Scene) -> Sequence[Patch | Places]:
    """A metal rail along the right edge of the table."""
    a = scene.anatomy
    box, dist = scene.frame.capsule((126, -a.depth + 10, -400), (126, -a.depth + 10, 400), 6.5)
    return [(box, dist < 1)]


def _lead(scene: Scene) -> Sequence[Patch | Places]:
    """A wire that lies on the front of the chest, from the right shoulder across to the left."""
    points = _LEAD.of(scene.anatomy)
    return [scene.frame.tubes(points[:-1], points[1:], [3.0] * (len(points) - 1))[0]]


def _electrode(scene: Scene) -> Sequence[Patch | Places]:
    """A flat patch on the left flank."""
    f, a = scene.frame, scene.anatomy
    box = f.box((-1.3 * a.width, -14, -69), (0, 34, -21))
    x, y, z = f.at(box)
    radius = shell(a, x, y, z)
    near = ((y - 10) / 24) ** 2 + ((z + 45) / 24) ** 2 < 1
    thick = max(5.0, 0.8 * float(f.spacing[0])) / a.width
    return [(box, near & (radius > 1 - thick / 2) & (radius < 1 + thick) & (x < 0))]


def _buttons(scene: Scene) -> Sequence[Patch | Places]:
    """A row of buttons down the front."""
    points = _BUTTONS.of(scene.anatomy)
    return [scene.frame.balls(points, np.full(points.shape, max(7.0, 1.6 * scene.frame.thin)))[0]]


def _plate(scene: Scene) -> Sequence[Patch | Places]:
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
