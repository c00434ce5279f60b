"""What every reader of a volume gives: voxels as they lie on disk, and where they lie in the world."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError

# Bytes of one volume: 1024^3 of float32. A header that asks for more is wrong, or means harm.
MOST_BYTES = 4 * 2**30
# Patient axes: file formats of ITK's family count to the left and to the back, camtrain to the right and to the front.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_PIECE = 1 << 22


@dataclass(frozen=True)
class RawVolume:
    """A volume as a file holds it.

    Attributes:
        data: (X, Y, Z) in the file's own order and type, or (X, Y, Z, ...) where the file has more axes.
        affine: (4, 4) voxel to world, axes running to the patient's right, front and top.
        oriented: Does the file say where left and right are?
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]
    oriented: bool = True


@dataclass(frozen=True)
class VolumeHeader:
    """What a file says of its volume before any voxel is read.

    Attributes:
        shape: (X, Y, Z), or more axes where the file has more.
        affine: (4, 4) voxel to world, RAS.
        dtype: Name of numpy's type on disk.
        oriented: Does the file say where left and right are?
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    dtype: str
    oriented: bool = True

    @property
    def voxels(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Lengths of the voxel's edges."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


def check_size(shape: Sequence[int], dtype: np.dtype[Any], path: Path) -> int:
    """Bytes of an array, if that many may be read.

    Raises:
        InputError: An axis below 1, objects inside, or more than `MOST_BYTES`.
    """
    if dtype.hasobject:
        raise InputError(f"expected numbers, got an object array in {path}: it could run code; save plain numbers")
    if dtype.fields is not None:
        raise InputError(
            f"expected one number per voxel, got {dtype} (colours or records) in {path}: export grey values"
        )
    if not shape or min(shape) < 1:
        raise InputError(f"expected a volume with voxels, got shape {tuple(shape)} in {path}: export it again")
    size = math.prod(shape) * dtype.itemsize
    if size > MOST_BYTES:
        raise InputError(
            f"expected at most {MOST_BYTES / 2**30:g} GiB for one volume, got {size / 2**30:.3g} GiB of shape "
            f"{tuple(shape)} by the header of {path}: the file is damaged or made to fill the memory"
        )
    return size


def read_exactly(stream: IO[bytes], size: int, path: Path, rest: bool = True) -> bytearray:
    """So many bytes of a stream, unpacking no more than these.

    Args:
        stream: Opened where the voxels begin.
        size: Bytes that the header promises.
        path: For messages.
        rest: May more bytes follow? In a packed stream more of them mean a header that lies.

    Raises:
        InputError: The stream is shorter, longer where it may not be, or damaged.
    """
    data = bytearray()
    try:
        while len(data) < size and (piece := stream.read(min(_PIECE, size - len(data)))):
            data += piece
        more = not rest and len(stream.read(1)) > 0
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise InputError(
            f"expected packed voxels, got damaged or truncated ones in {path} ({error}): copy it again"
        ) from error
    if len(data) < size:
        raise InputError(
            f"expected {size} bytes of voxels, got {len(data)} in {path}: the file is truncated, or its header wrong; "
            "copy or export it again"
        )
    if more:
        raise InputError(
            f"expected {size} bytes of voxels, got more behind them in {path}: the header does not fit (a zip bomb has "
            "this form); export it again"
        )
    return data


def opened(path: Path, packing: str, start: int = 0) -> IO[bytes]:
    """A file opened where the voxels begin.

    Args:
        path: The file.
        packing: `raw`, `gzip`, `zlib` or `bzip2`.
        start: First byte of the voxels.

    Raises:
        InputError: The file is not there.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(
            f"expected the voxels in {path}, got {error.strerror}: keep header and data together"
        ) from None
    stream.seek(start)
    if packing == "gzip":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if packing == "bzip2":
        return bz2.BZ2File(stream)
    return stream if packing == "raw" else _Zlib(stream)  # type: ignore[return-value]


class _Zlib:
    """A zlib stream that unpacks piece by piece."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._packed = stream, zlib.decompressobj()

    def __enter__(self) -> _Zlib:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        while not self._packed.eof:
            source = self._packed.unconsumed_tail or self._stream.read(_PIECE)
            if not source:
                raise EOFError("the stream ends too early")
            if piece := self._packed.decompress(source, size):
                return piece
        return b""


def beside(header: Path, name: str) -> Path:
    """The data file that a header names; it must lie in the same folder, or below it.

    Raises:
        InputError: It lies elsewhere.
    """
    path = header.parent / name
    if header.parent.resolve() not in path.resolve().parents:
        raise InputError(f"expected the voxels beside {header}, got {name!r}, which lies elsewhere: keep them together")
    return path


def text_header(path: Path, most: int = 1 << 20) -> tuple[list[str], int]:
    r"""Lines of a text header up to an empty line (or the end), and the byte behind it.

    Raises:
        InputError: It is not text, or has no end.
    """
    lines: list[str] = []
    with path.open("rb") as stream:
        while stream.tell() < most:
            line = stream.readline(4096)
            if not line.strip(b"\r\n"):
                break
            lines.append(line.decode("latin-1").strip())
            if lines[-1].replace(" ", "").lower() == "elementdatafile=local":
                break
        else:
            raise InputError(f"expected a text header of at most {most} bytes, got no end of it in {path}")
        return lines, stream.tell()


def numbers(text: str, count: int | None, key: str, path: Path) -> list[float]:
    """Numbers of a header's line.

    Raises:
        InputError: Something else stands there, or another number of them.
    """
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values or (count is not None and len(values) != count):
        raise InputError(
            f"expected {count or 'some'} numbers for {key!r}, got {text[:60]!r} in {path}: export it again"
        )
    return values
