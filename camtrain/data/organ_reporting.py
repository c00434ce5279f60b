"""Who has organs, by split and label, and whether having them gives a label away.

Cases are rarely segmented at random: the sick first, one hospital first, the scans on which a segmenter did not fail.
The mask loss then acts on a selection, and what goes with the selection goes with the loss. Two questions are asked
of each label and split:

* **How much** does having organs tell? The part of the cases with the finding that have organs, minus the part of
  those without it. (1 + difference) / 2 is the AUROC of a reader who looks at nothing but whether there are organs,
  so 0.5 means that it tells nothing.
* **Could it be chance?** Fisher's exact test, two-sided, which counts tables and so holds for the smallest numbers.
  With all labels and splits asked at once some are bound to look striking: p values are Holm's, which keeps the
  chance of even one false alarm at the level, whatever the dependence between labels. Scans of one patient share
  findings and fate, so each patient enters once, with the first of its scans whose truth is known.

A warning needs both: Holm's p below 0.05 and a difference of at least 0.1, since among 40,000 scans a difference that
no network could use is significant. Where even the most lopsided table with these counts would not reach the level,
the answer is "too few", not "no".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from scipy.special import gammaln

from camtrain._errors import InputError

LEVEL = 0.05
LEAST = 0.1
_log = logging.getLogger(__name__)
_CUT = 6
_ORDER = {"train": 0, "val": 1, "test": 2}

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class OrganRow:
    """One label in one split.

    Attributes:
        split: Word of the split.
        label: Name of the label.
        present: Cases with the finding.
        present_with: Those of them that have organs.
        absent: Cases known to be without the finding.
        absent_with: Those of them that have organs.
        unknown: Cases whose truth is not known.
        p: Fisher's exact p over patients, before the correction; 1 where one margin is empty.
        least_p: The smallest p that any table with these margins could give.
        holm: p after Holm's correction over all rows of the report.
    """

    split: str
    label: str
    present: int
    present_with: int
    absent: int
    absent_with: int
    unknown: int
    p: float
    least_p: float
    holm: float = math.nan

    @property
    def difference(self) -> float:
        """Share of the present with organs minus share of the absent with organs; NaN without one of them."""
        if not self.present or not self.absent:
            return math.nan
        return self.present_with / self.present - self.absent_with / self.absent

    @property
    def auroc(self) -> float:
        """AUROC of having organs as a score for the label."""
        return (1 + self.difference) / 2

    @property
    def told(self) -> bool:
        """Does having organs predict this label, by more than chance and enough to matter?"""
        return self.holm < LEVEL and abs(self.difference) >= LEAST

    @property
    def verdict(self) -> str:
        """`predicts`, `no`, or `too few` where these counts could not have shown it."""
        if self.told:
            return "predicts"
        return "too few" if not self.least_p < LEVEL else "no"


@dataclass(frozen=True)
class OrganReport:
    """Who has organs.

    Attributes:
        rows: One per split and label.
        cases: Split -> (cases, those with organs).
    """

    rows: tuple[OrganRow, ...]
    cases: Mapping[str, tuple[int, int]]

    @property
    def partial(self) -> bool:
        """Do some cases have organs and others not?"""
        return any(0 < with_organs < cases for cases, with_organs in self.cases.values())

    @property
    def told(self) -> list[OrganRow]:
        """Rows in which having organs predicts the label, the strongest first."""
        return sorted((row for row in self.rows if row.told), key=lambda row: -abs(row.difference))

    def warnings(self) -> list[str]:
        """One sentence for each label that having organs predicts in a split, and what to do."""
        return [
            f"having organs predicts {row.label!r} in {row.split!r}: {row.present_with} of {row.present} with the "
            f"finding have organs, {row.absent_with} of {row.absent} without it (AUROC {row.auroc:.2f}, Holm's "
            f"p {row.holm:.2g}); the mask loss then acts on a selection: segment the others too, or organs at random"
            for row in self.told
        ]

    def line(self, split: str) -> str:
        """A split in one sentence, with the labels of which nobody is known to have the finding."""
        cases, with_organs = self.cases[split]
        empty = [row.label for row in self.rows if row.split == split and not row.present]
        some = f"{', '.join(empty[:6])}{f' and {len(empty) - 6} more' if len(empty) > 6 else ''}"
        return f"{split}: {cases} cases, {with_organs} with organs" + (f"; nobody with {some}" if empty else "")

    def table(self, split: str) -> Table:
        """One split for a terminal.

        Args:
            split: Its word.
        """
        cases, with_organs = self.cases[split]
        table = Table(title=Text(f"{split}: {cases} cases, {with_organs} with organs"), title_justify="left")
        table.add_column("label")
        for name in ("present", "with organs", "absent", "with organs", "unknown", "difference", "Holm's p"):
            table.add_column(name, justify="right")
        table.add_column("do organs predict it?")
        for row in (row for row in self.rows if row.split == split):
            table.add_row(
                Text(row.label),
                str(row.present),
                _part(row.present_with, row.present),
                str(row.absent),
                _part(row.absent_with, row.absent),
                str(row.unknown or ""),
                "" if math.isnan(row.difference) else f"{row.difference:+.2f}",
                f"{row.holm:.2g}",
                row.verdict if 0 < with_organs < cases else "",
                style="red" if row.told else "",
            )
        return table


def organ_report(
    labels: Sequence[str],
    label: Sequence[Sequence[float]] | NDArray[np.floating],
    has_organs: Sequence[bool],
    split: Sequence[str],
    patient: Sequence[str] | None = None,
) -> OrganReport:
    """Count who has organs, and ask whether having them predicts a label.

    Args:
        labels: L names.
        label: (N, L) of 0, 1 and NaN = unknown.
        has_organs: N flags.
        split: N words.
        patient: N patients, "" = unknown; a case without one stands for itself.

    Returns:
        The report; see the module for what is asked and how.

    Raises:
        InputError: The lengths differ.

    Example:
        >>> truth = [[1.0]] * 20 + [[0.0]] * 20
        >>> report = organ_report(["mass"], truth, [True] * 18 + [False] * 20 + [True] * 2, ["train"] * 40)
        >>> report.rows[0].difference, report.rows[0].verdict
        (0.8, 'predicts')
    """
    truth = np.asarray(label, dtype=float).reshape(len(split), -1)
    has = np.asarray(has_organs, dtype=bool)
    if truth.shape != (len(has), len(labels)) or len(split) != len(has):
        raise InputError(
            f"expected truths (N, {len(labels)}), N flags and N splits, got {truth.shape}, {len(has)} and {len(split)}"
        )
    people = [name or f"\0{case}" for case, name in enumerate(patient or [""] * len(has))]
    words = np.asarray(split)
    rows: list[OrganRow] = []
    cases: dict[str, tuple[int, int]] = {}
    for word in sorted(set(split), key=lambda word: (_ORDER.get(word, len(_ORDER)), word)):
        inside = np.flatnonzero(words == word)
        cases[word] = (len(inside), int(has[inside].sum()))
        names = [people[case] for case in inside]
        rows += [_row(word, name, truth[inside, column], has[inside], names) for column, name in enumerate(labels)]
    return OrganReport(tuple(_corrected(rows)), cases)


def report_and_warn(report: OrganReport, source: str) -> None:
    """Tell the log what a report says: counts as information, labels that organs predict as a warning.

    Nothing is asked where everybody or nobody has organs.

    Args:
        report: From `organ_report`.
        source: File or folder, for the message.
    """
    for split, (cases, with_organs) in report.cases.items():
        _log.info("%s: %d of %d cases of %r have organs", source, with_organs, cases, split)
    warnings = report.warnings()
    for sentence in warnings[:_CUT]:
        _log.warning("%s: %s", source, sentence)
    if len(warnings) > _CUT:
        more = ", ".join(f"{row.label} ({row.split})" for row in report.told[_CUT:])
        _log.warning("%s: the same of %s", source, more)


def _row(split: str, label: str, truth: NDArray[np.float64], has: Bools, people: Sequence[str]) -> OrganRow:
    known = ~np.isnan(truth)
    present = known & (truth == 1)
    absent = known & (truth == 0)
    first = _first_of_each(people, known)
    p, least_p = exact_test(
        int((present & has & first).sum()),
        int((present & first).sum()),
        int((absent & has & first).sum()),
        int((absent & first).sum()),
    )
    return OrganRow(
        split=split,
        label=label,
        present=int(present.sum()),
        present_with=int((present & has).sum()),
        absent=int(absent.sum()),
        absent_with=int((absent & has).sum()),
        unknown=int((~known).sum()),
        p=p,
        least_p=least_p,
    )


def _first_of_each(people: Sequence[str], known: Bools) -> Bools:
    """The first known case of each patient."""
    first = np.zeros(len(people), dtype=bool)
    seen: set[str] = set()
    for case in np.flatnonzero(known).tolist():
        if people[case] not in seen:
            seen.add(people[case])
            first[case] = True
    return first


def exact_test(present_with: int, present: int, absent_with: int, absent: int) -> tuple[float, float]:
    """Fisher's exact test, and the smallest p that any table with the same margins could give.

    Example:
        >>> p, least = exact_test(3, 3, 0, 3)
        >>> round(p, 3), round(least, 3)
        (0.1, 0.1)
        >>> exact_test(3, 3, 4, 4)
        (1.0, 1.0)
    """
    with_organs, total = present_with + absent_with, present + absent
    if not 0 < with_organs < total or not present or not absent:
        return 1.0, 1.0
    counts = np.arange(max(0, with_organs - absent), min(present, with_organs) + 1)
    chances = np.exp(
        _log_choices(present, counts) + _log_choices(absent, with_organs - counts) - _log_choices(total, with_organs)
    )
    # Tables as likely as the one at hand count too; the factor covers what the logarithms lose.
    p, *ends = (chances[chances <= chances[place] * (1 + 1e-7)].sum() for place in (present_with - counts[0], 0, -1))
    return min(1.0, float(p)), min(1.0, float(min(ends)))


def _log_choices(total: int, some: NDArray[np.int_] | int) -> NDArray[np.float64]:
    choices: NDArray[np.float64] = gammaln(total + 1) - gammaln(np.add(some, 1)) - gammaln(np.subtract(total + 1, some))
    return choices


def _corrected(rows: Sequence[OrganRow]) -> list[OrganRow]:
    """Rows with Holm's p. Rows that could not show anything are no question and cost the others nothing.

    Leaving them out by their margins alone is Tarone's remark: a test that cannot reject cannot reject falsely.
    """
    holm = [1.0] * len(rows)
    asked = [place for place, row in enumerate(rows) if row.least_p < LEVEL]
    highest = 0.0
    for rank, place in enumerate(sorted(asked, key=lambda place: rows[place].p)):
        highest = max(highest, min(1.0, rows[place].p * (len(asked) - rank)))
        holm[place] = highest
    return [replace(row, holm=p) for row, p in zip(rows, holm, strict=True)]


def _part(some: int, all_of_them: int) -> str:
    return f"{some} ({100 * some / all_of_them:.0f} %)" if all_of_them else "0"


def cases_report(labels: Sequence[str], cases: Iterable[object]) -> OrganReport:
    """The report of cases as a manifest has them.

    Args:
        labels: Names.
        cases: With `label`, `organs` (None = none), `split` and `patient`.
    """
    found = list(cases)
    return organ_report(
        labels,
        [list(case.label) for case in found],  # type: ignore[attr-defined]
        [case.organs is not None for case in found],  # type: ignore[attr-defined]
        [case.split for case in found],  # type: ignore[attr-defined]
        [case.patient for case in found],  # type: ignore[attr-defined]
    )
