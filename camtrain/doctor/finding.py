"""What a check has to say: how bad, where, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Place:
    """One row or file that a finding is about.

    Attributes:
        where: File of the manifest and row, or the data module's split and case.
        id: Name of the case; "" where it is about no case.
        file: The volume; "" where it is about no volume.
        got: What came, here.
    """

    where: str
    id: str = ""
    file: str = ""
    got: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or suspicious.

    Attributes:
        check: Name of the check, see `camtrain.doctor.check_table`.
        severity: `error` = training would fail, `warning` = it would run, and go wrong or be misread, `note` = worth
            knowing.
        title: The finding in a few words.
        expected: What was expected.
        got: What came; where there are places, in sum.
        todo: What to do.
        places: Every row or file that it is about.

    Example:
        >>> Finding("patients", "error", "a patient in two splits", "one split", "p1 in two", "move row 3").severity
        'error'
    """

    check: str
    severity: Severity
    title: str
    expected: str
    got: str
    todo: str
    places: tuple[Place, ...] = ()


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; within each those of most places first, else as they were found.

    Example:
        >>> note, error = (Finding("c", s, s, "", "", "") for s in ("note", "error"))
        >>> [f.severity for f in worst_first([note, error])]
        ['error', 'note']
    """
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -len(f.places)))


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    Example:
        >>> count(1, "case"), count(3, "case"), count(2, "is", "are")
        ('1 case', '3 cases', '2 are')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def bytes_in_words(number: float) -> str:
    """A size in MiB or GiB.

    Example:
        >>> bytes_in_words(3 * 2**20), bytes_in_words(2.5 * 2**30)
        ('3 MiB', '2.5 GiB')
    """
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def number_in_words(number: float) -> str:
    """Three digits, without an exponent for what is large.

    Example:
        >>> number_in_words(1081.3), number_in_words(4.0971), number_in_words(0.027)
        ('1,081', '4.1', '0.027')
    """
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def some(words: Iterable[object], most: int = 6) -> str:
    """The first words of a list, and how many more there are.

    Example:
        >>> some("abc", 2), some([])
        ('a, b and 1 more', 'none')
    """
    texts = [str(word) for word in words]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more if texts else "none"
