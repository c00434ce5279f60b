"""Pictures for a training run: one panel per case and label, and sheets of panels.

Composed with NumPy and Pillow, a few milliseconds each: a panel drawn with matplotlib takes forty times as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting import _draw, slices
from camtrain.reporting.overlays import shared_scale
from camtrain.reporting.scene import Scene
from camtrain.reporting.sections import Sections

Pixels = npt.NDArray[np.uint8]
Map = npt.NDArray[np.floating]

GAP = 4
_MARGIN = 6
_SHAPELY = 1.6  # width / height that logger pages show best


def compose_panel(
    image: npt.NDArray[np.generic],
    maps: Map | Mapping[str, Map],
    allowed: npt.NDArray[np.bool_] | None = None,
    *,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    caption: str = "",
    scale: float | Mapping[str, float] | None = None,
    point: Sequence[int] | None = None,
    window: tuple[float, float] | None = None,
    width: int = 640,
    marked: bool = False,
) -> Pixels:
    """One case and one label: three orthogonal planes of the image alone, and the same with each map laid over.

    Warm is evidence for the label, cool is evidence against it, zero is transparent; the green rim is the region that
    the label may be read from. Give `scale` and `point` to make panels of different epochs comparable.

    Args:
        image: (*S) or (C, *S), 2D or 3D; any range.
        maps: (*S') signed map, or several by title (methods; before and after).
        allowed: (*S) or (*S') bool.
        spacing: Voxel size in mm; default: cubes.
        axes: Where the image's axes run, such as `"RAS"` (see `geometry`); None = unknown: no R/L letters.
        caption: First line: case, label, truth, score.
        scale: Map value with the strongest colour, for all maps or per title; default: the largest of these maps.
        point: Voxel through which the planes go; default: where the allowed region is largest.
        window: Image values shown as black and white; default: quantiles of the image.
        width: Width of the panel in pixels.
        marked: Put a cross on each map's highest cell.

    Returns:
        (H, width, 3) uint8.

    Raises:
        InputError: Shapes that do not fit each other.

    Example:
        >>> panel = compose_panel(np.random.rand(16, 12, 10), np.ones((4, 4, 4)), caption="case 1: nodule", scale=1.0)
        >>> panel.shape[1], panel.dtype
        (640, dtype('uint8'))
    """
    named = dict(maps) if isinstance(maps, Mapping) else {"attention": maps}
    if not named:
        raise InputError("expected at least one map, got none: give an array or {title: array}")
    rank = np.ndim(next(iter(named.values())))
    scene = Scene.make(image, allowed, rank=rank, spacing=spacing, axes=axes, point=point, window=window)
    oriented = {title: scene.orient(m) for title, m in named.items()}
    if isinstance(scale, Mapping):
        ends = {title: checked_scale(scale[title]) for title in oriented}
    else:
        end = checked_scale(scale) if scale is not None else shared_scale(oriented.values())
        ends = dict.fromkeys(oriented, end)
    common = next(iter(ends.values())) if len(set(ends.values())) == 1 else None
    heads = {t: t if common is not None else f"{t}, colours end at +-{_draw.number(e)}" for t, e in ends.items()}
    inner = width - 2 * _MARGIN
    down, boxes = _layout(scene, len(oriented) + 1, inner)
    blocks = [draw_block(scene, boxes, None, 1.0, "image")]
    blocks += [draw_block(scene, boxes, m, ends[title], heads[title], marked) for title, m in oriented.items()]
    legend = _draw.legend(inner, common, region_note(scene.allowed), own="each map on its own scale")
    parts = [_draw.stack(blocks, GAP, down=down), legend]
    if caption:
        parts.insert(0, _draw.headline(caption, inner, 14))
    return _draw.stack(parts, 2, down=True, margin=_MARGIN)


def compose_grid(panels: Sequence[Pixels], columns: int | None = None, gap: int = 16) -> Pixels:
    """A sheet of panels, row by row, each centred in a cell of the largest panel's size.

    Args:
        panels: (H, W, 3) each.
        columns: Panels in a row; default: about as many rows as columns.
        gap: Pixels between panels.

    Example:
        >>> compose_grid([np.zeros((10, 20, 3), np.uint8)] * 3, columns=2, gap=2).shape
        (22, 42, 3)
    """
    if not panels:
        raise InputError("expected at least one panel, got none")
    columns = columns or math.ceil(math.sqrt(len(panels)))
    same = same_size(panels)
    rows = [_draw.stack(same[i : i + columns], gap, down=False) for i in range(0, len(same), columns)]
    return _draw.stack(rows, gap, down=True)


def same_size(pictures: Sequence[Pixels]) -> list[Pixels]:
    """The pictures on dark ground, all as high and as wide as the largest.

    Example:
        >>> [p.shape for p in same_size([np.zeros((2, 5, 3), np.uint8), np.zeros((4, 3, 3), np.uint8)])]
        [(4, 5, 3), (4, 5, 3)]
    """
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    result = []
    for picture in pictures:
        page = _draw.sheet(height, width)
        top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        page[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        result.append(page)
    return result


def region_note(allowed: npt.NDArray[np.bool_] | Sections | None) -> str | None:
    """What the legend says about the outline."""
    if allowed is None:
        return None
    if allowed.all():
        return "allowed: everywhere"
    return "allowed region" if allowed.any() else "allowed: nowhere in this volume"


def state_note(values: Map) -> str:
    """What a reader must know about a map that shows little or nothing; empty for an ordinary map."""
    finite = np.isfinite(values)
    if not finite.any():
        return "not computed"
    if not finite.all():
        return "cells undefined"
    if not (values != 0).any():
        return "all zero"
    return "" if (values > 0).any() else "no positive cell"


def checked_scale(scale: float) -> float:
    """The scale, after a check that it can be one.

    Raises:
        InputError: Not positive or not finite.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"expected a positive finite scale, got {scale}: leave it out to take it from the maps")
    return float(scale)


Box = tuple[str, int, int, int, int]  # plane, top, left, height, width


def _layout(scene: Scene, blocks: int, width: int) -> tuple[bool, list[Box]]:
    """Blocks below or beside each other, whichever comes nearer to a page's shape, and the boxes of one block."""
    full = boxes_of(scene, width)
    aspect = width / max(top + height for _, top, _, height, _ in full)
    if abs(math.log(aspect / blocks / _SHAPELY)) <= abs(math.log(aspect * blocks / _SHAPELY)):
        return True, full
    return False, boxes_of(scene, (width - GAP * (blocks - 1)) // blocks)


def boxes_of(scene: Scene, width: int) -> list[Box]:
    """Where the planes of one block go; one scale for all, so that proportions are true.

    Planes stand in a row. Where coronal and sagittal are so low that both fit beside the axial plane, they are stacked.
    """
    mm = {plane: scene.extent(plane) for plane in scene.planes}
    if scene.rank == 2:
        height, across = mm["image"]
        zoom = min(width / across, 1.5 * width / height)
        return [("image", 0, 0, _pixels(height, zoom), _pixels(across, zoom))]
    (high, wide), (low1, wide1), (low2, wide2) = (mm[p] for p in slices.PLANES)
    if low1 + low2 <= 1.15 * high:
        zoom = (width - GAP) / (wide + max(wide1, wide2))
        left = _pixels(wide, zoom) + GAP
        second = _pixels(low1, zoom) + GAP
        places = {"axial": (0, 0), "coronal": (0, left), "sagittal": (second, left)}
    else:
        zoom = min((width - 2 * GAP) / (wide + wide1 + wide2), 1.2 * width / max(high, low1, low2))
        first = _pixels(wide, zoom) + GAP
        places = {"axial": (0, 0), "coronal": (0, first), "sagittal": (0, first + _pixels(wide1, zoom) + GAP)}
    return [(p, *places[p], _pixels(mm[p][0], zoom), _pixels(mm[p][1], zoom)) for p in slices.PLANES]


def _pixels(mm: float, zoom: float) -> int:
    return max(8, int(mm * zoom))


def draw_block(
    scene: Scene, boxes: list[Box], values: Map | None, scale: float, title: str = "", marked: bool = False
) -> Pixels:
    """The planes of one map (or of the image alone, without any drawing on it), under a headline if there is one."""
    page = _draw.sheet(max(t + h for _, t, _, h, _ in boxes), max(le + w for _, _, le, _, w in boxes))
    letters = []
    for plane, top, left, height, width in boxes:
        tile = scene.tile(plane, (height, width), values, scale=scale, outlined=values is not None, marked=marked)
        page[top : top + height, left : left + width] = tile
        letters += edge_letters(scene, plane, top, left, height, width)
    note = state_note(values) if values is not None else ""
    page = _draw.write(page, letters) if letters else page
    if not title:
        return page
    head = _draw.headline(f"{title} ({note})" if note else title, page.shape[1], 12, _draw.FAINT)
    return _draw.stack([head, page], 0, down=True)


def edge_letters(
    scene: Scene, plane: str, top: int, left: int, height: int, width: int, size: int = 11
) -> list[tuple[str, tuple[float, float], str, int, tuple[int, int, int]]]:
    """R, L, A, P, S, I at the edges of a tile, as entries for `_draw.write`; none where the orientation is unknown."""
    if scene.axes is None or min(height, width) < 5 * size:
        return []
    west, east, north, south = tuple(slices.EDGES[plane])
    centre, middle = left + width / 2, top + height / 2
    return [
        (west, (left + 3, middle), "lm", size, _draw.INK),
        (east, (left + width - 3, middle), "rm", size, _draw.INK),
        (north, (centre, top + 3), "mt", size, _draw.INK),
        (south, (centre, top + height - 3), "mb", size, _draw.INK),
    ]
