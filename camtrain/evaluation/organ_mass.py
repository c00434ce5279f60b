"""In which organs does a map have its mass? For a counterfactual map: what argues against the label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.evaluation.concepts import TableSource, organ_shares, with_rest
from camtrain.evaluation.organ_account import sums_by


class OrganMass(NamedTuple):
    """Shares of a map's positive mass.

    Attributes:
        names: Parts of the volume: the organs, and "no organ" for the rest.
        shares: (B, L, P) adding up to 1; NaN for a map without positive cells, or one that was not computed.
        volume: (B, P) share of the volume that each part takes: what an evenly spread map would have there.
    """

    names: tuple[str, ...]
    shares: Tensor
    volume: Tensor


def organ_mass(maps: Tensor, organs: Tensor, table: TableSource) -> OrganMass:
    """Split the positive mass of maps by organ; negative cells count nothing (Selvaraju et al., Grad-CAM, eq. 2).

    With `method="counterfactual"` (eq. 3 there) the mass lies where removing something would raise the logit, so that
    for a missed finding it tells what spoke against it. It is an account of cells: a cell may have seen more than the
    organ it lies in, and where maps are coarse a cell on a border counts for each organ by its share.

    Args:
        maps: (B, L, *S') signed.
        organs: (B, 1, *S) integer ids, 0 = background.
        table: `OrganTable` or what `OrganTable.load` takes; its organs are the parts.

    Returns:
        Shares per organ; ids that the table does not know count as "no organ".

    Raises:
        InputError: `organs` does not fit the maps.

    Example:
        >>> table = {"organs": {"heart": 3}, "labels": {"stent": ["heart"]}}
        >>> found = organ_mass(torch.tensor([[[3.0, 1.0, -9.0, 0.0]]]), torch.tensor([[[3, 0, 0, 0]]]), table)
        >>> found.names, found.shares
        (('heart', 'no organ'), tensor([[[0.7500, 0.2500]]], dtype=torch.float64))
    """
    if organs.ndim != maps.ndim or len(organs) != len(maps) or organs.shape[1] != 1:
        raise InputError(
            f"expected organs (B, 1, *S) for maps {tuple(maps.shape)}, got {tuple(organs.shape)}: pass those of the "
            "batch that was explained"
        )
    table = OrganTable.load(table)
    shares = with_rest(organ_shares(organs, table, tuple(maps.shape[2:])))
    mass = sums_by(maps.detach().clamp(min=0), shares)
    total = mass.sum(dim=2, keepdim=True)
    return OrganMass(
        names=(*table.organs, "no organ"),
        shares=torch.where(total > 0, mass / total, torch.nan),
        volume=shares.flatten(2).double().mean(dim=2),
    )
