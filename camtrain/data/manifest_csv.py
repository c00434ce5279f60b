"""CSV files that users write: text in UTF-8 with or without a byte-order mark, columns by name, rows by line number."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from camtrain._errors import InputError, nearest
from camtrain.data._faults import Faults

_KNOWN = {
    "": math.nan,
    "0": 0.0,
    "1": 1.0,
    "-1": math.nan,
    "0.0": 0.0,
    "1.0": 1.0,
    "-1.0": math.nan,
    "nan": math.nan,
    "NaN": math.nan,
}


@dataclass(frozen=True)
class CsvTable:
    """A CSV file that was read.

    Attributes:
        path: The file.
        columns: Names in the order of the header.
        lines: (line number, fields as they are) of every row that is not empty.
    """

    path: Path
    columns: tuple[str, ...]
    lines: tuple[tuple[int, list[str]], ...]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """(line number, column -> text without blanks around it), of the columns asked for that there are."""
        places = [(name, self.columns.index(name)) for name in names if name in self.columns]
        for number, fields in self.lines:
            yield number, {name: fields[place].strip() for name, place in places}

    def truths(self, names: Sequence[str], faults: Faults) -> Iterator[tuple[float, ...]]:
        """The labels of every row; what is none is noted and unknown."""
        places = [self.columns.index(name) for name in names]
        key = self.columns.index("id")
        for number, fields in self.lines:
            # Millions of cells: each is looked at by itself only where one is written in no usual way.
            try:
                yield tuple([_KNOWN[fields[place]] for place in places])
            except KeyError:
                where = f"{self.path}, row {number} (id {fields[key].strip()!r})"
                yield tuple([_read(fields[p].strip(), where, n, faults) for p, n in zip(places, names, strict=True)])


def read_csv(file: Path, required: Sequence[str], what: str, argument: str, faults: Faults | None = None) -> CsvTable:
    """Header and rows of a CSV file; blank lines are left out.

    Args:
        file: The file.
        required: Columns that must be there.
        what: What the file should be, for messages, such as `a manifest`.
        argument: The argument that named it.
        faults: Where semicolons and rows of another length are noted, so that the other rows can be looked at; None
            raises them.

    Raises:
        InputError: Unreadable, no CSV, a column missing, without a name or twice; or what `faults` would take. All of a
            kind are told at once.
    """
    own = Faults(str(file)) if faults is None else faults
    lines = _lines(file, what, argument, own)
    if not lines:
        raise InputError(f"{file}: expected a header {','.join(required)},..., got an empty file: write {what}")
    columns = [name.strip() for name in lines[0][1]]
    _check_columns(file, columns, required, own)
    for number, fields in lines[1:]:
        if len(fields) != len(columns):
            own.add(
                f"{file}, row {number}: expected {len(columns)} fields as in the header, got {len(fields)}: "
                "put fields that contain a comma in quotes, and leave unknown fields empty"
            )
    if faults is None:
        own.stop()
    return CsvTable(file, tuple(columns), tuple(line for line in lines[1:] if len(line[1]) == len(columns)))


def _lines(file: Path, what: str, argument: str, faults: Faults) -> list[tuple[int, list[str]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            mark = _separator(stream.readline())
            stream.seek(0)
            reader = csv.reader(stream, strict=True, delimiter=mark)
            lines = [(reader.line_num, fields) for fields in reader]
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{file}: expected {what} (CSV file), got {reason!r}: check {argument}=") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: expected CSV text in UTF-8, got {error}: save it as CSV in UTF-8") from None
    if mark != "," and lines:
        # A comma within a field of such a file would part it once it is saved with commas: it is not taken as it is.
        faults.add(
            f"{file}: expected columns separated by commas, got {'tabs' if mark == chr(9) else 'semicolons'} in "
            f"{mark.join(lines[0][1])[:60]!r}: save the file with commas"
        )
    return [
        (number, fields) for number, fields in lines if fields and (fields[0].strip() or any(map(str.strip, fields)))
    ]


def _separator(header: str) -> str:
    """What parts the columns, where it is no comma: a semicolon (spreadsheets in much of Europe) or a tab."""
    return "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")


def _check_columns(file: Path, columns: Sequence[str], required: Sequence[str], noted: Faults) -> None:
    faults = Faults(str(file))
    for name in required:
        if name not in columns:
            faults.add(
                f"{file}: expected the columns {', '.join(required)}, {name!r} is missing{nearest(name, columns)}: "
                f"add it{' (organs may be left empty)' if 'organs' in required else ''}"
            )
    for name in dict.fromkeys(columns):
        if not name or columns.count(name) > 1:
            faults.add(
                f"{file}: expected every column to have a name of its own, got {columns.count(name)} "
                f"named {name!r}: rename or delete"
            )
    if faults:  # nothing else can be read then, so that what is known is told now
        faults.lines[:0] = noted.lines
    faults.stop()


def choose_labels(
    file: Path, columns: Sequence[str], taken: Sequence[str], labels: Sequence[str] | None, faults: Faults
) -> tuple[str, ...]:
    """Names of the label columns that are there, in the order asked for.

    Args:
        file: The file, for messages.
        columns: All columns.
        taken: Columns that are no labels.
        labels: What was asked for; None = every column that is not taken.
        faults: Takes: none is there, a name is unknown or given twice, a column looks like a misspelt one of `taken`.
    """
    found = tuple(name for name in columns if name not in taken)
    names = found if labels is None else tuple(labels)
    if not names:
        faults.add(
            f"{file}: expected at least one label, got only the columns {', '.join(columns)}: "
            "add one column per label with 0, 1 or nothing (unknown), and leave labels= out or name such columns"
        )
    odd = set()
    for name in names if labels is None else ():
        meant = next((word for word in taken if word not in columns and one_letter_apart(name.lower(), word)), None)
        if meant is not None:
            odd.add(name)  # its values are no truths
            faults.add(
                f"{file}: the column {name!r} differs from {meant!r} by a letter: rename it to {meant!r}, or say "
                "with labels= that it is a label"
            )
    for name in dict.fromkeys(names):
        if name not in found:
            faults.add(
                f"{file}: labels= names {name!r}, which is no label column{nearest(name, found)}: "
                "add the column to the file or take the label out of labels="
            )
        if names.count(name) > 1:
            faults.add(f"labels= expects every label once, got {name!r} {names.count(name)} times: keep one")
    return tuple(name for name in dict.fromkeys(names) if name in found and name not in odd)


def one_letter_apart(one: str, other: str) -> bool:
    """Is one the other with a letter changed, missing, one too many, or two neighbours exchanged?

    Example:
        >>> one_letter_apart("patiant", "patient"), one_letter_apart("patinet", "patient"), one_letter_apart("a", "a")
        (True, True, False)
    """
    if one == other or abs(len(one) - len(other)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    changed = a[1:] == b[1:] or a[1:] == b or a == b[1:]
    return changed or (len(a) > 1 and len(b) > 1 and a[:2] == b[1::-1] and a[2:] == b[2:])


def _read(text: str, where: str, name: str, faults: Faults) -> float:
    try:
        return read_label(text, where, name)
    except InputError as error:
        faults.add(str(error))
        return math.nan


def read_label(text: str, where: str, name: str) -> float:
    """0 and 1 as they are; empty, -1 and NaN mean unknown.

    Raises:
        InputError: Anything else.

    Example:
        >>> read_label("1", "cases.csv, row 2", "nodule"), read_label("-1", "cases.csv, row 2", "nodule")
        (1.0, nan)
    """
    known = _KNOWN.get(text)
    if known is not None:
        return known
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if value in (0.0, 1.0):
        return value
    if value == -1 or math.isnan(value):
        return math.nan
    raise InputError(
        f"{where}: label {name!r} expects 0, 1, or empty / -1 / NaN for unknown, got {text!r}: correct the value, "
        "or name the label columns with labels= if this column is no label"
    )
