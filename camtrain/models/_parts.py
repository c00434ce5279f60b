"""What the small nets share: sizes, checks of the input, and the two blocks they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Norm
from torch import Tensor, nn

from camtrain._errors import InputError


def spatial_size(size: int | Sequence[int], name: str = "size", dims: int = 3) -> tuple[int, ...]:
    """One positive number per spatial axis.

    Args:
        size: A number (the same for `dims` axes) or one number per axis, 1 to 3 of them.
        name: Argument to name in the error.
        dims: Number of axes when `size` is a single number.

    Raises:
        InputError: Not one to three positive whole numbers.

    Example:
        >>> spatial_size(48)
        (48, 48, 48)
    """
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise InputError(f"{name}= expects a positive whole number or one per spatial axis, got {size!r}")
    return sizes


def check_outputs(labels: int) -> int:
    """The number of labels of a head, if it is one.

    Raises:
        InputError: Not a whole number of at least 1.
    """
    if isinstance(labels, bool) or not isinstance(labels, int) or labels < 1:
        raise InputError(f"labels= of a network is the number of its outputs, at least 1, got {labels!r}")
    return labels


def check_channels(channels: int) -> int:
    """Number of image channels.

    Raises:
        InputError: Not a whole number of at least 1.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InputError(f"channels= expects a whole number of at least 1, got {channels!r}")
    return channels


def check_widths(widths: Sequence[int], expected: int) -> tuple[int, ...]:
    """Channels of the convolutions.

    Raises:
        InputError: Another number of widths, or one below 1.
    """
    if len(widths) != expected or any(not isinstance(w, int) or w < 1 for w in widths):
        raise InputError(f"widths= expects {expected} positive numbers of channels, got {list(widths)}")
    return tuple(widths)


def check_image(image: Tensor, channels: int, size: tuple[int, ...] | None, dims: int, net: str) -> None:
    """Compare an image (B, C, *S) with what a net was built for.

    Args:
        image: Input of the net.
        channels: Expected number of channels.
        size: Expected spatial size, or None for any.
        dims: Expected number of spatial axes.
        net: Name of the net, for the error.

    Raises:
        InputError: Another rank, number of channels or spatial size.
    """
    expected = ", ".join(["B", str(channels), *(map(str, size) if size else "*" * dims)])
    if image.ndim != dims + 2 or image.shape[1] != channels or (size is not None and tuple(image.shape[2:]) != size):
        raise InputError(
            f"{net} was built for images of shape ({expected}), got {tuple(image.shape)}: "
            f"set {'channels= and size=' if size else 'channels='} of {net} to those of the data"
        )


def replaced_linear(head: nn.Linear, labels: int) -> nn.Linear:
    """`head` itself when it has that many outputs, else a fresh layer on the same device and of the same dtype."""
    if head.out_features == check_outputs(labels):
        return head
    return nn.Linear(head.in_features, labels, device=head.weight.device, dtype=head.weight.dtype)


def tile(dims: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Convolution whose kernel is its stride, then BatchNorm: cell i stands for voxels i*stride ... (i+1)*stride - 1.

    A padded 3-kernel with stride would shift every cell by part of a voxel against the picture it is drawn on.
    """
    return nn.Sequential(
        Conv[Conv.CONV, dims](inputs, outputs, kernel_size=stride, stride=stride, bias=False),
        Norm[Norm.BATCH, dims](outputs),
    )


def look(dims: int, inputs: int, outputs: int) -> nn.Sequential:
    """3-convolution that keeps the grid, then BatchNorm."""
    return nn.Sequential(
        Conv[Conv.CONV, dims](inputs, outputs, kernel_size=3, padding=1, bias=False),
        Norm[Norm.BATCH, dims](outputs),
    )


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeat the far border of (B, C, *S) until every axis divides by `multiple`, so that no voxel goes unseen."""
    missing = [-n % multiple for n in image.shape[2:]]
    if not any(missing):
        return image
    # F.pad counts from the last axis: (0, missing of the last axis, 0, missing of the one before, ...).
    return F.pad(image, [p for n in reversed(missing) for p in (0, n)], mode="replicate")
