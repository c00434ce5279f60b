"""Which voxels have an organ's id, fast."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**24  # voxels that are copied to one byte each before they are compared; beyond, the copy would count


def narrowed(ids: Tensor) -> Tensor:
    """The same ids in one byte per voxel, where they fit, the tensor lies on the CPU and is not large; else as given.

    Args:
        ids: Whole numbers of any shape.

    Example:
        >>> narrowed(torch.tensor([0, 255])).dtype, narrowed(torch.tensor([0, 256])).dtype
        (torch.uint8, torch.int64)
    """
    if ids.device.type != "cpu" or ids.dtype in (torch.uint8, torch.bool) or not 0 < ids.numel() <= SMALL:
        return ids
    low, high = torch.aminmax(ids)
    return ids.to(torch.uint8) if int(low) >= 0 and int(high) < 2**8 else ids


def voxels_with(ids: Tensor, number: int) -> Tensor:
    """Voxels with an id, bool.

    Args:
        ids: Whole numbers of any shape.
        number: The id.

    Example:
        >>> voxels_with(torch.tensor([3, 4, 3], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    whole = not ids.is_floating_point() and ids.dtype != torch.bool
    if whole and not torch.iinfo(ids.dtype).min <= number <= torch.iinfo(ids.dtype).max:
        return torch.zeros_like(ids, dtype=torch.bool)  # torch would compare with the remainder
    if ids.dtype != torch.uint8:
        return ids == number
    # Into bytes it compares sixteen times as fast as into bools, which are the same bytes.
    return torch.eq(ids, number, out=torch.empty_like(ids)).view(torch.bool)
