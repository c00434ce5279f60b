"""Scores of the logits per label over a whole split: AUROC, AUPRC, calibration error; per scan or per patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from camtrain._label_rates import RATES, add_block, label_rates

SCORES = RATES


class LabelScores(Metric):
    """Probabilities and truths of a split, and what torchmetrics says of each label.

    Args:
        num_labels: L.
        scores: Of `SCORES`.
        per_patient: One row per patient: the mean probability of his or her scans, present where any scan is.
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> metric = LabelScores(1, ["auroc"])
        >>> metric.update(torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([[1.0], [0.0], [0.0]]))
        >>> metric.compute()["auroc"].reshape(1)  # torchmetrics squeezes what has one element
        tensor([1.])
    """

    is_differentiable = False
    full_state_update = False
    probabilities: list[Tensor]
    labels: list[Tensor]
    ids: list[Tensor]
    patients: list[Tensor]

    def __init__(self, num_labels: int, scores: Sequence[str], per_patient: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_labels, self.scores, self.per_patient = num_labels, list(scores), per_patient
        for name in ("probabilities", "labels", "ids", "patients"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        logits: Tensor,
        label: Tensor,
        ids: Sequence[str] | None = None,
        patients: Sequence[str | None] | None = None,
    ) -> None:
        """Add a batch: logits and label (B, L), names of cases and patients (None or "" = unknown)."""
        # In float64: the sigmoid of large logits would tie in float32, and ties cost area.
        add_block(self.probabilities, logits.detach().double().sigmoid().flatten())
        add_block(self.labels, label.detach().flatten().to(torch.float64, copy=True))
        count = sum(len(held) for held in self.ids)
        names = [f"case {i}" for i in ids] if ids is not None else [f"row {count + i}" for i in range(len(logits))]
        owners = list(patients) if patients is not None else [None] * len(logits)
        known = [f"patient {p}" if p not in (None, "") else name for p, name in zip(owners, names, strict=True)]
        keys = _keys(names, logits.device)
        add_block(self.ids, keys if ids is not None else -keys.abs() - 1)
        add_block(self.patients, _keys(known, logits.device))

    def compute(self) -> dict[str, Tensor]:
        """Score -> (L,); NaN where a label has known cases of one class only (of the calibration: none)."""
        probability, label = self._rows()
        return {name: label_rates(name, probability, label).float() for name in self.scores}

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Probabilities and truths (rows, L): each case once (samplers repeat some), or each patient once."""
        states: list[Any] = [self.probabilities, self.labels, self.ids, self.patients]
        if not all(len(state) for state in states):
            empty = torch.zeros(0, self.num_labels, dtype=torch.float64, device=self.device)
            return empty, empty
        flat = [dim_zero_cat(state) for state in states]
        probability, label = (each.reshape(-1, self.num_labels) for each in flat[:2])
        ids, patients = flat[2:]
        rows = first_of_each(ids)
        probability, label, patients = probability[rows], label[rows], patients[rows]
        return of_patients(probability, label, patients) if self.per_patient else (probability, label)


def first_of_each(keys: Tensor) -> Tensor:
    """Rows at which each key stands first, in their order.

    Example:
        >>> first_of_each(torch.tensor([7, 5, 7, 9]))
        tensor([0, 1, 3])
    """
    _, place = torch.unique(keys, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(keys), device=keys.device)
    first.scatter_reduce_(0, place, torch.arange(len(keys), device=keys.device), "amin")
    return first.sort().values


def of_patients(probability: Tensor, label: Tensor, patients: Tensor) -> tuple[Tensor, Tensor]:
    """One row per patient, over the scans in which a label is known: the mean probability, and whether any has it.

    Args:
        probability: (scans, L).
        label: (scans, L), NaN = unknown.
        patients: (scans,) whole numbers.

    Returns:
        Two (patients, L); NaN where no scan's label is known.

    Example:
        >>> of_patients(torch.tensor([[0.2], [0.6]]), torch.tensor([[0.0], [1.0]]), torch.tensor([3, 3]))
        (tensor([[0.4000]]), tensor([[1.]]))
    """
    _, place = torch.unique(patients, return_inverse=True)
    shape = (int(place.max()) + 1 if len(place) else 0, label.shape[1])
    known = ~label.isnan()
    sums = [torch.zeros(shape, dtype=probability.dtype, device=label.device) for _ in range(3)]
    parts = (known, torch.where(known, probability, 0.0), (label == 1) & known)
    count, total, present = (s.index_add(0, place, p.to(s)) for s, p in zip(sums, parts, strict=True))
    there = count > 0
    return torch.where(there, total / count, torch.nan), torch.where(there, (present > 0).to(label), torch.nan)


def _keys(names: Sequence[str], device: torch.device) -> Tensor:
    """Names as 63-bit numbers, which processes can exchange."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(d, "big") >> 1 for d in digests], dtype=torch.long, device=device)
