"""Accounts averaged over the cases of a class, in sums that grow with no case."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from camtrain.cam.account import Account
from camtrain.evaluation.description import ChannelPart, Description

Tops = Callable[[Tensor, Tensor], tuple[ChannelPart, ...]]


class ClassAverage:
    """Sums over cases, per label.

    Args:
        outputs: L.
        parts: P.
        channels: K.
    """

    def __init__(self, outputs: int, parts: int, channels: int) -> None:
        self.outputs = outputs
        # Per label: logit, probability, bias, residual, then the parts; of these the squares too.
        self._sums = torch.zeros(outputs, 4 + parts, dtype=torch.float64)
        self._squares = torch.zeros_like(self._sums)
        self._channels = torch.zeros(outputs, 2, channels, dtype=torch.float64)  # contribution, importance
        self._absent = torch.zeros(outputs, channels, dtype=torch.float64)
        self._counts = torch.zeros(outputs, 4, dtype=torch.long)  # present, absent, without organs, unknown
        self._obstacles: dict[str, None] = {}  # of the network, the same in every batch
        self._unbalanced = torch.zeros(outputs, dtype=torch.bool)
        self._layer = ""

    def add(self, account: Account, parts: Tensor, label: Tensor, known: Tensor) -> None:
        """Add one batch.

        Args:
            account: Of all labels, NaN where not asked for.
            parts: (B, L, P) cells by part.
            label: (B, L), NaN = unknown.
            known: (B,) bool: cases with organs.
        """
        label, known = label.cpu(), known.cpu()[:, None]
        present, absent = (label == 1) & known, (label == 0) & known
        each = [account.logits, account.logits.sigmoid(), account.bias, account.residual]
        rows = torch.cat([torch.stack(each, dim=2).double().cpu(), parts.double().cpu()], dim=2)
        self._sums += _sum(rows, present)
        self._squares += _sum(rows.square(), present)
        self._channels += _sum(torch.stack([account.channels, account.importance], dim=2).double().cpu(), present)
        self._absent += _sum(account.importance.double().cpu(), absent)
        unknown = label.isnan() & known
        missing = ~known & (label == 1)
        self._counts += torch.stack([m.sum(dim=0) for m in (present, absent, missing, unknown)], dim=1)
        self._unbalanced |= (present & ~account.balanced.cpu()).any(dim=0)
        self._obstacles |= dict.fromkeys(account.obstacles)
        self._layer = account.layer

    def description(self, column: int, name: str, parts: tuple[str, ...], tops: Tops) -> Description:
        """The average of one label."""
        present, absent, missing, unknown = self._counts[column].tolist()
        mean = self._sums[column] / max(present, 1)
        logit, probability, bias, residual, *values = mean.tolist()
        contribution, importance = (self._channels[column] / max(present, 1)).float()
        order = sorted(range(len(parts)), key=lambda i: -abs(values[i]))
        why = tuple(self._obstacles)
        if not why and bool(self._unbalanced[column]):
            # Batches say it with figures of their own; over many cases one sentence must do.
            why = ("in some cases something that is neither a cell nor a bias that was found adds to the logit",)
        return Description(
            label=name,
            logit=logit,
            probability=probability,
            by_organ={parts[i]: values[i] for i in order} if present else {},
            bias=bias,
            residual=residual,
            layer=self._layer,
            valid=not why,
            why=why,
            channels=tops(contribution, importance) if present else (),
            importance=importance if present else None,
            importance_absent=(self._absent[column] / absent).float() if absent else None,
            n=present,
            spread=self._spread(column, present, parts),
            left_out={"without organs": missing, "unknown": unknown},
        )

    def _spread(self, column: int, present: int, parts: tuple[str, ...]) -> dict[str, float]:
        if present < 2:
            return {}
        mean = self._sums[column] / present
        variance = (self._squares[column] - present * mean.square()).clamp(min=0) / (present - 1)
        return dict(zip(parts, variance.sqrt()[4:].tolist(), strict=True))


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    """(B, L, ...) -> (L, ...) over the cases of the mask (B, L); what lies outside may be NaN."""
    shape = (*mask.shape, *[1] * (values.ndim - 2))
    return torch.where(mask.reshape(shape), values, 0.0).sum(dim=0)
