"""The page that `camtrain evaluate` writes: one HTML file with tables and charts, without network or script."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from camtrain._errors import InputError
from camtrain.reporting._files import replacing
from camtrain.reporting._pages import asset, environment, script_hash
from camtrain.reporting.evaluation_digest import first_look, undecided
from camtrain.reporting.evaluation_numbers import Cell, number, score_cell
from camtrain.reporting.evaluation_plots import (
    Plot,
    comparison_plot,
    curves_plot,
    forest_plot,
    sanity_plot,
    shortcut_plot,
)
from camtrain.reporting.evaluation_rows import (
    ComparisonRow,
    Curve,
    EvaluationMeta,
    Measure,
    SanityRow,
    ScoreRow,
    read_rows,
)
from camtrain.reporting.evaluation_scores import FREE, Scores, series_name, title_of, unique
from camtrain.reporting.evaluation_svg import figure_svg
from camtrain.reporting.evaluation_tables import (
    Column,
    Grid,
    Line,
    comparison_grid,
    free_summary,
    label_grid,
    sanity_grid,
    summary,
    undefined_grid,
)

__all__ = [
    "ComparisonRow",
    "Curve",
    "EvaluationMeta",
    "EvaluationPage",
    "Measure",
    "SanityRow",
    "ScoreRow",
    "evaluation_html",
    "write_evaluation",
]

_CHARTS: Final = 12  # of one kind; beyond it the tables have to do
_LEADING: Final = ("auroc", "organ_iou", "energy_inside", "shortcut_reliance/case")


@dataclass(frozen=True, kw_only=True)
class EvaluationPage:
    """All that the page shows.

    Attributes:
        meta: What was evaluated and how.
        rows: The tidy table of the last checkpoint: `ScoreRow` or mappings with its columns (from a CSV: as strings).
        measures: Measure -> what it says; `outside_effect` also stands for `outside_effect/air`.
        comparison: `ComparisonRow` or mappings: two checkpoints.
        curves: Mean insertion and deletion curves.
        sanity: `SanityRow` or mappings: randomised weights.

    Raises:
        InputError: No rows, a column is missing, a value is no number, or two rows speak about the same thing.

    Example:
        >>> row = {"split": "test", "method": "", "layer": "", "label": "nodule", "measure": "auroc", "n": "40"}
        >>> page = EvaluationPage(meta=EvaluationMeta(title="Small net"), rows=[{**row, "mean": "0.8"}])
        >>> page.scores.labels("test")
        ['nodule']
    """

    meta: EvaluationMeta
    rows: Sequence[ScoreRow | Mapping[str, Any]]
    measures: Mapping[str, Measure] = field(default_factory=dict)
    comparison: Sequence[ComparisonRow | Mapping[str, Any]] = ()
    curves: Sequence[Curve] = ()
    sanity: Sequence[SanityRow | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError("a page of an evaluation needs rows, got none: check the case filter and the splits")
        for name, kind in (("rows", ScoreRow), ("comparison", ComparisonRow), ("sanity", SanityRow)):
            object.__setattr__(self, name, read_rows(kind, getattr(self, name)))
        self.scores  # noqa: B018  (repeated rows are refused here, not while the page is made)

    @functools.cached_property
    def scores(self) -> Scores:
        """The rows, to be asked."""
        return Scores(tuple(self.rows), self.measures)  # type: ignore[arg-type]


def write_evaluation(page: EvaluationPage, path: Path) -> Path:
    """Write the page; the file is whole or not there.

    Args:
        page: What to show.
        path: File to make or to replace.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> row = ScoreRow("test", "", "", "nodule", "auroc", 40, 0.8)
        >>> page = EvaluationPage(meta=EvaluationMeta(title="Small net"), rows=[row])
        >>> write_evaluation(page, Path(tempfile.mkdtemp()) / "evaluation.html").name
        'evaluation.html'
    """
    text = evaluation_html(page)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def evaluation_html(page: EvaluationPage) -> str:
    """The page as one string: no request leaves it, the same input gives the same bytes.

    Sections without content are left out. All text is escaped; the only script allowed is the page's own, by its hash.

    Example:
        >>> row = ScoreRow("test", "", "", "<b>", "auroc", 40, 0.8)
        >>> text = evaluation_html(EvaluationPage(meta=EvaluationMeta(title="Small net"), rows=[row]))
        >>> text.startswith("<!doctype html>"), "<b>" in text, "&lt;b&gt;" in text
        (True, False, True)
    """
    script = asset("evaluation.js")
    scores = page.scores
    return (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            meta=page.meta,
            style=asset("evaluation.css"),
            script=script,
            digest=script_hash(script),
            headline=_headline(page),
            methods=unique(row.method for row in scores.rows if row.method),
            layers=unique(row.layer for row in scores.rows if row.layer),
            labels=len({label for split in scores.splits for label in scores.labels(split)}),
            splits=scores.splits,
            first=[(split, found) for split in scores.splits if (found := first_look(scores, split))],
            sections=_sections(page),
            thresholds=[(label, number(value)) for label, value in page.meta.thresholds.items()],
            definitions=_definitions(scores),
        )
    )


def _headline(page: EvaluationPage) -> Grid:
    """A line per split: cases, patients and the leading means."""
    scores, meta = page.scores, page.meta
    measures = []
    for measure in _LEADING:
        series = [FREE, *(s for split in scores.splits for s in scores.series(split, measure))]
        found = next((s for s in series if any(scores.get(sp, s, "macro", measure) for sp in scores.splits)), None)
        if found is not None:
            measures.append((measure, found))
    columns = [Column("Split", numeric=False), Column("Cases")]
    columns += [Column("Patients")] if meta.patients else []
    columns += [Column(title_of(m), scores.better(m), series_name(s) if any(s) else "") for m, s in measures]
    lines = []
    for split in scores.splits:
        cells = [_count(meta.cases.get(split))]
        cells += [_count(meta.patients.get(split))] if meta.patients else []
        cells += [score_cell(scores.get(split, s, "macro", m)) for m, s in measures]
        lines.append(Line(split, tuple(cells)))
    maps = unique(series_name(s) for _, s in measures if any(s))
    caption = "Means over labels of each split" + (f"; scores of maps: {', '.join(maps)}" if maps else "")
    return Grid(caption, tuple(columns), tuple(lines))


def _count(value: int | None) -> Cell:
    return Cell(number(None), why="not given") if value is None else Cell(str(value))


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a section.

    Attributes:
        title: Heading; empty where the section's is enough.
        svg: Chart.
        caption: How to read it.
        grid: Table.
        note: A sentence before the table.
        folded: Closed until asked for.
    """

    title: str = ""
    svg: Markup | None = None
    caption: str = ""
    grid: Grid | None = None
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A section with at least one block."""

    ident: str
    title: str
    blocks: tuple[Block, ...]
    note: str = ""


def _sections(page: EvaluationPage) -> list[Section]:
    """The sections with content, in the order of reading."""
    makers = (
        ("summary", "Summary", _summary_blocks),
        ("shortcuts", "What the network uses", _shortcut_blocks),
        ("labels", "Labels, drawn", _forest_blocks),
        ("tables", "Labels, in numbers", _label_blocks),
        ("curves", "Insertion and deletion", _curve_blocks),
        ("comparison", "Two checkpoints", _comparison_blocks),
        ("sanity", "Randomised networks", _sanity_blocks),
        ("undefined", "Undefined", _undefined_blocks),
    )
    made = [Section(ident, title, tuple(make(page)), _NOTES.get(ident, "")) for ident, title, make in makers]
    return [section for section in made if section.blocks]


_NOTES: Final = {
    "summary": (
        "Mean over labels with its interval. Bold: the best of a column, only if its interval overlaps the "
        "interval of no other line of the table. This is stricter than a paired test; what is not bold may still "
        "differ. ↑ higher is better, ↓ lower is better."
    ),
    "labels": "One row per label. Where two intervals overlap, the order of the labels says little.",
    "undefined": (
        "A counted pair of case and label without a score enters no mean, neither as 0 nor as 1. Read a mean together "
        "with its share of undefined pairs."
    ),
    "sanity": "A method whose maps survive random weights does not explain the network.",
    "shortcuts": (
        "A map shows where cells look, not what they use: a cell may have seen the whole image. Replacing a region and "
        "reading the probability again measures use."
    ),
}


def _summary_blocks(page: EvaluationPage) -> Iterator[Block]:
    for split in page.scores.splits:
        for make in (summary, free_summary):
            if grid := make(page.scores, split):
                yield Block(grid=grid)


def _drawn(plot: Plot, ident: str, prefix: str, **more: Any) -> Block:
    title = f"{prefix}: {plot.title}" if prefix else plot.title
    # The renderer has escaped every text of the figure.
    svg = Markup(figure_svg(plot.figure, title=title, description=plot.description, ident=ident))  # noqa: S704
    return Block(title=title, svg=svg, caption=plot.caption, **more)


def _shortcut_blocks(page: EvaluationPage) -> Iterator[Block]:
    for index, split in enumerate(page.scores.splits):
        if plot := shortcut_plot(page.scores, split):
            parts = [f"{label} ({', '.join(names)})" for label, names in undecided(page.scores, split).items()]
            note = f"Share undefined for: {', '.join(parts)}." if parts else ""
            yield _drawn(plot, f"use{index}", split, note=note)


def _methods(page: EvaluationPage) -> list[str]:
    """All methods, in an order that fixes their colours on the whole page."""
    rows = [*page.rows, *page.comparison, *page.curves, *page.sanity]
    return unique(row.method for row in rows if row.method)  # type: ignore[union-attr]


def _forest_blocks(page: EvaluationPage) -> Iterator[Block]:
    scores = page.scores
    wanted = [(split, layer) for split in scores.splits for layer in unique(s[1] for s in scores.series(split))]
    wanted = wanted or [(split, "") for split in scores.splits]
    for index, (split, layer) in enumerate(wanted[:_CHARTS]):
        if plot := forest_plot(scores, split, layer, _methods(page)):
            yield _drawn(plot, f"forest{index}", split, folded=index > 0)
    if rest := wanted[_CHARTS:]:
        names = ", ".join(f"{split} at {layer}" for split, layer in rest)
        yield Block(title="Not drawn", note=f"Only {_CHARTS} charts are drawn; see the tables for {names}.")


def _label_blocks(page: EvaluationPage) -> Iterator[Block]:
    first = True
    for split in page.scores.splits:
        for series in [*page.scores.series(split), FREE]:
            if grid := label_grid(page.scores, split, series):
                yield Block(title=grid.caption, grid=grid, folded=not first)
                first = False


def _curve_blocks(page: EvaluationPage) -> Iterator[Block]:
    for index, split in enumerate(unique(curve.split for curve in page.curves)):
        if plot := curves_plot(page.curves, split, _methods(page)):
            yield _drawn(plot, f"curve{index}", split)


def _comparison_blocks(page: EvaluationPage) -> Iterator[Block]:
    rows: Sequence[Any] = page.comparison
    wanted = list(dict.fromkeys((row.split, (row.method, row.layer)) for row in rows))
    for index, (split, series) in enumerate(wanted[:_CHARTS]):
        if plot := comparison_plot(rows, split, series, page.scores.better):
            yield _drawn(plot, f"compare{index}", split, folded=index > 1)
    if found := comparison_grid(rows):
        yield Block(
            title="All comparisons" if not found[1] else "Comparisons", grid=found[0], note=found[1], folded=True
        )


def _sanity_blocks(page: EvaluationPage) -> Iterator[Block]:
    rows: Sequence[Any] = page.sanity
    if plot := sanity_plot(rows, _methods(page)):
        yield _drawn(plot, "sanity0", "")
    if grid := sanity_grid(rows):
        yield Block(title=grid.caption, grid=grid, folded=True)


def _undefined_blocks(page: EvaluationPage) -> Iterator[Block]:
    if grid := undefined_grid(page.scores):
        yield Block(grid=grid)


def _definitions(scores: Scores) -> list[tuple[str, str, bool | None]]:
    """Measures of the page that have a description: name as in the CSV, sentence, direction."""
    names = unique(row.measure for row in scores.rows)
    found = [(name, scores.about(name)) for name in names]
    return [(name, about.description, about.higher_is_better) for name, about in found if about is not None]
