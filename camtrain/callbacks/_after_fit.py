"""The table after a fit, for the command line and for whoever asks for it under a Trainer of their own."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from camtrain.callbacks._alarms import Alarms
from camtrain.callbacks._scores import Score
from camtrain.reporting import RunDir
from camtrain.reporting.fitting import FittedTable
from camtrain.reporting.need_table import MEASURES, need_table


def table_of(
    scores: Sequence[Score], first_method: str, alarms: dict[str, list[str]] | None, title: str, full: str
) -> FittedTable | None:
    """Labels of one split, the neediest first; None where no label has a score.

    Args:
        scores: All scores of the split.
        first_method: The method with the plain keys.
        alarms: Label -> alarms that are raised; None = not watched.
        title: Heading.
        full: Where all labels are, if there are too many.
    """
    by_measure: dict[str, dict[str, float]] = {}
    for score in scores:
        if score.label is not None and score.method in (None, first_method):
            by_measure.setdefault(score.measure, {})[score.label] = score.value
    return need_table(by_measure, alarms, title=title, full=full, measures=MEASURES) if by_measure else None


def print_table(table: FittedTable | None) -> None:
    """On stdout, wide enough for all columns where that is no terminal."""
    if table is not None:
        console = Console()
        console = console if console.is_terminal else Console(width=max(console.width, 160))
        console.print(table)


def print_need(scores: Sequence[Score], first_method: str, alarms: Alarms, run_dir: RunDir | None) -> None:
    """The table of a validation, with the alarms that stand."""
    raised = alarms.board.by_label("val") if alarms.active else None
    full = "scores.csv" if run_dir is None else str(run_dir.scores_path)
    what = "scores and alarms" if alarms.active else "scores"
    title = f"val, {what} of epoch {alarms.epoch} (the last), the neediest label first"
    print_table(table_of(scores, first_method, raised, title, full))
