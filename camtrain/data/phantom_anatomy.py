"""One patient of the phantom: pose, proportions, heart and aorta, drawn from a population.

Numbers are millimetres in body coordinates (x to the right, y to the front, z up; the origin lies in mid-chest) and
Hounsfield units.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from camtrain.data.phantom_frame import Floats, Pose


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

    @functools.cached_property
    def heart_reach(self) -> Floats:
        """(3,) half the box around the ellipsoid of the heart's half-axes."""
        reach: Floats = np.sqrt(((self.heart_frame * self.heart_axes[:, None]) ** 2).sum(axis=0))
        return reach

    @functools.cached_property
    def heart_rows(self) -> Floats:
        """(3, 3) the axes divided by their lengths, as columns: along them the heart's coordinates are measured."""
        return np.ascontiguousarray((self.heart_frame / self.heart_axes[:, None]).T)

    @property
    def cavity(self) -> tuple[float, float]:
        """Half-axes of the inside of the rib cage."""
        return self.width - self.fat - self.wall, self.depth - self.fat - self.wall


_MEASURES: dict[str, tuple[float, float]] = {
    # In the order in which they are drawn: another order would be other patients.
    **{"shift_x": (-9, 9), "shift_y": (-4, 8), "shift_z": (-10, 10)},
    **{"scale_x": (0.94, 1.06), "scale_y": (0.94, 1.06), "scale_z": (0.94, 1.06), "roll": (-0.07, 0.07)},
    **{"apex_x": (-0.08, 0.08), "apex_y": (-0.08, 0.08), "apex_z": (-0.08, 0.08)},
    **{"fat": (7, 20), "width": (-5, 5), "depth": (-3, 3), "wall": (17, 21)},
    **{"lung_hu": (-870, -810), "lung_gradient": (0.3, 0.9), "dome_right": (-52, -36), "dome_left": (-62, -46)},
    **{"rib_phase": (0, 26), "heart_x": (-4, 4), "heart_y": (-4, 4), "heart_z": (-5, 5), "heart_scale": (0.93, 1.03)},
    **{"arch_top": (40, 52), "aorta_back": (-36, -30), "aorta_left": (-24, -16), "aorta_radius": (11.5, 14)},
}

_LOW, _HIGH = np.array(list(_MEASURES.values()), float).T
_RANGE = _HIGH - _LOW


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One patient from the population: pose, proportions, fat, density of the lungs, course of the aorta."""
    m = dict(zip(_MEASURES, (_LOW + _RANGE * rng.random(len(_LOW))).tolist(), strict=True))
    return Anatomy(
        pose=Pose(
            shift=(m["shift_x"], m["shift_y"], m["shift_z"]),
            scale=(m["scale_x"], m["scale_y"], m["scale_z"]),
            roll=m["roll"],
        ),
        width=130 + 0.5 * m["fat"] + m["width"],
        depth=88 + 0.4 * m["fat"] + m["depth"],
        fat=m["fat"],
        wall=m["wall"],
        lung_hu=m["lung_hu"],
        lung_gradient=m["lung_gradient"],
        dome_right=m["dome_right"],
        dome_left=m["dome_left"],
        rib_phase=m["rib_phase"],
        heart=np.array([-20 + m["heart_x"], 16 + m["heart_y"], -28 + m["heart_z"]], np.float32),
        heart_axes=np.array([53, 42, 44], np.float32),
        heart_frame=_heart_frame(-0.74 + m["apex_x"], 0.42 + m["apex_y"], -0.52 + m["apex_z"]),
        heart_scale=m["heart_scale"],
        aorta=_aorta(top=m["arch_top"], back=m["aorta_back"], left=m["aorta_left"]),
        aorta_radius=m["aorta_radius"],
    )


def _heart_frame(right: float, front: float, up: float) -> Floats:
    """(3, 3) unit vectors: to the apex, and two across it."""
    apex, side = np.array([right, front, up]), np.array([0.6, 0.75, 0.0])
    apex /= math.sqrt(apex @ apex)
    side -= apex * (side @ apex)
    side /= math.sqrt(side @ side)
    (a, b, c), (d, e, f) = apex.tolist(), side.tolist()
    third = (b * f - c * e, c * d - a * f, a * e - b * d)
    return np.array([apex, side, third], np.float32)


_TURN = np.linspace(0, np.pi, 6)
_ALONG, _RISE = (1 - np.cos(_TURN)) / 2, 18 * np.sin(_TURN)


def _aorta(top: float, back: float, left: float) -> Floats:
    line = np.empty((9, 3))
    line[0] = -2.0, 14.0, -8.0
    line[1:7, 0] = 12.0 + _ALONG * (left - 12.0)
    line[1:7, 1] = 16.0 + _ALONG * (back - 16.0)
    line[1:7, 2] = top + _RISE
    line[7] = left, back - 3, -40.0
    line[8] = left + 10, back - 2, -190.0
    return line
