"""What channels and cells are named after: the organs of a table, and bands of Hounsfield units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain._grid import occupancy
from camtrain.anatomy.organ_table import OrganTable

# (low, high) in HU, low inclusive. Contrast medium above 200 HU counts as bone; between -500 and -150 lies what is
# neither, partial volume and poorly aerated lung.
BANDS: dict[str, tuple[float, float]] = {
    "air": (-math.inf, -950.0),
    "aerated lung": (-950.0, -500.0),
    "fat": (-150.0, -30.0),
    "soft tissue": (-30.0, 200.0),
    "bone": (200.0, math.inf),
}
Window = tuple[float, float] | Callable[[Tensor], Tensor]
TableSource = OrganTable | str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Band:
    """A range of Hounsfield units, low <= HU < high."""

    name: str
    low: float
    high: float

    def voxels(self, hounsfield: Tensor, ends: tuple[float, float] | None) -> Tensor:
        """Voxels in the band.

        Args:
            hounsfield: (B, 1, *S) in HU.
            ends: Where a window cut the values off, None where it did not. A voxel at an end may be anything beyond,
                so it belongs only to a band that holds everything beyond.

        Returns:
            (B, 1, *S) bool.
        """
        inside = (hounsfield >= self.low) & (hounsfield < self.high)
        if ends is None:
            return inside
        low, high = ends
        sure_low = self.low == -math.inf and self.high > low
        sure_high = self.high == math.inf and self.low <= high
        inside = torch.where(hounsfield <= low, sure_low, inside)
        return torch.where(hounsfield >= high, sure_high, inside)


class Concepts:
    """Organs of a table, then bands of HU, as shares of a map's cells.

    Args:
        table: `OrganTable` or what `OrganTable.load` takes. Each of its organs is a concept; labels play no part.
            None: bands only.
        window: What the image's values mean: (low, high) in HU for an image in 0..1, or a callable that makes HU
            (B, 1, *S) of the image. None: organs only.
        bands: Name -> (low, high) in HU instead of `BANDS`; they may leave gaps, not overlap.

    Raises:
        InputError: Neither table nor window, a window that is none, or bands that overlap.

    Example:
        >>> concepts = Concepts({"organs": {"heart": 3}, "labels": {"stent": ["heart"]}}, window=(-1000, 800))
        >>> concepts.names
        ('heart', 'air', 'aerated lung', 'fat', 'soft tissue', 'bone')
    """

    def __init__(
        self,
        table: TableSource | None = None,
        window: Window | None = None,
        bands: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        if table is None and window is None:
            raise InputError(
                "nothing to name cells after: pass table= (an OrganTable, for batches with organs), or window=(low, "
                "high), the HU that 0 and 1 of the image stand for, to go by bands of HU"
            )
        if bands is not None and window is None:
            raise InputError("bands= are in HU: pass window=(low, high), the HU that 0 and 1 of the image stand for")
        self.table = None if table is None else OrganTable.load(table)
        self.window = _checked_window(window)
        organs = () if self.table is None else tuple(self.table.organs)
        self.bands = _checked_bands(BANDS if bands is None else bands, organs) if window is not None else ()
        self.names = (*organs, *(band.name for band in self.bands))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that split a volume into parts: the organs, or without a table the bands; then what is left over."""
        if self.table is not None:
            return (*self.table.organs, "no organ")
        return (*(band.name for band in self.bands), "no band")

    @property
    def by_organ(self) -> bool:
        """Are the parts organs?"""
        return self.table is not None

    def shares(self, image: Tensor, organs: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Share of each cell that each concept fills.

        Args:
            image: (B, C, *S).
            organs: (B, 1, *S) integer ids; needed with a table.
            size: Grid of the cells, S'.

        Returns:
            (B, O, *S') float32 in 0..1, in the order of `names`.

        Raises:
            InputError: A table without organs, or image values that do not fit the window.
        """
        found = []
        if self.table is not None:
            found.append(organ_shares(self._organs(organs), self.table, size))
        if self.window is not None:
            hounsfield, ends = self._hounsfield(image)
            found += [occupancy(band.voxels(hounsfield, ends), size) for band in self.bands]
        return torch.cat(found, dim=1)

    def part_shares(self, image: Tensor, organs: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Share of each cell that each part fills; they add up to 1.

        Args:
            image: (B, C, *S).
            organs: (B, 1, *S) integer ids; needed with a table.
            size: Grid of the cells, S'.

        Returns:
            (B, O + 1, *S'), in the order of `parts`.

        Raises:
            InputError: As in `shares`.
        """
        if self.table is not None:
            shares = organ_shares(self._organs(organs), self.table, size)
        else:
            shares = self.shares(image, organs, size)
        return with_rest(shares)

    def _organs(self, organs: Tensor | None) -> Tensor:
        if organs is None:
            raise InputError(
                "table= needs organs (B, 1, *S) in the batch, and there are none: add them (keys= renames), or leave "
                "the table out and pass window=(low, high) to go by bands of HU"
            )
        return organs

    def _hounsfield(self, image: Tensor) -> tuple[Tensor, tuple[float, float] | None]:
        if callable(self.window):
            values, ends = self.window(image), None
        else:
            assert self.window is not None  # noqa: S101 (shares() asks only with a window)
            values, ends = _unwindowed(image, self.window), self.window
        if tuple(values.shape) != (len(image), 1, *image.shape[2:]):
            raise InputError(
                f"window= must give HU of shape (B, 1, *S), got {tuple(values.shape)} for an image of shape "
                f"{tuple(image.shape)}: pass a callable that makes HU of your image"
            )
        return values, ends


def organ_shares(organs: Tensor, table: OrganTable, size: tuple[int, ...]) -> Tensor:
    """Share of each cell that each organ of a table fills, organ by organ to bound memory.

    Args:
        organs: (B, 1, *S) integer ids.
        table: Its organs never share an id, so that the shares of a cell add up to at most 1.
        size: Grid of the cells, S'.

    Returns:
        (B, O, *S') float32.

    Example:
        >>> table = OrganTable(organs={"lung": [1, 2], "heart": 3}, labels={"nodule": ["lung"]})
        >>> organ_shares(torch.tensor([[[1, 2, 0, 3]]]), table, (2,))
        tensor([[[1.0000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    each = [
        occupancy(torch.isin(organs, torch.tensor(ids, device=organs.device)), size) for ids in table.organs.values()
    ]
    return torch.cat(each, dim=1)


def with_rest(shares: Tensor) -> Tensor:
    """Shares (B, O, *S') with what is left of each cell as one more part."""
    return torch.cat([shares, (1 - shares.sum(dim=1, keepdim=True)).clamp(min=0)], dim=1)


def _unwindowed(image: Tensor, window: tuple[float, float]) -> Tensor:
    low, high = float(image.min()), float(image.max())
    if low < -0.01 or high > 1.01:
        raise InputError(
            f"window={window} expects an image in 0..1, got values in {low:.4g}..{high:.4g}: pass window=callable that "
            "makes HU of your image"
        )
    # In whole HU: 0.05 of a window of 1000 HU is 50, not 49.999996, which would be another band.
    values = window[0] + image.double() * (window[1] - window[0])
    return (values * 1e3).round() / 1e3


def _checked_window(window: Any) -> Window | None:
    if window is None:
        return None
    if callable(window):
        made: Callable[[Tensor], Tensor] = window
        return made
    numbers = tuple(window) if isinstance(window, list | tuple) else ()
    if len(numbers) != 2 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise InputError(f"window= expects (low, high) in HU or a callable, got {window!r}")
    low, high = map(float, numbers)
    if low >= high:
        raise InputError(f"window= expects low < high in HU, got {window!r}")
    return low, high


def _checked_bands(bands: Mapping[str, tuple[float, float]], organs: tuple[str, ...]) -> tuple[Band, ...]:
    found = []
    for name, bounds in bands.items():
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise InputError(f"bands= expects name -> (low, high) in HU with low < high, got {name!r}: {bounds!r}")
        # An organ and a band may both be called bone.
        found.append(Band(f"{name} (HU)" if name in organs else name, float(bounds[0]), float(bounds[1])))
    ordered = sorted(found, key=lambda band: band.low)
    for left, right in pairwise(ordered):
        if left.high > right.low:
            raise InputError(f"bands= overlap: {left.name!r} ends at {left.high:g} HU, {right.name!r} begins before")
    return tuple(found)
