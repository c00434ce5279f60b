"""The fixed panel: a few validation cases that are drawn the same way every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from camtrain._batch import Batch
from camtrain.reporting import compose_panel, geometry

Position = tuple[int, int, int]  # loader, batch, row: the same case every epoch, as validation does not shuffle


@dataclass(frozen=True)
class PanelEntry:
    """One case and one label of the panel, copied off the device."""

    case: str
    label: str
    present: bool
    probability: float
    image: npt.NDArray[np.float32]
    maps: dict[str, npt.NDArray[np.float32]]
    allowed: npt.NDArray[np.bool_] | None
    affine: npt.NDArray[np.float64] | None

    @property
    def caption(self) -> str:
        """Case, label, truth and what the network says."""
        return f"{self.case}  {self.label}: {'present' if self.present else 'absent'}, p = {self.probability:.2f}"

    def draw(self, scale: float | None) -> npt.NDArray[np.uint8]:
        """The picture, with one colour scale for all epochs."""
        axes, spacing = (None, None) if self.affine is None else geometry(self.affine)
        return compose_panel(
            self.image, self.maps, self.allowed, spacing=spacing, axes=axes, caption=self.caption, scale=scale, marked=True
        )


class Panel:
    """Chooses cases once, then collects them every time.

    Cases are taken greedily in validation order: a case joins when it shows a label that is not yet covered.

    Args:
        cases: Cases at most.
        labels_per_case: Labels drawn of each case at most.
    """

    def __init__(self, cases: int, labels_per_case: int) -> None:
        self.cases = cases
        self.labels_per_case = labels_per_case
        self.chosen: dict[Position, list[int]] = {}
        self.complete = False
        self.entries: list[PanelEntry] = []

    def wanted(self, loader: int, batch_index: int, label: Tensor, segmented: Tensor) -> dict[int, list[int]]:
        """Rows of this batch to draw, with their labels; the first epoch chooses them."""
        if not self.complete:
            self._choose(loader, batch_index, (label == 1) & segmented[:, None])
        return {
            row: labels for (at, index, row), labels in self.chosen.items() if (at, index) == (loader, batch_index) and row < len(label)
        }

    def _choose(self, loader: int, batch_index: int, positive: Tensor) -> None:
        covered = {label for labels in self.chosen.values() for label in labels}
        for row, marks in enumerate(positive.tolist()):
            fresh = [index for index, mark in enumerate(marks) if mark and index not in covered]
            if fresh and len(self.chosen) < self.cases and (loader, batch_index, row) not in self.chosen:
                self.chosen[loader, batch_index, row] = fresh[: self.labels_per_case]
                covered.update(fresh[: self.labels_per_case])

    def collect(
        self,
        rows: Mapping[int, Sequence[int]],
        batch: Batch,
        maps: Mapping[str, Tensor],
        logits: Tensor,
        names: Sequence[str],
        region: Callable[[int], Tensor | None],
        fallback: str,
    ) -> None:
        """Copy the wanted rows to the host; `region(row)` gives (L, *S) bool at the image's resolution."""
        for row, labels in rows.items():
            if batch.image is None:
                return
            allowed = region(row)
            for index in labels:
                self.entries.append(
                    PanelEntry(
                        case=batch.ids[row] if batch.ids else f"{fallback}{row}",
                        label=names[index],
                        present=bool(batch.label[row, index] == 1) if batch.label is not None else False,
                        probability=float(torch.sigmoid(logits[row, index].float())),
                        image=batch.image[row].float().cpu().numpy(),
                        maps={method: m[row, index].float().cpu().numpy() for method, m in maps.items()},
                        allowed=None if allowed is None else allowed[index].cpu().numpy(),
                        affine=None if batch.affine is None else batch.affine[row].double().cpu().numpy(),
                    )
                )

    def state(self) -> list[Any]:
        """What a checkpoint keeps: plain lists and numbers."""
        return [[list(position), list(labels)] for position, labels in self.chosen.items()] if self.complete else []

    def load(self, state: Sequence[Any]) -> None:
        """Take the choice of an earlier run."""
        self.chosen = {(int(p[0]), int(p[1]), int(p[2])): [int(i) for i in labels] for p, labels in state}
        self.complete = bool(state)
