"""Two voxel grids, and in words how they differ; what the network gets to see of one."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from camtrain.data.manifest_files import TOLERANCE

Affine = NDArray[np.float64]


def turned_to_ras(shape: Sequence[int], affine: Affine) -> tuple[tuple[int, ...], Affine]:
    """Shape and affine after the axes were permuted and flipped to RAS.

    Example:
        >>> shape, affine = turned_to_ras((4, 6, 8), np.diag([-1.0, 2, 3, 1]))
        >>> shape, affine[:, 3].tolist()
        ((4, 6, 8), [-3.0, 0.0, 0.0, 1.0])
    """
    turn = nib.orientations.io_orientation(affine)
    turned = tuple(int(shape[int(np.flatnonzero(turn[:, 0] == axis)[0])]) for axis in range(3))
    return turned, np.asarray(affine @ nib.orientations.inv_ornt_aff(turn, tuple(shape)), dtype=np.float64)


def how_grids_differ(
    image_shape: Sequence[int], image_affine: Affine, organs_shape: Sequence[int], organs_affine: Affine
) -> str:
    """What parts the grid of the organs from that of the image; "" where they are one, in any order of the axes.

    Args:
        image_shape: (X, Y, Z) as stored.
        image_affine: (4, 4) voxel to world, mm.
        organs_shape: Of the segmentation.
        organs_affine: Of the segmentation.

    Example:
        >>> moved = np.eye(4); moved[0, 3] = 5
        >>> how_grids_differ((4, 4, 4), np.eye(4), (4, 4, 4), moved)
        'shifted by 5.0, 0.0, 0.0 mm (right, front, up)'
        >>> how_grids_differ((4, 4, 4), np.eye(4), (4, 4, 2), np.diag([1.0, 1, 2, 1]))
        'voxels of 1 x 1 x 2 mm instead of 1 x 1 x 1; shape 4 x 4 x 2 instead of 4 x 4 x 4 (right, front, up)'
    """
    shape, affine = turned_to_ras(image_shape, image_affine)
    other, matrix = turned_to_ras(organs_shape, organs_affine)
    steps, theirs = (np.linalg.norm(a[:3, :3], axis=0) for a in (affine, matrix))
    said = []
    if (np.abs(theirs / steps - 1) > 1e-3).any():
        said.append(f"voxels of {_by(theirs)} mm instead of {_by(steps)}")
    if other != shape:
        mixed = "; the axes are in another order" if sorted(other) == sorted(shape) else ""
        said.append(f"shape {_by(other)} instead of {_by(shape)} (right, front, up){mixed}")
    if said:
        return "; ".join(said)
    top = np.array(shape) - 1
    corners = np.array([[*(np.array(bits) * top), 1] for bits in np.ndindex(2, 2, 2)]).T
    if np.abs(np.linalg.inv(affine) @ matrix @ corners - corners).max() < TOLERANCE:
        return ""
    shift = (matrix @ [*(top / 2), 1] - affine @ [*(top / 2), 1])[:3]
    turn = _angle(affine[:3, :3] / steps, matrix[:3, :3] / theirs)
    told = f"shifted by {', '.join(f'{x:.1f}' for x in shift)} mm (right, front, up)"
    return f"turned by {turn:.1f} degrees and {told}" if turn > 0.1 else told


def _angle(one: Affine, other: Affine) -> float:
    """Degrees of the rotation from one set of unit axes to another."""
    cosine = (np.trace(one.T @ other) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def seen_box(
    shape: Sequence[int], step: Sequence[float], spacing: Sequence[float] | None, size: Sequence[int] | None
) -> tuple[slice, ...]:
    """Voxels of a volume in RAS that remain after resampling to `spacing` and cropping around the middle to `size`.

    Args:
        shape: (X, Y, Z) of the volume.
        step: Its voxel size, mm.
        spacing: Wanted voxel size, mm; None = its own.
        size: Wanted voxels; None = all.

    Example:
        >>> seen_box((100, 40), (1.0, 1.0), (2.0, 2.0), (20, 40))
        (slice(29, 69, None), slice(0, 40, None))
    """
    if size is None:
        return tuple(slice(0, n) for n in shape)
    box = []
    for n, own, wanted, keep in zip(shape, step, spacing or step, size, strict=True):
        resampled = round((n - 1) * own / wanted + 1)  # as MONAI rounds; the first voxels share their centre
        first = max(0, resampled // 2 - keep // 2)
        last = min(resampled, first + keep)
        low, high = ((edge - 0.5) * wanted / own for edge in (first, last))
        # Where nothing is cropped, nothing is lost but what resampling rounds off.
        start, stop = (0 if first == 0 else int(np.ceil(low))), (n if last == resampled else int(np.ceil(high)))
        box.append(slice(max(0, start), min(n, stop)))
    return tuple(box)


def _by(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " x ".join(f"{v:.4g}" for v in values)
