"""The raw data of a run's panel as plain arrays: a volume per case, written once, and the maps of each epoch.

Nothing is enlarged here. A volume is kept as grey values in its window, averaged down where it is large; a map stays on
the grid of its layer as int8 with a scale. Both files are `.npz` with a JSON header, so that any tool can read them.
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting._files import replacing
from camtrain.reporting.overlays import window_of

LAYOUT = 1  # of the run folder; a file of another layout is not guessed at
UNDEFINED = -128  # the int8 value of a cell that was not computed
_LUMA = (0.299, 0.587, 0.114)
# NumPy and zipfile answer bytes that make no sense with nearly anything.
_BROKEN = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


class CaseMap(NamedTuple):
    """One map of one panel case in one epoch.

    Attributes:
        case: Name of the case.
        label: Name of the label.
        truth: 1 present, 0 absent, NaN unknown.
        probability: What the network says; NaN where unknown.
        method: Attention method.
        layer: Layer of the map; empty for the map that is scored (of several layers: their mean).
        values: (*S') signed, NaN where not computed.
        inside: Share of the positive evidence inside the allowed region; NaN where undefined.
    """

    case: str
    label: str
    truth: float
    probability: float
    method: str
    layer: str
    values: npt.NDArray[np.floating]
    inside: float = math.nan


class StoredMap(NamedTuple):
    """A map as it lies in a file: value = cell x scale, and `UNDEFINED` for none.

    Attributes:
        cells: (*S') int8.
        scale: Value of one step.
        others: As in `CaseMap`.
    """

    case: str
    label: str
    truth: float | None
    probability: float | None
    method: str
    layer: str
    cells: npt.NDArray[np.int8]
    scale: float
    inside: float | None

    def values(self) -> npt.NDArray[np.float32]:
        """(*S') float32, NaN where not computed."""
        return np.where(self.cells == UNDEFINED, np.nan, self.cells * np.float32(self.scale)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class PanelVolume:
    """One case of the panel, as it is shown.

    Attributes:
        case: Name of the case.
        split: Split that it is of.
        image: (*V) uint8, averaged down from `shape` where it is smaller.
        regions: (R, *V) bool, each allowed region once.
        region_of: Label -> index into `regions`; a label without one is not known.
        shape: (*S) of the image that the network saw.
        spacing: Voxel size of that image in mm, or None.
        axes: Where its axes run, such as `"RAS"`, or None.
        window: Image values shown as black and white.

    Example:
        >>> image = np.random.rand(1, 8, 6, 4)
        >>> made = PanelVolume.make("case 1", image, allowed={"nodule": image[0] > 0.5}, budget=50)
        >>> made.image.shape, made.region_of, made.shape
        ((5, 4, 2), {'nodule': 0}, (8, 6, 4))
    """

    case: str
    image: npt.NDArray[np.uint8]
    regions: npt.NDArray[np.bool_]
    region_of: Mapping[str, int]
    shape: tuple[int, ...]
    split: str = "val"
    spacing: tuple[float, ...] | None = None
    axes: str | None = None
    window: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def make(
        cls,
        case: str,
        image: npt.NDArray[np.generic],
        *,
        allowed: Mapping[str, npt.NDArray[np.bool_]] | None = None,
        split: str = "val",
        spacing: Sequence[float] | None = None,
        axes: str | None = None,
        budget: int = 1 << 20,
    ) -> PanelVolume:
        """Window, quantise and, above `budget` voxels, average down.

        Args:
            case: Name of the case.
            image: (C, *S) as the network sees it; the first channel is kept, of a photograph the brightness.
            allowed: Label -> (*S) bool.
            split: Split that it is of.
            spacing: Voxel size in mm.
            axes: Where the axes run.
            budget: Voxels at most.

        Raises:
            InputError: Not one, two or three spatial axes.
        """
        if not 2 <= image.ndim <= 4:
            raise InputError(f"expected an image (C, *S) with 1, 2 or 3 spatial axes, got shape {image.shape}")
        grey = _first_channel(image)
        size = fitting_size(grey.shape, budget, spacing)
        window = window_of(grey)
        values = np.nan_to_num(grey.astype(np.float32), nan=window[0]).clip(*window)
        steps = (averaged(values, size) - window[0]) * (255 / (window[1] - window[0]))
        region_of: dict[str, int] = {}
        regions: list[npt.NDArray[np.bool_]] = []
        for label, region in (allowed or {}).items():
            small = np.asarray(region) if size == grey.shape else averaged(region.astype(np.float32), size) >= 0.25
            same = next((i for i, other in enumerate(regions) if np.array_equal(small, other)), len(regions))
            regions += [small] if same == len(regions) else []
            region_of[label] = same
        return cls(
            case=case,
            split=split,
            image=np.rint(steps).astype(np.uint8),
            regions=_stacked(regions, size),
            region_of=region_of,
            shape=grey.shape,
            spacing=None if spacing is None else tuple(float(s) for s in spacing),
            axes=axes,
            window=window,
        )

    def smaller(self, budget: int) -> PanelVolume:
        """The same with at most so many voxels."""
        size = fitting_size(self.image.shape, budget, self.voxel)
        if size == self.image.shape:
            return self
        regions = [averaged(region.astype(np.float32), size) >= 0.25 for region in self.regions]
        image = np.rint(averaged(self.image.astype(np.float32), size)).astype(np.uint8)
        return replace(self, image=image, regions=_stacked(regions, size))

    @property
    def voxel(self) -> tuple[float, ...]:
        """Size of a voxel of `image` along each axis: in mm, or in voxels of the network's image."""
        steps = self.spacing or (1.0,) * len(self.shape)
        return tuple(s * full / kept for s, full, kept in zip(steps, self.shape, self.image.shape, strict=True))


def _stacked(regions: Sequence[npt.NDArray[np.bool_]], size: Sequence[int]) -> npt.NDArray[np.bool_]:
    return np.stack(regions) if regions else np.zeros((0, *size), dtype=bool)


def _first_channel(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    photograph = image.ndim == 3 and image.shape[0] == 3
    return np.asarray(np.tensordot(np.asarray(_LUMA, np.float32), image, axes=1) if photograph else image[0])


def fitting_size(shape: Sequence[int], budget: int, spacing: Sequence[float] | None = None) -> tuple[int, ...]:
    """The largest size with at most `budget` voxels: the finest axes give way first, until voxels are cubes.

    Example:
        >>> fitting_size((100, 100, 10), 25_000, (1, 1, 8)), fitting_size((5, 5), 100)
        ((50, 50, 10), (5, 5))
    """
    steps = [1.0] * len(shape) if spacing is None else [float(s) for s in spacing]
    edge = min(steps)
    size = tuple(int(n) for n in shape)
    while math.prod(size) > max(1, budget):
        edge *= 1.02
        size = tuple(max(1, min(n, round(n * s / edge))) for n, s in zip(shape, steps, strict=True))
        if max(size) == 1:
            break
    return size


@functools.lru_cache(maxsize=64)
def _shares(voxels: int, points: int) -> npt.NDArray[np.float32]:
    """(points, voxels): which share of each voxel lies in each coarser one, rows add up to 1."""
    edges = np.arange(points + 1) * (voxels / points)
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(voxels)[None]
    overlap = (np.minimum(high, at + 1) - np.maximum(low, at)).clip(0)
    shares: npt.NDArray[np.float32] = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def averaged(values: npt.NDArray[np.floating], size: Sequence[int]) -> npt.NDArray[np.float32]:
    """Means over coarser voxels of the same extent.

    Example:
        >>> averaged(np.array([0.0, 3.0, 6.0, 9.0]), (2,)).tolist()
        [1.5, 7.5]
    """
    result = np.asarray(values, dtype=np.float32)
    for axis, points in enumerate(size):
        if result.shape[axis] != points:
            shares = _shares(result.shape[axis], points)
            result = np.moveaxis(np.tensordot(shares, result, axes=(1, axis)), 0, axis)
    return result


def write_volume(path: Path, volume: PanelVolume) -> None:
    """Write one case's volume; the file is whole or not there."""
    names = ("case", "split", "region_of", "shape", "spacing", "axes", "window")
    header = {"layout": LAYOUT, "size": volume.image.shape, **{name: getattr(volume, name) for name in names}}
    _save(path, header, image=volume.image, regions=np.packbits(volume.regions.ravel()))


def read_volume(path: Path) -> PanelVolume:
    """Read what `write_volume` wrote.

    Raises:
        InputError: Half a file, another layout, or no volume at all.
    """
    header, arrays = _load(path)
    try:
        image = arrays["image"]
        count = len(set(header["region_of"].values()))
        if image.ndim != len(header["shape"]) or any(not 0 <= i < count for i in header["region_of"].values()):
            raise ValueError("image, shape and regions do not fit")
        bits = np.unpackbits(arrays["regions"], count=count * image.size).astype(bool)
        return PanelVolume(
            case=str(header["case"]),
            split=str(header["split"]),
            image=image.astype(np.uint8, copy=False),
            regions=bits.reshape(count, *image.shape),
            region_of={str(label): int(index) for label, index in header["region_of"].items()},
            shape=tuple(int(n) for n in header["shape"]),
            spacing=None if header["spacing"] is None else tuple(float(s) for s in header["spacing"]),
            axes=header["axes"],
            window=(float(header["window"][0]), float(header["window"][1])),
        )
    except _BROKEN as error:
        raise InputError(f"{path.name}: not a volume of a panel ({error})") from error


def write_maps(path: Path, maps: Iterable[CaseMap], *, epoch: int, step: int, split: str = "val") -> None:
    """Write the maps of one epoch and split; the file is whole or not there."""
    rows: list[list[Any]] = []
    cells: list[npt.NDArray[np.int8]] = []
    for each in maps:
        steps, scale = quantised(each.values)
        cells.append(steps.ravel())
        numbers = [_number(each.truth), _number(each.probability)]
        shape = [int(n) for n in steps.shape]
        rows.append([each.case, each.label, *numbers, each.method, each.layer, shape, scale, _number(each.inside)])
    header = {"layout": LAYOUT, "epoch": int(epoch), "step": int(step), "split": split, "maps": rows}
    _save(path, header, cells=np.concatenate(cells) if cells else np.zeros(0, np.int8))


def read_maps(path: Path) -> tuple[dict[str, Any], list[StoredMap]]:
    """Read what `write_maps` wrote.

    Returns:
        `epoch`, `step` and `split`, and the maps.

    Raises:
        InputError: Half a file, another layout, or no maps at all.
    """
    header, arrays = _load(path)
    found, place = [], 0
    try:
        cells = arrays["cells"].astype(np.int8, copy=False)
        for case, label, truth, probability, method, layer, shape, scale, inside in header["maps"]:
            size = math.prod(shape)
            piece = cells[place : place + size].reshape(shape)
            place += size
            row = (str(case), str(label), truth, probability, str(method), str(layer), piece, float(scale), inside)
            found.append(StoredMap(*row))
        about = {"epoch": int(header["epoch"]), "step": int(header["step"]), "split": str(header["split"])}
    except _BROKEN as error:
        raise InputError(f"{path.name}: not the maps of an epoch ({error})") from error
    return about, found


def quantised(values: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int8], float]:
    """A map as int8 and the value of one step; cells that are not finite become `UNDEFINED`.

    Example:
        >>> cells, scale = quantised(np.array([0.0, -2.0, np.nan, 1.0]))
        >>> cells.tolist(), round(scale * 127, 6)
        ([0, -127, -128, 64], 2.0)
    """
    finite = np.isfinite(values)
    top = float(np.abs(values, where=finite, out=np.zeros(values.shape, np.float64)).max(initial=0.0))
    if top == 0:
        return np.where(finite, 0, UNDEFINED).astype(np.int8), 0.0
    scale = top / 127
    # In float64: the step of a map of tiny values is no float32 number.
    steps = np.rint(np.where(finite, values, 0).astype(np.float64) / scale)
    return np.where(finite, steps, UNDEFINED).astype(np.int8), scale


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _save(path: Path, header: Mapping[str, Any], **arrays: npt.NDArray[np.generic]) -> None:
    text = np.frombuffer(json.dumps(header, ensure_ascii=False).encode(errors="backslashreplace"), dtype=np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, header=text, **arrays)  # type: ignore[arg-type]


def _load(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Header and arrays; nothing in them is ever executed.

    Raises:
        InputError: They cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes().decode())
        layout = header["layout"]
    except _BROKEN as error:
        raise InputError(f"{path.name}: half written or damaged ({type(error).__name__})") from error
    if layout != LAYOUT:
        raise InputError(f"{path.name}: written in layout {layout}, this version reads {LAYOUT}")
    return header, arrays
