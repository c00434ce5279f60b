"""MetaImage files (`.mha`, `.mhd`): lines `Key = value` and voxels, raw or packed by zlib, here or beside it.

Source: MetaIO documentation, itk.org/Wiki/MetaIO/Documentation. As in ITK, the world runs left, back, up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.data.volume_raw import (
    LPS_TO_RAS,
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
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4"},
}


def read_metaimage_header(path: Path) -> VolumeHeader:
    """Shape, place and type.

    Raises:
        InputError: No MetaImage header, or one that says what is not read here.
    """
    fields, _ = _fields(path)
    shape = _shape(fields, path)
    return VolumeHeader(shape, _affine(fields, len(shape), path), _dtype(fields, path).name)


def read_metaimage(path: Path) -> RawVolume:
    """The whole volume.

    Raises:
        InputError: As `read_metaimage_header`, or the voxels are missing, truncated or too many.
    """
    fields, end = _fields(path)
    shape, dtype = _shape(fields, path), _dtype(fields, path)
    size = check_size(shape, dtype, path)
    name = fields["elementdatafile"]
    if name.upper().startswith("LIST") or "%" in name:
        raise InputError(f"expected one data file, got {name!r} in {path}: save header and voxels as one .mha")
    local = name.upper() == "LOCAL"
    source = path if local else beside(path, name)
    packed = _true(fields.get("compresseddata", "False"))
    start, skip = end if local else 0, int(fields.get("headersize", "0"))
    if skip == -1 and not packed:
        start = max(source.stat().st_size - size, 0)
    elif not local:
        start = max(skip, 0)
    with opened(source, "zlib" if packed else "raw", start) as stream:
        held = read_exactly(stream, size, source, rest=not packed)
    data: NDArray[Any] = np.frombuffer(held, dtype).reshape(shape, order="F")
    return RawVolume(data, _affine(fields, len(shape), path))


def _fields(path: Path) -> tuple[dict[str, str], int]:
    lines, end = text_header(path)
    pairs = [line.split("=", 1) for line in lines if "=" in line]
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    for key, word in (("ndims", "NDims"), ("dimsize", "DimSize"), ("elementtype", "ElementType")):
        if key not in fields:
            raise InputError(f"expected the field {word} in a MetaImage header, got none in {path}: export it again")
    if "elementdatafile" not in fields:
        raise InputError(
            f"expected the field ElementDataFile in a MetaImage header, got none in {path}: export it again"
        )
    if _true(fields.get("binarydata", "True")) is False:
        raise InputError(f"expected binary voxels, got BinaryData = False in {path}: save them as binary")
    return fields, end


def _shape(fields: dict[str, str], path: Path) -> tuple[int, ...]:
    axes = int(numbers(fields["ndims"], 1, "NDims", path)[0])
    shape = tuple(int(n) for n in numbers(fields["dimsize"], axes, "DimSize", path))
    channels = int(numbers(fields.get("elementnumberofchannels", "1"), 1, "ElementNumberOfChannels", path)[0])
    if channels != 1:
        raise InputError(
            f"expected one number per voxel, got {channels} (colours or vectors) in {path}: export grey values"
        )
    return shape


def _dtype(fields: dict[str, str], path: Path) -> np.dtype[Any]:
    kind = _TYPES.get(fields["elementtype"].upper())
    if kind is None:
        raise InputError(f"expected numbers, got ElementType {fields['elementtype']!r} in {path}: convert it")
    big = _true(fields.get("elementbyteordermsb", fields.get("binarydatabyteordermsb", "False")))
    return np.dtype((">" if big else "<") + kind)


def _affine(fields: dict[str, str], axes: int, path: Path) -> NDArray[np.float64]:
    matrix = np.eye(4)
    if axes != 3:
        return matrix  # Refused later, with its shape.
    turn = _first(fields, ("transformmatrix", "rotation", "orientation"))
    steps = _first(fields, ("elementspacing", "elementsize"))
    origin = _first(fields, ("offset", "position", "origin"))
    # The file lists the world direction of one voxel axis after the other.
    axes_of = np.array(numbers(turn, 9, "TransformMatrix", path)).reshape(3, 3).T if turn else np.eye(3)
    matrix[:3, :3] = axes_of * (numbers(steps, 3, "ElementSpacing", path) if steps else [1.0] * 3)
    if origin:
        matrix[:3, 3] = numbers(origin, 3, "Offset", path)
    return LPS_TO_RAS @ matrix


def _first(fields: dict[str, str], keys: tuple[str, ...]) -> str | None:
    return next((fields[key] for key in keys if key in fields), None)


def _true(text: str) -> bool:
    return text.strip().lower().startswith(("t", "1"))
