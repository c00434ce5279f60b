"""An account of logits by the organ that the cells lie in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.cam.account import Account
from camtrain.evaluation.concepts import TableSource, organ_shares, with_rest


@dataclass(frozen=True, eq=False)
class OrganAccount:
    """`logits = sums.sum + bias + residual`.

    Attributes:
        names: Parts of the volume: the organs, and "no organ" for the rest.
        sums: (B, n, O + 1) sum of the cells in each part, a cell on a border counting for each part by its share.
        bias: (B, n).
        residual: (B, n).
        logits: (B, n).
        valid: Do the parts add up to the logits?
        why: Why not, in sentences.
    """

    names: tuple[str, ...]
    sums: Tensor
    bias: Tensor
    residual: Tensor
    logits: Tensor
    valid: bool
    why: tuple[str, ...]


def organ_account(account: Account, organs: Tensor, table: TableSource) -> OrganAccount:
    """Split the cells of an account by organ.

    It is an account of cells: a cell may have seen more than the organ it lies in.

    Args:
        account: What `ct.account` returned for the same batch.
        organs: (B, 1, *S) integer ids, 0 = background.
        table: `OrganTable` or what `OrganTable.load` takes; its organs are the parts.

    Returns:
        Sums per organ; ids that the table does not know count as "no organ".

    Raises:
        InputError: `organs` does not fit the account.

    Example:
        >>> from camtrain.cam.account import account
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 1))
        >>> table = OrganTable(organs={"heart": 3}, labels={"stent": ["heart"]})
        >>> found = organ_account(account(model, torch.rand(1, 1, 6), "0"), torch.tensor([[[0, 0, 3, 3, 0, 0]]]), table)
        >>> found.names, torch.allclose(found.sums.sum(dim=2).float() + found.bias, found.logits)
        (('heart', 'no organ'), True)
    """
    grid = tuple(account.cells.shape[2:])
    if organs.ndim != account.cells.ndim or organs.shape[1] != 1 or len(organs) != len(account.cells):
        raise InputError(
            f"expected organs (B, 1, *S) for {len(account.cells)} images with {len(grid)} spatial axes, "
            f"got {tuple(organs.shape)}: pass those of the batch that was accounted"
        )
    table = OrganTable.load(table)
    shares = with_rest(organ_shares(organs, table, grid))
    return OrganAccount(
        names=(*table.organs, "no organ"),
        sums=sums_by(account.cells, shares),
        bias=account.bias,
        residual=account.residual,
        logits=account.logits,
        valid=account.valid,
        why=account.why,
    )


def sums_by(cells: Tensor, shares: Tensor) -> Tensor:
    """Sum of cells in each part.

    Args:
        cells: (B, n, *S').
        shares: (B, P, *S') of each cell; over parts they add up to 1.

    Returns:
        (B, n, P) float64 (float32 on Apple GPUs).

    Example:
        >>> sums_by(torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[1.0, 0.25], [0.0, 0.75]]]))
        tensor([[[3., 3.]]], dtype=torch.float64)
    """
    precise = torch.float32 if cells.device.type == "mps" else torch.float64
    return torch.einsum("bns,bps->bnp", cells.flatten(2).to(precise), shares.flatten(2).to(cells.device, precise))
