"""Reading volumes: one NIfTI file, or a folder with one binary file per organ, checked and turned to RAS."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader
from monai.transforms import LoadImage, Orientation

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable

_log = logging.getLogger(__name__)

SUFFIXES = (".nii", ".nii.gz")
# Two grids are one when no corner lies further apart than this part of a voxel: writers round affines differently.
TOLERANCE = 0.1
# MONAI's default for `labels` changed between releases; written out, all of them agree.
_TO_RAS = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))


def read_volume(path: Path) -> MetaTensor:
    """Read one 3D NIfTI file as it lies on disk.

    Args:
        path: A `.nii` or `.nii.gz` file.

    Returns:
        (1, X, Y, Z) with the file's own voxel order, data type and affine (4, 4).

    Raises:
        InputError: The file cannot be read, is not 3D, or its affine is not invertible.
    """
    try:
        volume = LoadImage(image_only=True, dtype=None)(path, reader=NibabelReader())
    except MemoryError:
        raise
    except Exception as error:  # Whatever the reader stumbles over, it is the content of this file.
        raise InputError(
            f"expected a readable NIfTI file (.nii or .nii.gz), got {path}, which fails with "
            f"{type(error).__name__} ({_first_line(error)}): the file is truncated, damaged or of another format; "
            "copy or export it again"
        ) from error
    data, affine = volume.as_tensor(), torch.as_tensor(volume.affine, dtype=torch.float64)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(
            f"expected a 3D volume, got shape {tuple(data.shape)} in {path}: write one file per time point or channel"
        )
    if not _invertible(affine):
        raise InputError(
            f"expected an invertible voxel-to-world matrix, got {affine.tolist()} in {path}: correct the NIfTI header"
        )
    if volume.meta.get("sform_code") == 0 and volume.meta.get("qform_code") == 0:
        _log.warning("%s: the header does not say where left and right are; NIfTI's default is assumed", path)
    return MetaTensor(data[None], affine=affine)


def read_image(path: Path) -> MetaTensor:
    """Read a scan: (1, X, Y, Z) float32, on its own grid.

    Raises:
        InputError: As `read_volume`, or the scan holds NaN or Inf.
    """
    image = read_volume(path)
    data = image.as_tensor()
    if data.is_complex():
        raise InputError(f"expected real intensities, got {data.dtype} in {path}: export the magnitude")
    data = data.float()
    if bad := int((~torch.isfinite(data)).sum()):
        raise InputError(
            f"expected finite intensities, got {bad} NaN or Inf voxels in {path}: "
            "replace them (with -1000 HU where the scanner saw nothing)"
        )
    return MetaTensor(data, affine=image.affine)


def read_organs(path: Path, table: OrganTable) -> MetaTensor:
    """Read the organs of one case: (1, X, Y, Z) int32 ids, 0 = background, on their own grid.

    Args:
        path: Multi-label NIfTI file, or a folder with one binary NIfTI per organ.
        table: Knows organ names and ids.

    Raises:
        InputError: As `read_volume`; ids are not whole or not in the table; a folder has no known organ.
    """
    if path.is_dir():
        return _compose(path, table)
    organs = read_volume(path)
    data = organs.as_tensor()
    if data.is_floating_point() and bool((data != data.round()).any()):
        wrong = float(data[data != data.round()][0])
        raise InputError(
            f"expected whole organ ids, got {wrong:g} in {path}: the file was resampled with a linear interpolation; "
            "resample segmentations with nearest neighbour"
        )
    data = data.to(torch.int32)
    try:
        table.check_ids(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return MetaTensor(data, affine=organs.affine)


def _compose(folder: Path, table: OrganTable) -> MetaTensor:
    """One id volume from a folder of binary files; where two organs overlap, the first of the table stays."""
    files = {stem: f for f in sorted(folder.iterdir()) if (stem := _stem(f))}
    known = {name: ids[0] for name, ids in table.organs.items() if name in files}
    if not known:
        raise InputError(
            f"expected files named after organs of the table ({', '.join(list(table.organs)[:4])}, ...), got "
            f"{', '.join(list(files)[:4]) or 'no NIfTI file'} in {folder}: rename the files or use another table"
        )
    if unknown := [stem for stem in files if stem not in known]:
        _log.info("%s: %d files of organs that the table does not know are left out", folder, len(unknown))
    organs: MetaTensor | None = None
    overlap = 0
    for name, number in known.items():
        mask = read_volume(files[name])
        inside = _binary(mask, files[name])
        if organs is None:
            organs = MetaTensor(torch.zeros(mask.shape, dtype=torch.int32), affine=mask.affine)
            first = files[name]
        elif not same_grid(mask, organs):
            raise InputError(grid_message(f"{files[name]}", mask, f"{first}", organs))
        data = organs.as_tensor()
        overlap += int((inside & (data > 0)).sum())
        data[inside & (data == 0)] = number
    assert organs is not None  # noqa: S101  (known is not empty)
    if overlap:
        _log.warning("%s: %d voxels belong to two organs; the first in the table keeps them", folder, overlap)
    return organs


def _binary(mask: MetaTensor, path: Path) -> torch.Tensor:
    data: torch.Tensor = mask.as_tensor()
    top = data.max()
    if not bool(((data == 0) | (data == top)).all()) or float(top) < 0:
        raise InputError(
            f"expected a binary file (0 and one other value) for one organ, got values up to {float(top):g} in {path}: "
            "threshold it, or name a multi-label file in the column organs"
        )
    return data > 0


def to_ras(volume: MetaTensor) -> MetaTensor:
    """Permute and flip the axes so that they run to the patient's right, front and top; no resampling."""
    turned: MetaTensor = _TO_RAS(volume)
    return turned


def same_grid(one: MetaTensor, other: MetaTensor) -> bool:
    """Do two volumes (1, X, Y, Z) share shape and voxel positions, to a tenth of a voxel?"""
    if one.shape[1:] != other.shape[1:]:
        return False
    top = np.array(one.shape[1:]) - 1
    corners = np.array([[*(np.array(bits) * top), 1] for bits in np.ndindex(2, 2, 2)]).T
    a, b = (np.asarray(v.affine, dtype=float) for v in (one, other))
    apart = np.linalg.inv(b) @ a @ corners - corners
    return bool(np.abs(apart).max() < TOLERANCE)


def grid_message(one: str, a: Any, other: str, b: Any) -> str:
    """The sentence for two volumes that do not share a grid."""
    return (
        f"expected one voxel grid, got {_grid(a)} for {one} but {_grid(b)} for {other}: "
        "resample the segmentation to the image (nearest neighbour), or segment this very image"
    )


def _grid(volume: Any) -> str:
    affine = np.asarray(volume.affine, dtype=float)
    rows = "; ".join(" ".join(f"{x:.4g}" for x in row) for row in affine[:3])
    return f"shape {tuple(volume.shape[1:])} with affine [{rows}]"


def _invertible(affine: torch.Tensor) -> bool:
    axes = affine[:3, :3]
    unit = axes / axes.norm(dim=0)  # An axis of length zero gives NaN, which no comparison passes.
    return bool(torch.isfinite(affine).all()) and bool(torch.linalg.det(unit).abs() > 1e-4)


def _stem(file: Path) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file.name.endswith(suffix) and not file.name.startswith("."):
            return file.name[: -len(suffix)]
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]
