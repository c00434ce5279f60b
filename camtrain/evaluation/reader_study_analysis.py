"""What the answers of a reader study say: accuracy by method, differences, trust, agreement, each with an interval."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from camtrain._errors import InputError
from camtrain.evaluation.comparing import holm
from camtrain.evaluation.intervals import check_level
from camtrain.evaluation.reader_study import KeyTask, Kind, StudyKey
from camtrain.evaluation.reader_study_answers import Answers
from camtrain.evaluation.reader_study_statistics import (
    flip_test,
    guessing_tail,
    krippendorff,
    mean_interval,
    wilson,
)
from camtrain.evaluation.resampling import Floats, Units


@dataclass(frozen=True)
class StudyRow:
    """One number of the analysis; NaN = not defined.

    Attributes:
        part: `accuracy` (of a discrimination), `difference` (of two accuracies on the same findings) or `trust` (-2 to
            2, above 0 = the first is the more reasonable).
        subject: Model and method, or what is compared, the first minus the second.
        label: A finding, or `all`.
        n: Answers.
        readers: Readers that gave them.
        cases: Cases (patients) that they are about.
        value: Mean.
        wilson_low: Of an accuracy: interval that takes answers as independent.
        wilson_high: Its upper end.
        low: Bootstrap over cases, and over readers where there are several.
        high: Its upper end.
        chance: Of an accuracy: what guessing among the choices gets.
        chance_present: Of an accuracy: what guessing among the present findings gets.
        p: Of an accuracy against guessing (one-sided, exact); else against 0 (two-sided, flips of cases).
        p_holm: Of a difference: adjusted for the number of differences.
    """

    part: str
    subject: str
    label: str
    n: int
    readers: int
    cases: int
    value: float
    wilson_low: float = math.nan
    wilson_high: float = math.nan
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan
    chance_present: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan


@dataclass(frozen=True)
class ReaderRow:
    """One reader.

    Attributes:
        reader: Name.
        answered: Tasks with an answer.
        missing: Tasks without.
        repeated: Answers that came more than once and count once.
        contradicted: Those of them that differed; the one read last counts.
        accuracy: Of the discriminations; NaN without.
        trust: Mean trust score; NaN without.
        left: Share of trust answers on the left side, of those on a side: about a half for a reader without a habit.
        seconds: Median time of an answer.
    """

    reader: str
    answered: int
    missing: int
    repeated: int
    contradicted: int
    accuracy: float
    trust: float
    left: float
    seconds: float


@dataclass(frozen=True)
class StudyResult:
    """The analysis.

    Attributes:
        study: Name of the study.
        rows: All numbers.
        readers: One line per reader.
        agreement: Kind of task -> Krippendorff's alpha (nominal; ordinal for trust); NaN for one reader.
        level: Of the intervals.
        repeats: Of the bootstrap.
        seed: Of the resampling.
    """

    study: str
    rows: tuple[StudyRow, ...]
    readers: tuple[ReaderRow, ...]
    agreement: Mapping[str, float]
    level: float
    repeats: int
    seed: int

    def row(self, part: str, subject: str, label: str = "all") -> StudyRow:
        """One number.

        Raises:
            InputError: There is none.
        """
        for row in self.rows:
            if (row.part, row.subject, row.label) == (part, subject, label):
                return row
        raise InputError(f"the study has no {part} of {subject!r} for {label!r}")


def analyse_study(
    key: StudyKey, answers: Answers, repeats: int = 2000, level: float = 0.95, seed: int = 0
) -> StudyResult:
    """Everything that the answers say.

    Args:
        key: Of the study.
        answers: From `collect_answers`.
        repeats: Resamplings, and flips of the tests.
        level: Of the intervals.
        seed: Of the resampling.

    Raises:
        InputError: No repeats, or a level outside 0..1.

    Example:
        >>> from collections import Counter
        >>> from camtrain.evaluation.reader_study_answers import Answer
        >>> task = KeyTask("discrimination", "c1", "c1", "nodule", ("hirescam",), ("nodule", "effusion"), ("nodule",))
        >>> answer = Answer("ann", "t1", "nodule", 4.0)
        >>> answers = Answers({("ann", "t1"): answer}, ("ann",), Counter(), Counter())
        >>> analyse_study(StudyKey("0123", {"t1": task}), answers).row("accuracy", "hirescam").value
        1.0
    """
    check_level(level)
    if repeats < 2:
        raise InputError(f"--repeats expects 2 or more, got {repeats}: 2000 is usual")
    table = _Table(key, answers, repeats, level, seed)
    rows = [*_accuracies(table), *_adjusted(list(_differences(table))), *_trust(table)]
    return StudyResult(
        study=key.study,
        rows=tuple(rows),
        readers=tuple(_reader(table, reader) for reader in answers.readers),
        agreement={kind: table.agreement(kind) for kind in ("discrimination", "trust") if table.of(kind)},
        level=level,
        repeats=repeats,
        seed=seed,
    )


def trust_score(task: KeyTask, answer: str) -> int:
    """-2 to 2; above 0 = the first source is the more reasonable, on whichever side it stood.

    Example:
        >>> task = KeyTask("trust", "c", "c", "nodule", ("B hirescam", "A hirescam"), (), first="A hirescam")
        >>> trust_score(task, "5")
        2
    """
    to_the_right = int(answer) - 3
    return -to_the_right if task.sources[0] == task.first else to_the_right


@dataclass(frozen=True)
class _Table:
    """Answers as matrices of readers and tasks."""

    key: StudyKey
    answers: Answers
    repeats: int
    level: float
    seed: int

    def of(self, kind: Kind, **wanted: str) -> list[str]:
        """Tasks of a kind whose attributes are these."""
        return [
            name
            for name, task in self.key.tasks.items()
            if task.kind == kind and all(getattr(task, k) == v for k, v in wanted.items())
        ]

    def values(self, tasks: Sequence[str]) -> Floats:
        """(readers, tasks): 1 right, 0 wrong; trust scores; NaN = not answered."""
        return np.array([[self._value(r, t) for t in tasks] for r in self.answers.readers], dtype=np.float64)

    def _value(self, reader: str, task: str) -> float:
        given = self.answers.given.get((reader, task))
        if given is None:
            return math.nan
        of = self.key.tasks[task]
        return float(given.answer == of.label) if of.kind == "discrimination" else trust_score(of, given.answer)

    def units(self, tasks: Sequence[str]) -> Units:
        """Cases or patients of tasks."""
        return Units.of([self.key.tasks[t].unit for t in tasks])

    def agreement(self, kind: Kind) -> float:
        """Krippendorff's alpha of all tasks of a kind."""
        tasks = self.of(kind)
        if kind == "trust":
            return krippendorff(self.values(tasks), "ordinal")
        # By place among the choices, which is random: by name, offering few of many findings would look like agreement.
        given, of = self.answers.given, self.key.tasks
        said = [
            [of[t].choices.index(given[r, t].answer) if (r, t) in given else math.nan for t in tasks]
            for r in self.answers.readers
        ]
        return krippendorff(np.array(said, dtype=np.float64), "nominal")

    def row(self, part: str, subject: str, label: str, values: Floats, units: Units) -> StudyRow:
        """What every part has: counts, mean and bootstrap interval."""
        there = ~np.isnan(values)
        low, high = mean_interval(values, units, self.repeats, self.level, self.seed)
        return StudyRow(
            part=part,
            subject=subject,
            label=label,
            n=int(there.sum()),
            readers=int(there.any(axis=1).sum()),
            cases=int(units.having(np.atleast_1d(there.any(axis=0))).sum()),
            value=float(values[there].mean()) if there.any() else math.nan,
            low=low,
            high=high,
        )


def _accuracies(table: _Table) -> Iterator[StudyRow]:
    for source in table.key.sources():
        tasks = [t for t in table.of("discrimination") if table.key.tasks[t].sources == (source,)]
        labels = dict.fromkeys(table.key.tasks[t].label for t in tasks)
        for label in ("all", *sorted(labels)):
            some = [t for t in tasks if label == "all" or table.key.tasks[t].label == label]
            yield _accuracy(table, source, label, some)


def _accuracy(table: _Table, source: str, label: str, tasks: list[str]) -> StudyRow:
    values = table.values(tasks)
    there = ~np.isnan(values)
    row = table.row("accuracy", source, label, values, table.units(tasks))
    chances, informed = (
        np.broadcast_to([getattr(table.key.tasks[t], name) for t in tasks], values.shape)[there]
        for name in ("chance", "chance_present")
    )
    hits = int(values[there].sum())
    low, high = wilson(hits, row.n, table.level)
    return dataclasses.replace(
        row,
        wilson_low=low,
        wilson_high=high,
        chance=float(chances.mean()) if row.n else math.nan,
        chance_present=float(informed.mean()) if row.n else math.nan,
        p=guessing_tail(hits, chances) if row.n else math.nan,
    )


def _differences(table: _Table) -> Iterator[StudyRow]:
    """Every two sources, on the findings of cases that a reader saw under both."""
    tasks = table.key.tasks
    for first, second in itertools.combinations(table.key.sources(), 2):
        shown = {
            source: {
                (tasks[t].case, tasks[t].label): t for t in table.of("discrimination") if source in tasks[t].sources
            }
            for source in (first, second)
        }
        common = [pair for pair in shown[first] if pair in shown[second]]
        if not common:
            continue
        values = table.values([shown[first][p] for p in common]) - table.values([shown[second][p] for p in common])
        units = table.units([shown[first][p] for p in common])
        yield _tested(table, table.row("difference", f"{first} - {second}", "all", values, units), values, units)


def _adjusted(rows: Sequence[StudyRow]) -> Iterator[StudyRow]:
    """All differences are one family of tests."""
    for row, p in zip(rows, holm([row.p for row in rows]), strict=True):
        yield dataclasses.replace(row, p_holm=float(p))


def _trust(table: _Table) -> Iterator[StudyRow]:
    tasks = table.key.tasks
    for contest in dict.fromkeys(tasks[t].contest for t in table.of("trust")):
        asked = table.of("trust", contest=contest)
        for label in ("all", *sorted({tasks[t].label for t in asked})):
            some = [t for t in asked if label == "all" or tasks[t].label == label]
            values, units = table.values(some), table.units(some)
            yield _tested(table, table.row("trust", contest, label, values, units), values, units)


def _tested(table: _Table, row: StudyRow, values: Floats, units: Units) -> StudyRow:
    return dataclasses.replace(row, p=flip_test(values, units, table.repeats, table.seed))


def _reader(table: _Table, reader: str) -> ReaderRow:
    given = [answer for (who, _), answer in table.answers.given.items() if who == reader]
    tasks = table.key.tasks
    right = [a.answer == tasks[a.task].label for a in given if tasks[a.task].kind == "discrimination"]
    trust = [trust_score(tasks[a.task], a.answer) for a in given if tasks[a.task].kind == "trust"]
    sides = [int(a.answer) < 3 for a in given if tasks[a.task].kind == "trust" and a.answer != "3"]
    seconds = [a.seconds for a in given if not math.isnan(a.seconds)]
    return ReaderRow(
        reader=reader,
        answered=len(given),
        missing=len(tasks) - len(given),
        repeated=table.answers.repeated[reader],
        contradicted=table.answers.contradicted[reader],
        accuracy=_mean(right),
        trust=_mean(trust),
        left=_mean(sides),
        seconds=float(np.median(seconds)) if seconds else math.nan,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
