"""A table that is whole at the width at which it is printed: numbers are never cut, names fold onto several lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_LONGEST = 16  # cells of a word that has no place to fold at; a longer one is broken where the line ends
_SHORTEST = 6
_PIECE = re.compile(r"[^\s_/-]+[\s_/-]*|[\s_/-]+")


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: Its heading.
        cells: Its cells, from above.
        names: Are they names, which may fold? Numbers and bars never do.
        side: Where they stand in the column.
        may_go: May it be left out where there is no room?
    """

    head: str
    cells: Sequence[Text]
    names: bool = False
    side: Literal["left", "right"] = "right"
    may_go: bool = True

    @property
    def least(self) -> int:
        """The narrowest it can be, in cells of the terminal."""
        cells = [_longest(cell.plain) if self.names else cell.cell_len for cell in self.cells]
        return max([_longest(self.head), *cells, 1])

    @property
    def most(self) -> int:
        """Its width when nothing is folded."""
        return max([cell_len(self.head), *(cell.cell_len for cell in self.cells), 1])


@dataclass(frozen=True)
class FittedTable:
    """For `rich.print` and `Console.print`; plain text throughout, so that a bracket in a name is a bracket.

    Attributes:
        columns: The most important first: where there is no room, the last ones are left out, and the note says which.
        title: Heading.
        note: What stands below.
        strong: The last row is one of means, set apart.

    Example:
        >>> names, numbers = [Text("pericardial_effusion")], [Text("0.125")]
        >>> table = FittedTable([Column("label", names, True, "left", may_go=False), Column("organ_iou", numbers)])
        >>> Console(width=22).print(table)  # doctest: +SKIP
    """

    columns: Sequence[Column]
    title: str = ""
    note: str = ""
    strong: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out for this console."""
        kept, gap = _kept(self.columns, options.max_width)
        widths = _widths(kept, options.max_width - 1 - gap * len(kept))
        table = Table(box=SIMPLE, padding=(0, gap - 1, 0, 0))
        for column, width in zip(kept, widths, strict=True):
            table.add_column(Text(fold(column.head, width)), justify=column.side, width=width, overflow="fold")
        rows = list(zip(*(_folded(column, width) for column, width in zip(kept, widths, strict=True)), strict=True))
        for place, row in enumerate(rows):
            last = self.strong and place == len(rows) - 1
            if last:
                table.add_section()
            table.add_row(*row, style="bold" if last else None)
        if self.title:
            yield Text(self.title, style="table.title")
        yield table
        gone = [column.head for column in self.columns if column not in kept]
        left_out = f"no room for {', '.join(gone)}" if gone else ""
        if note := "; ".join(part for part in (self.note, left_out) if part):
            yield Text(note, style="table.caption")


def fold(text: str, width: int) -> str:
    """A name on as many lines as it needs, broken behind blanks, underscores, hyphens and slashes.

    Example:
        >>> fold("pericardial_effusion", 12).split()
        ['pericardial_', 'effusion']
    """
    lines = [""]
    for piece in _PIECE.findall(" ".join(text.split())):
        if lines[-1] and cell_len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _longest(text: str) -> int:
    return min(_LONGEST, max((cell_len(piece.rstrip()) for piece in _PIECE.findall(text)), default=0))


def _folded(column: Column, width: int) -> Iterator[Text]:
    for cell in column.cells:
        yield Text(fold(cell.plain, width), style=cell.style) if column.names else cell


def _kept(columns: Sequence[Column], width: int) -> tuple[list[Column], int]:
    """The columns for which there is room, and the blanks between them: two, or one where that saves a column."""
    kept = list(columns)
    gap = 2 if sum(column.least + 2 for column in kept) < width else 1
    going = [column for column in kept if column.may_go]
    while len(going) > 1 and sum(column.least + gap for column in kept) >= width:
        kept.remove(going.pop())
    return kept, gap


def _widths(columns: Sequence[Column], room: int) -> list[int]:
    """The widths: names are unfolded first, then headings from the left; on a very narrow terminal names give way."""
    widths = [column.least for column in columns]
    spare = room - sum(widths)
    for place in sorted(range(len(columns)), key=lambda place: not columns[place].names):
        column = columns[place]
        shrink = min(0, max(spare, _SHORTEST - column.least)) if column.names else 0
        more = max(0, min(spare, column.most - column.least)) + shrink
        widths[place], spare = widths[place] + more, spare - more
    return widths
