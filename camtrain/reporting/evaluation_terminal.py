"""The averages of an evaluation as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camtrain.reporting.evaluation_rows import ComparisonRow, ScoreRow


def print_summary(console: Console, rows: Sequence[ScoreRow], comparison: Sequence[ComparisonRow] = ()) -> None:
    """Macro means with their intervals, a table per split; differences with p-values, where there are any.

    Args:
        console: Where to.
        rows: All rows of the evaluation.
        comparison: All rows of the comparison.

    Example:
        >>> row = ScoreRow("test", "hirescam", "layer4", "macro", "energy_inside", 34, 0.71, 0.65, 0.77)
        >>> print_summary(Console(width=60, no_color=True, file=None), [row])  # doctest: +NORMALIZE_WHITESPACE
                test: mean over labels
        measure        hirescam layer4
        energy_inside  0.710 (0.650 to 0.770)
    """
    macro = [row for row in rows if row.label == "macro"]
    for split in dict.fromkeys(row.split for row in macro):
        console.print(_scores([row for row in macro if row.split == split], f"{split}: mean over labels"))
    averages = [row for row in comparison if row.label == "macro" and row.difference is not None]
    for split in dict.fromkeys(row.split for row in averages):
        title = f"{split}: second minus first, on the same cases"
        console.print(_differences([row for row in averages if row.split == split], title))


def _scores(rows: Sequence[ScoreRow], title: str) -> Table:
    series = [s for s in dict.fromkeys((row.method, row.layer) for row in rows) if any(s)]
    table = _table(title, "measure", *(" ".join(s) for s in series or [("", "")]))
    for measure in dict.fromkeys(row.measure for row in rows):
        found = {(row.method, row.layer): row for row in rows if row.measure == measure}
        if ("", "") in found:
            # Needs no map: the same whatever the method.
            table.add_row(Text(measure), _number(found["", ""]))
        else:
            table.add_row(Text(measure), *(_number(found[s]) if s in found else "" for s in series))
    return table


def _differences(rows: Sequence[ComparisonRow], title: str) -> Table:
    table = _table(title, "measure", "method, layer", "first", "second", "difference", "p")
    for row in rows:
        table.add_row(Text(row.measure), Text(f"{row.method} {row.layer}".strip()), *_cells(row))
    return table


def _cells(row: ComparisonRow) -> Iterator[str]:
    yield from ("–" if v is None else f"{v:.3f}" for v in (row.mean_a, row.mean_b))
    ends = "" if row.low is None or row.high is None else f" ({row.low:+.3f} to {row.high:+.3f})"
    yield f"{row.difference:+.3f}{ends}"
    yield "–" if row.p is None else f"{row.p:.4f}"


def _number(row: ScoreRow) -> str:
    if row.mean is None:
        return "–"
    ends = row.interval
    return f"{row.mean:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column))
    return table
