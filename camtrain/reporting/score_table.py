"""Scores per label as a table on the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from camtrain._errors import InputError, nearest
from camtrain.reporting.fitting import Column, FittedTable

Scores = Mapping[str, Mapping[str, float]]  # measure -> label -> value

LOWER_IS_BETTER = frozenset({"empty_map_rate", "empty_rate", "mask_loss", "task_loss", "outside_evidence", "loss"})
_NONE = "-"


def labels_of(scores: Scores) -> list[str]:
    """All labels that any measure knows, in the order in which they first appear.

    Example:
        >>> labels_of({"auroc": {"b": 0.5}, "organ_iou": {"a": 0.1, "b": 0.2}})
        ['b', 'a']
    """
    return list(dict.fromkeys(label for values in scores.values() for label in values))


def mean_of(values: Mapping[str, float], labels: Iterable[str] | None = None) -> float:
    """Mean over the labels whose score is defined; NaN when there is none.

    Example:
        >>> mean_of({"a": 1.0, "b": float("nan"), "c": 0.0})
        0.5
    """
    kept = [v for v in (values.get(label, math.nan) for label in (values if labels is None else labels)) if v == v]
    return sum(kept) / len(kept) if kept else math.nan


def worst_first(scores: Scores, measure: str, lower_is_better: Iterable[str] = LOWER_IS_BETTER) -> list[str]:
    """The labels from the worst to the best score; labels without a score come last.

    Raises:
        InputError: The measure is unknown.

    Example:
        >>> worst_first({"auroc": {"a": 0.9, "b": 0.4}}, "auroc")
        ['b', 'a']
    """
    if measure not in scores:
        raise InputError(f"there is no measure {measure!r} to sort by{nearest(measure, scores)}")
    sign = -1.0 if measure in set(lower_is_better) else 1.0
    values = scores[measure]

    def rank(label: str) -> tuple[bool, float]:
        value = values.get(label, math.nan)
        return value != value, sign * value if value == value else 0.0

    return sorted(labels_of(scores), key=rank)


def score_table(
    scores: Scores,
    *,
    title: str = "",
    sort: str | None = None,
    worst: int = 20,
    full: str = "scores.csv",
    measures: Iterable[str] | None = None,
) -> FittedTable:
    """A table with a line per label, a column per measure, and the means. It fits the terminal.

    Args:
        scores: Measure -> label -> value; missing and NaN values show as `-`.
        title: Heading.
        sort: Measure by which the worst labels come first; default: the order of the labels.
        worst: With more labels than this, only so many are shown, the worst by `sort` (default: the first measure).
        full: Where the note says that all labels and measures are.
        measures: Those that get a column, the most important first; None = all. The note says that there are more.

    Returns:
        Something for `rich.print` and `Console.print`.

    Example:
        >>> from rich.console import Console
        >>> Console(width=60).print(score_table({"auroc": {"nodule": 0.91, "effusion": 0.83}}))  # doctest: +SKIP
    """
    labels, note = _shown(scores, sort, worst, full)
    shown, more = selected(scores, measures, full)
    names = Column("label", [*map(Text, labels), Text("mean")], names=True, side="left", may_go=False)
    notes = "; ".join([*([note] if note else []), *more])
    return FittedTable([names, *number_columns(shown, labels)], title, notes, strong=True)


def selected(scores: Scores, measures: Iterable[str] | None, full: str) -> tuple[Scores, list[str]]:
    """The scores of these measures, all where none of them is there; and what to say of the others.

    Args:
        scores: Measure -> label -> value.
        measures: Those asked for, None = all.
        full: Where the others are.

    Example:
        >>> selected({"auroc": {}, "auprc": {}}, ["auroc", "organ_iou"], "scores.csv")
        ({'auroc': {}}, ['all 2 measures are in scores.csv'])
    """
    chosen = {name: scores[name] for name in (scores if measures is None else measures) if name in scores} or scores
    return chosen, [f"all {len(scores)} measures are in {full}"] if len(chosen) < len(scores) else []


def number_columns(scores: Scores, labels: Sequence[str]) -> list[Column]:
    """A column for each measure: these labels, and below them the mean over all."""
    return [
        Column(measure, [Text(_cell(value)) for value in (*(values.get(n, math.nan) for n in labels), mean_of(values))])
        for measure, values in scores.items()
    ]


def comparison_table(
    before: Scores,
    after: Scores,
    *,
    titles: tuple[str, str] = ("plain", "mask loss"),
    title: str = "",
    sort: str | None = None,
    worst: int = 20,
    full: str = "scores.csv",
    lower_is_better: Iterable[str] = LOWER_IS_BETTER,
) -> Table:
    """Two runs side by side: for every common measure both values and the difference.

    Differences are green where the second run is better and red where it is worse. Means are taken over the labels that
    both runs could score, so that they compare like with like.

    Args:
        before: Scores of the first run.
        after: Scores of the second run.
        titles: Short names of the runs.
        title: Heading.
        sort: Measure of the second run by which the worst labels come first.
        worst: With more labels than this, only so many are shown.
        full: Where the note says that all labels are.
        lower_is_better: Measures where a fall is good.

    Returns:
        A rich table.

    Raises:
        InputError: The runs have no measure in common.
    """
    measures = [m for m in before if m in after]
    if not measures:
        raise InputError(f"the two runs have no measure in common: {', '.join(before)} and {', '.join(after)}")
    lower = set(lower_is_better)
    labels, note = _shown({m: after[m] for m in measures}, sort, worst, full)
    table = _empty_table(title, note)
    for measure in measures:
        for head in (f"{measure}\n{titles[0]}", f"\n{titles[1]}", "\ndiff"):
            table.add_column(Text(head), justify="right", min_width=max(map(len, head.split())))
    for label in labels:
        cells: list[Text | str] = []
        for m in measures:
            cells += _pair(before[m].get(label, math.nan), after[m].get(label, math.nan), m in lower)
        table.add_row(Text(label), *cells)
    table.add_section()
    means: list[Text | str] = []
    for m in measures:
        both = [label for label in after[m] if _defined(before[m].get(label)) and _defined(after[m][label])]
        means += _pair(mean_of(before[m], both), mean_of(after[m], both), m in lower)
    table.add_row("mean", *means, style="bold")
    return table


def as_rows(scores: Scores, *, sort: str | None = None) -> tuple[list[str], list[list[Any]]]:
    """Column names and one row per label, then the means; undefined scores are None. For sinks and files.

    Example:
        >>> as_rows({"auroc": {"a": 0.5, "b": float("nan")}})
        (['label', 'auroc'], [['a', 0.5], ['b', None], ['mean', 0.5]])
    """
    labels = labels_of(scores) if sort is None else worst_first(scores, sort)
    rows: list[list[Any]] = [[label, *(_plain(v.get(label, math.nan)) for v in scores.values())] for label in labels]
    rows.append(["mean", *(_plain(mean_of(values)) for values in scores.values())])
    return ["label", *scores], rows


def as_csv(scores: Scores, *, sort: str | None = None) -> str:
    """All labels and the means as CSV; undefined scores are empty.

    Example:
        >>> print(as_csv({"auroc": {"a": 0.5}}), end="")
        label,auroc
        a,0.5
        mean,0.5
    """
    columns, rows = as_rows(scores, sort=sort)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(scores: Scores, *, sort: str | None = None) -> str:
    """All labels and the means as a Markdown table.

    Example:
        >>> print(as_markdown({"auroc": {"a": 0.5}}))
        | label | auroc |
        |---|---:|
        | a | 0.500 |
        | mean | 0.500 |
    """
    return rows_as_markdown(*as_rows(scores, sort=sort))


def rows_as_markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Any table as Markdown: the first column to the left, the others to the right, floats with three places.

    Example:
        >>> rows_as_markdown(["a|b", "n"], [["x", None]]).splitlines()[2]
        '| x | - |'
    """

    def cell(value: Any) -> str:
        text = _cell(float(value)) if isinstance(value, float) else _NONE if value is None else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    head = "|---|" + "---:|" * (len(columns) - 1)
    lines = ["| " + " | ".join(map(cell, line)) + " |" for line in ([*columns], *rows)]
    return "\n".join([lines[0], head, *lines[1:]])


def _empty_table(title: str, note: str) -> Table:
    """The look of a comparison, and its column of labels; whatever a user has named is no markup."""
    table = Table(
        title=Text(title) if title else None,
        caption=Text(note) if note else None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("label", no_wrap=True)
    return table


def _shown(scores: Scores, sort: str | None, worst: int, full: str) -> tuple[list[str], str]:
    """The labels to show, and the note that says what is missing."""
    labels = labels_of(scores) if sort is None else worst_first(scores, sort)
    if len(labels) <= worst:
        return labels, ""
    by = sort or next(iter(scores))
    return worst_first(scores, by)[:worst], f"the {worst} worst of {len(labels)} labels by {by}; all are in {full}"


def _pair(before: float, after: float, lower: bool) -> list[Text | str]:
    change = after - before
    if not _defined(change):
        return [_cell(before), _cell(after), _NONE]
    shown = f"{change:+.3f}"
    # What rounds to nothing is neither better nor worse.
    style = "" if float(shown) == 0 else "green" if (change < 0) == lower else "red"
    return [_cell(before), _cell(after), Text(shown, style=style)]


def _defined(value: float | None) -> bool:
    return value is not None and value == value


def _plain(value: float) -> float | None:
    return float(value) if value == value else None


def _cell(value: float) -> str:
    return f"{value:.3f}" if value == value else _NONE
