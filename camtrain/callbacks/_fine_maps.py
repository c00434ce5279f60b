"""Maps as fine as the image: scored where they are made, and kept as coarse as the pictures need them.

A map of a guided method, or of an early layer, has as many cells as the image has voxels: 256 MB at 400^3, for each
pair and method of a panel. Those of usual layers have a few thousand and are kept as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from camtrain.metrics.energy_inside import energy_inside
from camtrain.metrics.organ_iou import THRESHOLDS, organ_iou_curve
from camtrain.reporting.panel_files import averaged, fitting_size

DRAWN = 1 << 20  # cells of a map that pictures are drawn from: 101 along an axis of a cube
REPORTED = 1 << 16  # cells of a map in the report, of which each epoch has dozens

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """Scores of one map, of which the threshold is known only when the pass is over.

    Attributes:
        energy_inside: NaN where undefined.
        curve: OrganIoU at each of `THRESHOLDS`, NaN where undefined.
    """

    energy_inside: float
    curve: tuple[float, ...]

    @classmethod
    def of(cls, values: Tensor, cells: Tensor) -> Measured:
        """Measure one map where it is.

        Args:
            values: (*S') signed.
            cells: (*S') bool, the allowed cells.
        """
        one = torch.ones(1, 1, device=values.device)
        maps, allowed = values[None, None], cells.to(values.device)[None, None]
        curve = organ_iou_curve(maps, allowed, one)[0, 0]
        return cls(float(energy_inside(maps, allowed, one)[0, 0]), tuple(curve.tolist()))

    def organ_iou(self, threshold: float) -> float:
        """At the nearest of `THRESHOLDS`, from which every threshold of a pass is chosen."""
        return self.curve[min(range(len(THRESHOLDS)), key=lambda i: abs(THRESHOLDS[i] - threshold))]


def on_host(values: Tensor) -> Floats:
    """A copy: a view of one row of the CPU would keep the whole batch, all labels of it."""
    return np.array(values.detach().float().cpu())


def is_fine(values: Tensor | Floats, most: int = DRAWN) -> bool:
    """Has a map (*S') more cells than are kept?

    Example:
        >>> is_fine(torch.zeros(8, 8, 8)), is_fine(torch.zeros(8, 8, 8), most=100)
        (False, True)
    """
    return math.prod(values.shape) > most


def coarse(values: Floats, most: int = DRAWN) -> Floats:
    """A map (*S') of at most so many cells: means of neighbouring ones, where it has more.

    Example:
        >>> coarse(np.ones((8, 8, 8), np.float32), most=100).shape
        (4, 4, 4)
    """
    return averaged(values, fitting_size(values.shape, most)) if is_fine(values, most) else values
