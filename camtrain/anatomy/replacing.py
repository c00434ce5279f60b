"""Replacing a part of an image by that of another image, with a seam that leaves what is kept untouched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camtrain._errors import InputError


def replace_outside(image: Tensor, other: Tensor, region: Tensor, seam: int = 1) -> Tensor:
    """Replace everything outside a region; the region itself is kept as it is, to the last bit.

    A hard border would be an edge that no image has. So the replacement fades in over the first `seam` voxels
    beyond the region (counted along the axes and diagonals, whatever the voxel spacing): the k-th of them is
    k / (seam + 1) replaced, and all further ones wholly.

    Args:
        image: (B, C, *S).
        other: (B, C, *S), what comes in.
        region: (B, 1, *S) bool, what is kept.
        seam: Voxels over which the replacement fades in; 0 = a hard border.

    Returns:
        (B, C, *S) in the dtype of `image`, a new tensor. An empty region gives `other`, a full one `image`.

    Raises:
        InputError: Shapes, types or the seam do not fit.

    Example:
        >>> image, other = torch.zeros(1, 1, 6), torch.ones(1, 1, 6)
        >>> replace_outside(image, other, torch.tensor([[[True, True, False, False, False, False]]]))
        tensor([[[0.0000, 0.0000, 0.5000, 1.0000, 1.0000, 1.0000]]])
    """
    _check(image, other, region, seam)
    return _replaced(image, other, region.to(image.device), seam)


def replace_inside(image: Tensor, other: Tensor, region: Tensor, seam: int = 1) -> Tensor:
    """Replace everything inside a region; what lies outside is kept as it is, and the seam lies inside.

    Args:
        image: (B, C, *S).
        other: (B, C, *S), what comes in.
        region: (B, 1, *S) bool, what is replaced.
        seam: Voxels over which the replacement fades in, as in `replace_outside`; 0 = a hard border.

    Returns:
        (B, C, *S) in the dtype of `image`, a new tensor. An empty region gives `image`, a full one `other`.

    Raises:
        InputError: Shapes, types or the seam do not fit.

    Example:
        >>> image, other = torch.zeros(1, 1, 6), torch.ones(1, 1, 6)
        >>> replace_inside(image, other, torch.tensor([[[True, True, False, False, False, False]]]))
        tensor([[[1.0000, 0.5000, 0.0000, 0.0000, 0.0000, 0.0000]]])
    """
    _check(image, other, region, seam)
    return _replaced(image, other, ~region.to(image.device), seam)


def _replaced(image: Tensor, other: Tensor, kept: Tensor, seam: int) -> Tensor:
    other = other.to(image)
    result = torch.where(kept, image, other)
    reached = kept
    for step in range(1, seam + 1):
        grown = grow(reached, [1] * (kept.ndim - 2))
        # Only the ring is mixed: a mixture with weight 0 or 1 need not be one of the two to the last bit.
        result = torch.where(grown & ~reached, torch.lerp(image, other, step / (seam + 1)), result)
        reached = grown
    return result


def grow(region: Tensor, voxels: Sequence[int]) -> Tensor:
    """The region and everything within so many voxels of it, counted along each axis and the diagonals.

    Args:
        region: (B, 1, *S) bool.
        voxels: One number per spatial axis, at least 0.

    Returns:
        (B, 1, *S) bool.

    Example:
        >>> grow(torch.tensor([[[True, False, False, False]]]), [2])
        tensor([[[ True,  True,  True, False]]])
    """
    grown = region
    for axis, wanted in enumerate(voxels, start=2):
        reached = 0
        while reached < wanted:
            # What covers so many voxels to both sides covers three times as many once it was shifted by its width.
            step = min(wanted - reached, 2 * reached + 1, grown.shape[axis] - 1)
            if step < 1:
                break
            wider = grown.clone()
            size = grown.shape[axis] - step
            wider.narrow(axis, step, size).logical_or_(grown.narrow(axis, 0, size))
            wider.narrow(axis, 0, size).logical_or_(grown.narrow(axis, step, size))
            grown, reached = wider, reached + step
    return grown


def _check(image: Tensor, other: Tensor, region: Tensor, seam: int) -> None:
    if image.ndim < 3 or not image.is_floating_point() or other.shape != image.shape:
        raise InputError(
            f"expected image and replacement of one shape (B, C, *S) in floating point, got {tuple(image.shape)} "
            f"in {image.dtype} and {tuple(other.shape)}"
        )
    if region.dtype != torch.bool or region.shape != (image.shape[0], 1, *image.shape[2:]):
        raise InputError(
            f"expected region as bool {(image.shape[0], 1, *image.shape[2:])}, got {region.dtype} "
            f"{tuple(region.shape)}: one region per image, at full resolution"
        )
    if isinstance(seam, bool) or not isinstance(seam, int) or seam < 0:
        raise InputError(f"seam= expects a whole number of voxels, at least 0, got {seam!r}")
