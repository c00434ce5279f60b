"""Pictures for readers who must not know what made them: no caption, no scale, no outline, and files of one length."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from camtrain._errors import InputError
from camtrain.reporting.overlays import shared_scale
from camtrain.reporting.panels import boxes_of, draw_block
from camtrain.reporting.scene import Scene

Pixels = npt.NDArray[np.uint8]
_ROOM = b"  "
_QUALITY = 88


def blinded_pictures(
    image: npt.NDArray[np.generic],
    maps: Sequence[npt.NDArray[np.floating]],
    *,
    point: Sequence[int],
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    width: int = 600,
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


def webp_bytes(pixels: Pixels) -> bytes:
    """A WebP file with room for padding and nothing else in it that tells of its making.

    Example:
        >>> webp_bytes(np.zeros((2, 2, 3), np.uint8))[8:12]
        b'WEBP'
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="WEBP", quality=_QUALITY, xmp=_ROOM)
    return file.getvalue()


def equally_long(files: Sequence[bytes]) -> list[bytes]:
    """WebP files padded to one length: a coarse map compresses better than a fine one, which would tell them apart.

    The padding is blanks in the metadata that `webp_bytes` leaves at the end.

    Example:
        >>> sizes = (2, 40)
        >>> len({len(f) for f in equally_long([webp_bytes(np.zeros((n, n, 3), np.uint8)) for n in sizes])})
        1
    """
    longest = max((len(file) for file in files), default=0)
    return [_padded(file, longest - len(file)) for file in files]


def _padded(file: bytes, more: int) -> bytes:
    """`more` is even: RIFF chunks are."""
    last = len(file) - len(_ROOM) - 8
    if file[last : last + 4] != b"XMP ":
        raise InputError("expected WebP files of webp_bytes, whose metadata come last")
    whole, room = struct.pack("<I", len(file) + more - 8), struct.pack("<I", len(_ROOM) + more)
    return file[:4] + whole + file[8 : last + 4] + room + _ROOM + b" " * more
