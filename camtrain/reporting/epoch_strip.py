"""One case and label over the epochs, small: the planes of a scene in a few epochs, all in the same colours."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from camtrain.reporting import _draw, overlays
from camtrain.reporting.scene import Scene

Pixels = npt.NDArray[np.uint8]

COLUMNS = 6  # epochs beside each other
Past = Mapping[str, Mapping[str, npt.NDArray[np.float32]]]  # title -> "epoch 3" -> map (*S'), of one grid for a title
_GAP = 4


def epoch_strip(
    scene: Scene, title: str, maps: Mapping[str, npt.NDArray[np.float32]], end: float, width: int
) -> Pixels:
    """A row for each plane of the scene and a column for each of the last `COLUMNS` epochs.

    The proportions are true, as they are above: one zoom for all planes.

    Args:
        scene: Where the planes lie; the same for all epochs.
        title: Whose maps they are.
        maps: Name of the epoch -> (*S') map as it came, all of one grid.
        end: Absolute map value with the strongest colour, for all epochs.
        width: Pixels that there are.

    Returns:
        (rows, width, 3).

    Example:
        >>> scene = Scene.make(np.zeros((8, 8, 8)))
        >>> epoch_strip(scene, "hirescam", {"epoch 0": np.ones((2, 2, 2), np.float32)}, 1.0, 200).shape
        (131, 200, 3)
    """
    names = tuple(maps)[-COLUMNS:]
    step = (width + _GAP) // COLUMNS
    sizes = _sizes(scene, step - _GAP)
    oriented = np.stack([scene.orient(maps[name]) for name in names])
    rows = _draw.sheet(sum(high for high, _ in sizes) + _GAP * (len(sizes) - 1), COLUMNS * step)
    columns, top = rows.reshape(len(rows), COLUMNS, step, 3), 0
    for plane, (high, wide) in zip(scene.planes, sizes, strict=True):
        tiles = _tiles(scene, plane, oriented, end, (high, wide))
        columns[top : top + high, : len(names), :wide] = tiles.transpose(1, 0, 2, 3)
        top += high + _GAP
    head = _draw.headline(f"{title} over the epochs, in the same colours", width, 12, _draw.FAINT)
    return _draw.stack([head, rows[:, :width], _feet(names, step, max(wide for _, wide in sizes), width)], 0, down=True)


def _tiles(
    scene: Scene, plane: str, oriented: npt.NDArray[np.floating], end: float, size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """(epochs, rows, columns, 3): maps (epochs, *S') in screen order on one plane."""
    index = scene.through(plane)
    alone = overlays.grey(scene.plane(plane, index), scene.window, size)
    tiles = overlays.blend(alone, overlays.enlarge(scene.flat(oriented, plane, index), (len(oriented), *size)), end)
    if scene.allowed is not None and not scene.allowed.all():
        tiles[:, overlays.outline(scene.inside(plane, index, size))] = overlays.OUTLINE
    return tiles


def _sizes(scene: Scene, width: int) -> list[tuple[int, int]]:
    """Rows and columns of each plane, so that the widest fits into the column."""
    extents = [scene.extent(plane) for plane in scene.planes]
    zoom = min(width / max(wide for _, wide in extents), 1.5 * width / max(high for high, _ in extents))
    return [(max(8, int(high * zoom)), max(8, int(wide * zoom))) for high, wide in extents]


@functools.lru_cache(maxsize=8)
def _feet(names: tuple[str, ...], step: int, wide: int, width: int) -> Pixels:
    """The names of the epochs; in a pass they are the same for every case of one shape."""
    middles = [place * step + max(wide, _draw.text_width(name, 10) + 2) / 2 for place, name in enumerate(names)]
    letters = [(name, (middle, 7.0), "mm", 10, _draw.FAINT) for name, middle in zip(names, middles, strict=True)]
    feet = _draw.write(_draw.sheet(15, width), letters)
    feet.setflags(write=False)
    return feet
