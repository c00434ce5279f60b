"""Headers of volumes: what can be said of a file before its voxels are read."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from camtrain._errors import InputError
from camtrain.data import manifest_files
from camtrain.data.manifest_paths import stem_of
from camtrain.doctor.facts import Header

_TRAILING = 2**16  # bytes that may follow the voxels
_SAMPLE = 2**12  # bytes at either end of a file that its print is made of


def is_nifti(path: Path) -> bool:
    """Is this a file whose header can be read here? Of others only a full read tells."""
    return path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith(".") and not path.is_dir()


def volume_files(folder: Path) -> list[Path]:
    """Files of a folder that are read as organs, by name."""
    return [path for path in sorted(folder.iterdir()) if stem_of(path) and path.is_file()]


def read_header(path: Path) -> Header:
    """Header of a volume; what is wrong is in its `fault`, nothing is raised.

    Args:
        path: A file of any format that the data room reads, or the folder of a DICOM series.

    Example:
        >>> read_header(Path("nowhere.nii")).fault
        'no such file'
    """
    if not path.exists():
        return Header(path, fault="no such file")
    if not is_nifti(path):
        return _other_header(path)
    try:
        size, mark = path.stat().st_size, fingerprint(path)
    except OSError as error:
        return Header(path, fault=error.strerror or str(error))
    if size == 0:
        return Header(path, fault="the file is empty (0 bytes)")
    try:
        image: Any = nib.load(path)
        shape = tuple(int(n) for n in image.shape)
        affine = np.asarray(image.affine, dtype=np.float64)
        dtype = image.get_data_dtype()
        header = image.header
        codes = [int(header[name]) for name in ("sform_code", "qform_code") if name in header]
        offset = int(header.get_data_offset())
    except Exception as error:  # Whatever the reader stumbles over, it is the content of this file.
        return Header(path, size=size, print=mark, fault=f"no readable NIfTI header ({_first_line(error)})")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    bytes_ = offset + math.prod(shape) * dtype.itemsize
    return Header(
        path=path,
        shape=shape,
        affine=affine,
        dtype="RGB" if dtype.names else str(dtype),
        placed=any(codes) or not codes,
        fault=_fault(shape, dtype, affine) or _too_short(path, size, bytes_),
        doubt=_odd_end(path, bytes_),
        size=size,
        print=mark,
    )


def _other_header(path: Path) -> Header:
    """Header of another format, as the data room reads it."""
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    try:
        told = manifest_files.read_header(path)
    except InputError as error:
        return Header(path, size=size, fault=str(error))
    shape = tuple(int(n) for n in told.shape)
    affine = np.asarray(told.affine, dtype=np.float64)
    mark = fingerprint(path) if path.is_file() else ""
    return Header(path, shape, affine, str(told.dtype), bool(told.oriented), size=size, print=mark)


def _fault(shape: tuple[int, ...], dtype: np.dtype[Any], affine: np.ndarray[Any, Any]) -> str:
    if dtype.names:
        return "colours (RGB) instead of one intensity per voxel"
    if dtype.kind == "c":
        return f"complex numbers ({dtype})"
    if len(shape) != 3:
        return f"{len(shape)}D, shape {shape}"
    if not all(shape):
        return f"no voxels, shape {shape}"
    axes = affine[:3, :3]
    with np.errstate(all="ignore"):
        unit = axes / np.linalg.norm(axes, axis=0)
        if not np.isfinite(affine).all() or not abs(np.linalg.det(unit)) > 1e-4:
            return "a voxel-to-world matrix that cannot be inverted"
    return ""


def _too_short(path: Path, size: int, expected: int) -> str:
    """Fewer bytes than the header promises."""
    if path.name.endswith(".gz") or size >= expected:
        return ""
    return f"{size:,} bytes, where the header promises {expected:,}: truncated"


def _odd_end(path: Path, expected: int) -> str:
    """The last four bytes of a gz stream are its length, modulo 2^32; those of half a stream are anything."""
    if not path.name.endswith(".gz"):
        return ""
    with path.open("rb") as file:
        if file.read(14).endswith(b"BC"):
            return ""  # bgzip: many streams, the last one empty
        file.seek(-4, 2)
        (length,) = struct.unpack("<I", file.read(4))
    if 0 <= length - expected % 2**32 < _TRAILING:
        return ""
    return f"its end says {length:,} bytes, its header {expected:,}: truncated?"


def fingerprint(path: Path) -> str:
    """Hash of a file's size and of the bytes at either end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_SAMPLE)
        file.seek(max(0, size - _SAMPLE))
        tail = file.read(_SAMPLE)
    return hashlib.blake2b(size.to_bytes(8, "little") + head + tail, digest_size=12).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
