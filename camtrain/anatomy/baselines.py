"""What an image is replaced by where it is to say nothing: air, its own mean, a blurred copy of itself, a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from camtrain._errors import InputError, nearest

Baseline = str | float | Tensor
"""What measures take: a kind or an intensity for `make_baseline`, or a ready image (B, C, *S)."""

_KINDS = ("air", "mean", "blur")
_AIR = 0.0
_BLUR = 0.1
_BELOW = -0.01  # resampling may overshoot the window by as much
_REACH = 4.0  # of the Gaussian, in standard deviations


def make_baseline(
    image: Tensor, kind: str | float, *, value: float | None = None, sigma: float | None = None
) -> Tensor:
    """The image that says nothing, of which there are several; which one decides the numbers, so none is the default.

    - `"air"`: air everywhere. 0.0, which is air for a CT whose window is brought to 0..1 and is *not* for Hounsfield
      units (-1000 HU), a window brought to -1..1, or standardised images: those are refused without `value`.
    - `"mean"`: the mean of each image and channel.
    - `"blur"`: a Gaussian blur of the image, borders continued by their nearest voxel: what is large stays, so it is
      the one nearest to real images, and the one that a network can still read large things from.
    - a number: that intensity everywhere.

    Args:
        image: (B, C, *S).
        kind: One of the above.
        value: Intensity of air, in the units of the image; None: 0.0. Only for `"air"`.
        sigma: Standard deviation of the blur as a share of the image's size along each axis; None: 0.1. Only for
            `"blur"`.

    Returns:
        (B, C, *S) in the dtype and on the device of the image. Constant baselines are views that take no memory:
        clone them before writing into them.

    Raises:
        InputError: An unknown kind, a number that is none, or `"air"` without a value for images with negative voxels.

    Example:
        >>> image = torch.tensor([[[0.0, 0.2, 1.0, 0.4]]])
        >>> make_baseline(image, "mean"), make_baseline(image, "air")
        (tensor([[[0.4000, 0.4000, 0.4000, 0.4000]]]), tensor([[[0., 0., 0., 0.]]]))
        >>> make_baseline(torch.rand(2, 1, 8, 6, 4), "blur", sigma=0.2).shape
        torch.Size([2, 1, 8, 6, 4])
    """
    image = _checked(image)
    for name, given, of in (("value", value, "air"), ("sigma", sigma, "blur")):
        if given is not None and kind != of:
            raise InputError(f"{name}= belongs to the baseline {of!r}, got it with {kind!r}: leave it out")
    if not isinstance(kind, str):
        return _constant(image, _number("the baseline", kind))
    if kind == "air":
        return _constant(image, _air(image) if value is None else _number("value=", value))
    if kind == "mean":
        return image.mean(dim=tuple(range(2, image.ndim)), keepdim=True, dtype=_wide(image)).to(image).expand_as(image)
    if kind == "blur":
        return _blurred(image, _BLUR if sigma is None else _positive(sigma))
    check_baseline(kind)
    raise AssertionError(kind)  # a kind without a branch above


def check_baseline(kind: str | float) -> None:
    """Refuse a word that is no kind of baseline, before anything is computed.

    Raises:
        InputError: It is none.
    """
    if isinstance(kind, str) and kind not in _KINDS:
        raise InputError(f"expected a baseline {', '.join(_KINDS)} or a number, got {kind!r}{nearest(kind, _KINDS)}")


def baseline_of(image: Tensor, baseline: Baseline) -> Tensor:
    """A kind or a number made into an image, a ready image checked.

    Args:
        image: (B, C, *S).
        baseline: What `make_baseline` takes, or (B, C, *S); axes of length 1 are repeated.

    Returns:
        (B, C, *S) like the image.

    Raises:
        InputError: It does not fit the image, or is not finite.

    Example:
        >>> baseline_of(torch.rand(2, 1, 3), torch.zeros(1, 1, 1)).shape
        torch.Size([2, 1, 3])
    """
    if not isinstance(baseline, Tensor):
        return make_baseline(image, baseline)
    ready = baseline.detach().as_subclass(Tensor).to(image)
    fits = ready.ndim == image.ndim and all(a in (1, b) for a, b in zip(ready.shape, image.shape, strict=True))
    if not fits or not bool(torch.isfinite(ready).all()):
        raise InputError(
            f"expected a baseline of finite voxels with the shape of the image {tuple(image.shape)}, got "
            f"{tuple(ready.shape)}: pass what make_baseline() returned, or one of air, mean, blur, or a number"
        )
    return ready.expand_as(image)


def _checked(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim < 3 or not image.is_floating_point() or not image.numel():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"expected an image (B, C, *S) in floating point with at least one voxel, got {what}")
    return image.detach().as_subclass(Tensor)


def _constant(image: Tensor, value: float) -> Tensor:
    return image.new_full((1,) * image.ndim, value).expand_as(image)


def _air(image: Tensor) -> float:
    """0.0, where that can be air.

    Raises:
        InputError: The image has voxels below it.
    """
    low = float(image.min())
    if low < _BELOW:
        raise InputError(
            f"the baseline 'air' is 0.0, for images in 0..1, but this image goes down to {low:g}: give the intensity "
            "of air in the units of the image as a number (-1000 in Hounsfield units)"
        )
    return _AIR


def _number(what: str, number: float) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise InputError(f"{what} expects one finite intensity in the units of the image, got {number!r}")
    return float(number)


def _positive(sigma: float) -> float:
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
        raise InputError(f"sigma= expects a positive share of the image's size (0.1 = a tenth), got {sigma!r}")
    return float(sigma)


def _wide(image: Tensor) -> torch.dtype:
    """Never sum voxels in half precision: they overflow."""
    return torch.float32 if image.device.type == "mps" else torch.float64


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """One image and channel at a time, so that a batch of large volumes takes little more than itself."""
    wide = image.dtype if image.dtype == torch.float64 else torch.float32
    kernels = [_gaussian(n, sigma * n, wide, image.device) for n in image.shape[2:]]
    result = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    with torch.autocast(device_type=image.device.type, enabled=False):
        for source, target in zip(image.flatten(0, 1), result.flatten(0, 1), strict=True):
            blurred = source.to(wide)
            for axis, kernel in enumerate(kernels):
                blurred = _along(blurred, kernel, axis)
            target.copy_(blurred)
    return result


def _gaussian(length: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, length): the blur of one axis, what lies beyond an end counting as the voxel at that end.

    As a matrix, because a tenth of 400 voxels makes a kernel of 321: a product of matrices is many times faster there
    than a convolution, and exact at the borders.
    """
    reach = math.ceil(_REACH * sigma)
    steps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    weights = weights / weights.sum()
    rows = torch.arange(length)[:, None]
    columns = (rows + steps).clamp(0, length - 1)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, columns, weights.expand_as(columns)).to(device, dtype)


def _along(volume: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """`matrix` applied along one axis of (*S)."""
    if axis == volume.ndim - 1:
        return volume @ matrix.T
    before, after = math.prod(volume.shape[:axis]), math.prod(volume.shape[axis + 1 :])
    return (matrix @ volume.reshape(before, volume.shape[axis], after)).reshape(volume.shape)
