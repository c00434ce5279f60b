"""What AttentionMonitor gives up when memory ends, one thing after the other, so that the training need not end."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from camtrain.callbacks._lot import Lot
from camtrain.callbacks._memory import out_of_memory
from camtrain.callbacks._scores import Score, ScoreBook
from camtrain.cam.logits import find_logits


class Level(IntEnum):
    """How much is still done."""

    ALL = 0
    ONE_BY_ONE = 1
    FEWER = 2
    NO_MAPS = 3
    BLIND = 4


_LEFT = "AUROC, AUPRC and calibration error are still scored, a `monitor=` on a score of maps keeps its last value"
_NOW = {
    Level.ONE_BY_ONE: "the cases of a batch are mapped and scored one by one (the scores stay the same)",
    Level.FEWER: "one case of each batch is mapped and scored, nothing is drawn, and methods that cost forwards rest",
    Level.NO_MAPS: f"no map is made any more; {_LEFT}",
    Level.BLIND: f"validation steps are no longer watched; {_LEFT}",
}
BATCH = "batches for which it does not suffice are left out of the scores of maps"
SCORES = "scores of maps of an epoch in which it does not suffice to sum them up are left out"
WRITTEN = "pictures, tables and the report of an epoch in which it does not suffice for them are not complete"


class Relief:
    """Counts batches as far as memory allows. Every process decides for itself: what they log together is the same.

    What has been given up stays given up until the next fit, validate or test.
    """

    def __init__(self) -> None:
        self.level = Level.ALL
        self.entry: nn.Module | None = None
        self._told: set[str] = set()

    def start(self) -> None:
        """All is done again."""
        self.level, self.entry = Level.ALL, None
        self._told.clear()

    @property
    def draws(self) -> bool:
        """Are there still pictures?"""
        return self.level < Level.FEWER

    @property
    def maps(self) -> bool:
        """Are there still maps?"""
        return self.level < Level.NO_MAPS

    @property
    def blind(self) -> bool:
        """Are steps left alone?"""
        return self.level == Level.BLIND

    def through(self, lot: Lot, book: ScoreBook, count: Callable[[Lot], None]) -> None:
        """Count a batch; where memory ends half-way, undo that and count it with less.

        Args:
            lot: The batch.
            book: Takes the scores.
            count: Counts some rows of it into the book.
        """
        while self.level < Level.NO_MAPS:
            kept = None
            with self._caught() as found:
                kept = book.kept()
                for part in self._parts(lot):
                    count(part)
            if not found:
                return
            if kept is not None:
                book.restore(kept)
            self._give_up(Level(self.level + 1), found[0])

    @contextmanager
    def sparing(self, what: str, may: Callable[[], bool] | bool = True) -> Iterator[None]:
        """Leave out what stands within from where memory ends in it, told once until the next fit.

        Args:
            what: `BATCH`, `SCORES` or `WRITTEN`: what is left out.
            may: May it be, since no other process waits for it? A callable is asked when memory has ended.
        """
        with self._caught(may) as found:
            yield
        if found:
            _tidy()
            if what not in self._told:
                self._told.add(what)
                _warn(what, found[0])

    @contextmanager
    def counting(self, may: Callable[[], bool]) -> Iterator[None]:
        """Around what is done behind the user's step; a batch is left out where memory ends, if it `may` be."""
        # Metric states made under inference mode could never be updated again.
        with self.sparing(BATCH, may), torch.inference_mode(False), torch.no_grad():
            yield

    def summed(self, books: Mapping[str, ScoreBook], methods: Sequence[str], alone: bool) -> dict[str, list[Score]]:
        """Split -> its scores; where memory ends in that, those of logits alone, or none.

        Several processes sum up together: one that left something out would have the others wait for ever, so that an
        end of memory stays an error there.
        """
        for some in (methods, ()):
            scores: dict[str, list[Score]] | None = None
            with self.sparing(SCORES, alone):
                scores = {split: book.compute(some) for split, book in books.items()}
            if scores is not None:
                return scores
        return {}

    @contextmanager
    def watching(self, entered: Callable[[], bool]) -> Iterator[list[str]]:
        """Around the user's step: where memory ends inside the watched network, because of what the watch keeps.

        Args:
            entered: Is the step still inside the network? Before and behind it the step is the user's alone, may have
                counted already, and cannot be run again.

        Yields:
            A list, which afterwards holds the message if the step may be run once more, without a watch.
        """
        found: list[str] = []
        try:
            yield found
        except Exception as error:
            if not out_of_memory(error) or not entered():
                raise
            found.append(_first_line(error))
        if found:
            self._give_up(Level.BLIND, found[0])

    @contextmanager
    def outputs(self, width: int | None) -> Iterator[list[Tensor]]:
        """The logits (B, width) that the network gives within, where they can be told from what it returns."""
        given: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if (logits := find_logits(output)) is not None and width in (None, logits.shape[1]):
                given.append(logits.detach().clone())

        handle = None if self.entry is None else self.entry.register_forward_hook(keep)
        try:
            yield given
        finally:
            if handle is not None:
                handle.remove()

    def _parts(self, lot: Lot) -> list[Lot]:
        if self.level == Level.ALL:
            return [lot]
        each = lot.each()
        if self.level == Level.ONE_BY_ONE:
            return each
        return [one.undrawn() for one in each if bool(one.scored.any())][:1]

    @contextmanager
    def _caught(self, may: Callable[[], bool] | bool = True) -> Iterator[list[str]]:
        # The exception must be gone before anything is tried again: its frames hold the very tensors.
        found: list[str] = []
        try:
            yield found
        except Exception as error:
            if not out_of_memory(error) or not (may() if callable(may) else may):
                raise
            found.append(_first_line(error))

    def _give_up(self, level: Level, why: str) -> None:
        self.level = level
        _tidy()
        _warn(_NOW[level], why)


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warn(now: str, why: str) -> None:
    rank = getattr(rank_zero_only, "rank", 0)
    where = f" in process {rank}" if rank else ""
    warnings.warn(
        f"camtrain: memory ended in AttentionMonitor{where}, training goes on: from now on {now}. To spare memory from "
        f"the start, take a later layer, fewer methods or a smaller validation batch ({why})",
        RuntimeWarning,
        stacklevel=3,
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
