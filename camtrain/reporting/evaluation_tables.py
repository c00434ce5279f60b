"""The tables of an evaluation page: rows in, cells with their text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from camtrain.reporting.evaluation_numbers import Cell, interval, number, p_value, percent, score_cell
from camtrain.reporting.evaluation_plots import significant
from camtrain.reporting.evaluation_rows import CHANCE, ComparisonRow, SanityRow, ScoreRow, is_average
from camtrain.reporting.evaluation_scores import FREE, Scores, Series, average_name, series_name, title_of, unique

MANY_COMPARISONS: Final = 1200  # a table with more rows helps nobody, and costs megabytes


@dataclass(frozen=True, slots=True)
class Column:
    """A heading.

    Attributes:
        text: What it says.
        better: True = higher is better, False = lower is, None = neither or no score.
        hint: One sentence about it.
        numeric: Aligned and sorted as numbers.
    """

    text: str
    better: bool | None = None
    hint: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """A line: its heading and its cells."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    Attributes:
        caption: What it shows.
        columns: Headings; the first belongs to the names of the lines.
        lines: Its body, which can be sorted.
        foot: Averages, which stay at the foot.
    """

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: tuple[Line, ...] = ()


def _heading(scores: Scores, measure: str) -> Column:
    about = scores.about(measure)
    return Column(title_of(measure), scores.better(measure), about.description if about else "")


def summary(scores: Scores, split: str) -> Grid | None:
    """Macro means: a line per method and layer, a column per measure; the rule for bold is `clear_winner`."""
    series = [s for s in scores.series(split) if any(_macro(scores, split, s, m) for m in scores.measured(split, s))]
    measures = unique(m for s in series for m in scores.measured(split, s) if _macro(scores, split, s, m))
    if not series:
        return None
    winners = {m: clear_winner([_macro(scores, split, s, m) for s in series], scores.better(m)) for m in measures}
    lines = tuple(
        Line(
            series_name(s),
            tuple(score_cell(_macro(scores, split, s, m), best=winners[m] == index) for m in measures),
        )
        for index, s in enumerate(series)
    )
    columns = (Column("Method and layer", numeric=False), *(_heading(scores, m) for m in measures))
    return Grid(f"{split}: means over labels of the measures of maps", columns, lines)


def _macro(scores: Scores, split: str, series: Series, measure: str) -> ScoreRow | None:
    return scores.get(split, series, "macro", measure)


def clear_winner(rows: Sequence[ScoreRow | None], better: bool | None) -> int | None:
    """The row whose interval lies apart from the interval of every other row, on the good side.

    None where no side is good, where fewer than two rows have a mean, or where one of them has no interval. This is
    stricter than a paired test: rows that are not told apart here may still differ.

    Example:
        >>> rows = [ScoreRow("test", "", "", "macro", "organ_iou", 9, v, v - 0.1, v + 0.1) for v in (0.2, 0.8)]
        >>> clear_winner(rows, True), clear_winner(rows, False), clear_winner(rows, None)
        (1, 0, None)
    """
    known = [(index, row.interval) for index, row in enumerate(rows) if row is not None and row.defined]
    ends = [(index, both) for index, both in known if both is not None]
    if better is None or len(known) < 2 or len(ends) < len(known):
        return None
    for index, (low, high) in ends:
        others = [both for other, both in ends if other != index]
        if all(low > top if better else high < bottom for bottom, top in others):
            return index
    return None


def free_summary(scores: Scores, split: str) -> Grid | None:
    """Averages of the measures that need no map: a line per measure."""
    averages = scores.averages(split)
    measures = [m for m in scores.measured(split, FREE) if any(scores.get(split, FREE, a, m) for a in averages)]
    averages = [a for a in averages if any(scores.get(split, FREE, a, m) for m in measures)]
    if not measures:
        return None
    lines = tuple(
        Line(_with_direction(scores, m), tuple(score_cell(scores.get(split, FREE, a, m)) for a in averages))
        for m in measures
    )
    columns = (Column("Measure", numeric=False), *(Column(average_name(a)) for a in averages))
    return Grid(f"{split}: means over labels of the measures that need no map", columns, lines)


def _with_direction(scores: Scores, measure: str) -> str:
    return title_of(measure) + {True: " ↑", False: " ↓", None: ""}[scores.better(measure)]


def label_grid(scores: Scores, split: str, series: Series) -> Grid | None:
    """Label x measure for one method and layer, averages at the foot."""
    measures = scores.measured(split, series)

    def line(label: str) -> Line | None:
        rows = [scores.get(split, series, label, m) for m in measures]
        counts = {row.n for row in rows if row is not None}
        if not counts:
            return None
        n = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)}–{max(counts)}"
        return Line(average_name(label), (Cell(n), *(score_cell(row) for row in rows)))

    lines = tuple(found for label in scores.labels(split) if (found := line(label)))
    foot = tuple(found for label in scores.averages(split) if (found := line(label)))
    columns = (Column("Label", numeric=False), Column("n"), *(_heading(scores, m) for m in measures))
    return Grid(f"{split}, {series_name(series)}: every label", columns, lines, foot) if lines else None


def undefined_grid(scores: Scores) -> Grid | None:
    """Where counted pairs have no score: a line per split, method, layer and measure."""
    lines = tuple(line for split in scores.splits for line in _undefined_lines(scores, split))
    columns = tuple(
        Column(text, numeric=numeric)
        for text, numeric in (
            ("Measure", False),
            ("Split", False),
            ("Method and layer", False),
            ("Counted", True),
            ("Undefined", True),
            ("Labels concerned", True),
            ("Most", False),
        )
    )
    return Grid("Counted pairs without a score", columns, lines) if lines else None


def _undefined_lines(scores: Scores, split: str) -> Iterator[Line]:
    groups: dict[tuple[str, Series], list[ScoreRow]] = {}
    for row in scores.of(split):
        if not is_average(row.label) and row.measure != CHANCE:
            groups.setdefault((row.measure, (row.method, row.layer)), []).append(row)
    for (measure, series), rows in groups.items():
        concerned = [row for row in rows if row.undefined > 0]
        counted = sum(row.n for row in rows)
        if not concerned:
            continue
        share = sum(row.n * row.undefined for row in rows) / counted if counted else 1.0
        most = max(concerned, key=lambda row: row.undefined)
        texts = (split, series_name(series), str(counted), percent(share), f"{len(concerned)} of {len(rows)}")
        yield Line(title_of(measure), (*map(Cell, texts), Cell(f"{most.label}: {percent(most.undefined)} of {most.n}")))


def comparison_grid(rows: Sequence[ComparisonRow]) -> tuple[Grid, str] | None:
    """Every comparison; of very many only the means over labels and what differs, and a sentence that says so."""
    if not rows:
        return None
    shown, note = list(rows), ""
    if len(rows) > MANY_COMPARISONS:
        shown = [row for row in rows if is_average(row.label) or significant(row)]
        shown = sorted(shown, key=lambda row: (row.p_holm is None, row.p_holm or 0.0))[:MANY_COMPARISONS]
        note = (
            f"{len(shown)} of {len(rows)} comparisons are shown: means over labels, and labels with Holm p < 0.05, "
            "smallest p first. The CSV holds all of them."
        )
    columns = tuple(
        Column(text, numeric=numeric)
        for text, numeric in (
            ("Label", False),
            ("Measure", False),
            ("Split", False),
            ("Method and layer", False),
            ("n", True),
            ("A", True),
            ("B", True),
            ("B − A", True),
            ("p", True),
            ("p (Holm)", True),
        )
    )
    return Grid("Checkpoint B against checkpoint A", columns, tuple(map(_comparison_line, shown))), note


def _comparison_line(row: ComparisonRow) -> Line:
    why = "" if row.difference is not None else "no case that both could score"
    cells = (
        Cell(title_of(row.measure)),
        Cell(row.split),
        Cell(series_name((row.method, row.layer))),
        Cell(str(row.n)),
        Cell(number(row.mean_a), why=why),
        Cell(number(row.mean_b), why=why),
        Cell(number(row.difference), interval(row.low, row.high, row.difference), why, best=significant(row)),
        Cell(p_value(row.p), why="" if row.p is not None else "not tested"),
        Cell(p_value(row.p_holm), why="" if row.p_holm is not None else "not tested"),
    )
    return Line(average_name(row.label), cells)


def sanity_grid(rows: Sequence[SanityRow]) -> Grid | None:
    """Every sanity check as numbers."""
    columns = (
        *(Column(text, numeric=False) for text in ("Stage", "Module", "Method")),
        Column("Mean |Spearman|"),
        Column("SSIM"),
    )

    def cell(value: float | None) -> Cell:
        return Cell(number(value), why="" if value is not None else "constant or empty map")

    lines = tuple(Line(r.stage, (Cell(r.module), Cell(r.method), cell(r.spearman), cell(r.ssim))) for r in rows)
    return Grid("Similarity to the maps of the trained network", columns, lines) if lines else None
