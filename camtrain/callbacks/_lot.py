"""Rows of a batch of an evaluation step that are mapped together, scored, and kept where the panel shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from camtrain._batch import Batch
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._panel import Panel, asked_too
from camtrain.callbacks._recording import Recorder
from camtrain.callbacks._scores import ScoreBook
from camtrain.callbacks._step_maps import StepMaps, first_only, only


@dataclass(frozen=True)
class Lot:
    """A batch, or some rows of it.

    Attributes:
        words: The rows in camtrain's words.
        logits: (b, L) detached.
        label: (b, L), NaN = unknown or a repeat.
        within: (b, L) bool: present labels that the budget holds; None = all.
        segmented: (b,) bool.
        cases: b names.
        drawn: Row -> labels that the panel draws.
        recorded: (b, L) bool, labels that the report shows; None = no row of these.
        rows: Which rows of the batch these are; None = all.
        draws: Is there a panel, and are methods asked that cost forwards?
    """

    words: Batch
    logits: Tensor
    label: Tensor
    within: Tensor | None
    segmented: Tensor
    cases: Sequence[str]
    drawn: Mapping[int, list[int]]
    recorded: Tensor | None = None
    rows: slice | None = None
    draws: bool = True

    @property
    def present(self) -> Tensor:
        """(b, L) bool: pairs that can be scored."""
        return (self.label == 1) & self.segmented[:, None]

    @property
    def scored(self) -> Tensor:
        """(b, L) bool: pairs that are scored."""
        return self.present if self.within is None else self.within

    @property
    def judged(self) -> Tensor:
        """(b, L): the labels, NaN also for present ones that are not scored."""
        return self.label if self.within is None else self.label.masked_fill(self.present & ~self.within, torch.nan)

    def each(self) -> list[Lot]:
        """The rows one by one."""
        return [self._one(row) for row in range(len(self.label))]

    def undrawn(self) -> Lot:
        """The same rows for the scores alone."""
        return replace(self, drawn={}, recorded=None, draws=False)

    def _one(self, row: int) -> Lot:
        rows = slice(row, row + 1)
        recorded = None if self.recorded is None or not bool(self.recorded[row].any()) else self.recorded[rows]
        return replace(
            self,
            words=self.words.rows(rows),
            logits=self.logits[rows],
            label=self.label[rows],
            within=None if self.within is None else self.within[rows],
            segmented=self.segmented[rows],
            cases=self.cases[rows],
            drawn={0: self.drawn[row]} if row in self.drawn else {},
            recorded=recorded,
            rows=rows,
        )


@dataclass(frozen=True)
class Counting:
    """Where the maps of a step go.

    Attributes:
        context: What the monitor reads of the run.
        step: What the step can be asked for.
        book: The scores of the split.
        panel: The cases that are drawn, or None.
        recorder: What the report keeps, or None.
        split: Name of the split.
        names: L label names.
        kind: `fit`, `validate`, `test`, or `sanity`: the few batches before a fit.
        first: Is this the first batch of a pass? Maps are made of it even where none is asked for: what does not fit is
            told before an epoch is spent.
    """

    context: RunContext
    step: StepMaps
    book: ScoreBook
    panel: Panel | None
    recorder: Recorder | None
    split: str
    names: list[str]
    kind: str
    first: bool = False

    def __call__(self, lot: Lot) -> None:
        """Make the maps of a lot, score them, and copy to the host what is shown."""
        scored = lot.scored
        asked = asked_too(lot.drawn, scored)
        if self.kind == "sanity":
            # This only shows that a method works here; one map does, and K forwards of a Score-CAM are long.
            asked = first_only(scored)
        elif lot.recorded is not None:
            asked |= lot.recorded
        if not (self.first or bool(asked.any())):
            return
        step = self.step if lot.draws else self.step.free()
        made = step.make(lot.present & asked, asked, lot.recorded is not None, lot.rows)
        maps = made.by_method
        allowed = self.context.allowed_on_grids(lot.words, maps, scored)
        # What only the panel shows is not scored.
        self.book.update(only(maps, scored, asked), allowed, lot.judged, lot.segmented, lot.logits)
        if lot.within is not None:
            self.book.share.score(scored)
        if lot.drawn and self.panel is not None:
            region = partial(self.context.region, lot.words)
            self.panel.collect(lot.drawn, lot.cases, lot.words, maps, lot.logits, self.names, region, allowed)
        if self.recorder is not None and lot.recorded is not None:
            fitting = self.kind == "fit"
            self.recorder.collect(self.split, lot.recorded, lot.cases, lot.words, lot.logits, made, self.step, fitting)
