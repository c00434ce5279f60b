"""Reading volumes of any known format, and organs from one file or several: checked, and turned to RAS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader
from monai.transforms import Orientation

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._faults import Faults
from camtrain.data.byte_order import swapped
from camtrain.data.manifest_paths import organ_names, stem_of, suffix_of
from camtrain.data.volume_dicom import read_dicom, read_dicom_header
from camtrain.data.volume_metaimage import read_metaimage, read_metaimage_header
from camtrain.data.volume_mrc import read_mrc, read_mrc_header
from camtrain.data.volume_nrrd import read_nrrd, read_nrrd_header
from camtrain.data.volume_numpy import read_numpy, read_numpy_header
from camtrain.data.volume_picture import is_picture, read_picture
from camtrain.data.volume_raw import RawVolume, VolumeHeader, check_size

T = TypeVar("T")
_log = logging.getLogger(__name__)

SUFFIXES = (".nii", ".nii.gz")
_READERS: Mapping[str, tuple[Callable[[Path], RawVolume], Callable[[Path], VolumeHeader]]] = {
    **dict.fromkeys((".nrrd", ".nhdr"), (read_nrrd, read_nrrd_header)),
    **dict.fromkeys((".mha", ".mhd"), (read_metaimage, read_metaimage_header)),
    **dict.fromkeys((".mrc", ".rec", ".map"), (read_mrc, read_mrc_header)),
    **dict.fromkeys((".npz", ".npy"), (read_numpy, read_numpy_header)),
}
# torch has no arithmetic for these.
_WIDER = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "float16": np.float32, "bool": np.uint8}
# Two grids are one when no corner lies further apart than this part of a voxel: writers round affines differently.
TOLERANCE = 0.1
# MONAI's default for `labels` changed between releases; written out, all of them agree.
_TO_RAS = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))


def read_header(path: Path) -> VolumeHeader:
    """Shape, place and type of a volume, without its voxels (milliseconds; of a DICOM folder, its files' headers).

    Args:
        path: A file of a known format, or the folder of a DICOM series.

    Raises:
        InputError: The header cannot be read.
    """
    if is_picture(path):
        picture = read_picture(path)
        return VolumeHeader(
            tuple(picture.shape[1:]), np.eye(4), str(picture.dtype).removeprefix("torch."), oriented=False
        )
    readers = (read_dicom, read_dicom_header) if path.is_dir() else _READERS.get(suffix_of(path))
    if readers is not None:
        return _guarded(readers[1], path)
    try:
        header = nib.load(path).header
        affine = np.asarray(header.get_best_affine(), dtype=float)
    except Exception as error:  # Whatever the reader stumbles over, it is the content of this file.
        raise _unreadable(path, error) from error
    oriented = bool(header.get("sform_code", 1)) or bool(header.get("qform_code", 1))
    return VolumeHeader(tuple(header.get_data_shape()), affine, str(header.get_data_dtype()), oriented)


def read_volume(path: Path, scan: bool = False) -> MetaTensor:
    """Read one 3D volume as it lies on disk.

    Args:
        path: A file of a known format (`.nii`, `.nii.gz`, NRRD, MetaImage, MRC, npz, npy), or the folder of a DICOM
            series.
        scan: Are these intensities, so that a wrong byte order shows?

    Returns:
        (1, X, Y, Z) with the file's own voxel order, data type (wider where torch lacks it) and affine (4, 4).

    Raises:
        InputError: The file cannot be read, is not 3D, its affine is not invertible, or its byte order is wrong.
    """
    reader = read_dicom if path.is_dir() else _READERS.get(suffix_of(path), (_read_nifti,))[0]
    raw = _read_nifti(path) if reader is _read_nifti else _guarded(reader, path)
    shape = raw.data.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"expected a 3D volume, got shape {shape} in {path}: write one file per time point or channel")
    affine = torch.as_tensor(raw.affine, dtype=torch.float64)
    if not _invertible(affine):
        raise InputError(
            f"expected an invertible voxel-to-world matrix, got {affine.tolist()} in {path}: correct the header"
        )
    if scan and swapped(raw.data):
        raise InputError(
            f"expected intensities that change little from voxel to voxel, got noise in {path} ({raw.data.dtype.name}) "
            "that is a scan in the other byte order (endianness): correct it in the header, or export again"
        )
    if not raw.oriented:
        told = _log.info if suffix_of(path) in (".npy", ".npz") else _log.warning
        told("%s: the header does not say where left and right are; NIfTI's default is assumed", path)
    data = raw.data.reshape(shape, order="A")
    data = data.astype(_WIDER.get(data.dtype.name, data.dtype.newbyteorder("=")), copy=False)
    return MetaTensor(torch.from_numpy(data)[None], affine=affine)


def _read_nifti(path: Path) -> RawVolume:
    header = read_header(path)
    with_colours = header.dtype.startswith("[")
    if with_colours:
        raise InputError(f"expected one number per voxel, got colours ({header.dtype}) in {path}: export grey values")
    check_size(header.shape, np.dtype(header.dtype), path)
    try:
        # Not by LoadImage: it makes all readers that MONAI has for every file, and one of them talks about codecs.
        reader = NibabelReader()
        data, facts = reader.get_data(reader.read(path))
    except MemoryError:
        raise
    except Exception as error:  # Whatever the reader stumbles over, it is the content of this file.
        raise _unreadable(path, error) from error
    # A file that stays open as memory would follow whatever is done to it.
    data = np.array(data) if isinstance(data, np.memmap) else data
    return RawVolume(data, np.asarray(facts["affine"], dtype=float), header.oriented)


def _guarded(reader: Callable[[Path], T], path: Path) -> T:
    """Anything that a reader of ours did not foresee is still the content of this file."""
    try:
        return reader(path)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"expected a readable {suffix_of(path) or 'DICOM'} file, got {path}, which fails with "
            f"{type(error).__name__} ({_first_line(error)}): it is truncated or damaged; copy or export it again"
        ) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"expected a readable NIfTI file (.nii or .nii.gz), got {path}, which fails with "
        f"{type(error).__name__} ({_first_line(error)}): the file is truncated, damaged or of another format; "
        "copy or export it again"
    )


def read_image(path: Path) -> MetaTensor:
    """Read a scan: (1, X, Y, Z) float32, on its own grid; a picture is (C, rows, columns).

    Raises:
        InputError: As `read_volume`, or the scan holds NaN or Inf.
    """
    image = read_picture(path) if is_picture(path) else read_volume(path, scan=True)
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


def read_organs(path: Path | tuple[Path, ...], table: OrganTable) -> MetaTensor:
    """Read the organs of one case: (1, X, Y, Z) int32 ids, 0 = background, on their own grid.

    Args:
        path: Multi-label file, a folder with one binary file per organ, or several such files.
        table: Knows organ names and ids.

    Raises:
        InputError: As `read_volume`; ids are not whole or not in the table; a folder has no known organ.
    """
    if isinstance(path, tuple):
        return _compose(str(path[0].parent), {stem_of(file): file for file in path}, table, several=True)
    if path.is_dir():
        return _compose(str(path), {stem: f for f in sorted(path.iterdir()) if (stem := stem_of(f))}, table)
    organs = read_picture(path, ids=True) if is_picture(path) else read_volume(path)
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


def _compose(folder: str, files: Mapping[str, Path], table: OrganTable, several: bool = False) -> MetaTensor:
    """One id volume from binary files named by organ; where two organs overlap, the first of the table stays."""
    # In a folder a name is the organ's; several files may have that of the case before it.
    own = {stem: stem for stem in files if stem in table.organs}
    named = organ_names(list(files), table.organs) if several else own
    by_organ = {organ: files[stem] for stem, organ in named.items()}
    known = {name: ids[0] for name, ids in table.organs.items() if name in by_organ}
    if not known:
        raise InputError(
            f"expected files named after organs of the table ({', '.join(list(table.organs)[:4])}, ...), got "
            f"{', '.join(list(files)[:4]) or 'no NIfTI file or other volume'} in {folder}: rename the files "
            "or use another table"
        )
    if unknown := [stem for stem in files if stem not in named]:
        _log.info("%s: %d files of organs that the table does not know are left out", folder, len(unknown))
    organs: MetaTensor | None = None
    first = Path(folder)
    overlap = 0
    faults = Faults(folder)
    for name, number in known.items():
        with faults.noting():
            mask = read_picture(by_organ[name], ids=True) if is_picture(by_organ[name]) else read_volume(by_organ[name])
            inside = _binary(mask, by_organ[name])
            if organs is None:
                organs = MetaTensor(torch.zeros(mask.shape, dtype=torch.int32), affine=mask.affine)
                first = by_organ[name]
            elif not same_grid(mask, organs):
                raise InputError(grid_message(f"{by_organ[name]}", mask, f"{first}", organs))
            data = organs.as_tensor()
            overlap += int((inside & (data > 0)).sum())
            data[inside & (data == 0)] = number
    faults.stop()
    assert organs is not None  # noqa: S101  (known is not empty, and nothing was wrong)
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
    if one.shape[1:] != other.shape[1:] or one.ndim == 3:  # Pictures have no place in a world.
        return bool(one.shape[1:] == other.shape[1:])
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]
