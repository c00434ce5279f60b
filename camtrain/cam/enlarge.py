"""From the grid of a layer up to that of the image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from camtrain._errors import InputError

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def enlarge(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear interpolation, centre-aligned (`align_corners=False`), in one, two or three dimensions.

    Args:
        maps: (B, K, *S').
        size: The wanted S, one number per axis of S'.

    Returns:
        (B, K, *S).

    Raises:
        InputError: The grid has not as many axes as `size`, or more than three.

    Example:
        >>> import torch
        >>> enlarge(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    axes = maps.ndim - 2
    if axes != len(size) or axes not in _LINEAR:
        raise InputError(
            f"a grid {tuple(maps.shape[2:])} cannot be enlarged to the size {tuple(size)}: it needs one to three axes, "
            "as many as the image has; choose another layer or pass reshape="
        )
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    if maps.shape[0] == 0 or maps.shape[1] == 0:
        return maps.new_empty(*maps.shape[:2], *size)
    return functional.interpolate(maps, size=tuple(size), mode=_LINEAR[axes], align_corners=False)
