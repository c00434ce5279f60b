"""The fixed panel: a few cases of each split that are drawn the same way every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from camtrain._batch import Batch
from camtrain.reporting import compose_panel, geometry


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

    def draw(self, scale: Mapping[str, float]) -> npt.NDArray[np.uint8]:
        """The picture, with one colour scale per method."""
        axes, spacing = (None, None) if self.affine is None else geometry(self.affine)
        return compose_panel(
            self.image,
            self.maps,
            self.allowed,
            spacing=spacing,
            axes=axes,
            caption=self.caption,
            scale=scale,
            marked=True,
        )


class Panel:
    """Chooses cases of one split once, then collects them every time.

    Cases are taken greedily in the order of the split: a case joins when it shows a label that does not have its share
    of cases yet. They are known by their `id`, or by their place where the batch has no ids.

    Args:
        cases: Cases at most.
        labels_per_case: Labels drawn of each case at most.
    """

    def __init__(self, cases: int, labels_per_case: int) -> None:
        self.cases = cases
        self.labels_per_case = labels_per_case
        self.chosen: dict[str, list[int]] = {}
        self.complete = False
        self.entries: list[PanelEntry] = []
        self._drawn: set[str] = set()

    def begin(self) -> None:
        """A new pass over the split."""
        self.entries.clear()
        self._drawn.clear()

    def end(self) -> None:
        """The pass is over; what it chose stays."""
        self.complete = self.complete or bool(self.chosen)
        self.begin()

    def wanted(self, cases: Sequence[str], label: Tensor, segmented: Tensor) -> dict[int, list[int]]:
        """Rows of this batch to draw, with their labels; the first pass chooses them.

        Args:
            cases: B names.
            label: (B, L), NaN = unknown.
            segmented: (B,) bool.
        """
        positive = ((label == 1) & segmented[:, None]).tolist()
        rows: dict[int, list[int]] = {}
        for row, (case, marks) in enumerate(zip(cases, positive, strict=True)):
            if not self.complete and case not in self.chosen:
                self._choose(case, [index for index, mark in enumerate(marks) if mark], len(marks))
            # Patches of one scan share its id: the first one stands for it.
            if case in self.chosen and case not in self._drawn:
                self._drawn.add(case)
                rows[row] = [index for index in self.chosen[case] if index < len(marks) and marks[index]]
        return rows

    def _choose(self, case: str, present: list[int], labels: int) -> None:
        shown = Counter(index for chosen in self.chosen.values() for index in chosen)
        share = max(1, self.cases // labels)
        fresh = sorted((index for index in present if shown[index] < share), key=lambda index: shown[index])
        if fresh and len(self.chosen) < self.cases:
            self.chosen[case] = fresh[: self.labels_per_case]

    def collect(
        self,
        rows: Mapping[int, Sequence[int]],
        cases: Sequence[str],
        batch: Batch,
        maps: Mapping[str, Tensor],
        logits: Tensor,
        names: Sequence[str],
        region: Callable[[int], Tensor | None],
    ) -> None:
        """Copy the wanted rows to the host; `region(row)` gives (L, *S) bool at the image's resolution."""
        for row, labels in rows.items():
            if batch.image is None:
                return
            allowed = region(row)
            for index in labels:
                self.entries.append(
                    PanelEntry(
                        case=cases[row],
                        label=names[index],
                        present=batch.label is not None and bool(batch.label[row, index] == 1),
                        probability=float(torch.sigmoid(logits[row, index].float())),
                        image=batch.image[row].float().cpu().numpy(),
                        maps={method: m[row, index].float().cpu().numpy() for method, m in maps.items()},
                        allowed=None if allowed is None else allowed[index].cpu().numpy(),
                        affine=None if batch.affine is None else batch.affine[row].double().cpu().numpy(),
                    )
                )

    def state(self) -> list[Any]:
        """What a checkpoint keeps: plain lists and numbers."""
        return [[case, list(labels)] for case, labels in self.chosen.items()] if self.complete else []

    def load(self, state: Sequence[Any]) -> None:
        """Take the choice of an earlier run."""
        self.chosen = {str(case): [int(index) for index in labels] for case, labels in state}
        self.complete = bool(state)
