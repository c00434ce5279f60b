"""The table after a fit, for the command line and for whoever asks for it under a Trainer of their own."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from camtrain.callbacks._alarms import Alarms
from camtrain.callbacks._scores import Score
from camtrain.reporting import RunDir
from camtrain.reporting.need_table import chosen, need_table

COLUMNS = ("auroc", "organ_iou", "energy_inside", "pointing_game", "empty_map_rate", "outside_share")


def table_of(
    scores: Sequence[Score], first_method: str, alarms: dict[str, list[str]] | None, title: str, full: str
) -> Table | None:
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
    shown = chosen(by_measure, COLUMNS)
    return need_table(shown, alarms, title=title, full=full) if shown else None


def print_table(table: Table | None) -> None:
    """On stdout, wide enough for all columns where that is no terminal."""
    if table is not None:
        console = Console()
        console = console if console.is_terminal else Console(width=max(console.width, 160))
        console.print(table)


def print_need(scores: Sequence[Score], first_method: str, alarms: Alarms, run_dir: RunDir | None) -> None:
    """The table of a validation, with the alarms that stand."""
    raised = alarms.board.by_label("val") if alarms.active else None
    full = "scores.csv" if run_dir is None else str(run_dir.scores_path)
    print_table(table_of(scores, first_method, raised, "val, the neediest label first", full))
