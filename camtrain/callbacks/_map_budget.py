"""Which present labels of an evaluation are scored, where the map of each takes a backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.callbacks._context import tell_once
from camtrain.callbacks._scores import ScoreBook
from camtrain.callbacks._splits import split_name
from camtrain.callbacks._step_maps import StepMaps
from camtrain.cam.engine import takes_backward
from camtrain.cam.layer_lookup import INPUT, find_layer
from camtrain.cam.price import WorkCount
from camtrain.cam.watch import ModuleWatch

SECOND = 1.0
"""Passes of about one second of one core are made in every pass over a split, however short it is."""
_EACH = 2e-4  # seconds of a pass that do not depend on the network
_TOGETHER = 2  # labels of a case at least: class_sensitivity compares them with each other


class MapBudget:
    """Paces the backward passes of an evaluation: evenly over its batches, the same pairs in every epoch.

    Passes and forwards are counted (`camtrain.cam.price`), not timed, so that two runs, or a run that is resumed, score
    the same pairs. Where a batch has more present labels than the budget holds, those of each case come first that have
    been scored least in this pass over the split: a rare label is scored as often as a common one, as far as it can be.

    Args:
        share: Seconds of passes per second of the plain forwards, at least `free` of them, which is one, in
            each pass over a split; None = all.

    Raises:
        InputError: Not a positive number.
    """

    def __init__(self, share: float | None) -> None:
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf
        ):
            raise InputError(
                f"map_budget= expects a positive number, such as 0.03 of the forwards of an evaluation, or None for "
                f"maps of all present labels, got {share!r}"
            )
        self.share, self.free = share, SECOND
        self._watched: ModuleWatch | None = None
        self._count: WorkCount | None = None
        self._price: tuple[float, float] | None = None
        self._planned: int | None = None
        self._told: ModuleWatch | None = None
        self.begin()

    def begin(self) -> None:
        """A pass over the splits begins."""
        self._credit: dict[str, float] = {}
        self._scored: dict[str, list[int]] = {}

    @contextmanager
    def counting(self, watch: ModuleWatch) -> Iterator[None]:
        """Around the user's step: the work of the first one that is watched is counted."""
        if self.share is None or self._watched is watch:
            yield
            return
        count = WorkCount(watch.model, [find_layer(watch.model, name)[1] for name in watch.names])
        with count.counting():
            yield
        self._watched, self._count, self._price = watch, count, None

    def paces(self, watch: ModuleWatch) -> bool:
        """Do maps of what it watches take passes? Known once a step has been priced."""
        return self._watched is watch and self._price is not None and min(self._price) > 0

    def plan(self, trainer: Any, label: Tensor | None, loader: int) -> int | None:
        """How many passes the next step may have, by the labels as they are before it; None = told behind the step.

        Args:
            trainer: The Trainer.
            label: (B, L), NaN = unknown; None where they cannot be told yet.
            loader: Index of the DataLoader.
        """
        self._planned = None if label is None else self._passes(trainer, label, loader)
        return self._planned

    def within(
        self, trainer: Any, step: StepMaps, label: Tensor, present: Tensor, loader: int, book: ScoreBook
    ) -> Tensor | None:
        """(B, L) bool: the present labels of a batch that are scored; None = all, and nothing is paced.

        A test, which is run once, scores all.

        Args:
            trainer: The Trainer.
            step: What the step can be asked for.
            label: (B, L) as the batch has it.
            present: (B, L) bool: those that can be scored.
            loader: Index of the DataLoader.
            book: Is told what there is to be scored.
        """
        if self._count is None or self.share is None or trainer.testing or trainer.sanity_checking:
            return None
        if self._price is None and step.watch.graph:
            self._price = self._priced(step, self._count)
        if self._price is None or not min(self._price):
            return None
        passes = self._passes(trainer, label, loader) if self._planned is None else self._planned
        split = split_name(trainer, loader)
        chosen, used = self._chosen(present, passes, split)
        self._credit[split] = self._credit_for(trainer, loader) - used * self._price[0]
        book.share.update(present)
        if self._told is not step.watch and bool((present & ~chosen).any()):
            self._told = step.watch
            self._tell(trainer, step, self._price[0] / self._price[1])
        return chosen

    def _passes(self, trainer: Any, label: Tensor, loader: int) -> int:
        """How many passes a batch may have; what it does not need, later ones may.

        One that shows a label which is behind the others may borrow from those to come: else a label that is rare could
        always fall between two batches that have passes.
        """
        rows, credit, price = (label == 1).tolist(), self._credit_for(trainer, loader), self._dear
        most = max(map(sum, rows), default=0)
        if most * price <= credit or not most:
            return most
        scored = self._scored.get(split_name(trainer, loader)) or [0] * len(rows[0])
        mean = sum(scored) / len(scored)
        behind = max(sum(there and 2 * done < mean for there, done in zip(row, scored, strict=True)) for row in rows)
        passes = int(credit / price)
        if behind or not mean:
            passes = max(passes, min(max(behind, _TOGETHER), int((credit + self._loan) / price)))
        passes = min(passes, most)
        return 0 if passes < min(_TOGETHER, most) else passes

    @property
    def _dear(self) -> float:
        """Seconds of a pass."""
        return 0.0 if self._price is None else self._price[0]

    @property
    def _loan(self) -> float:
        """Seconds that may be borrowed: by so much more than the budget, at most, is spent in the end."""
        return max(self.free / 4, _TOGETHER * self._dear)

    def _credit_for(self, trainer: Any, loader: int) -> float:
        """Seconds that the next batch may take: its own part, and what batches before it have left."""
        batches, each = _batches(trainer, loader), (self.share or 0.0) * (self._price or (0.0, 0.0))[1]
        if not math.isinf(batches):
            each = max(each, self.free / batches) - self.free / 2 / batches
        return self._credit.get(split_name(trainer, loader), self.free / 2) + each

    def _chosen(self, present: Tensor, passes: int, split: str) -> tuple[Tensor, int]:
        """(B, L) bool: of each case at most so many labels, those first that have been scored least; and the passes."""
        chosen, scored = torch.zeros_like(present), self._scored.setdefault(split, [0] * present.shape[1])
        used = 0
        for row, there in enumerate(present.tolist() if passes else []):
            wanted = [label for label, is_there in enumerate(there) if is_there]
            wanted = sorted(wanted, key=scored.__getitem__)[:passes]
            chosen[row, wanted] = True
            used = max(used, len(wanted))
            for label in wanted:
                scored[label] += 1
        return chosen, used

    def _priced(self, step: StepMaps, count: WorkCount) -> tuple[float, float]:
        """Seconds of one pass to all layers that need one, 0 where none does, and of a forward."""
        call = -1 if step.watch.call is None else step.watch.call
        dear = [
            count.behind(place, call)
            for place, (key, source) in enumerate(step.sources.items())
            if takes_backward(step.logits, source, None if key == INPUT else step.reshape)
        ]
        # Recording the graph takes time too, once for all passes of a batch, which are two or more.
        return sum(work.backward + work.forward / 2 + _EACH for work in dear), count.whole.forward

    def _tell(self, trainer: Any, step: StepMaps, share: float) -> None:
        layers = ", ".join(step.layers())
        tell_once(
            trainer,
            f"camtrain: a map of {layers} takes a backward pass, of about {share:.2g} of a forward. Within "
            f"map_budget={self.share} not all present labels are scored: the same ones in every validation, and all in "
            "a test; <split>/scored_share says how many. map_budget=None scores all, a layer nearer to the logits "
            "(camtrain layers, or ct.layers, lists them) takes less",
        )


def _batches(trainer: Any, loader: int) -> float:
    counts = trainer.num_val_batches
    return float(counts[loader]) if isinstance(counts, list) and loader < len(counts) and counts[loader] else math.inf
