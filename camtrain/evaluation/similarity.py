"""How alike are two maps? Spearman's rank correlation and SSIM, per sample and label.

Both are those of the sanity checks of Adebayo et al. (2018, arXiv:1810.03292, section 3): rank correlation of the
signed maps and of their absolute values, and structural similarity of the absolute values, each scaled to [0, 1].
Neither sees the scale of a map, and where a map is constant there is nothing to compare: NaN, never 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.metrics.regression import KernelType, compute_ssim_and_cs
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._ranks import rank_correlation

# SSIM of 4D and higher would need another convolution.
_RANKS = (1, 2, 3)


def spearman(a: Tensor, b: Tensor, absolute: bool = False) -> Tensor:
    """Spearman's rank correlation over cells, ties at their average rank.

    Args:
        a: (B, L, *S').
        b: The same shape.
        absolute: Of |a| and |b|, which does not see the sign of a cell ("ABS" in the paper).

    Returns:
        (B, L) float64, in -1..1; NaN where a map is constant, or NaN or infinite in a cell.

    Raises:
        InputError: Different shapes, or no cell.

    Example:
        >>> a = torch.tensor([[[1.0, 2, 2, 9]]])
        >>> spearman(a, a.square()).item(), spearman(a, -a).item(), spearman(a, -a, absolute=True).item()
        (1.0, -1.0, 1.0)
        >>> spearman(a, torch.ones_like(a)).item()
        nan
    """
    check_pair(a, b)
    left, right = ((m.abs() if absolute else m).flatten(2) for m in (a, b))
    return rank_correlation(left, right)


def ssim(a: Tensor, b: Tensor, window: int | None = None) -> Tensor:
    """Structural similarity of |a| and |b|, each scaled by its own maximum.

    The mean of MONAI's SSIM (uniform window, k1 = 0.01, k2 = 0.03, range 1) over all places where the window lies
    inside the map. Attention maps are small, so the window fits itself to each axis (`window_sizes`): 3 of 4 cells,
    5 of 8, 7 of 12 and more. The window matters: compare values of grids of one size only.

    Args:
        a: (B, L, *S') with 1, 2 or 3 spatial axes.
        b: The same shape.
        window: Width along every axis instead, cut to the map.

    Returns:
        (B, L) float64, in -1..1; NaN where a map is zero everywhere, |map| is constant, or a cell is not finite.

    Raises:
        InputError: Different shapes, no cell, another number of axes, or a window below 2.

    Example:
        >>> a = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
        >>> round(ssim(a, 3 * a).item(), 4), ssim(a, a.flip(2)).item() < 0.5
        (1.0, True)
    """
    check_pair(a, b)
    if a.ndim - 2 not in _RANKS:
        raise InputError(f"SSIM takes maps with 1, 2 or 3 spatial axes, got {tuple(a.shape)}: use spearman")
    sizes = window_sizes(a.shape[2:], window)
    scaled = [_scaled(m) for m in (a, b)]
    defined = _varies(scaled[0]) & _varies(scaled[1]) & _finite(a) & _finite(b)
    # Every map is a picture of its own: labels become samples. What is undefined must not reach the convolution.
    left, right = (torch.where(_spread(defined, m), m, 0.0).flatten(0, 1)[:, None] for m in scaled)
    if left.ndim == 3:
        left, right, sizes = left[..., None], right[..., None], (*sizes, 1)
    if not len(left):
        return torch.full(a.shape[:2], torch.nan, dtype=torch.float64, device=a.device)
    places, _ = compute_ssim_and_cs(left, right, left.ndim - 2, sizes, (1.0,) * len(sizes), 1.0, KernelType.UNIFORM)
    mean = places.double().flatten(1).mean(dim=1).reshape(a.shape[:2])
    return torch.where(defined, mean, torch.nan)


def window_sizes(size: Sequence[int], window: int | None = None) -> tuple[int, ...]:
    """Width of SSIM's window along each axis: half of the axis and one cell, at most 7.

    Seven is the usual width; on a small grid it would leave no place, or one.

    Raises:
        InputError: `window` below 2: a window of one cell has no structure.

    Example:
        >>> window_sizes((4, 8, 30)), window_sizes((4, 8, 30), 5)
        ((3, 5, 7), (4, 5, 5))
    """
    if window is not None and window < 2:
        raise InputError(f"window= expects a width of 2 cells or more, got {window}")
    return tuple(min(7, n // 2 + 1) if window is None else min(window, n) for n in size)


def check_pair(a: Tensor, b: Tensor) -> None:
    """Two maps that can be compared cell by cell.

    Raises:
        InputError: They cannot.
    """
    if a.shape != b.shape or a.ndim < 3 or not a.shape[2:].numel():
        raise InputError(
            f"expected two maps of one shape (B, L, *S), got {tuple(a.shape)} and {tuple(b.shape)}: "
            "explain both with the same layer, labels and size"
        )


def _scaled(maps: Tensor) -> Tensor:
    """|map| / max |map|; not finite where the map is zero everywhere."""
    plain = maps.detach().double().abs()
    return plain / plain.amax(dim=tuple(range(2, maps.ndim)), keepdim=True)


def _varies(maps: Tensor) -> Tensor:
    cells = maps.flatten(2)
    return cells.amax(dim=2) > cells.amin(dim=2)


def _finite(maps: Tensor) -> Tensor:
    return torch.isfinite(maps.detach()).flatten(2).all(dim=2)


def _spread(pairs: Tensor, maps: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1, ...), to go with maps."""
    return pairs.reshape(*pairs.shape, *(1 for _ in maps.shape[2:]))
