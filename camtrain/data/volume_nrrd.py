"""NRRD files (`.nrrd`, `.nhdr`): a text header and voxels, raw or packed, here or in a file beside it.

Source: Definition of NRRD File Format, teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError, nearest
from camtrain.data.volume_raw import (
    RawVolume,
    VolumeHeader,
    beside,
    check_size,
    numbers,
    opened,
    read_exactly,
    text_header,
)

_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_PACKING = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
}


def read_nrrd_header(path: Path) -> VolumeHeader:
    """Shape, place and type.

    Raises:
        InputError: No NRRD header, or one that says what is not read here.
    """
    fields, _ = _fields(path)
    shape = tuple(int(n) for n in numbers(fields["sizes"], None, "sizes", path))
    affine, oriented = _affine(fields, len(shape), path)
    return VolumeHeader(shape, affine, _dtype(fields, path).name, oriented)


def read_nrrd(path: Path) -> RawVolume:
    """The whole volume.

    Raises:
        InputError: As `read_nrrd_header`, or the voxels are missing, truncated or too many.
    """
    fields, end = _fields(path)
    shape = tuple(int(n) for n in numbers(fields["sizes"], None, "sizes", path))
    dtype = _dtype(fields, path)
    size = check_size(shape, dtype, path)
    packing = _PACKING.get(fields.get("encoding", "").lower())
    if packing is None:
        raise InputError(
            f"expected the encoding raw, gzip or bzip2, got {fields.get('encoding')!r} in {path}: save as gzip"
        )
    name = fields.get("data file", "")
    if len(name.split()) > 1 or name == "LIST":
        raise InputError(f"expected one data file, got {name!r} in {path}: save header and voxels as one .nrrd")
    source = beside(path, name) if name else path
    skip = int(fields.get("byte skip", "0") or 0)
    start = 0 if name else end
    if skip == -1:
        start = source.stat().st_size - size
    elif packing == "raw":
        start += skip
    if fields.get("line skip", "0") not in ("", "0") or (skip > 0 and packing != "raw"):
        raise InputError(
            f"expected voxels right behind the header, got lines or bytes to skip in {path}: save it again"
        )
    with opened(source, packing, max(start, 0)) as stream:
        held = read_exactly(stream, size, source, rest=packing == "raw")
    data: NDArray[Any] = np.frombuffer(held, dtype).reshape(shape, order="F")
    affine, oriented = _affine(fields, len(shape), path)
    return RawVolume(data, affine, oriented)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    lines, end = text_header(path)
    if not lines or not lines[0].startswith("NRRD"):
        raise InputError(f"expected a NRRD file, got one that does not begin with 'NRRD': {path} is of another format")
    pairs = [line.split(":", 1) for line in lines[1:] if ":" in line and not line.startswith("#") and ":=" not in line]
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    for short, long in (("datafile", "data file"), ("byteskip", "byte skip"), ("lineskip", "line skip")):
        if short in fields:
            fields[long] = fields.pop(short)
    for key in ("type", "sizes", "encoding"):
        if key not in fields:
            raise InputError(f"expected the field {key!r} in a NRRD header, got none in {path}: export it again")
    return fields, end


def _dtype(fields: dict[str, str], path: Path) -> np.dtype[Any]:
    kind = _TYPES.get(fields["type"].lower())
    if kind is None:
        raise InputError(
            f"expected numbers, got type {fields['type']!r}{nearest(fields['type'], _TYPES)} in {path}: convert"
        )
    endian = fields.get("endian", "").lower()
    if kind[1] != "1" and endian not in ("little", "big"):
        raise InputError(f"expected 'endian: little' or 'big', got {endian or 'nothing'!r} in {path}: export it again")
    return np.dtype(("<" if endian != "big" else ">") + kind)


def _affine(fields: dict[str, str], axes: int, path: Path) -> tuple[NDArray[np.float64], bool]:
    matrix = np.eye(4)
    space = fields.get("space", "").lower()
    if "space directions" not in fields:
        steps = fields.get("spacings")
        if steps and axes == 3:
            matrix[:3, :3] = np.diag(numbers(steps, 3, "spacings", path))
        return matrix, False
    if axes != 3:
        return matrix, space in _SPACES  # Refused later, with its shape.
    text = fields["space directions"].replace("(", " ").replace(")", " ")
    matrix[:3, :3] = np.array(numbers(text, 9, "space directions", path)).reshape(3, 3).T
    if "space origin" in fields:
        matrix[:3, 3] = numbers(fields["space origin"].strip("() "), 3, "space origin", path)
    if space and space not in _SPACES:
        raise InputError(f"expected a patient space (RAS, LAS or LPS), got {space!r} in {path}: export it again")
    signs = np.diag([*_SPACES.get(space, (1, 1, 1)), 1]).astype(float)
    return signs @ matrix, bool(space)
