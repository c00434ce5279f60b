"""Scores per label after a fit, the neediest label first, with a small bar."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from camtrain.reporting.score_table import Scores, labels_of, mean_of

_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BARS = ("energy_inside", "organ_iou", "auroc")
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
) -> Table:
    """A table with a line per label: a bar, the scores, and which alarms are raised.

    Args:
        scores: Measure -> label -> value; missing and NaN values show as `-`.
        alarms: Label -> names of the alarms that are raised for it; None leaves the column out.
        bar: Measure of the bar and of the order (see `by_need`).
        title: Heading.
        most: With more labels than this, only so many are shown.
        full: Where the note says that all labels are.

    Returns:
        A rich table.

    Example:
        >>> from rich.console import Console
        >>> table = need_table({"organ_iou": {"nodule": 0.91, "effusion": 0.25}}, {"effusion": ["reliance"]})
        >>> Console(width=70).print(table)  # doctest: +SKIP
    """
    measure = bar or bar_measure(scores)
    ordered = by_need(scores, alarms, measure)
    note = f"bar: {measure}"
    if len(ordered) > most:
        note += f"; the {most} neediest of {len(ordered)} labels, all are in {full}"
    table = Table(title=title or None, caption=note, title_justify="left", caption_justify="left", box=SIMPLE,
                  padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("label", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_WIDTH)
    for column in scores:
        table.add_column(column, justify="right")
    if alarms is not None:
        table.add_column("alarms")
    for label in ordered[:most]:
        cells = [_number(values.get(label, math.nan)) for values in scores.values()]
        told = [] if alarms is None else [Text(", ".join(alarms.get(label, ())), style="bold red")]
        table.add_row(Text(label), _bar(scores.get(measure, {}).get(label, math.nan)), *cells, *told)
    table.add_section()
    means = [_number(mean_of(values)) for values in scores.values()]
    table.add_row("mean", "", *means, *([] if alarms is None else [""]), style="bold")
    return table


def chosen(scores: Scores, measures: Iterable[str]) -> Scores:
    """Those of the measures that there are, in the order asked for."""
    return {measure: scores[measure] for measure in measures if measure in scores}


def _bar(value: float) -> Text:
    """A bar of ten cells in eighths; the colour says the same as the length."""
    if value != value:
        return Text("-")
    eighths = round(8 * _WIDTH * min(1.0, max(0.0, value)))
    whole, rest = divmod(eighths, 8)
    style = "red" if value < _POOR else "yellow" if value < _FAIR else "green"
    return Text("█" * whole + (_EIGHTHS[rest] if rest else ""), style=style)


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"
