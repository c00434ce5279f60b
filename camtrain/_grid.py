"""Bringing regions down to a map's grid: the mask goes to the map, never the map to the mask.

Cells tile the image: cell `i` of `S'` along an axis of `S` voxels covers the voxels from `i S / S'` to
`(i + 1) S / S'`, fractions of voxels included. All sums are whole numbers, so nothing depends on the precision that
autocast or TF32 leave, and a flip of the region is exactly the flip of its cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from camtrain._errors import InputError, nearest

ENOUGH = 4  # a cell is allowed from 1/4 of its volume on ...
HALF = 2  # ... or from 1/2 of what the region's best-filled cell has, so that no region vanishes
AT_ONCE = 2**23  # voxels summed in one go


def to_grid(region: Tensor, size: Sequence[int], mode: str = "fill") -> Tensor:
    """Bring regions to a grid of cells.

    A cell is part of the region, by `mode`:

    - `"fill"`: the region fills at least `min(1/4, half of the region's best-filled cell in that sample)` of it. A
      region with at least one voxel keeps at least one cell at any stride.
    - `"any"`: the region has any voxel in the cell (the `area` way of the HiResCAM authors).
    - `"nearest"`: the voxel at the cell's first corner is in the region (the authors' final choice; off-centre).
    - `"trilinear"`: one of the voxels around the cell's centre is in the region (the authors' third way; linear or
      bilinear for fewer axes).

    Args:
        region: (B, N, *S) bool, one to three spatial axes.
        size: Cells along each axis, S'. Larger than S is allowed: whole factors repeat voxels.
        mode: One of the four above.

    Returns:
        (B, N, *S') bool on the region's device.

    Raises:
        InputError: `mode` is unknown, or `size` does not fit the region's axes.

    Example:
        >>> region = torch.zeros(1, 1, 8, dtype=torch.bool)
        >>> region[..., 3] = True
        >>> to_grid(region, (2,)), to_grid(region, (2,), mode="nearest")
        (tensor([[[ True, False]]]), tensor([[[False, False]]]))
    """
    if mode not in MODES:
        raise InputError(f"mode= expects {', '.join(MODES)}, got {mode!r}{nearest(mode, MODES)}")
    region = _checked(region, size)
    if tuple(size) == tuple(region.shape[2:]):
        return region
    return MODES[mode](region, tuple(size))


def occupancy(region: Tensor, size: Sequence[int]) -> Tensor:
    """Share of each cell that the region fills.

    Args:
        region: (B, N, *S) bool.
        size: Cells along each axis, S'.

    Returns:
        (B, N, *S') float32 in 0..1. Its mean is the region's share of the volume, whatever the grid.

    Raises:
        InputError: `size` does not fit the region's axes.

    Example:
        >>> occupancy(torch.tensor([[[True, True, True, False, False]]]), (2,))
        tensor([[[1.0000, 0.2000]]])
    """
    counts, full = _counts(_checked(region, size), tuple(size))
    return counts.to(torch.float32) / full


def _checked(region: Tensor, size: Sequence[int]) -> Tensor:
    axes = region.ndim - 2
    if axes < 1 or region.dtype != torch.bool:
        raise InputError(f"expected a bool region of shape (B, N, *S), got {region.dtype} {tuple(region.shape)}")
    if len(size) != axes or min(size) < 1:
        raise InputError(
            f"expected {axes} positive cell numbers for a region of shape {tuple(region.shape)}, "
            f"got size={tuple(size)}: pass the spatial shape of the maps, maps.shape[2:]"
        )
    return region


def _counts(region: Tensor, size: tuple[int, ...]) -> tuple[Tensor, int]:
    """Filled volume of each cell, and the volume of a cell, in one common whole unit."""
    full = math.prod(voxels // math.gcd(voxels, cells) for voxels, cells in zip(region.shape[2:], size, strict=True))
    # torch sums bools into int32 twenty times faster than into int64; the latter is for volumes beyond half a billion.
    dtype = torch.int32 if ENOUGH * full < 2**31 else torch.int64
    counts, top = region, 1
    # The axis that shrinks most goes first: what is held between two axes is then small. Whole sums know no order.
    for axis in sorted(range(len(size)), key=lambda a: size[a] / region.shape[2 + a]):
        counts, top = _cell_sums(counts, 2 + axis, size[axis], dtype, top)
    return counts.to(dtype), full


def _cell_sums(counts: Tensor, axis: int, cells: int, dtype: torch.dtype, top: int) -> tuple[Tensor, int]:
    """Sums over the cells of one axis, and the most that they can be, where it was `top` before.

    A voxel on an edge counts for each cell with its share.
    """
    voxels = counts.shape[axis]
    if voxels % cells == 0:
        return _sums_of_runs(counts, axis, cells, dtype, top)
    index, share, parts = _overlaps(voxels, cells)
    whole = (share == parts).all(dim=0)
    picked = counts.index_select(axis, index[:, whole].flatten().to(counts.device))
    sums = _sums_of_runs(picked, axis, cells, dtype, top)[0].to(dtype) * parts
    along = [-1 if a == axis else 1 for a in range(counts.ndim)]
    for column in (~whole).nonzero().flatten().tolist():
        weight = share[:, column].to(counts.device, dtype).reshape(along)
        sums = sums + weight * counts.index_select(axis, index[:, column].to(counts.device))
    return sums, top * voxels // math.gcd(voxels, cells)


def _sums_of_runs(counts: Tensor, axis: int, cells: int, dtype: torch.dtype, top: int) -> tuple[Tensor, int]:
    """Sums over equal runs of voxels of one axis, `cells` of them, and the most that they can be."""
    run = counts.shape[axis] // cells
    grouped = counts.reshape(*counts.shape[:axis], cells, run, *counts.shape[axis + 1 :])
    top *= run
    if counts.device.type == "cpu" and 0 < top < 2**8:
        # One byte per voxel from end to end: eight times as fast as torch's sum, which makes a wide copy first.
        narrow = grouped.view(torch.uint8) if grouped.dtype == torch.bool else grouped.to(torch.uint8)
        sums = narrow.select(axis + 1, 0).clone()
        for place in range(1, run):
            sums += narrow.select(axis + 1, place)
        return sums, top
    if grouped.numel() <= AT_ONCE:
        return grouped.sum(axis + 1, dtype=dtype), top
    # Of a part at a time in large volumes.
    few = max(1, AT_ONCE * cells // grouped.numel())
    return torch.cat([part.sum(axis + 1, dtype=dtype) for part in torch.split(grouped, few, axis)], axis), top


def _overlaps(voxels: int, cells: int) -> tuple[Tensor, Tensor, int]:
    """For each cell of an axis the voxels that it overlaps, and by how many of the `parts` of a voxel."""
    parts = cells // math.gcd(voxels, cells)
    edges = torch.arange(cells + 1) * (voxels * parts // cells)  # in parts of a voxel
    first = edges[:-1] // parts
    most = int(((edges[1:] - 1) // parts - first).max()) + 1
    index = first[:, None] + torch.arange(most)
    share = torch.minimum((index + 1) * parts, edges[1:, None]) - torch.maximum(index * parts, edges[:-1, None])
    return index.clamp(max=voxels - 1), share.clamp(min=0), parts


def _fill(region: Tensor, size: tuple[int, ...]) -> Tensor:
    counts, full = _counts(region, size)
    best = counts.amax(dim=tuple(range(2, counts.ndim)), keepdim=True)
    return (counts > 0) & ((ENOUGH * counts >= full) | (HALF * counts >= best))


def _any(region: Tensor, size: tuple[int, ...]) -> Tensor:
    return _counts(region, size)[0] > 0


def _nearest(region: Tensor, size: tuple[int, ...]) -> Tensor:
    return functional.interpolate(region.to(torch.uint8), size=size, mode="nearest").bool()


def _trilinear(region: Tensor, size: tuple[int, ...]) -> Tensor:
    if region.ndim > 5:
        raise InputError(f"mode='trilinear' takes one to three spatial axes, got {region.ndim - 2}: use mode='fill'")
    linear = ("linear", "bilinear", "trilinear")[region.ndim - 3]
    return functional.interpolate(region.float(), size=size, mode=linear, align_corners=False) != 0


MODES: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "fill": _fill,
    "nearest": _nearest,
    "trilinear": _trilinear,
    "any": _any,
}
