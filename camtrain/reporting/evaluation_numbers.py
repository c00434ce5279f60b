"""Numbers as text: as many digits as say something, and a dash with a reason where there is no number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from camtrain.reporting.evaluation_rows import ScoreRow

DASH: Final = "–"
_TINY: Final = 5e-4


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What is read first.
        more: Smaller, behind or below it: the interval.
        why: Why there is no number; empty where there is one.
        best: Shown in bold.
    """

    text: str
    more: str = ""
    why: str = ""
    best: bool = False


def number(value: float | None, digits: int | None = None) -> str:
    """A number with a typographic minus; two decimals from 0.1 on, more below, fewer above 10.

    Args:
        value: None is a dash.
        digits: Decimals; default: chosen by the size.

    Example:
        >>> number(0.7142), number(-0.0321), number(0.00004), number(12.345), number(None), number(0.0)
        ('0.71', '−0.032', '4e−05', '12.3', '–', '0.00')
    """
    if value is None:
        return DASH
    text = _scientific(value) if digits is None and 0 < abs(value) < _TINY else f"{value:.{_digits(value, digits)}f}"
    if text.startswith("-") and not any(c in "123456789" for c in text):  # no minus zero
        text = text[1:]
    return text.replace("-", "−")


def _scientific(value: float) -> str:
    return f"{value:.0e}"


def _digits(value: float, digits: int | None) -> int:
    if digits is not None:
        return digits
    size = abs(value)
    if size >= 100:
        return 0
    if size >= 10:
        return 1
    return 2 if size >= 0.0995 or size == 0 else 3


def interval(low: float | None, high: float | None, mean: float | None = None) -> str:
    """Both ends in brackets, with the decimals of the mean; empty where either is missing.

    Example:
        >>> interval(-0.1, 0.25), interval(0.093, 0.112, 0.101), interval(None, 0.2)
        ('[−0.10, 0.25]', '[0.09, 0.11]', '')
    """
    if low is None or high is None:
        return ""
    digits = None if mean is None or 0 < abs(mean) < _TINY else _digits(mean, None)
    return f"[{number(low, digits)}, {number(high, digits)}]"


def percent(share: float) -> str:
    """A share in per cent; only nothing is 0 % and only all is 100 %.

    Example:
        >>> percent(0.5), percent(0.004), percent(0.9999), percent(0.0), percent(0.00001)
        ('50 %', '0.4 %', '> 99 %', '0 %', '< 0.1 %')
    """
    if 0 < share < 0.001:
        return "< 0.1 %"
    if share < 0.0995 and share > 0:
        return f"{100 * share:.1f} %"
    if 0.995 <= share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def p_value(p: float | None) -> str:
    """Three decimals, and never zero.

    Example:
        >>> p_value(0.0312), p_value(0.0), p_value(None)
        ('0.031', '< 0.001', '–')
    """
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def score_cell(row: ScoreRow | None, best: bool = False) -> Cell:
    """Mean and interval of a row, or a dash and why.

    Example:
        >>> score_cell(ScoreRow("test", "", "", "nodule", "auroc", 0, None)).why
        'no case counted'
    """
    if row is None:
        return Cell(DASH, why="not measured")
    if row.mean is None:
        return Cell(DASH, why="no case counted" if row.n == 0 else f"undefined in all of {row.n} counted")
    more = interval(row.low, row.high, row.mean)
    return Cell(number(row.mean), more, "" if more else "no interval", best)


def in_words(row: ScoreRow) -> str:
    """Mean, interval and n of a row within a sentence.

    Example:
        >>> in_words(ScoreRow("test", "cam", "layer4", "nodule", "organ_iou", 34, 0.21, 0.15, 0.28))
        '0.21 [0.15, 0.28], n = 34'
    """
    return (
        " ".join(part for part in (number(row.mean), interval(row.low, row.high, row.mean)) if part) + f", n = {row.n}"
    )
