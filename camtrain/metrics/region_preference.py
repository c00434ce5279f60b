"""`region_preference`: of two findings in one volume, does a label's map point at its own?"""

from __future__ import annotations

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import sum_dtype
from camtrain.metrics._pairs import check_label


def region_preference(maps: Tensor, regions: Tensor, label: Tensor) -> Tensor:
    """Share of a case's other present labels whose own region a label's map prefers less than the label's own.

    For labels a and b that are both present, the map of a is averaged over the voxels of a alone and over those of b
    alone (what they share is left out); a wins when the first mean is higher, and a tie counts half. A method that
    gives one map for all labels wins for exactly one of (a, b) and (b, a), so that chance is 0.5 whatever the places
    are: unlike scores of place this one cannot be won by a map that is blind to the label. The zebra and the elephant
    of Relevance-CAM (Lee et al., CVPR 2021, who show pictures) as a number.

    Args:
        maps: (B, L, *S) signed, enlarged to the grid of the regions (`ct.explain(..., size="image")`); NaN in every
            cell where not computed.
        regions: (B, L, *S) bool: the voxels of each finding.
        label: (B, L) 0, 1 or NaN = unknown: which findings are there.

    Returns:
        (B, L) in [0, 1], NaN where the label is absent, its map not computed or not finite, or no other present label
        leaves both of them voxels of their own.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> maps = torch.tensor([[[9.0, 1.0, 0.0], [5.0, 2.0, 0.0]]])
        >>> regions = torch.tensor([[[True, False, False], [False, True, False]]])
        >>> region_preference(maps, regions, torch.ones(1, 2))  # the second label's map points at the first finding
        tensor([[1., 0.]], dtype=torch.float64)
    """
    _check(maps, regions)
    check_label(label, (maps.shape[0], maps.shape[1]))
    found = torch.full(label.shape, torch.nan, dtype=sum_dtype(), device=maps.device)
    flat, where = maps.detach().flatten(2), regions.flatten(2)
    for sample, row in enumerate(label == 1):
        present = row.nonzero()[:, 0].tolist()
        for own in present:
            if not bool(flat[sample, own].isfinite().all()):
                continue
            cells = flat[sample, own].to(sum_dtype())
            others = [b for b in present if b != own]
            wins = [_wins(cells, where[sample, own], where[sample, other]) for other in others]
            known = [won for won in wins if won is not None]
            if known:
                found[sample, own] = sum(known) / len(known)
    return found


def _wins(cells: Tensor, own: Tensor, other: Tensor) -> float | None:
    """1, 0.5 or 0; None where one of them has no voxel of its own."""
    mine, theirs = own & ~other, other & ~own
    if not (bool(mine.any()) and bool(theirs.any())):
        return None
    # Equal means of equal values must tie: the means are taken of what is left of the lowest cell.
    low = cells.min()
    first, second = (cells[mine] - low).mean(), (cells[theirs] - low).mean()
    return 0.5 if bool(torch.isclose(first, second, rtol=1e-12, atol=0.0)) else float(first > second)


def _check(maps: Tensor, regions: Tensor) -> None:
    if maps.ndim < 3 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise InputError(
            f"expected maps of shape (B, L, *S) in floating point with at least one cell, "
            f"got {tuple(maps.shape)} in {maps.dtype}: pass what explain() returned"
        )
    if regions.dtype != torch.bool or regions.shape != maps.shape:
        raise InputError(
            f"expected regions as bool on the grid of the maps {tuple(maps.shape)}, got {tuple(regions.shape)} in "
            f"{regions.dtype}: enlarge the maps first, explain(..., size='image')"
        )
