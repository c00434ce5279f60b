"""The page of `camtrain doctor`: findings worst first, what was seen, what was asked without a finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from camtrain.reporting._files import replacing
from camtrain.reporting._pages import asset, environment

MARK = "camtrain doctor"
_MOST = 200  # places of one finding on the page


class PlaceLike(Protocol):
    """A row or file."""

    @property
    def where(self) -> str:
        """File and row."""

    @property
    def id(self) -> str:
        """Case."""

    @property
    def file(self) -> str:
        """Volume."""

    @property
    def got(self) -> str:
        """What came."""


class FindingLike(Protocol):
    """What is wrong or suspicious."""

    @property
    def check(self) -> str:
        """Name of the check."""

    @property
    def severity(self) -> str:
        """`error`, `warning` or `note`."""

    @property
    def title(self) -> str:
        """In a few words."""

    @property
    def expected(self) -> str:
        """What was expected."""

    @property
    def got(self) -> str:
        """What came."""

    @property
    def todo(self) -> str:
        """What to do."""

    @property
    def places(self) -> Sequence[PlaceLike]:
        """Where."""


@dataclass(frozen=True)
class DoctorTable:
    """A table of what was seen.

    Attributes:
        heading: Above it.
        says: A sentence.
        columns: Headings.
        rows: Texts; the first of a row is its heading.
    """

    heading: str
    says: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class DoctorPage:
    """All that the page holds.

    Attributes:
        title: Heading.
        verdict: One sentence.
        fails: Would training fail?
        counts: How many findings of which kind.
        lead: What was looked at.
        findings: Worst first.
        tables: What was seen.
        quiet: Checks without a finding: name and question.
        left_out: What was not looked at, and why.
        command: What was typed.
    """

    title: str
    verdict: str
    fails: bool
    counts: str
    lead: str
    findings: Sequence[FindingLike] = ()
    tables: Sequence[DoctorTable] = ()
    quiet: Sequence[tuple[str, str]] = field(default_factory=list)
    left_out: Sequence[str] = ()
    command: str = ""


def doctor_html(page: DoctorPage) -> str:
    """The page as one string: no request leaves it, and it has no script.

    Example:
        >>> "&lt;b&gt;" in doctor_html(DoctorPage("<b>", "Fine.", False, "no finding", ""))
        True
    """
    style = asset("evaluation.css") + "\n" + asset("doctor.css")
    return environment().get_template("doctor.html.j2").render(page=page, style=style, most=_MOST, mark=MARK)


def write_doctor_page(page: DoctorPage, path: Path) -> Path:
    """Write the page; the file is whole or not there."""
    text = doctor_html(page)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def is_doctor_page(path: Path) -> bool:
    """Was this file written by `write_doctor_page`? So that a mistyped name replaces nothing else."""
    with path.open("rb") as file:
        return f'content="{MARK}"'.encode() in file.read(2000)
