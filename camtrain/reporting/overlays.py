"""Grey values, signed colours and outlines: plain functions from arrays to pixels."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

OUTLINE = (70, 240, 110)
_HALF = 255  # entries of the colour table on either side of zero
HOUNSFIELD = (-1000.0, 400.0)
_AIR_BELOW = -700.0  # no other unit of images goes there
_REMEMBERED = 1 << 18  # bytes
_STRONGEST = 0.85  # opacity at the end of the scale: the anatomy stays visible under the strongest attention


def window_of(image: npt.NDArray[np.generic]) -> tuple[float, float]:
    """Grey window that shows an image of any range: all of it but the outermost 0.1 % at either end.

    A fifth of the range is left free above it, so that soft tissue is a middle grey on which colours are seen. Values
    below -700 are Hounsfield units: air to soft bone (-1000 to 400 HU) then, whatever metal or padding there is.

    Args:
        image: Any shape and range; a large volume is sampled on a regular grid.

    Returns:
        Values shown as black and as white; black < white also for a constant image.

    Example:
        >>> window_of(np.linspace(0, 1, 1001))
        (0.001, 1.1986)
    """
    step = max(1, round((image.size / 50_000) ** (1 / max(1, image.ndim))))
    sample = np.asarray(image[(slice(None, None, step),) * image.ndim], dtype=np.float32)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    low, high = (round(float(q), 6) for q in np.quantile(sample, (0.001, 0.999)))
    if low < _AIR_BELOW < high:
        return HOUNSFIELD
    top = round(high + 0.2 * (high - low), 6)
    if high - low < 1e-6:  # constant but for a few voxels, or constant
        low, high = float(sample.min()), float(sample.max())
        top = high
    return (low, top) if high > low else (low - 0.5, low + 0.5)


def grey(pixels: npt.NDArray[np.generic], window: tuple[float, float], size: tuple[int, int]) -> Pixels:
    """Image values as grey pixels of the wanted size.

    Args:
        pixels: (rows, columns) in the image's unit, or (rows, columns, 3) for a photograph.
        window: Values shown as black and white; NaN is black.
        size: Rows and columns of the result.

    Returns:
        (rows, columns), of a photograph (rows, columns, 3).

    Example:
        >>> grey(np.array([[0.0, 1.0]]), (0.0, 1.0), (1, 2)).tolist()
        [[0, 255]]
    """
    values = np.asarray(pixels, dtype=np.float32)
    if values.nbytes > _REMEMBERED:
        return _grey(values, window, size)
    return _grey_again(values.tobytes(), values.shape, window, size)


@functools.lru_cache(maxsize=32)
def _grey_again(values: bytes, shape: tuple[int, ...], window: tuple[float, float], size: tuple[int, int]) -> Pixels:
    """The labels of a case are drawn one after the other, often on the same planes; of small ones the last are kept."""
    made = _grey(np.frombuffer(values, np.float32).reshape(shape), window, size)
    made.setflags(write=False)
    return made


def _grey(values: Floats, window: tuple[float, float], size: tuple[int, int]) -> Pixels:
    low, high = window
    inside = values.clip(low, high)
    inside[np.isnan(inside)] = low
    scaled = np.rint((inside - low) * (255 / (high - low)))
    picture = Image.fromarray(np.ascontiguousarray(scaled.astype(np.uint8)))
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(picture)


def coloured(grey: Pixels) -> Pixels:
    """Grey pixels (rows, columns) as (rows, columns, 3); Pillow is faster at this than NumPy."""
    return np.asarray(Image.fromarray(grey).convert("RGB"))


@functools.lru_cache(maxsize=256)
def _linear(cells: int, points: int) -> Floats:
    """(points, cells) weights of linear interpolation with aligned centres and clamped ends."""
    position = ((np.arange(points) + 0.5) * cells / points - 0.5).clip(0, cells - 1)
    low = np.floor(position).astype(int)
    weight = np.zeros((points, cells), dtype=np.float32)
    np.add.at(weight, (np.arange(points), low), 1 - (position - low))
    np.add.at(weight, (np.arange(points), np.minimum(low + 1, cells - 1)), position - low)
    weight.setflags(write=False)
    return weight


def enlarge(values: npt.NDArray[np.floating], size: Sequence[int]) -> Floats:
    """(Bi-, tri-)linear interpolation to another grid of the same extent, as torch does with align_corners=False.

    Args:
        values: (*S') map.
        size: *S, as many entries as the map has axes.

    Example:
        >>> enlarge(np.array([0.0, 1.0]), (4,)).tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    result = np.asarray(values, dtype=np.float32)
    for axis, n in enumerate(size):
        if result.shape[axis] == n:
            continue
        weights = _linear(result.shape[axis], n)
        if axis == result.ndim - 1:
            result = result @ weights.T
        elif axis == result.ndim - 2:
            result = weights @ result
        else:
            result = np.moveaxis(np.tensordot(weights, result, axes=(1, axis)), 0, axis)
    return result


def section(values: npt.NDArray[np.floating], axis: int, position: float) -> Floats:
    """The map between its cells: linear interpolation along one axis.

    Args:
        values: (*S') map.
        axis: Axis to remove.
        position: Where, as a fraction of the extent: (index + 0.5) / voxels.

    Example:
        >>> section(np.array([[0.0], [1.0]]), 0, 0.5).tolist()
        [0.5]
    """
    cells = values.shape[axis]
    at = min(max(position * cells - 0.5, 0.0), cells - 1.0)
    low = int(at)
    here = values.take(low, axis=axis).astype(np.float32)
    there = values.take(min(low + 1, cells - 1), axis=axis).astype(np.float32)
    mixed: Floats = here + np.float32(at - low) * (there - here)
    return mixed


def shared_scale(maps: Iterable[npt.NDArray[np.floating]], quantile: float = 0.999) -> float:
    """One end of the colour scale for several maps: a high quantile of their absolute values.

    Returns:
        A positive number; 1.0 where nothing differs from zero.

    Example:
        >>> shared_scale([np.array([0.0, -3.0]), np.array([1.0])], quantile=1.0)
        3.0
    """
    flat = [np.abs(np.asarray(m, dtype=np.float32)).ravel() for m in maps]
    values = np.concatenate(flat) if flat else np.zeros(0, dtype=np.float32)
    values = values[np.isfinite(values)]
    top = float(np.quantile(values, quantile)) if values.size else 0.0
    if top <= 0 and values.size:
        top = float(values.max())
    return top if top > 0 else 1.0


@functools.cache
def _table() -> tuple[Floats, Floats]:
    """Colour times opacity, and one minus opacity, for the values -scale .. +scale."""
    strength = np.abs(np.linspace(-1, 1, 2 * _HALF + 1)).astype(np.float32)[:, None]
    warm = np.array((240, 40, 10), np.float32) + strength * np.array((15, 180, 40), np.float32)
    cool = np.array((25, 65, 240), np.float32) + strength * np.array((65, 155, 15), np.float32)
    colour = np.where(np.arange(2 * _HALF + 1)[:, None] > _HALF, warm, cool)
    opacity = _STRONGEST * strength
    return (colour * opacity).astype(np.float32), (1 - opacity).astype(np.float32)


@functools.cache
def _grey_table() -> Pixels:
    """(values, grey levels, 3): the whole mixture for grey pictures, which makes laying over one look-up."""
    colour, rest = _table()
    mixed = colour[:, None] + np.arange(256, dtype=np.float32)[None, :, None] * rest[:, None]
    return np.rint(mixed).astype(np.uint8)


def blend(base: Pixels, values: npt.NDArray[np.floating], scale: float) -> Pixels:
    """Lay a signed map over a picture: zero leaves the pixel as it is, warm is positive, cool is negative.

    Args:
        base: (rows, columns) grey or (rows, columns, 3).
        values: (rows, columns) map values, or (n, rows, columns) of several maps; NaN counts as zero.
        scale: Absolute value with the strongest colour; beyond it nothing gets stronger.

    Returns:
        (rows, columns, 3), of several maps (n, rows, columns, 3).

    Example:
        >>> base = np.full((1, 2), 100, np.uint8)
        >>> blend(base, np.array([[0.0, 1.0]]), 1.0)[0].tolist()
        [[100, 100, 100], [232, 202, 58]]
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of a map far beyond the scale, or on one next to zero
        share = np.asarray(values, dtype=np.float32) * np.float32(_HALF / scale)
    np.clip(share, -_HALF, _HALF, out=share)
    if np.isnan(share.sum()):
        share[np.isnan(share)] = 0.0
    np.rint(share, out=share)
    share += _HALF
    if base.ndim == 2:
        share *= 256
        share += base  # whole numbers below 2^24: exact
        laid: Pixels = np.take(_grey_table().reshape(-1, 3), share.astype(np.intp), axis=0)
        return laid
    colour, rest = _table()
    index = share.astype(np.intp)
    mixed: Floats = colour[index] + base * rest[index]
    return np.rint(mixed).astype(np.uint8)


def region(allowed: Bools, size: tuple[int, int], smooth: bool) -> Bools:
    """A region at the size of the picture.

    Args:
        allowed: (rows, columns) True = inside.
        size: Rows and columns of the result.
        smooth: Follow the voxels' linear interpolation (image grid); False keeps the corners of cells (map grid).

    Example:
        >>> region(np.array([[True, False]]), (1, 4), smooth=False).tolist()
        [[True, True, False, False]]
    """
    if allowed.nbytes > _REMEMBERED:
        return _region(allowed, size, smooth)
    return _region_again(allowed.tobytes(), allowed.shape, size, smooth)


@functools.lru_cache(maxsize=32)
def _region_again(allowed: bytes, shape: tuple[int, ...], size: tuple[int, int], smooth: bool) -> Bools:
    """As `_grey_again`: labels share organs, and a label its region over the epochs."""
    made = _region(np.frombuffer(allowed, np.bool_).reshape(shape), size, smooth)
    made.setflags(write=False)
    return made


def _region(allowed: Bools, size: tuple[int, int], smooth: bool) -> Bools:
    picture = Image.fromarray(allowed.astype(np.uint8) * 255)
    way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    # A picture smaller than the slice averages voxels: a lower threshold keeps thin organs.
    threshold = 128 if size[0] >= allowed.shape[0] else 64
    return np.asarray(picture.resize(size[::-1], way)) >= threshold


def outline(inside: Bools, width: int = 1) -> Bools:
    """The rim of a region; where the region runs out of the picture there is no rim.

    Args:
        inside: (rows, columns).
        width: Thickness in pixels; the rim lies inside the region.

    Example:
        >>> outline(np.array([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], bool)).astype(int).tolist()
        [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    """
    if inside.nbytes > _REMEMBERED:
        return _outline(inside, width)
    return _outline_again(inside.tobytes(), inside.shape, width)


@functools.lru_cache(maxsize=32)
def _outline_again(inside: bytes, shape: tuple[int, ...], width: int) -> Bools:
    made = _outline(np.frombuffer(inside, np.bool_).reshape(shape), width)
    made.setflags(write=False)
    return made


def _outline(inside: Bools, width: int) -> Bools:
    core = inside
    for _ in range(width):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        # Diagonal neighbours too: a rim without gaps at corners.
        core &= padded[:-2, :-2] & padded[2:, 2:] & padded[:-2, 2:] & padded[2:, :-2]
    return inside & ~core
