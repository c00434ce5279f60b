"""PNG in half the time: one filter for all lines, where Pillow tries five of them on each."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

_UP = 2  # each byte less the one above it: the best of the five for scans and for masks
_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}


def png(pixels: npt.NDArray[np.uint8], strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """A picture as the bytes of a PNG file, a few per cent larger than Pillow's.

    Args:
        pixels: (rows, columns) grey or (rows, columns, 3); with a fourth channel for opacity.
        strategy: Of zlib; `zlib.Z_RLE` is the better one for masks.

    Source: PNG specification (ISO/IEC 15948), chunks IHDR, IDAT and IEND, filter type 2.

    Example:
        >>> png(np.zeros((2, 3), np.uint8))[1:4]
        b'PNG'
    """
    height, width = pixels.shape[:2]
    flat = np.ascontiguousarray(pixels).reshape(height, -1)
    lines = np.empty((height, 1 + flat.shape[1]), np.uint8)
    lines[:, 0], lines[0, 1:] = _UP, flat[0]
    np.subtract(flat[1:], flat[:-1], out=lines[1:, 1:])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, strategy)
    data = packer.compress(lines.data) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[flat.shape[1] // width], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
