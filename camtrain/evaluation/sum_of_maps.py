"""Class sensitivity of maps that do not fit into memory at once: each is set against the sum of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SumOfMaps:
    """The sum of the centred maps of unit length of a case.

    The mean correlation of one of them with the others is (unit . sum - 1) / (number - 1), so that no two parts of the
    maps need be there at the same time.

    Attributes:
        total: (N,) float64, or None before the first part.
        number: Maps in it; constant and broken ones are left out.

    Example:
        >>> maps = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [5.0, 5.0, 5.0]]])
        >>> both = SumOfMaps().plus(maps[:, :1]).plus(maps[:, 1:])
        >>> both.sensitivity(maps)
        tensor([-1., -1., nan], dtype=torch.float64)
    """

    total: Tensor | None = None
    number: int = 0

    def plus(self, maps: Tensor) -> SumOfMaps:
        """With more maps (1, n, *S')."""
        units, known = _units(maps)
        part = units.sum(dim=0)
        return SumOfMaps(part if self.total is None else self.total + part, self.number + int(known.sum()))

    def sensitivity(self, maps: Tensor) -> Tensor:
        """(n,) mean correlation of each of these maps (1, n, *S') with all others; NaN where undefined."""
        units, known = _units(maps)
        if self.total is None or self.number < 2:
            return torch.full_like(units[:, 0], torch.nan)
        mean = (units @ self.total - 1) / (self.number - 1)
        return mean.masked_fill(~known, torch.nan)


def _units(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(n, N) centred, of unit length, 0 where constant or broken; (n,) bool which are neither."""
    flat = maps[0].flatten(1).double()
    known = flat.isfinite().all(dim=1) & (flat.amax(dim=1) > flat.amin(dim=1))
    centred = (flat - flat.mean(dim=1, keepdim=True)).masked_fill(~known[:, None], 0.0)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / length.masked_fill(length == 0, 1.0), known
