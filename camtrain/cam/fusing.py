"""Maps of several layers: brought to one grid, and made one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.enlarge import enlarge


def resized(maps: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """Linear enlargement to the wanted grid, centre-aligned; gradients go through it.

    Args:
        maps: (B, n, *S').
        size: Spatial sizes wanted; None = as they are.

    Returns:
        (B, n, *size). A map that is NaN everywhere (a label that was not selected) stays so.

    Raises:
        InputError: Another number of sizes than the maps have, or one below 1.

    Example:
        >>> resized(torch.tensor([[[0.0, 4.0]]]), (4,))
        tensor([[[0., 1., 3., 4.]]])
    """
    if size is None or size == tuple(maps.shape[2:]):
        return maps
    if len(size) != maps.ndim - 2 or min(size) < 1:
        raise InputError(f"size= needs {maps.ndim - 2} positive sizes or 'image', got {size}")
    return enlarge(maps, size)


def fused(maps: Sequence[Tensor], how: str = "mean") -> Tensor:
    """One map of those of several layers: the mean on the finest of their grids.

    Args:
        maps: One (B, n, *S') per layer, B and n the same.
        how: "mean".

    Returns:
        (B, n, *S') on the grid with the most cells.

    Raises:
        InputError: Another `how`.

    Example:
        >>> fused([torch.tensor([[[0.0, 4.0]]]), torch.ones(1, 1, 4)])
        tensor([[[0.5000, 1.0000, 2.0000, 2.5000]]])
    """
    if how != "mean":
        raise InputError(f"fuse= knows 'mean', got {how!r}")
    finest = max((tuple(m.shape[2:]) for m in maps), key=math.prod)
    return torch.stack([resized(m, finest) for m in maps]).mean(dim=0)
