"""What the alarms look at, what they answer, and what they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from camtrain._errors import InputError

ALL = "all"
"""The label of a judgement about the maps of all labels together."""
Values = Mapping[str, Mapping[str, float]]
"""Measure -> label -> value of one epoch; what is undefined is missing."""


@dataclass(frozen=True)
class Seen:
    """What the rules look at: one split after an epoch, and what was there before.

    Attributes:
        now: Values of this epoch.
        before: Values of the epochs before it, the oldest first.
    """

    now: Values
    before: Sequence[Values] = ()

    def of(self, measure: str) -> Mapping[str, float]:
        """Label -> value of this epoch."""
        return self.now.get(measure, {})

    def earlier(self, measure: str, label: str, epochs: int) -> list[float]:
        """Values of the last `epochs` epochs before this one, where they are defined."""
        rows = (row.get(measure, {}).get(label, math.nan) for row in self.before[-epochs:])
        return [value for value in rows if value == value]


@dataclass(frozen=True)
class Judgement:
    """What a rule says of one label.

    Attributes:
        label: Its name, or `ALL`.
        value: The number that was compared.
        threshold: With what.
        speaks: Is it beyond the threshold?
    """

    label: str
    value: float
    threshold: float
    speaks: bool


class Alarm(Protocol):
    """One rule; the classes below are all there are."""

    name: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    what: ClassVar[str]
    means: ClassVar[str]
    tries: ClassVar[str]

    @property
    def patience(self) -> int:
        """After how many judgements in a row that speak it is raised."""

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """One judgement per label that has the figures; none where there is nothing to judge by."""


def rises(seen: Seen, measure: str, window: int, threshold: float) -> Iterator[Judgement]:
    """How far the size of a measure lies above its smallest value of the window; labels with a past only."""
    for label, value in seen.of(measure).items():
        if earlier := seen.earlier(measure, label, window):
            rise = abs(value) - min(map(abs, earlier))
            yield Judgement(label, rise, threshold, rise > threshold)


def check_numbers(alarm: Any) -> None:
    """Numbers are numbers, and counts at least 1.

    Raises:
        InputError: One is not.
    """
    for field in dataclasses.fields(alarm):
        value = getattr(alarm, field.name)
        if field.name in ("patience", "window", "every_n_epochs", "cases", "memory_mib"):
            fits = (
                isinstance(value, int) and not isinstance(value, bool) and value >= (2 if field.name == "cases" else 1)
            )
            wanted = "a whole number of at least " + ("2" if field.name == "cases" else "1")
        elif field.name == "margin":
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 0.5
            wanted = "a share of the image from 0 to below 0.5"
        elif field.name == "seen":
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
            wanted = "a share of the image between 0 and 1"
        elif field.name in ("threshold", "outside", "inside", "correlation", "gain", "auroc"):
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            wanted = "a number"
        else:
            continue
        if not fits:
            raise InputError(f"alarm {alarm.name!r}: {field.name}= expects {wanted}, got {value!r}")
