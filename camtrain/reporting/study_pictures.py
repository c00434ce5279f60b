"""Pictures for readers who must not know what made them: no caption, no scale, no outline, and files of one length."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from camtrain._errors import InputError
from camtrain.reporting.overlays import shared_scale
from camtrain.reporting.panels import boxes_of, draw_block
from camtrain.reporting.scene import Scene

Pixels = npt.NDArray[np.uint8]
_END = 12  # bytes of the chunk that closes a PNG file


def blinded_pictures(
    image: npt.NDArray[np.generic],
    maps: Sequence[npt.NDArray[np.floating]],
    *,
    point: Sequence[int],
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    width: int = 420,
) -> list[Pixels]:
    """The slices of a scan alone, then the same slices under each map, as panels draw them but with nothing that tells.

    A colour scale would tell methods apart, and the outline of the allowed region the finding: neither is drawn. Each
    map ends its colours at its own largest value.

    Args:
        image: (*S) or (C, *S).
        maps: (*S') signed.
        point: Voxel through which the planes go.
        spacing: Voxel size in mm.
        axes: Where the image's axes run; None = unknown.
        width: Width of each picture in pixels.

    Returns:
        1 + len(maps) pictures (H, width', 3), all of one shape.

    Example:
        >>> [p.shape[2] for p in blinded_pictures(np.random.rand(8, 8, 8), [np.ones((2, 2, 2))], point=(4, 4, 4))]
        [3, 3]
    """
    if not maps:
        raise InputError("expected at least one map, got none")
    rank = np.ndim(maps[0])
    scene = Scene.make(image, None, rank=rank, spacing=spacing, axes=axes, point=point)
    boxes = boxes_of(scene, width)
    shown = [draw_block(scene, boxes, None, 1.0)]
    return shown + [draw_block(scene, boxes, scene.orient(m), shared_scale([m])) for m in maps]


def png_bytes(pixels: Pixels) -> bytes:
    """A PNG file without any text or time in it.

    Example:
        >>> png_bytes(np.zeros((2, 2, 3), np.uint8))[1:4]
        b'PNG'
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def equally_long(files: Sequence[bytes]) -> list[bytes]:
    """PNG files padded to one length: a coarse map compresses better than a fine one, which would tell them apart.

    The padding is a private chunk, which decoders skip.

    Example:
        >>> sizes = (2, 40)
        >>> len({len(f) for f in equally_long([png_bytes(np.zeros((n, n, 3), np.uint8)) for n in sizes])})
        1
    """
    longest = max((len(file) for file in files), default=0) + _END
    return [_padded(file, longest - len(file) - _END) for file in files]


def _padded(file: bytes, zeros: int) -> bytes:
    body = b"paDd" + bytes(zeros)  # lower p: may be skipped; lower a: private
    return file[:-_END] + struct.pack(">I", zeros) + body + struct.pack(">I", zlib.crc32(body)) + file[-_END:]
