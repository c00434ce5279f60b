"""Which labels of which samples a map is wanted for, and how to lay the result out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError

Labels = Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Selection:
    """Columns of the logits to explain.

    Attributes:
        picks: (B, n) column per sample and pass.
        valid: (B, n) bool, or None when every pick counts.
        columns: The shared columns when every sample has the same ones, else None.
        spread: Width L of the output when maps go back to their own columns (bool mask per sample), else None.
        everything: All columns in their own order.
    """

    picks: Tensor
    valid: Tensor | None
    columns: Tensor | None
    spread: int | None
    everything: bool = False

    def arrange(self, maps: Tensor) -> Tensor:
        """(B, n, *S') in the order of the passes -> the layout that the caller asked for."""
        if self.spread is None or self.valid is None:
            return maps
        full = maps.new_full((maps.shape[0], self.spread, *maps.shape[2:]), torch.nan)
        rows, passes = self.valid.nonzero(as_tuple=True)
        return full.index_put((rows, self.picks[rows, passes]), maps[rows, passes])

    def take(self, maps: Tensor) -> Tensor:
        """(B, L, *S') of all labels -> the layout that the caller asked for."""
        if self.columns is not None:
            return maps if self.everything else maps.index_select(1, self.columns)
        index = self.picks.reshape(*self.picks.shape, *[1] * (maps.ndim - 2)).expand(-1, -1, *maps.shape[2:])
        return self.arrange(maps.gather(1, index))


def select(labels: Labels, batch: int, outputs: int, device: torch.device) -> Selection:
    """Read the `labels=` argument.

    Args:
        labels: None = all columns; ints = those columns in that order; LongTensor (B, n) = per sample; bool (L,) =
            those columns; bool (B, L) = per sample, result laid out over all L columns with NaN where not selected.
        batch: B.
        outputs: L.
        device: Where the logits are.

    Raises:
        InputError: Wrong shape or type, a column that does not exist, or a truth of 0 and 1 instead of a mask.

    Example:
        >>> select([2, 0], batch=2, outputs=3, device=torch.device("cpu")).picks.tolist()
        [[2, 0], [2, 0]]
    """
    if labels is None:
        columns = torch.arange(outputs, device=device)
        return Selection(columns.expand(batch, -1), None, columns, None, everything=True)
    chosen = _tensor(labels).to(device)
    if chosen.is_inference():
        chosen = chosen.clone()  # an index made under inference mode could not be saved for a backward pass
    if chosen.dtype == torch.bool:
        return _from_mask(chosen, batch, outputs)
    if chosen.numel() and (chosen.dtype == torch.uint8 or chosen.is_floating_point() or chosen.is_complex()):
        raise InputError(f"labels= expects columns (ints) or a bool mask, got {chosen.dtype} numbers: pass label == 1")
    chosen = chosen.long().reshape(1) if chosen.ndim == 0 else chosen.long()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= outputs):
        raise InputError(f"labels= must lie in 0..{outputs - 1}, got {int(chosen.min())}..{int(chosen.max())}")
    if chosen.ndim == 1:
        return _shared(chosen, batch)
    if chosen.ndim != 2 or chosen.shape[0] != batch:
        raise InputError(f"labels= per sample expects shape ({batch}, n), got {tuple(chosen.shape)}")
    if chosen.shape[1] == outputs > 2 and chosen.numel() and int(chosen.max()) <= 1:
        raise InputError(
            f"labels= of shape {tuple(chosen.shape)} with 0 and 1 only reads as columns 0 and 1; for a truth of 0 and "
            "1 pass label == 1"
        )
    return Selection(chosen, None, None, None)


def _tensor(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        return labels.as_subclass(Tensor)
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"labels= expects columns such as [0, 2], or a bool mask, got {repr(labels)[:60]}: of a label's name, pass "
            "its place among the model's outputs"
        ) from None


def _shared(columns: Tensor, batch: int) -> Selection:
    return Selection(columns.expand(batch, -1), None, columns, None)


def _from_mask(mask: Tensor, batch: int, outputs: int) -> Selection:
    if tuple(mask.shape) == (outputs,):
        return _shared(mask.nonzero()[:, 0], batch)
    if tuple(mask.shape) != (batch, outputs):
        raise InputError(f"a bool labels= expects shape ({outputs},) or ({batch}, {outputs}), got {tuple(mask.shape)}")
    # As many passes as the sample with the most selected labels: true columns first, in their order.
    passes = int(mask.sum(dim=1).max()) if mask.numel() else 0
    order = torch.argsort(~mask, dim=1, stable=True)[:, :passes]
    return Selection(order, mask.gather(1, order), None, outputs)
