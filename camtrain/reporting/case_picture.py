"""The picture of one case and one label in an epoch: planes through the organ and through the attention's peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting import _draw, overlays, slices
from camtrain.reporting.epoch_strip import Past, epoch_strip
from camtrain.reporting.panels import Box, boxes_of, checked_scale, edge_letters, region_note, state_note
from camtrain.reporting.scene import Scene

Pixels = npt.NDArray[np.uint8]
Map = npt.NDArray[np.floating]

REGION = {1: "allowed"}
# How strong a colour is: from a seventh of the scale on weak, from a half on strong.
STRENGTH = {1: "against, strong", 2: "against, weak", 3: "for, weak", 4: "for, strong"}
_EDGES = [
    # The least values in single precision that lie at or above an edge.
    np.float32(edge) if float(np.float32(edge)) >= edge else np.nextafter(np.float32(edge), np.float32(1))
    for edge in (-0.5, -0.15, 0.15, 0.5)
]
_CLASSES = np.array([1, 2, 0, 3, 4], dtype=np.uint8)
_GAP, _MARGIN = 4, 6
_NEARLY = 1.25  # a tile that would grow by less stays as it is: sharper, and in less time
SEPARATOR = "  ·  "  # between the parts of a caption, which may then stand on two lines


@dataclass(frozen=True)
class CasePicture:
    """A composed picture and the layers that a logger can switch on and off over it.

    Attributes:
        pixels: (H, W, 3).
        masks: Name -> (H, W) of classes: `allowed region` with the classes `REGION`, and `attention` (of several
            methods `attention <method>`) with the classes `STRENGTH`. They lie over the image where it is drawn
            alone; 0 elsewhere.
        tile: (h, w, 3), the one plane that tells most, for an overview of many cases.
    """

    pixels: Pixels
    masks: Mapping[str, Pixels] = field(default_factory=dict)
    tile: Pixels = field(default_factory=lambda: np.zeros((8, 8, 3), np.uint8))

    @staticmethod
    def classes_of(mask: str) -> dict[int, str]:
        """What the numbers in a mask of this name mean.

        Example:
            >>> CasePicture.classes_of("allowed region")
            {1: 'allowed'}
        """
        return REGION if mask == "allowed region" else STRENGTH


def compose_case(
    image: npt.NDArray[np.generic],
    maps: Mapping[str, Map],
    allowed: npt.NDArray[np.bool_] | None = None,
    *,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    caption: str = "",
    scale: Mapping[str, float],
    window: tuple[float, float] | None = None,
    width: int = 840,
) -> CasePicture:
    """Draw one case for one label: on the left planes through the organ, on the right through the first map's peak.

    Each side shows the image alone and below it the image with each map: warm is evidence for the label, cool against
    it, zero is transparent; the green rim is the region that the label may be read from, the cross a map's highest
    cell. The left side stays where it is over the epochs. A 2D image has one side.

    Args:
        image: (*S) or (C, *S), 2D or 3D; any range.
        maps: Title -> (*S') signed map.
        allowed: (*S) or (*S') bool, or None.
        spacing: Voxel size in mm; default: cubes.
        axes: Where the image's axes run, such as `"RAS"`; None = unknown: no R/L letters.
        caption: First line; at a `SEPARATOR` it goes on in a second one where the page ends.
        scale: Title -> map value with the strongest colour, the same for every epoch.
        window: Image values shown as black and white; default: quantiles of the image.
        width: Width in pixels.

    Returns:
        The picture, its masks and its tile.

    Raises:
        InputError: No map, or shapes that do not fit each other.

    Example:
        >>> made = compose_case(np.random.rand(16, 12, 10), {"hirescam": np.ones((4, 4, 4))}, scale={"hirescam": 1.0})
        >>> made.pixels.shape[1], sorted(made.masks)
        (840, ['attention'])
    """
    scenes = case_scenes(image, maps, allowed, spacing=spacing, axes=axes, window=window)
    return draw_case(scenes, maps, caption=caption, scale=scale, width=width)


def case_scenes(
    image: npt.NDArray[np.generic],
    maps: Mapping[str, Map],
    allowed: npt.NDArray[np.bool_] | None = None,
    *,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    window: tuple[float, float] | None = None,
) -> dict[str, Scene]:
    """Where the planes of `compose_case` lie: title -> scene, that through the organ first.

    Made thin (`Scene.thin`) they can wait for a colour scale without the volume.

    Raises:
        InputError: No map, or shapes that do not fit each other.
    """
    if not maps:
        raise InputError("expected at least one map, got none: give {title: array}")
    first = next(iter(maps.values()))
    rank = np.ndim(first)
    given = {"rank": rank, "spacing": spacing, "axes": axes, "window": window or overlays.window_of(np.asarray(image))}
    organ = Scene.make(image, allowed, **given)  # type: ignore[arg-type]
    sides = {"through the organ" if allowed is not None else "middle": organ}
    if organ.rank == 3:
        top = slices.peak(first, np.shape(image)[-rank:])
        if top is None:
            sides["no positive cell, so the same planes again"] = organ
        else:
            sides[f"through the peak of {next(iter(maps))}"] = Scene.make(image, allowed, point=top, **given)  # type: ignore[arg-type]
    return sides


def draw_case(
    scenes: Mapping[str, Scene],
    maps: Mapping[str, Map],
    *,
    caption: str,
    scale: Mapping[str, float],
    width: int = 840,
    masked: bool = True,
    past: Past | None = None,
) -> CasePicture:
    """Draw what `case_scenes` has laid out; arguments as for `compose_case`, and no masks unless `masked`.

    With `past` a strip for each map stands below each side: its planes in a few epochs, all in this picture's colours,
    while pictures of other epochs may have been drawn on another scale.
    """
    organ, inner = next(iter(scenes.values())), width - 2 * _MARGIN
    ends = {title: checked_scale(scale[title]) for title in maps}
    return _framed(_sides(scenes, maps, ends, inner, masked, past or {}), organ, ends, caption, inner)


@dataclass(frozen=True)
class _Side:
    """One column of the picture, its masks, and the plane of the first map that an overview shows."""

    pixels: Pixels
    masks: dict[str, Pixels]
    tile: Pixels


def _sides(
    sides: Mapping[str, Scene],
    maps: Mapping[str, Map],
    ends: Mapping[str, float],
    width: int,
    masked: bool,
    past: Past,
) -> list[_Side]:
    across = (width - _GAP * 2 * (len(sides) - 1)) // len(sides)
    return [
        _side(scene, f"image, {where}", {t: scene.orient(m) for t, m in maps.items()}, ends, across, masked, past)
        for where, scene in sides.items()
    ]


def _side(
    scene: Scene,
    where: str,
    maps: Mapping[str, Map],
    ends: Mapping[str, float],
    width: int,
    masked: bool,
    past: Past,
) -> _Side:
    boxes = boxes_of(scene, width)
    height = max(top + high for _, top, _, high, _ in boxes)
    width = max(width, *(left + wide for _, _, left, _, wide in boxes))  # a plane one voxel wide takes some pixels too
    rows = [_draw.sheet(height, width) for _ in range(1 + len(maps))]
    layers = {name: np.zeros((height, width), np.uint8) for name in (_mask_names(scene, maps) if masked else ())}
    letters, tile = [], None
    for box in boxes:
        _, top, left, high, wide = box
        here = slice(top, top + high), slice(left, left + wide)
        letters += edge_letters(scene, *box)
        planes = _planes(scene, box, maps, ends, masked)
        for row, pixels in zip(rows, planes.pixels, strict=True):
            row[here] = pixels
        for name, values in planes.masks.items():
            layers[name][here] = values
        tile = planes.pixels[1] if tile is None else tile
    heads = [where, *(_head(title, values, ends) for title, values in maps.items())]
    parts, above = [], 0
    for index, (head, row) in enumerate(zip(heads, rows, strict=True)):
        strip = _draw.headline(head, width, 12, _draw.FAINT)
        above = len(strip) if not index else above
        # Letters once: the rows below show the same planes.
        parts += [strip, _draw.write(row, letters) if letters and not index else row]
    parts += [epoch_strip(scene, title, past[title], ends[title], width) for title in maps if past.get(title)]
    page = _draw.stack(parts, 0, down=True)
    return _Side(page, {name: _placed(mask, page, above, 0) for name, mask in layers.items()}, np.asarray(tile))


@dataclass(frozen=True)
class _Planes:
    """One plane: the image alone and with each map, and the masks over it."""

    pixels: list[Pixels]
    masks: dict[str, Pixels]


def _planes(scene: Scene, box: Box, maps: Mapping[str, Map], ends: Mapping[str, float], masked: bool) -> _Planes:
    """Everything about one plane; grey values, region and enlarged maps are made once for pixels and masks."""
    plane, _, _, *size = box
    shape = size[0], size[1]
    index = scene.through(plane)
    alone = overlays.grey(scene.plane(plane, index), scene.window, shape)
    pixels, masks, rim = [alone if alone.ndim == 3 else overlays.coloured(alone)], {}, None
    if scene.allowed is not None:
        inside = scene.inside(plane, index, shape)
        if masked:
            masks["allowed region"] = inside.astype(np.uint8)
        if not scene.allowed.all():
            rim = overlays.outline(inside, width=1 + shape[1] // 400)
    for title, values in maps.items():
        enlarged = scene.enlarged(values, plane, index, shape)
        tile = overlays.blend(alone, enlarged, ends[title])
        if rim is not None:
            tile[rim] = overlays.OUTLINE
        pixels.append(scene.crossed(tile, values, plane, index))
        if masked:
            masks[_mask_name(title, maps)] = _strength(enlarged * (1 / ends[title]))
    return _Planes(pixels, masks)


def _strength(share: npt.NDArray[np.float32]) -> Pixels:
    """Classes `STRENGTH` of a map in parts of its scale; counting the edges is faster than looking them up."""
    passed = np.zeros(share.shape, np.uint8)
    for edge in _EDGES:
        passed += share >= edge
    return np.take(_CLASSES, passed)


def _mask_name(title: str, maps: Mapping[str, Map]) -> str:
    return "attention" if len(maps) == 1 else f"attention {title}"


def _mask_names(scene: Scene, maps: Mapping[str, Map]) -> list[str]:
    region = ["allowed region"] if scene.allowed is not None else []
    return region + [_mask_name(title, maps) for title in maps]


def _head(title: str, values: Map, ends: Mapping[str, float]) -> str:
    own = "" if len(set(ends.values())) == 1 else f", colours end at +-{_draw.number(ends[title])}"
    note = state_note(values)
    return f"{title}{own} ({note})" if note else f"{title}{own}"


def _framed(drawn: Sequence[_Side], scene: Scene, ends: Mapping[str, float], caption: str, width: int) -> CasePicture:
    """Sides beside each other, between caption and legend; the masks go where the sides went."""
    body = _draw.stack([side.pixels for side in drawn], 2 * _GAP, down=False)
    common = next(iter(ends.values())) if len(set(ends.values())) == 1 else None
    parts = [_draw.headline(line, width, 14) for line in _lines(caption, width)]
    above = sum(len(part) + 2 for part in parts) + _MARGIN
    parts += [body, _draw.legend(width, common, region_note(scene.allowed), own="each map on its own scale")]
    page = _draw.stack(parts, 2, down=True, margin=_MARGIN)
    masks: dict[str, Pixels] = {}
    left = _MARGIN
    for side in drawn:
        for name, mask in side.masks.items():
            masks[name] = masks.get(name, np.zeros(page.shape[:2], np.uint8)) | _placed(mask, page, above, left)
        left += side.pixels.shape[1] + 2 * _GAP
    return CasePicture(page, masks, drawn[-1].tile)


def _lines(caption: str, width: int) -> list[str]:
    """The caption in as few lines as its parts need: with two methods it is wider than the page."""
    lines: list[str] = []
    for part in caption.split(SEPARATOR) if caption else ():
        longer = f"{lines[-1]}{SEPARATOR}{part}" if lines else part
        if lines and _draw.text_width(_draw.plain(longer), 14) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _placed(mask: Pixels, page: Pixels, top: int, left: int) -> Pixels:
    whole = np.zeros(page.shape[:2], np.uint8)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return whole


def compose_overview(tiles: Sequence[Pixels], titles: Sequence[str], cell: int = 150) -> Pixels:
    """The tiles of many cases on one sheet, in their order, each under a title.

    Args:
        tiles: (h, w, 3) each, such as `CasePicture.tile`.
        titles: Some short lines for each; the first is the brightest. They are cut in their middle.
        cell: Width and height of a tile in pixels.

    Returns:
        (H, W, 3).

    Example:
        >>> compose_overview([np.zeros((20, 30, 3), np.uint8)] * 3, ["a", "b", "c"], cell=60).shape
        (186, 122, 3)
    """
    from PIL import Image

    if not tiles or len(tiles) != len(titles):
        raise InputError(f"expected a title for each of one tile or more, got {len(titles)} for {len(tiles)}")
    columns = int(np.ceil(np.sqrt(len(tiles))))
    count = max(2, *(title.count("\n") + 1 for title in titles))
    cells = []
    for tile, title in zip(tiles, titles, strict=True):
        zoom = cell / max(tile.shape[:2])
        zoom = 1.0 if 1 < zoom < _NEARLY else zoom
        size = max(1, round(tile.shape[1] * zoom)), max(1, round(tile.shape[0] * zoom))
        page = _draw.sheet(cell, cell)
        top, left = (cell - size[1]) // 2, (cell - size[0]) // 2
        page[top : top + size[1], left : left + size[0]] = np.asarray(Image.fromarray(tile).resize(size))
        first, *others = title.split("\n") + [""] * (count - 1 - title.count("\n"))
        lines = [_draw.headline(first, cell, 11, middle=True)]
        lines += [_draw.headline(other, cell, 10, _draw.FAINT, middle=True) for other in others]
        cells.append(_draw.stack([*lines, page], 0, down=True))
    rows = [_draw.stack(cells[i : i + columns], 2, down=False) for i in range(0, len(cells), columns)]
    return _draw.stack(rows, 4, down=True)
