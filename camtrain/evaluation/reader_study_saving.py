"""The analysis of a reader study as tables: for the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from camtrain.evaluation.reader_study_analysis import StudyResult, StudyRow
from camtrain.reporting._files import replacing


@dataclass(frozen=True)
class PlainTable:
    """A table of words.

    Attributes:
        title: What it shows.
        header: One word per column.
        rows: Cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def study_tables(result: StudyResult, labels: bool = True) -> list[PlainTable]:
    """What a reader of the analysis wants to see.

    Args:
        result: The analysis.
        labels: With the tables per finding.
    """
    return [table for table in _tables(result, labels) if table.rows]


def _tables(result: StudyResult, labels: bool) -> Iterator[PlainTable]:
    percent = f"{100 * result.level:g} %"
    some = ("n", "readers", "cases")
    accuracy = ("right", f"Wilson {percent}", f"bootstrap {percent}", "chance", "of the present", "p guessing")
    difference = ("difference", f"bootstrap {percent}", "p", "p (Holm)")
    trust = ("score -2..2", f"bootstrap {percent}", "p")
    whole = [row for row in result.rows if row.label == "all"]
    rows = tuple(_accuracy(r, r.subject) for r in whole if r.part == "accuracy")
    yield PlainTable("Which finding?", ("map", *some, *accuracy), rows)
    yield PlainTable(
        "Differences on the same findings",
        ("maps", *some, *difference),
        tuple((*_signed(r, r.subject), p_value(r.p_holm)) for r in whole if r.part == "difference"),
    )
    yield PlainTable(
        "Which map is more reasonable? (above 0: the first)",
        ("contest", *some, *trust),
        tuple(_signed(r, r.subject) for r in whole if r.part == "trust"),
    )
    if labels:
        parts = [row for row in result.rows if row.label != "all"]
        rows = tuple(_accuracy(r, f"{r.subject}: {r.label}") for r in parts if r.part == "accuracy")
        yield PlainTable("Which finding? by finding", ("map: finding", *some, *accuracy), rows)
        rows = tuple(_signed(r, f"{r.subject}: {r.label}") for r in parts if r.part == "trust")
        yield PlainTable("More reasonable, by finding", ("contest: finding", *some, *trust), rows)
    yield _readers(result)
    agreed = tuple((kind, number(alpha)) for kind, alpha in result.agreement.items())
    yield PlainTable("Agreement of the readers", ("tasks", "Krippendorff's alpha"), agreed)


def _accuracy(row: StudyRow, name: str) -> tuple[str, ...]:
    ends = (span(row.wilson_low, row.wilson_high), span(row.low, row.high))
    chances = (number(row.chance), number(row.chance_present))
    return (name, str(row.n), str(row.readers), str(row.cases), number(row.value), *ends, *chances, p_value(row.p))


def _signed(row: StudyRow, name: str) -> tuple[str, ...]:
    counts = (str(row.n), str(row.readers), str(row.cases))
    return (name, *counts, number(row.value, "+"), span(row.low, row.high, "+"), p_value(row.p))


def _readers(result: StudyResult) -> PlainTable:
    header = ("reader", "answered", "missing", "repeated", "contradicted", "right", "score", "left", "median s")
    rows = tuple(
        (
            *(r.reader, str(r.answered), str(r.missing), str(r.repeated), str(r.contradicted)),
            *(number(r.accuracy), number(r.trust, "+"), number(r.left)),
            "–" if math.isnan(r.seconds) else f"{r.seconds:.1f}",
        )
        for r in result.readers
    )
    return PlainTable("Readers", header, rows)


def number(value: float, sign: str = "") -> str:
    """Three digits, or a dash for NaN.

    Example:
        >>> number(0.5), number(0.5, "+"), number(float("nan"))
        ('0.500', '+0.500', '–')
    """
    return "–" if math.isnan(value) else f"{value:{sign}.3f}"


def span(low: float, high: float, sign: str = "") -> str:
    """An interval.

    Example:
        >>> span(0.25, 0.75)
        '0.250 to 0.750'
    """
    return "–" if math.isnan(low) else f"{number(low, sign)} to {number(high, sign)}"


def p_value(p: float) -> str:
    """Four digits.

    Example:
        >>> p_value(0.04), p_value(1e-9)
        ('0.0400', '< 0.0001')
    """
    return "–" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def print_study(console: Console, result: StudyResult) -> None:
    """The tables without those by finding."""
    for plain in study_tables(result, labels=False):
        table = Table(title=escape(plain.title), box=None, pad_edge=False, title_justify="left")
        for name in plain.header:
            table.add_column(escape(name), overflow="fold")
        for row in plain.rows:
            table.add_row(*map(escape, row))
        console.print(table)


def study_markdown(result: StudyResult) -> str:
    """All tables as Markdown."""
    parts = [
        f"# Reader study {result.study}\n\n{len(result.readers)} reader{'s' * (len(result.readers) != 1)}; intervals "
        f"{100 * result.level:g} %, {result.repeats} resamplings, seed {result.seed}."
    ]
    for table in study_tables(result):
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append(f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """A label may hold what Markdown takes for a column or for HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def save_result(result: StudyResult, out: Path) -> list[Path]:
    """Write `analysis.json`, `scores.csv`, `readers.csv` and `analysis.md`.

    Returns:
        Their paths.
    """
    files = {
        "analysis.json": json.dumps(_plain(dataclasses.asdict(result)), indent=1, ensure_ascii=False) + "\n",
        "scores.csv": _csv(result.rows),
        "readers.csv": _csv(result.readers),
        "analysis.md": study_markdown(result),
    }
    for name, text in files.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [out / name for name in files]


def _csv(rows: Sequence[Any]) -> str:
    file = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in _plain(dataclasses.asdict(r)).items()} for r in rows)
    return file.getvalue()


def _plain(value: Any) -> Any:
    """NaN is no JSON: null."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
