"""Volumes and maps of a run as pieces of an HTML page: turned to screen order, compressed, as text.

A piece is made once and kept by the file that it came of, as long as it is on the page, so that the page of a long run
costs no more per epoch, and holds no more memory, than the page of a short one. The page's script reads the pieces;
`templates/report_data.js` is their other end.
"""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting.panel_files import PanelVolume, StoredMap, read_maps, read_volume
from camtrain.reporting.slices import to_ras, to_ras_order

VOLUME_VOXELS = 6 << 20  # of all volumes of a page together
_STRIP = 6  # a 1D image is shown as a strip this many times as long as it is high


@dataclass(frozen=True)
class Piece:
    """One piece of a page.

    Attributes:
        kind: `volume` or `maps`.
        split: Split that it is of.
        epoch: Epoch of the maps; -1 of a volume.
        text: JSON that is safe inside a `<script>`.
        axes: Case -> axes, of a volume.
    """

    kind: str
    split: str
    epoch: int
    text: str
    axes: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes in the page (the text is ASCII)."""
        return len(self.text)


_Kept = dict[Path, tuple[tuple[Any, ...], Piece]]  # file -> the state in which it was read, and what it gave


class PieceStore:
    """Pieces by the file they were made of; a file that has changed is read anew, one not asked for is forgotten.

    Example:
        >>> PieceStore().volumes([], limit=1000)
        ([], [])
    """

    def __init__(self) -> None:
        self._volumes: _Kept = {}
        self._maps: _Kept = {}

    def volumes(self, paths: Sequence[Path], limit: int = VOLUME_VOXELS) -> tuple[list[Piece], list[str]]:
        """One piece per volume file, and a note for each file that is no volume.

        Args:
            paths: Files of `volumes/`.
            limit: Voxels of all together; each gets the same share.
        """
        share = limit // max(1, len(paths))
        pieces, self._volumes, notes = _pieces(
            paths, self._volumes, share, lambda path: volume_piece(read_volume(path), share)
        )
        return pieces, notes

    def maps(self, paths: Sequence[Path], volumes: Iterable[Piece]) -> tuple[list[Piece], list[str]]:
        """One piece per file of maps, and a note for each file that holds none.

        Args:
            paths: Files `maps.npz` of the epochs.
            volumes: The volumes of the page: they say how a case is turned, and maps of other cases are left out.
        """
        axes = {(piece.split, case): way for piece in volumes for case, way in piece.axes.items()}
        known = tuple(sorted(axes.items(), key=str))
        pieces, self._maps, notes = _pieces(paths, self._maps, known, lambda path: maps_piece(*read_maps(path), axes))
        return pieces, notes


def _pieces(
    paths: Sequence[Path], before: _Kept, key: Any, make: Callable[[Path], Piece]
) -> tuple[list[Piece], _Kept, list[str]]:
    """The pieces, what is to be kept of them, and a note for each file that gave none."""
    now: _Kept = {}
    notes = []
    for path in paths:
        try:
            state = path.stat()
            seen = (key, state.st_mtime_ns, state.st_size)
            kept = before.get(path)
            now[path] = kept if kept is not None and kept[0] == seen else (seen, make(path))
        except InputError as error:
            notes.append(f"{path.parent.name}/{error}: left out")
        except (
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
        ) as error:  # whole, but not what this version writes
            notes.append(f"{path.parent.name}/{path.name}: not as expected ({error}): left out")
        except OSError as error:
            notes.append(f"{path.parent.name}/{path.name}: {error.strerror or error}: left out")
    return [piece for _, piece in now.values()], now, notes


def volume_piece(volume: PanelVolume, budget: int) -> Piece:
    """A volume in screen order: for 3D right, front, up; grey values, then a bit per voxel and region."""
    small = volume.smaller(budget)
    image, voxel = on_screen(small.image, small.axes), _turned_sizes(small)
    bits = np.packbits(np.stack([on_screen(r, small.axes) for r in small.regions])) if len(small.regions) else b""
    content = {
        "split": small.split,
        "case": small.case,
        "size": list(image.shape),
        "voxel": [float(f"{v:.5g}") for v in voxel],
        "known": small.axes is not None and image.ndim == 3,
        "regions": len(small.regions),
        "regionOf": dict(small.region_of),
        "shape": list(small.shape),
        "data": packed(np.ascontiguousarray(image).tobytes() + bytes(bits)),
    }
    return Piece("volume", small.split, -1, script_json(content), {small.case: small.axes})


def maps_piece(
    about: Mapping[str, Any], maps: Iterable[StoredMap], axes: Mapping[tuple[str, str], str | None]
) -> Piece:
    """The maps of one epoch in screen order: a list that says what they are, and their cells one after the other."""
    split = about["split"]
    shown = [each for each in maps if (split, each.case) in axes]
    cells: list[bytes] = []
    listed = []
    for (case, label), group in itertools.groupby(shown, key=lambda each: (each.case, each.label)):
        entries: list[list[Any]] = []
        for each in group:
            turned = on_screen(each.cells, axes[split, case])
            cells.append(np.ascontiguousarray(turned).tobytes())
            scale = float(f"{each.scale:.6g}")
            entries.append([each.method, each.layer, list(turned.shape), scale, _short(each.inside)])
            truth, probability = each.truth, each.probability
        listed.append([case, label, truth, _short(probability), entries])
    content = {"split": split, "epoch": about["epoch"], "step": about["step"], "maps": listed}
    text = script_json({**content, "data": packed(b"".join(cells))})
    return Piece("maps", split, about["epoch"], text)


def thinned(paths: Mapping[int, Path], budget: int, besides: Mapping[int, int] | None = None) -> list[int]:
    """Which epochs a page can hold: all, or the first, every second, fourth, eighth ... behind it, and the last.

    What one epoch leaves out no later one brings back, so that pieces need not be made anew as a run gets longer.

    Args:
        paths: Epoch -> file of maps.
        budget: Bytes of the page that they may take.
        besides: Epoch -> bytes of what else the page holds for it.

    Example:
        >>> thinned({epoch: Path("no such file") for epoch in range(10)}, 9000)
        [0, 4, 8, 9]
    """
    epochs = sorted(paths)
    # Base64 takes a third more than the file, the list of what is there comes on top.
    sizes = {epoch: 1.45 * _size(paths[epoch]) + 2000 + (besides or {}).get(epoch, 0) for epoch in epochs}
    kept = epochs
    step = 1
    while sum(sizes[epoch] for epoch in kept) > budget and len(kept) > 2:
        step *= 2
        kept = [epoch for i, epoch in enumerate(epochs) if i % step == 0 or i == len(epochs) - 1]
    return kept


def on_screen(values: npt.NDArray[Any], axes: str | None) -> npt.NDArray[Any]:
    """3D: axes to the right, to the front and upwards, where they are known; 1D becomes a strip of one row."""
    if values.ndim == 1:
        return values[None]
    return to_ras(values, axes) if values.ndim == 3 and axes is not None else values


def _turned_sizes(volume: PanelVolume) -> tuple[float, ...]:
    if volume.image.ndim == 1:
        return (len(volume.image) * volume.voxel[0] / _STRIP, volume.voxel[0])
    if volume.image.ndim == 3 and volume.axes is not None:
        return tuple(volume.voxel[axis] for axis in to_ras_order(volume.axes))
    return volume.voxel


def packed(content: bytes) -> str:
    """Compressed (zlib) and as base64.

    Example:
        >>> zlib.decompress(base64.b64decode(packed(b"cells")))
        b'cells'
    """
    return base64.b64encode(zlib.compress(content, 6)).decode("ascii")


def script_json(content: Any) -> str:
    r"""JSON in ASCII that cannot end the script element that holds it.

    Example:
        >>> script_json({"case": "</script>é"})
        '{"case":"\\u003c/script\\u003e\\u00e9"}'
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def elements(pieces: Iterable[Piece], run: int) -> Iterator[str]:
    """The pieces as elements of a page."""
    for piece in pieces:
        yield f'<script type="application/json" class="{piece.kind}" data-run="{run}">{piece.text}</script>\n'


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
