"""Scores per label after a fit, the neediest label first, with a small bar."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from camtrain.reporting.fitting import Column, FittedTable
from camtrain.reporting.score_table import Scores, labels_of, number_columns, selected

_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BARS = ("energy_inside", "organ_iou", "auroc")
# What a table has room for, the most important first.
MEASURES = ("auroc", "organ_iou", "energy_inside", "pointing_game", "empty_map_rate", "outside_share")
_POOR, _FAIR = 0.33, 0.66


def by_need(scores: Scores, alarms: Mapping[str, Sequence[str]] | None = None, bar: str | None = None) -> list[str]:
    """The labels, those with most alarms first, then by their score from low to high; without a score last.

    Args:
        scores: Measure -> label -> value.
        alarms: Label -> names of the alarms that are raised for it.
        bar: The measure to sort by; None = `energy_inside`, else `organ_iou`, else `auroc`.

    Example:
        >>> by_need({"organ_iou": {"a": 0.9, "b": 0.2, "c": 0.5}}, {"c": ["drifting"]})
        ['c', 'b', 'a']
    """
    raised, values = alarms or {}, scores.get(bar or bar_measure(scores), {})

    def need(label: str) -> tuple[int, bool, float]:
        value = values.get(label, math.nan)
        return -len(raised.get(label, ())), value != value, value if value == value else 0.0

    return sorted(labels_of(scores), key=need)


def bar_measure(scores: Scores) -> str:
    """The measure that the bar shows."""
    return next((measure for measure in _BARS if measure in scores), next(iter(scores), ""))


def need_table(
    scores: Scores,
    alarms: Mapping[str, Sequence[str]] | None = None,
    *,
    bar: str | None = None,
    title: str = "",
    most: int = 20,
    full: str = "scores.csv",
    measures: Iterable[str] | None = None,
) -> FittedTable:
    """A table with a line per label: a bar, the scores, and which alarms are raised. It fits the terminal.

    Args:
        scores: Measure -> label -> value; missing and NaN values show as `-`.
        alarms: Label -> names of the alarms that are raised for it; None leaves the column out.
        bar: Measure of the bar and of the order (see `by_need`).
        title: Heading.
        most: With more labels than this, only so many are shown.
        full: Where the note says that all labels and measures are.
        measures: Those that get a column, the most important first; None = all. The note says that there are more.

    Returns:
        Something for `rich.print` and `Console.print`.

    Example:
        >>> from rich.console import Console
        >>> table = need_table({"organ_iou": {"nodule": 0.91, "effusion": 0.25}}, {"effusion": ["reliance"]})
        >>> Console(width=70).print(table)  # doctest: +SKIP
    """
    measure = bar or bar_measure(scores)
    ordered = by_need(scores, alarms, measure)
    labels = ordered[:most]
    shown, more = selected(scores, measures, full)
    notes = [f"bar: {measure}"]
    if len(ordered) > most:
        notes.append(f"the {most} neediest of {len(ordered)} labels, all are in {full}")
    # An alarm may speak of all labels at once, or of one that has no score.
    notes += [
        f"raised for {label}: {', '.join(names)}" for label, names in (alarms or {}).items() if label not in ordered
    ]
    bars = [_bar(scores.get(measure, {}).get(label, math.nan)) for label in labels]
    columns = [
        Column("label", [*map(Text, labels), Text("mean")], names=True, side="left", may_go=False),
        Column("", [*bars, Text(" " * _WIDTH)], side="left", may_go=False),
        *number_columns(shown, labels),
    ]
    if alarms is not None:
        raised = [Text(", ".join(alarms.get(label, ())), style="bold red") for label in labels]
        columns.append(Column("alarms", [*raised, Text("")], names=True, side="left", may_go=False))
    return FittedTable(columns, title, "; ".join([*notes, *more]), strong=True)


def _bar(value: float) -> Text:
    """A bar of ten cells in eighths; the colour says the same as the length."""
    if value != value:
        return Text("-")
    eighths = round(8 * _WIDTH * min(1.0, max(0.0, value)))
    whole, rest = divmod(eighths, 8)
    style = "red" if value < _POOR else "yellow" if value < _FAIR else "green"
    return Text("█" * whole + (_EIGHTHS[rest] if rest else ""), style=style)
