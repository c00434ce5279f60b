"""Answers of readers: files as the study's page saves them, or as a spreadsheet saved them again."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from camtrain._errors import InputError, nearest
from camtrain.evaluation.reader_study import TRUST_ANSWERS, StudyKey

COLUMNS = ("reader", "task", "answer", "seconds", "study")


@dataclass(frozen=True)
class Answer:
    """One answer of one reader.

    Attributes:
        reader: Name or code.
        task: Id.
        answer: A choice of the task; of a trust task 1 to 5.
        seconds: How long the question was on the screen; NaN = not told.
    """

    reader: str
    task: str
    answer: str
    seconds: float


@dataclass(frozen=True)
class Answers:
    """All answers, one per reader and task.

    Attributes:
        given: (reader, task) -> answer.
        readers: In the order of the files.
        repeated: Reader -> answers that came more than once, and count once: the one read last.
        contradicted: Reader -> those of them that were not the same.
    """

    given: dict[tuple[str, str], Answer]
    readers: tuple[str, ...]
    repeated: Counter[str]
    contradicted: Counter[str]


def collect_answers(key: StudyKey, paths: Iterable[str | Path]) -> Answers:
    """Read answer files and check every row against the key.

    Commas, semicolons or tabs, with or without a byte order mark, decimal commas in the seconds: what spreadsheets
    write is read. Of several answers of a reader to a task the one read last counts: give later files later.

    Raises:
        InputError: A file that cannot be read or is empty, a missing column, another study, an unknown task, an answer
            that was no choice.
    """
    given: dict[tuple[str, str], Answer] = {}
    repeated: Counter[str] = Counter()
    contradicted: Counter[str] = Counter()
    for path in paths:
        for answer in read_answers(key, path):
            place = answer.reader, answer.task
            if place in given:
                repeated[answer.reader] += 1
                contradicted[answer.reader] += given[place].answer != answer.answer
            given[place] = answer
    readers = tuple(dict.fromkeys(reader for reader, _ in given))
    if not readers:
        raise InputError("expected at least one answer, got none: give the CSV files that the page saved")
    return Answers(given, readers, repeated, contradicted)


def read_answers(key: StudyKey, path: str | Path) -> list[Answer]:
    """The rows of one file, checked.

    Raises:
        InputError: As `collect_answers`.
    """
    rows = _rows(Path(path))
    return [_checked(key, row, f"{path}, line {line}") for line, row in rows]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows by column name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the CSV files that the page saved") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: save it as CSV UTF-8, or take the file that the page saved"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty: take the file that the page saved at its end")
    head = text.lstrip().splitlines()[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns: list[str] | None = None
    found = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns = _columns([cell.strip() for cell in cells], path)
        elif len(cells) != len(columns):
            raise InputError(
                f"{path}, line {reader.line_num}: expected {len(columns)} cells ({', '.join(columns)}), "
                f"got {len(cells)}: take the file as the page saved it"
            )
        else:
            found.append((reader.line_num, dict(zip(columns, cells, strict=True))))
    return found


def _columns(head: Sequence[str], path: Path) -> list[str]:
    missing = [name for name in COLUMNS if name not in head]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r} (expected {','.join(COLUMNS)}): take the file that the page saved"
        )
    return list(head)


def _checked(key: StudyKey, row: dict[str, str], where: str) -> Answer:
    study, reader, name, answer = (row[column].strip() for column in ("study", "reader", "task", "answer"))
    if study != key.study:
        raise InputError(
            f"{where}: the answer is of study {study!r}, the key of {key.study!r}: give the key of that study"
        )
    if not reader:
        raise InputError(f"{where}: the reader has no name: fill in the column 'reader'")
    if name not in key.tasks:
        raise InputError(f"{where}: the study has no task {name!r}{nearest(name, key.tasks)}")
    task = key.tasks[name]
    # A label may begin or end with a space, a cell of a spreadsheet may too: both sides are compared without.
    choices = TRUST_ANSWERS if task.kind == "trust" else task.choices
    matching = [choice for choice in choices if choice.strip() == answer]
    if not matching:
        raise InputError(f"{where}: {answer!r} is no choice of task {name}; choices: {', '.join(choices)}")
    return Answer(reader, name, matching[0], _seconds(row["seconds"], where))


def _seconds(text: str, where: str) -> float:
    if not text.strip():
        return math.nan
    try:
        seconds = float(text.strip().replace(",", "."))
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(
            f"{where}: expected seconds as a number from 0 on, got {text!r}: correct it, or leave it empty"
        )
    return seconds
