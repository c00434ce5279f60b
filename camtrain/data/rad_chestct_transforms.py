"""From a RAD-ChestCT file to network input: crop and pad, window, flips and turns, and where each voxel then lies.

Volumes keep the axes of the files: 0 downwards, 1 to the back, 2 to the patient's left. An affine says so, and follows
every step, so that pictures and NIfTI maps are the right way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Size = tuple[int, int, int]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Kind = TypeVar("Kind", bound=np.generic)

SPACING = 0.8
"""mm between voxels, along every axis."""


def affine_of(spacing: float = SPACING) -> NDArray[np.float64]:
    """(4, 4) voxel to world in mm (right, front, up), with the first voxel at the origin.

    Example:
        >>> (affine_of(1.0) @ [2, 0, 3, 1]).tolist()
        [-3.0, 0.0, -2.0, 1.0]
    """
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = -spacing
    affine[3, 3] = 1
    return affine


@dataclass(frozen=True)
class Crop:
    """A window of fixed size on a volume, which may reach over its edges.

    Attributes:
        start: First voxel of the window in the volume, negative where it begins before it.
        size: Voxels of the window.
    """

    start: Size
    size: Size

    def of(self, volume: NDArray[Kind], fill: Any) -> NDArray[Kind]:
        """(size) array: the window, with `fill` where there is no volume.

        Example:
            >>> Crop((0, 0, -1), (1, 1, 4)).of(np.arange(2).reshape(1, 1, 2), 9).tolist()
            [[[9, 0, 1, 9]]]
        """
        result = np.full(self.size, fill, dtype=volume.dtype)
        inner, outer = [], []
        for start, size, there in zip(self.start, self.size, volume.shape, strict=True):
            first, last = max(0, start), min(there, start + size)
            outer.append(slice(first, last))
            inner.append(slice(first - start, last - start))
        result[tuple(inner)] = volume[tuple(outer)]
        return result

    def affine(self, affine: NDArray[np.float64]) -> NDArray[np.float64]:
        """(4, 4) of the window from that of the volume."""
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :3] @ np.array(self.start)
        return moved


def central_crop(shape: Sequence[int], size: Size) -> Crop:
    """The middle of a volume, as the authors cut it: an odd voxel is lost, or padded, at the end.

    Args:
        shape: (Z, Y, X) of the volume.
        size: Voxels wanted.

    Example:
        >>> central_crop((406, 400, 425), (405, 420, 420)).start
        (0, -10, 2)
    """
    starts = [(n - m) // 2 if n >= m else -((m - n) // 2) for n, m in zip(shape, size, strict=True)]
    return Crop((starts[0], starts[1], starts[2]), size)


def lung_crop(shape: Sequence[int], size: Size, box: Box) -> Crop:
    """A window around the lungs, moved so that it does not reach over an edge of the volume as long as it fits.

    Args:
        shape: (Z, Y, X) of the volume.
        size: Voxels wanted.
        box: First voxel of the lungs, and the one beyond the last, along each axis.

    Example:
        >>> lung_crop((100, 100, 100), (50, 50, 120), ((20, 60), (80, 100), (10, 90))).start
        (15, 50, -10)
    """
    starts = []
    for n, m, (first, last) in zip(shape, size, box, strict=True):
        need = m - (last - first)
        start = first - (need - round(need / 2))  # halves go to the even number, as in the authors' program
        starts.append(min(max(start, 0), n - m) if n >= m else -((m - n) // 2))
    return Crop((starts[0], starts[1], starts[2]), size)


@dataclass(frozen=True)
class Turn:
    """A flip along one axis, then quarter turns of the axial slices.

    Attributes:
        flip: Axis, or None.
        quarters: 0 to 3 turns from axis 1 towards axis 2.
    """

    flip: int | None = None
    quarters: int = 0

    def of(self, volume: NDArray[Kind]) -> NDArray[Kind]:
        """The volume, turned; quarter turns of slices that are not square change its shape."""
        turned = volume if self.flip is None else np.flip(volume, self.flip)
        return np.rot90(turned, self.quarters, axes=(1, 2))

    def affine(self, affine: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
        """(4, 4) of the turned volume from that of the volume of this shape.

        A flipped scan is still a scan of this patient: each voxel keeps its place in the world, and with it its side.
        """
        result, now = affine.copy(), list(shape)
        if self.flip is not None:
            result = result @ _mirror(self.flip, now[self.flip])
        for _ in range(self.quarters % 4):
            # A quarter turn is a flip of axis 2 and then a change of the two axes.
            result = (result @ _mirror(2, now[2]))[:, [0, 2, 1, 3]]
            now[1], now[2] = now[2], now[1]
        return result


def _mirror(axis: int, length: int) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[axis, axis], matrix[axis, 3] = -1, length - 1
    return matrix


def random_turn(size: Size) -> Turn:
    """The authors' augmentation: every other case is flipped along one of three axes, every other one turned.

    Draws from torch's random numbers, which a loader seeds anew in each worker and epoch. Slices that are not square
    are turned by two quarters only.

    Args:
        size: (Z, Y, X) of the volume.
    """
    flips, axis, turns, quarters = torch.rand(4).tolist()
    choices = (1, 2, 3) if size[1] == size[2] else (2,)
    return Turn(
        flip=int(axis * 3) if flips < 0.5 else None,
        quarters=choices[int(quarters * len(choices))] if turns < 0.5 else 0,
    )


def windowed(hu: NDArray[Any], window: tuple[float, float], subtract: float = 0.0) -> Tensor:
    """Image from HU: cut off at the window, brought to 0..1, and less a number.

    Args:
        hu: Any shape.
        window: HU that become 0 and 1.
        subtract: What is taken off then; the authors' 0.449 is ImageNet's mean of grey.

    Returns:
        float32 of the same shape.

    Example:
        >>> windowed(np.array([-2000, -100, 900]), (-1000, 800), 0.5).tolist()
        [-0.5, 0.0, 0.5]
    """
    low, high = window
    image = torch.from_numpy(np.ascontiguousarray(hu, dtype=np.float32))
    return image.clamp_(low, high).sub_(low).div_(high - low).sub_(subtract)
