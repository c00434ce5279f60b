"""What AttentionMonitor gives up when memory ends, one thing after the other, so that the training need not end."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from camtrain.callbacks._lot import Lot
from camtrain.callbacks._memory import out_of_memory
from camtrain.callbacks._scores import ScoreBook
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


class Relief:
    """Counts batches as far as memory allows. Every process decides for itself: what they log together is the same.

    What has been given up stays given up until the next fit, validate or test.
    """

    def __init__(self) -> None:
        self.level = Level.ALL
        self.entry: nn.Module | None = None

    def start(self) -> None:
        """All is done again."""
        self.level, self.entry = Level.ALL, None

    @property
    def draws(self) -> bool:
        """Are there still pictures?"""
        return self.level < Level.FEWER

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
            kept = book.kept()
            with self._caught() as found:
                for part in self._parts(lot):
                    count(part)
            if not found:
                return
            book.restore(kept)
            self._give_up(Level(self.level + 1), found[0])

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
        return [one.undrawn() for one in each if bool(one.present.any())][:1]

    @contextmanager
    def _caught(self) -> Iterator[list[str]]:
        # The exception must be gone before anything is tried again: its frames hold the very tensors.
        found: list[str] = []
        try:
            yield found
        except Exception as error:
            if not out_of_memory(error):
                raise
            found.append(_first_line(error))

    def _give_up(self, level: Level, why: str) -> None:
        self.level = level
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rank = getattr(rank_zero_only, "rank", 0)
        where = f" in process {rank}" if rank else ""
        warnings.warn(
            f"camtrain: memory ended in AttentionMonitor{where}, training goes on: from now on {_NOW[level]}. To spare "
            f"memory from the start, take a later layer, fewer methods or a smaller validation batch ({why})",
            RuntimeWarning,
            stacklevel=2,
        )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
