"""Larger sheets: all labels of one scan (`camtrain explain`), and networks side by side (before and after)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError, nearest
from camtrain.reporting import _draw, slices
from camtrain.reporting.overlays import shared_scale
from camtrain.reporting.panels import boxes_of, checked_scale, draw_block, edge_letters, region_note, state_note
from camtrain.reporting.scene import Scene

Pixels = npt.NDArray[np.uint8]
Map = npt.NDArray[np.floating]
_GAP = 6
_MARGIN = 8


@dataclass(frozen=True)
class Row:
    """One line of `side_by_side`: one slice of one case for one label, with the maps of several networks.

    Attributes:
        image: (*S) or (C, *S).
        maps: One (*S') map per network, in the order of the titles.
        allowed: (*S) or (*S') bool, or None.
        caption: Line above: case and label, perhaps the scores.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        spacing: Voxel size in mm.
        axes: Where the image's axes run, such as `"RAS"`; None = unknown.
        point: Voxel through which the plane goes; default: where region and maps together show most.
        window: Image values shown as black and white.
        scale: One colour scale for all maps, one for each, or None = each map at its own largest value.
    """

    image: npt.NDArray[np.generic]
    maps: Sequence[Map]
    allowed: npt.NDArray[np.bool_] | None = None
    caption: str = ""
    plane: str = "axial"
    spacing: Sequence[float] | None = None
    axes: str | None = None
    point: Sequence[int] | None = None
    window: tuple[float, float] | None = None
    scale: float | Sequence[float] | None = None


def side_by_side(
    rows: Sequence[Row], titles: Sequence[str], *, width: int = 1400, caption: str = "", region: str | None = None
) -> Pixels:
    """The same slices seen by several networks: the image with the allowed region, then one column per network.

    Args:
        rows: One line per case and label.
        titles: Heading of each column, the image's column first: `("CT", "plain training", "with mask loss")`.
        width: Width of the picture in pixels.
        caption: Last line.
        region: What the legend calls the outline; None: the allowed region, or where there is none.

    Returns:
        (H, width, 3) uint8.

    Raises:
        InputError: No rows, or a row whose number of maps is not the number of titles less one.

    Example:
        >>> row = Row(np.random.rand(12, 12, 12), [np.ones((3, 3, 3))] * 2, caption="case 7: nodule")
        >>> side_by_side([row], ("CT", "plain", "mask loss"), width=600).shape[1]
        600
    """
    if not rows:
        raise InputError("expected at least one row, got none")
    if wrong := [len(row.maps) for row in rows if len(row.maps) != len(titles) - 1]:
        raise InputError(f"expected {len(titles) - 1} maps in each row, one per title after the first, got {wrong[0]}")
    size, inner = max(12, width // 75), width - 2 * _MARGIN
    tile = (inner - _GAP * (len(titles) - 1)) // len(titles)
    parts = [_draw.stack([_draw.headline(t, tile, size, centre=True) for t in titles], _GAP, down=False)]
    scales = [_scales(row) for row in rows]
    for row, ends in zip(rows, scales, strict=True):
        if row.caption:
            parts.append(_draw.headline(row.caption, inner, round(0.85 * size), _draw.FAINT))
        parts.append(_line(row, ends, tile, size))
    one = {end for ends in scales for end in ends}
    note = region or next((n for row in rows if (n := region_note(row.allowed))), None)
    parts.append(_draw.legend(inner, one.pop() if len(one) == 1 else None, note, round(0.85 * size)))
    if caption:
        parts.append(_draw.headline(caption, inner, round(0.85 * size), _draw.FAINT))
    return _draw.stack([_wide(part, inner) for part in parts], _GAP // 2, down=True, margin=_MARGIN)


def _scales(row: Row) -> list[float]:
    if row.scale is None:
        return [shared_scale([m]) for m in row.maps]
    if isinstance(row.scale, int | float):
        return [checked_scale(row.scale)] * len(row.maps)
    if len(row.scale) != len(row.maps):
        raise InputError(f"expected one scale or {len(row.maps)}, one per map, got {len(row.scale)}")
    return [checked_scale(s) for s in row.scale]


def _line(row: Row, ends: Sequence[float], tile: int, text: int) -> Pixels:
    rank = np.ndim(row.maps[0]) if row.maps else None
    point = row.point
    if point is None and rank:
        point = slices.telling_point(np.shape(row.image)[-rank:], row.maps, row.allowed)
    scene = Scene.make(
        row.image, row.allowed, rank=rank, spacing=row.spacing, axes=row.axes, point=point, window=row.window
    )
    plane = checked_plane(row.plane, scene)
    height, width = scene.extent(plane)
    size = (max(8, round(tile * height / width)), tile)
    tiles = [scene.tile(plane, size)]
    notes = [""]
    for values, end in zip(row.maps, ends, strict=True):
        oriented = scene.orient(values)
        tiles.append(scene.tile(plane, size, oriented, scale=end))
        notes.append(state_note(oriented))
    letters = edge_letters(scene, plane, 0, 0, *size, size=round(0.8 * text))
    marked = [
        _draw.write(t, letters + ([(note, (6.0, size[0] - 6.0), "lb", text, _draw.INK)] if note else []))
        for t, note in zip(tiles, notes, strict=True)
    ]
    return _draw.stack(marked, _GAP, down=False)


def checked_plane(plane: str, scene: Scene) -> str:
    """The plane's name; a 2D image has only one.

    Raises:
        InputError: An unknown plane.
    """
    if scene.rank == 2:
        return "image"
    if plane not in slices.PLANES:
        raise InputError(
            f"expected one of the planes {', '.join(slices.PLANES)}, got {plane!r}{nearest(plane, slices.PLANES)}"
        )
    return plane


def compose_montage(
    image: npt.NDArray[np.generic],
    maps: Mapping[str, Map],
    allowed: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    *,
    captions: Mapping[str, str] | None = None,
    columns: int | str = "planes",
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    window: tuple[float, float] | None = None,
    scale: float | None = None,
    width: int = 1200,
) -> Pixels:
    """All labels of one scan on one sheet: a line per label, its planes or evenly spaced axial slices as columns.

    Args:
        image: (*S) or (C, *S).
        maps: Label -> (*S') map.
        allowed: Label -> (*S) or (*S') bool, for the labels that have a rule.
        captions: Label -> what to write beside its name, for example the network's probability.
        columns: `"planes"` = the image alone and with the map, in three planes where map and region show most;
            a number = that many axial slices with the map.
        spacing: Voxel size in mm.
        axes: Where the image's axes run; None = unknown.
        window: Image values shown as black and white.
        scale: One colour scale for all labels; default: each label at its own largest value.
        width: Width of the sheet in pixels.

    Returns:
        (H, width, 3) uint8.

    Example:
        >>> maps = {"nodule": np.ones((2, 2, 2)), "effusion": np.zeros((2, 2, 2))}
        >>> compose_montage(np.random.rand(16, 16, 12), maps, columns=4, width=400).shape[1]
        400
    """
    if not maps:
        raise InputError("expected the map of at least one label, got none")
    inner, parts = width - 2 * _MARGIN, []
    for label, given in maps.items():
        values, region = np.asarray(given), (allowed or {}).get(label)
        point = slices.telling_point(np.shape(image)[-values.ndim :], [values], region)
        scene = Scene.make(image, region, rank=values.ndim, spacing=spacing, axes=axes, point=point, window=window)
        oriented = scene.orient(values)
        end = checked_scale(scale) if scale is not None else shared_scale([oriented])
        note = " · ".join(n for n in ((captions or {}).get(label, ""), state_note(oriented)) if n)
        parts.append(_draw.headline(f"{label}   {note}" if note else label, inner, 14))
        parts.append(
            _planes(scene, oriented, end, inner)
            if columns == "planes"
            else _axial(scene, oriented, end, columns, inner)
        )
    parts.append(_draw.legend(inner, scale, "allowed region" if allowed else None))
    return _draw.stack([_wide(part, inner) for part in parts], 4, down=True, margin=_MARGIN)


def _planes(scene: Scene, values: Map, end: float, width: int) -> Pixels:
    """The image alone beside the image with the map, each in all its planes."""
    boxes = boxes_of(scene, (width - 2 * _GAP) // 2)
    return _draw.stack([draw_block(scene, boxes, m, end) for m in (None, values)], 2 * _GAP, down=False)


def _axial(scene: Scene, values: Map, end: float, columns: int | str, width: int) -> Pixels:
    """Evenly spaced axial slices with the map, from the feet to the head."""
    if not isinstance(columns, int) or columns < 1:
        raise InputError(f"expected columns='planes' or a positive number of slices, got {columns!r}")
    if scene.rank == 2:
        return _planes(scene, values, end, width)
    height, across = scene.extent("axial")
    tile = (width - _GAP * (columns - 1)) // columns
    size = (max(8, round(tile * height / across)), tile)
    depth = scene.image.shape[2]
    letters = edge_letters(scene, "axial", 0, 0, *size)
    tiles = [
        _draw.write(scene.tile("axial", size, values, scale=end, index=int((i + 0.5) * depth / columns)), letters)
        for i in range(columns)
    ]
    return _draw.stack(tiles, _GAP, down=False)


def _wide(part: Pixels, width: int) -> Pixels:
    """The part on a sheet of exactly that width."""
    if part.shape[1] == width:
        return part
    page = _draw.sheet(part.shape[0], width)
    page[:, : part.shape[1]] = part[:, :width]
    return page
