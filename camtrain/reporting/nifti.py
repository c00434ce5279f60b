"""Maps as NIfTI files that viewers lay exactly over the scan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting._files import replacing
from camtrain.reporting.slices import check_affine

_DESCRIP = 79  # the header field holds 80 bytes with its closing zero


def save_map(
    path: str | Path, volume: npt.NDArray[np.floating], affine: npt.ArrayLike, *, descrip: str = "camtrain"
) -> Path:
    """Write a map as a float32 NIfTI file in the given geometry; the file appears whole or not at all.

    qform and sform carry the same matrix (code 1, scanner), so that 3D Slicer and ITK-SNAP, which do not read the same
    one, agree. A sheared affine fits only the sform; its qform is marked unknown.

    Args:
        path: Ends in `.nii.gz` or `.nii`.
        volume: (X, Y, Z); signed, not normalised. Undefined cells become 0.
        affine: (4, 4) voxel to world in mm of exactly this grid, world axes to the right, front and upwards. For a map
            on the grid of a layer see `map_affine`, for the grid of the original scan `resample_to`.
        descrip: What the map is, up to 79 characters: method, label, logit.

    Returns:
        The file.

    Raises:
        InputError: The affine is not (4, 4) or singular, the volume is not 3D, or the ending is another.

    Example:
        >>> import tempfile
        >>> file = save_map(Path(tempfile.mkdtemp()) / "nodule.nii.gz", np.ones((2, 3, 4)), np.diag([2, 2, 3, 1]))
        >>> import nibabel as nib
        >>> nib.load(file).header.get_zooms()
        (np.float32(2.0), np.float32(2.0), np.float32(3.0))
    """
    import nibabel as nib

    path, matrix = Path(path), check_affine(affine)
    if not path.name.endswith((".nii.gz", ".nii")):
        raise InputError(f"expected a file name that ends in .nii.gz, got {path.name!r}")
    if np.ndim(volume) != 3:
        raise InputError(f"expected a map of shape (X, Y, Z), got {np.shape(volume)}: save each label on its own")
    values = np.nan_to_num(np.asarray(volume, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    image = nib.Nifti1Image(values, matrix)
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=0 if _sheared(matrix) else 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = descrip.encode("ascii", "replace")[:_DESCRIP]
    with replacing(path) as temporary:
        nib.save(image, temporary)
    return path


def _sheared(matrix: npt.NDArray[np.float64]) -> bool:
    columns = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    return not np.allclose(columns.T @ columns, np.eye(3), atol=1e-4)


def map_affine(affine: npt.ArrayLike, shape: Sequence[int], map_shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """Voxel to world of a map's own grid: cells cover the same extent as the image's voxels, edge to edge.

    Args:
        affine: (4, 4) of the image.
        shape: *S of the image.
        map_shape: *S' of the map.

    Returns:
        (4, 4) float64.

    Example:
        >>> map_affine(np.eye(4), (8, 8, 8), (2, 4, 8))[:3].tolist()
        [[4.0, 0.0, 0.0, 1.5], [0.0, 2.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0]]
    """
    ratio = np.asarray(shape, dtype=np.float64) / np.asarray(map_shape, dtype=np.float64)
    inner = np.diag([*ratio, 1.0])
    inner[:3, 3] = 0.5 * ratio - 0.5
    result: npt.NDArray[np.float64] = check_affine(affine) @ inner
    return result


def resample_to(
    volume: npt.NDArray[np.floating], affine: npt.ArrayLike, shape: Sequence[int], to_affine: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """A map in the geometry of another grid, for example of the scan as it was before orientation, spacing and crop.

    Trilinear between cell centres, constant from the outermost centres to the edge of the map's extent, zero outside
    it: there the network saw nothing.

    Args:
        volume: (X', Y', Z') map.
        affine: (4, 4) of the map's grid (see `map_affine`).
        shape: Shape of the other grid.
        to_affine: (4, 4) of the other grid.

    Returns:
        Array of `shape`, float32.

    Example:
        >>> fine = resample_to(np.arange(2.0).reshape(2, 1, 1), np.diag([2.0, 1, 1, 1]), (5, 1, 1), np.eye(4))
        >>> fine.ravel().tolist()                            # cell 0 covers -1 mm to 1 mm, cell 1 covers 1 mm to 3 mm
        [0.0, 0.5, 1.0, 1.0, 0.0]
    """
    from scipy import ndimage

    inner = np.linalg.inv(check_affine(affine)) @ check_affine(to_affine)
    values = np.nan_to_num(np.asarray(volume, dtype=np.float32))
    result = ndimage.affine_transform(
        values, inner[:3, :3], inner[:3, 3], tuple(shape), output=np.float32, order=1, mode="nearest"
    )
    # In slabs: index grids of a whole CT would take gigabytes.
    rows = np.indices(tuple(shape[1:])).reshape(2, -1)
    for i in range(shape[0]):
        cells = inner[:3, 1:3] @ rows + (inner[:3, 0] * i + inner[:3, 3])[:, None]
        edge = np.asarray(values.shape)[:, None] - 0.5
        inside = ((cells >= -0.5 - 1e-6) & (cells <= edge + 1e-6)).all(axis=0)
        result[i] *= inside.reshape(tuple(shape[1:]))
    return np.asarray(result, dtype=np.float32)
