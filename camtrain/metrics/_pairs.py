"""Which (case, label) pairs count: checked, masked and brought to one grid, in one place for every score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain._grid import to_grid


@dataclass(frozen=True)
class Pairs:
    """The counted pairs of one batch, P of them, with flattened cells.

    A pair counts when its label is present, its map was computed, the case was segmented and the region that the
    label may use is not empty.

    Attributes:
        maps: (P, N) float32, or float64 for float64 maps. Broken maps hold zeros here.
        allowed: (P, N) bool.
        broken: (P,) bool, True where the map holds an infinite value, or NaN in some of its cells.
        sample: (P,) row of each pair in the batch.
        label: (P,) column of each pair.
        size: Spatial sizes of the grid, N cells in all.
        shape: (B, L).
    """

    maps: Tensor
    allowed: Tensor
    broken: Tensor
    sample: Tensor
    label: Tensor
    size: tuple[int, ...]
    shape: tuple[int, int]

    def __len__(self) -> int:
        """The number of counted pairs, P."""
        return len(self.label)

    def mark(self, score: Tensor) -> Tensor:
        """Put NaN (undefined) where the map is broken: `score` (P, *) float -> the same shape."""
        return score.masked_fill(self.broken.reshape(-1, *[1] * (score.ndim - 1)), torch.nan)

    def spread(self, score: Tensor) -> Tensor:
        """Lay `score` (P,) out as (B, L), with NaN where a pair does not count or its score is undefined."""
        laid_out = score.new_full(self.shape, torch.nan)
        return laid_out.index_put((self.sample, self.label), self.mark(score))


def select_pairs(
    maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None, num_labels: int | None = None
) -> Pairs:
    """Check one batch and take out the pairs that count.

    Args:
        maps: (B, L, *S') signed maps, NaN in every cell of a pair that was not computed.
        allowed: (B, L, *S'') bool; brought to the grid of the maps when the sizes differ.
        label: (B, L) 0, 1 or NaN = unknown.
        has_organs: (B,) bool: was the case segmented? None: told by `allowed`, which is all False otherwise.
        num_labels: The L that the caller expects.

    Returns:
        The counted pairs; none is an ordinary case.

    Raises:
        InputError: Shapes, types or label values break the contract.
    """
    _check(maps, allowed, label, has_organs, num_labels)
    wanted = label == 1
    if has_organs is not None:
        wanted = wanted & has_organs.bool()[:, None]
    sample, column = wanted.nonzero(as_tuple=True)
    size = tuple(maps.shape[2:])
    # Labels are sparse: everything from here on costs what the present labels cost, not what all of them would.
    chosen = maps.detach()[sample, column]
    region = allowed[sample, column]
    if len(sample) and tuple(region.shape[1:]) != size:
        region = to_grid(region[:, None], size)[:, 0]
    chosen, region = chosen.flatten(1), region.reshape(len(sample), math.prod(size))
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen = chosen.float()
    counts = region.any(dim=1) & ~chosen.isnan().all(dim=1)
    if not bool(counts.all()):
        chosen, region, sample, column = chosen[counts], region[counts], sample[counts], column[counts]
    broken = ~chosen.isfinite().all(dim=1)
    return Pairs(
        maps=chosen.masked_fill(broken[:, None], 0.0),
        allowed=region,
        broken=broken,
        sample=sample,
        label=column,
        size=size,
        shape=(maps.shape[0], maps.shape[1]),
    )


def check_label(label: Tensor, shape: tuple[int, ...], num_labels: int | None = None) -> None:
    """Refuse labels of a wrong shape, a wrong number, or with values other than 0, 1 and NaN.

    Args:
        label: (B, L).
        shape: The (B, L) that goes with maps or scores.
        num_labels: The L that the metric was made for.

    Raises:
        InputError: The first thing that does not fit.
    """
    if tuple(label.shape) != shape:
        raise InputError(f"expected label of shape (B, L) = {shape}, got {tuple(label.shape)}: one column per label")
    if num_labels is not None and label.shape[1] != num_labels:
        raise InputError(
            f"this metric was made for {num_labels} labels, got {label.shape[1]}: "
            "set num_labels to the number of network outputs"
        )
    odd = (label != 0) & (label != 1) & ~label.isnan()
    if bool(odd.any()):
        raise InputError(f"expected labels 0, 1 or NaN (unknown), got {label[odd][0].item():g}: no soft labels here")


def _check(maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None, num_labels: int | None) -> None:
    if maps.ndim < 3 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise InputError(
            f"expected maps of shape (B, L, *S) in floating point with at least one cell, "
            f"got {tuple(maps.shape)} in {maps.dtype}: pass what explain() or tap.maps() returned"
        )
    if allowed.dtype != torch.bool:
        raise InputError(f"expected allowed as bool (True = may attend), got {allowed.dtype}: pass allowed > 0")
    if allowed.ndim != maps.ndim or allowed.shape[:2] != maps.shape[:2]:
        raise InputError(
            f"expected allowed of shape (B, L, *S) with the batch, labels and rank of maps {tuple(maps.shape)}, "
            f"got {tuple(allowed.shape)}: pass table.allowed(organs) with the labels in the order of the outputs"
        )
    check_label(label, (maps.shape[0], maps.shape[1]), num_labels)
    if has_organs is not None and tuple(has_organs.shape) != (maps.shape[0],):
        raise InputError(
            f"expected has_organs of shape (B,) = ({maps.shape[0]},), got {tuple(has_organs.shape)}: one bool per case"
        )
