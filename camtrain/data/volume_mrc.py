"""MRC files (`.mrc`, `.rec`, `.map`) of electron microscopy: 1024 bytes of header, then voxels with x fastest.

Source: Cheng et al., MRC2014: Extensions to the MRC format header (J. Struct. Biol. 192, 2015). The world's unit is the
nanometre here, not the mm of a scanner: the header counts in angstrom.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.data.volume_raw import RawVolume, VolumeHeader, check_size, opened, read_exactly

_log = logging.getLogger(__name__)

_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_OTHER = {3: "complex 16-bit integers", 4: "complex numbers", 16: "colours", 101: "4-bit integers"}
_STAMPS = {0x44: "<", 0x11: ">"}
_IMOD = 1146047817
_SIZE = 1024


class _Header(NamedTuple):
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: NDArray[np.float64]
    order: tuple[int, int, int]
    start: int


def read_mrc_header(path: Path) -> VolumeHeader:
    """Shape, place (nm) and type.

    Raises:
        InputError: No MRC header, or one that says what is not read here.
    """
    header = _header(path)
    shape = tuple(header.shape[header.order.index(axis)] for axis in range(3))
    return VolumeHeader(shape, header.affine, header.dtype.name)


def read_mrc(path: Path) -> RawVolume:
    """The whole volume, axes x, y, z, with an affine in nm.

    Raises:
        InputError: As `read_mrc_header`, or the voxels are missing.
    """
    header = _header(path)
    size = check_size(header.shape, header.dtype, path)
    with opened(path, "raw", header.start) as stream:
        held = read_exactly(stream, size, path)
    stored: NDArray[Any] = np.frombuffer(held, header.dtype).reshape(header.shape, order="F")
    return RawVolume(stored.transpose([header.order.index(axis) for axis in range(3)]), header.affine)


def _header(path: Path) -> _Header:
    with path.open("rb") as stream:
        held = stream.read(_SIZE)
    if len(held) < _SIZE:
        raise InputError(f"expected an MRC header of {_SIZE} bytes, got {len(held)} in {path}: the file is truncated")
    order = _byte_order(held, path)
    whole, real = (np.frombuffer(held, order + kind, count=256) for kind in ("i4", "f4"))
    columns, rows, sections, mode = (int(n) for n in whole[:4])
    if mode not in _MODES:
        raise InputError(
            f"expected whole or real numbers (mode {', '.join(map(str, _MODES))}), got mode {mode} "
            f"({_OTHER.get(mode, 'unknown')}) in {path}: convert it, for example with IMOD's newstack"
        )
    axes = tuple(int(n) - 1 for n in whole[16:19])
    if sorted(axes) != [0, 1, 2]:
        axes = (0, 1, 2)  # Old files leave the words empty.
    volumes = sections // int(whole[9]) if 0 < int(whole[9]) < sections else 1
    if volumes > 1 and int(whole[22]) >= 401:
        raise InputError(f"expected one volume, got a stack of {volumes} in {path}: write one file per volume")
    kind = "u1" if mode == 0 and _unsigned(held, whole, order) else _MODES[mode]
    affine = _affine(whole, real)
    return _Header((columns, rows, sections), np.dtype(order + kind), affine, axes, _SIZE + max(int(whole[23]), 0))  # type: ignore[arg-type]


def _byte_order(held: bytes, path: Path) -> str:
    """The order under which the sizes make sense; the stamp of the writer is often wrong, and then this is told."""
    fits = [order for order in "<>" if _sensible(np.frombuffer(held, order + "i4", count=24))]
    if not fits:
        raise InputError(
            f"expected an MRC header, got sizes and mode that make no sense in either byte order in {path}: "
            "the file is damaged or of another format"
        )
    stamped = _STAMPS.get(held[212])
    if stamped in fits:
        return stamped
    if stamped is not None:
        _log.warning("%s: the header is stamped with the other byte order than it has; read as it has it", path)
    return fits[0]


def _sensible(whole: NDArray[Any]) -> bool:
    return bool(
        (whole[:3] > 0).all() and (whole[:3] < 1 << 16).all() and 0 <= whole[3] <= 101 and 0 <= whole[23] < 1 << 28
    )


def _unsigned(held: bytes, whole: NDArray[Any], order: str) -> bool:
    """Bytes of IMOD's older files are unsigned unless a flag says otherwise."""
    return int(whole[38]) == _IMOD and not int(np.frombuffer(held[156:160], order + "i4")[0]) & 1


def _affine(whole: NDArray[Any], real: NDArray[Any]) -> NDArray[np.float64]:
    """Angstrom of the unit cell over its samples, in nm; axes x, y, z."""
    cell, samples = real[10:13].astype(float), whole[7:10].astype(float)
    known = (cell > 0) & (samples > 0) & np.isfinite(cell)
    steps = np.where(known, cell / np.where(samples > 0, samples, 1) / 10, 1.0)
    matrix = np.diag([*steps, 1.0])
    origin = real[49:52].astype(float)
    matrix[:3, 3] = np.where(np.isfinite(origin), origin, 0) / 10
    return matrix
