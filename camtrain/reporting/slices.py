"""Planes of a volume as a radiologist expects them on a screen.

Volumes are RAS: axis 0 runs to the patient's right, axis 1 to the front (anterior), axis 2 upwards (superior).
Pictures follow the radiological convention: in axial and coronal planes the patient's right is on the left of the
picture; the front (axial) or the head (coronal, sagittal) is at the top; in sagittal planes the front is on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting.sections import Sections

PLANES = ("axial", "coronal", "sagittal")
NORMAL = {"axial": 2, "coronal": 1, "sagittal": 0}
# What stands at the left, right, top and bottom edge of the picture.
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
_PAIRS = ("RL", "AP", "SI")

Array = npt.NDArray[np.generic]


def geometry(affine: npt.ArrayLike) -> tuple[str, tuple[float, float, float]]:
    """Where the axes of a volume run, and how large its voxels are.

    Args:
        affine: (4, 4) voxel to world in mm, world axes to the right, to the front and upwards (nibabel, MONAI).

    Returns:
        Axis codes such as `"RAS"` or `"LPS"` (for an oblique volume the nearest), and the voxel size in mm.

    Raises:
        InputError: The affine has another shape or is singular.

    Example:
        >>> geometry([[-2, 0, 0, 10], [0, 2, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
        ('LAS', (2.0, 2.0, 5.0))
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import aff2axcodes

    matrix = check_affine(affine)
    codes = aff2axcodes(matrix)
    right, front, up = (float(s) for s in voxel_sizes(matrix))
    return "".join(codes), (right, front, up)


def check_affine(affine: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The affine as float64, after a check that it maps voxels to a world.

    Raises:
        InputError: Not (4, 4), not finite, singular, or with a last row other than 0 0 0 1.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise InputError(
            f"expected an affine of shape (4, 4), got {matrix.shape}: give each case its own voxel-to-world matrix"
        )
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-12:
        raise InputError("expected an affine that can be inverted, got a singular or non-finite one: check the header")
    if not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise InputError(f"expected an affine with the last row 0 0 0 1, got {matrix[3].tolist()}")
    return matrix


def to_ras(volume: Array, axes: str) -> Array:
    """A view of a 3D volume with its axes to the right, to the front and upwards.

    Args:
        volume: Array of shape *S (3D).
        axes: One letter per axis for where it runs, for example `"LPS"`.

    Example:
        >>> to_ras(np.arange(2).reshape(2, 1, 1), "LAS").ravel().tolist()
        [1, 0]
    """
    order = to_ras_order(axes)
    return volume.transpose(order)[tuple(slice(None, None, 1 if axes[i] in "RAS" else -1) for i in order)]


def point_to_ras(point: Sequence[int], shape: Sequence[int], axes: str) -> tuple[int, ...]:
    """The voxel index that a point of the original volume has after `to_ras`.

    Example:
        >>> point_to_ras((0, 3, 1), (4, 5, 6), "LAS")
        (3, 3, 1)
    """
    return tuple(int(point[i] if axes[i] in "RAS" else shape[i] - 1 - point[i]) for i in to_ras_order(axes))


def to_ras_order(axes: str) -> list[int]:
    """Which axis of the volume runs left-right, back-front and down-up.

    Raises:
        InputError: Not one letter of R/L, A/P and S/I each.

    Example:
        >>> to_ras_order("SPL")
        [2, 1, 0]
    """
    if len(axes) != 3 or any(sum(a in pair for a in axes) != 1 for pair in _PAIRS):
        raise InputError(f"expected axes such as 'RAS' or 'LPS', one letter per axis, got {axes!r}")
    return [next(i for i, a in enumerate(axes) if a in pair) for pair in _PAIRS]


def cut(volume: Array | Sections, plane: str, index: int) -> Array:
    """One plane of a RAS volume, rows and columns as they stand on the screen; a 2D image is returned as it is.

    Args:
        volume: (X, Y, Z) in RAS order, or what was kept of it, or (rows, columns).
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        index: Voxel index along the plane's normal.

    Returns:
        (rows, columns).

    Example:
        >>> volume = np.zeros((4, 5, 6)); volume[3, 4, 2] = 1           # right, front
        >>> np.argwhere(cut(volume, "axial", 2)).tolist()               # top left of the picture
        [[0, 0]]
    """
    if isinstance(volume, Sections):
        return volume.cut(plane, index)
    if volume.ndim == 2:
        return volume
    plane_of_voxels: Array = np.take(volume, index, axis=NORMAL[plane])
    return plane_of_voxels.T[::-1, ::-1]


def on_screen(per_axis: Sequence[float], plane: str) -> tuple[float, float]:
    """What belongs to the rows and to the columns of a plane, from one value per axis of the volume.

    Example:
        >>> on_screen((0.5, 0.7, 3.0), "coronal")
        (3.0, 0.5)
    """
    if len(per_axis) == 2:
        return per_axis[0], per_axis[1]
    columns, rows = (v for axis, v in enumerate(per_axis) if axis != NORMAL[plane])
    return rows, columns


def largest_section(region: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """The point whose planes cut the most of a region: along each axis the index with the largest section.

    A centre of mass would fall between the two lungs; this point lies in the larger one. Of several equal sections the
    middle one counts. An empty region gives the middle of the volume. Of a large volume every second voxel or fewer are
    looked at.

    Example:
        >>> region = np.zeros((4, 5, 6), bool); region[2, 1:3, 4] = True; region[2, 1, 3] = True
        >>> largest_section(region)
        (2, 1, 4)
    """
    step = max(1, min(region.shape, default=1) // 96)
    if step > 1 and (thinned := region[(slice(None, None, step),) * region.ndim]).any():
        return tuple(step * index for index in largest_section(thinned))
    if not region.any():
        return tuple(n // 2 for n in region.shape)
    point = []
    for axis in range(region.ndim):
        areas = np.count_nonzero(region, axis=tuple(a for a in range(region.ndim) if a != axis))
        largest = np.flatnonzero(areas == np.max(areas))
        point.append(int(largest[len(largest) // 2]))
    return tuple(point)


def peak(values: npt.NDArray[np.floating], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The voxel of the image at the centre of the map's highest cell; None where no cell is positive.

    Args:
        values: (*S') map; NaN counts as nothing.
        shape: *S of the image.

    Example:
        >>> peak(np.array([[0.0, 1.0], [0.0, 0.0]]), (8, 8))
        (2, 6)
    """
    finite = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=-np.inf)
    if not finite.size or finite.max() <= 0:
        return None
    cell = np.unravel_index(int(finite.argmax()), finite.shape)
    return tuple(min(n - 1, int((c + 0.5) * n / m)) for c, n, m in zip(cell, shape, finite.shape, strict=True))


def telling_point(
    shape: Sequence[int], maps: Sequence[npt.NDArray[np.floating]], region: npt.NDArray[np.bool_] | None = None
) -> tuple[int, ...]:
    """The point whose planes show most of several maps, and of the allowed region.

    Before and after a training with the mask loss, attention may sit at different heights; this is the compromise for
    a single plane. Along each axis every map and the region vote with the share of their (positive) mass in each plane.

    Args:
        shape: *S of the image.
        maps: (*S') maps, of any grids.
        region: (*S) or (*S') bool; one vote like a map.

    Example:
        >>> first, second = np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
        >>> first[0, 1, 2] = second[3, 1, 2] = 1
        >>> telling_point((8, 8, 8), [first, second])[1:]
        (3, 5)
    """
    voters = [np.nan_to_num(np.asarray(m, dtype=np.float32)).clip(0) for m in maps]
    if region is not None:
        voters.append(np.asarray(region, dtype=np.float32))
    point = []
    for axis, n in enumerate(shape):
        votes = np.zeros(n)
        for mass in voters:
            profile = mass.sum(axis=tuple(a for a in range(mass.ndim) if a != axis), dtype=np.float64)
            if profile.max() > 0:
                cells = ((np.arange(n) + 0.5) * len(profile) / n).astype(int)
                votes += (profile / profile.max())[cells]
        best = np.flatnonzero(votes == votes.max())
        # The middle of the first run of equal votes: the centre of a cell, not its edge.
        run = best[: 1 + int(np.argmax(np.append(np.diff(best) != 1, True)))]
        point.append(int(run[len(run) // 2]))
    return tuple(point)
