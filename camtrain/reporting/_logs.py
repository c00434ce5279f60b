"""The CSV files of a run's folder: read strictly, or as far as they can be read; a changed one is put aside."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from camtrain._errors import InputError

Row = TypeVar("Row")


class Log(NamedTuple):
    """What such a file holds.

    Attributes:
        columns: Its header.
        what: What a row is, for messages: `scores`.
    """

    columns: tuple[str, ...]
    what: str


def finite(value: Any) -> float:
    """A value as a finite number.

    Raises:
        ValueError: It is none, or not finite.

    Example:
        >>> finite("0.25")
        0.25
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value}")
    return number


def read_rows(path: Path, log: Log, make: Callable[[list[str]], Row]) -> list[Row]:
    """All rows, in the order of writing; empty where there is no file.

    Raises:
        InputError: The file was changed into something else.
    """
    rows, faults = readable_rows(path, log, make)
    if faults:
        raise InputError(f"{path}{faults[0]}")
    return rows


def readable_rows(path: Path, log: Log, make: Callable[[list[str]], Row]) -> tuple[list[Row], list[str]]:
    """The rows that are as they should be, and of the others what is wrong.

    Args:
        path: The file.
        log: What it should hold.
        make: Makes a row of its cells; raises ValueError or IndexError where they are none.

    Returns:
        Rows, and sentences to be put behind the name of the file.
    """
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return rows_in(file, log, make)


def rows_in(file: Iterable[str], log: Log, make: Callable[[list[str]], Row]) -> tuple[list[Row], list[str]]:
    """As `readable_rows`, of an open file or its lines."""
    rows: list[Row] = []
    faults: list[str] = []
    reader = csv.reader(file)
    try:
        if (header := next(reader, [])) != list(log.columns):
            return rows, [f": expected the columns {', '.join(log.columns)}, got {header}"]
        for cells in reader:
            try:
                rows.append(make(cells))
            except (ValueError, IndexError) as error:
                faults.append(f", line {reader.line_num}: not a row of {log.what} ({error})")
    except csv.Error as error:
        faults.append(f", line {reader.line_num}: not readable as CSV ({error}), nor is what follows")
    return rows, faults


class Ending:
    """Where a log of a run ends, as long as nobody else changes the file: what comes behind needs no row before it.

    To replace rows all of them must be read: about a kilobyte of memory for each, in every epoch, and more every time.
    """

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None
        self._last = (-1, -1)

    def is_before(self, path: Path, places: Iterable[tuple[int, int]]) -> bool:
        """Do all of these (epoch, step) lie behind what is in the file?"""
        return self._file is not None and self._file == _state(path) and min(places, default=self._last) > self._last

    def note(self, path: Path, places: Iterable[tuple[int, int]]) -> None:
        """The file was written, and holds these among others that came before."""
        self._file, self._last = _state(path), max(places, default=(-1, -1))


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def put_aside(path: Path) -> Path:
    """Give a file another name, one that is free: `cases.csv` becomes `cases.changed.csv`, `cases.changed2.csv`, ...

    Returns:
        Where it is now.
    """
    number = 1
    while (target := path.with_stem(f"{path.stem}.changed{number if number > 1 else ''}")).exists():
        number += 1
    os.replace(path, target)  # noqa: PTH105  (as in `replacing`)
    return target


def adding(
    path: Path, add: Callable[[Sequence[Row]], object], readable: Callable[[], tuple[list[Row], list[str]]]
) -> Callable[[Sequence[Row]], None]:
    """Adds rows to a log, also to one that somebody has changed: what can be read of it is kept, the file put aside.

    Args:
        path: The file.
        add: Adds rows; refuses a changed file.
        readable: Its readable rows, and what is wrong with the others.
    """

    def go_on(rows: Sequence[Row]) -> None:
        try:
            add(rows)
            return
        except InputError:
            kept, faults = readable()
        aside = put_aside(path)
        warnings.warn(
            f"camtrain: {path}{'; '.join(faults[:1])}{_more(len(faults) - 1)}. It was changed by somebody else and is "
            f"now {aside.name}; {len(kept)} rows that could be read are kept, and the run goes on",
            stacklevel=2,
        )
        add([*kept, *rows])

    return go_on


def _more(count: int) -> str:
    return "" if count < 1 else f" (and {count} more lines)"
