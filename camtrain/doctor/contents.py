"""What a case holds: intensities, and the size and place of every organ."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.data import MetaTensor
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.manifest_files import read_image, read_organs, to_ras
from camtrain.doctor.facts import Content, OrganSize, Row
from camtrain.doctor.grids import how_grids_differ, seen_box

_LARGE = 2**16  # ids from here on are compared one by one
_SAMPLE = 2**18  # voxels that quantiles and prints are taken of


def lenient(table: OrganTable | None) -> OrganTable | None:
    """The table, with ids that it does not know let through: they are counted here, not refused."""
    return None if table is None else OrganTable.load({**table.to_dict(), "ignore_unknown": True})


def read_content(
    row: Row,
    table: OrganTable | None,
    spacing: Sequence[float] | None,
    size: Sequence[int] | None,
    window: Sequence[float] | None,
) -> Content:
    """Read the files of a case as training reads them, each by itself, so that both may have a fault.

    Args:
        row: The case; one without an image gives an empty content.
        table: From `lenient`; without one, organs are left unread.
        spacing: Voxel size that training resamples to.
        size: Voxels that training crops to.
        window: HU that become 0 and 1.
    """
    begin = time.perf_counter()
    found: dict[str, Any] = {}
    grid = None
    try:
        if row.image is not None:
            read = read_image(row.image)
            grid = tuple(read.shape[1:]), np.asarray(read.affine, dtype=np.float64)
            found |= of_intensities(read.as_tensor()[0].numpy(), window)
    except InputError as error:
        found["image_fault"] = str(error)
    try:
        if row.organs is not None and table is not None:
            files: Any = row.organs
            organs = read_organs(files, table)
            found |= _of_organs(organs, grid, spacing, size)
    except InputError as error:
        found["organs_fault"] = str(error)
    return Content(**found, seconds=time.perf_counter() - begin)


def _of_organs(
    organs: MetaTensor,
    grid: tuple[tuple[int, ...], NDArray[np.float64]] | None,
    spacing: Sequence[float] | None,
    size: Sequence[int] | None,
) -> dict[str, Any]:
    """Organs of a case, and how their grid differs from that of its image."""
    shape = tuple(int(n) for n in organs.shape[1:])
    if len(shape) != 3:  # a picture has no place in the world
        differs = "" if grid is None or grid[0] == shape else f"shape {shape} instead of {grid[0]}"
        return {"grids": differs, "organs": organ_sizes(organs.as_tensor()[0].numpy())}
    affine = np.asarray(organs.affine, dtype=np.float64)
    differs = "" if grid is None else how_grids_differ(*grid, shape, affine)
    turned = to_ras(organs)
    affine = np.asarray(turned.affine, dtype=np.float64)
    box = seen_box(turned.shape[1:], np.linalg.norm(affine[:3, :3], axis=0).tolist(), spacing, size)
    return {"grids": differs, "organs": organ_sizes(turned.as_tensor()[0].numpy(), affine, box)}


def of_intensities(image: NDArray[Any], window: Sequence[float] | None = None) -> dict[str, Any]:
    """Range, quantiles, share outside the window and print of an image of any shape.

    Example:
        >>> found = of_intensities(np.array([[-1000.0, 0, 100, 900]]), window=(-1000, 800))
        >>> found["low"], found["high"], found["clipped"], found["shape"]
        (-1000.0, 900.0, 0.25, (1, 4))
    """
    flat = np.ascontiguousarray(image).reshape(-1)
    sample = np.ascontiguousarray(flat[:: max(1, len(flat) // _SAMPLE)])
    clipped = math.nan if window is None else float(((sample < window[0]) | (sample > window[1])).mean())
    shape = tuple(int(n) for n in image.shape)
    mark = hashlib.blake2b(repr(shape).encode() + sample.astype(np.float32).tobytes(), digest_size=12).hexdigest()
    quantiles = np.quantile(sample, [0.01, 0.5, 0.99])
    return {
        "shape": shape,
        "low": float(flat.min()),
        "high": float(flat.max()),
        "quantiles": tuple(float(q) for q in quantiles),
        "clipped": clipped,
        "print": mark,
    }


def organ_sizes(
    ids: NDArray[Any], affine: NDArray[np.float64] | None = None, box: tuple[slice, ...] | None = None
) -> dict[int, OrganSize]:
    """Size and place of every organ id.

    Args:
        ids: (*S) integers, 0 = background.
        affine: Voxel to world in mm; None = sizes in voxels.
        box: What the network sees; None = all.

    Returns:
        Id -> size.

    Example:
        >>> ids = np.zeros((4, 4, 4), int); ids[1:3, 1, 1] = 7
        >>> size = organ_sizes(ids, np.diag([2.0, 1, 1, 1]), (slice(2, 4), slice(0, 4), slice(0, 4)))[7]
        >>> size.voxels, size.inside, size.ml, size.extent, size.centre
        (2, 1, 0.004, (4.0, 1.0, 1.0), (3.0, 1.0, 1.0))
    """
    numbers, compact = _numbered(ids)
    step = None if affine is None else np.linalg.norm(affine[:-1, :-1], axis=0)
    found = {}
    for index, part in enumerate(find_objects(compact), start=1):
        inside = compact[part] == index
        seen = inside if box is None else inside[_within(part, box)]
        centre = [_mean_place(inside, axis) + part[axis].start for axis in range(ids.ndim)]
        extent = np.array(inside.shape, dtype=float)
        voxels = int(inside.sum())
        found[int(numbers[index])] = OrganSize(
            voxels=voxels,
            inside=int(seen.sum()),
            ml=math.nan if step is None else voxels * float(np.prod(step)) / 1000,
            extent=tuple((extent if step is None else extent * step).tolist()),
            centre=tuple(centre if affine is None else (affine @ [*centre, 1])[:-1].tolist()),
        )
    return found


def _numbered(ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids that occur, background first, and the volume with their indices instead: few ids, however large they are."""
    if ids.min() >= 0 and ids.max() < _LARGE:
        # Slab by slab and without sorting: a whole body has 10^8 voxels.
        counts = sum(np.bincount(slab.ravel(), minlength=_LARGE) for slab in ids)
        numbers = np.union1d([0], np.flatnonzero(counts))
        index_of = np.zeros(_LARGE, dtype=np.int32)
        index_of[numbers] = np.arange(len(numbers))
        return numbers, index_of[ids]
    numbers = np.union1d([0], ids)
    order = [0, *(n for n in numbers.tolist() if n)]  # ids below 0 are wrong, and counted all the same
    compact = np.zeros(ids.shape, dtype=np.int32)
    for index, number in enumerate(order):
        compact[ids == number] = index
    return np.array(order), compact


def _within(part: tuple[slice, ...], box: tuple[slice, ...]) -> tuple[slice, ...]:
    """The box in the coordinates of a part."""
    return tuple(
        slice(max(0, b.start - p.start), max(0, min(b.stop, p.stop) - p.start)) for p, b in zip(part, box, strict=True)
    )


def _mean_place(inside: NDArray[np.bool_], axis: int) -> float:
    along = inside.sum(axis=tuple(a for a in range(inside.ndim) if a != axis))
    return float((along * np.arange(len(along))).sum() / along.sum())
