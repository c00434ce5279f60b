"""Arrays of numpy (`.npy`, `.npz`), read without pickle and without unpacking more than the header promises."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.data.volume_raw import RawVolume, VolumeHeader, check_size, read_exactly

# Names that an array of voxels goes by, where a file holds several arrays.
NAMES = ("image", "ct", "volume", "data", "arr_0", "organs", "mask", "labels", "seg")


def read_numpy_header(path: Path) -> VolumeHeader:
    """Shape and type; place only where the file has `affine` or `spacing`.

    Raises:
        InputError: No such file, objects inside, or no array that is clearly the volume.
    """
    if path.suffix.lower() == ".npy":
        with path.open("rb") as stream:
            shape, _, dtype = _npy_header(stream, path)
        return VolumeHeader(shape, np.eye(4), dtype.name, oriented=False)
    with _archive(path) as archive:
        with _member(archive, _chosen(archive, path), path) as stream:
            shape, _, dtype = _npy_header(stream, path)
        affine, oriented = _affine(archive, path)
    return VolumeHeader(shape, affine, dtype.name, oriented)


def read_numpy(path: Path) -> RawVolume:
    """The whole volume; axes as in the array, which are taken as right, front, up.

    Raises:
        InputError: As `read_numpy_header`, or the voxels are truncated or more than promised.
    """
    if path.suffix.lower() == ".npy":
        with path.open("rb") as stream:
            return RawVolume(_array(stream, path), np.eye(4), oriented=False)
    with _archive(path) as archive:
        with _member(archive, _chosen(archive, path), path) as stream:
            data = _array(stream, path)
        affine, oriented = _affine(archive, path)
    return RawVolume(data, affine, oriented)


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"expected an .npz file, got {path}, which fails with {error}: it is truncated; copy it again"
        ) from None


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    try:
        return archive.open(name)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise InputError(f"expected a readable array {name!r}, got {error} in {path}: save it again") from None


def _chosen(archive: zipfile.ZipFile, path: Path) -> str:
    """The member that is the volume: the only array with three axes, or else the first with a name of `NAMES`."""
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    volumes = []
    for name in names:
        with _member(archive, name, path) as stream:
            shape, _, dtype = _npy_header(stream, path, check=False)
        if len(shape) >= 3 or dtype.hasobject:
            volumes.append(name)
    known = [f"{name}.npy" for name in NAMES if f"{name}.npy" in (volumes or names)]
    if len(volumes) == 1:
        return volumes[0]
    if known:
        return known[0]
    raise InputError(
        f"expected one array with three axes, or one named {', '.join(NAMES[:4])}, got "
        f"{', '.join(name[:-4] for name in names) or 'no array'} in {path}: save the volume under the name 'image'"
    )


def _npy_header(stream: IO[bytes], path: Path, check: bool = True) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except KeyError:
        raise InputError(f"expected a plain array, got one with named fields in {path}: save numbers") from None
    except Exception as error:  # Whatever the header makes the reader stumble over, it is the content of this file.
        raise InputError(
            f"expected an array of numpy, got {path}, which fails with {str(error)[:120]}: save it again"
        ) from error
    if check:
        check_size(shape, dtype, path)
    return tuple(shape), fortran, dtype


def _array(stream: IO[bytes], path: Path) -> NDArray[Any]:
    shape, fortran, dtype = _npy_header(stream, path)
    size = check_size(shape, dtype, path)
    try:
        held = read_exactly(stream, size, path, rest=False)
    except zipfile.BadZipFile as error:
        raise InputError(f"expected intact voxels, got {error} in {path}: copy it again") from None
    array: NDArray[Any] = np.frombuffer(held, dtype).reshape(shape, order="F" if fortran else "C")
    return array


def _affine(archive: zipfile.ZipFile, path: Path) -> tuple[NDArray[np.float64], bool]:
    """From `affine` (4, 4), else `spacing` (3,), else one unit per voxel."""
    for name, shape in (("affine", (4, 4)), ("spacing", (3,))):
        if f"{name}.npy" not in archive.namelist():
            continue
        with _member(archive, f"{name}.npy", path) as stream:
            found = _array(stream, path)
        if found.shape != shape:
            raise InputError(f"expected {name!r} of shape {shape}, got {found.shape} in {path}: save it so")
        return (found.astype(float), True) if name == "affine" else (np.diag([*found.astype(float), 1.0]), False)
    return np.eye(4), False
