"""Two pieces of work against each other, in turns, on a machine that is never quiet. Not a benchmark."""

from __future__ import annotations

import csv
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import binom


class Ratio(NamedTuple):
    """(with) / (without) over pairs.

    Attributes:
        median: Of the ratios.
        low: Lower end of the interval of 90 % of that median.
        high: Its upper end.
        extra: Median of the differences, in milliseconds.
        plain: Median of the piece without, in milliseconds.
        pairs: How many.
    """

    median: float
    low: float
    high: float
    extra: float
    plain: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def interleaved(
    without: Callable[[], Any],
    with_it: Callable[[], Any],
    pairs: int,
    clock: Callable[[], float] = time.process_time,
    warm: int = 2,
    seconds: float = math.inf,
    keep: Path | None = None,
    row: str = "",
) -> Ratio:
    """Time both in every pair, who goes first alternating.

    Args:
        without: The plain piece.
        with_it: The same with what is measured.
        pairs: How many count.
        clock: Processor time, which others on the machine disturb least; `time.perf_counter` is wall time.
        warm: Pairs before that do not count.
        seconds: Of wall time, after which no other pair begins, once there are three.
        keep: Every pair is written here as it ends. The pairs of `row` that it already holds count among `pairs`.
        row: Their name in that file.
    """
    begun = time.perf_counter()
    found = kept(keep, row) if keep else []
    missing = max(0, pairs - len(found))
    for pair in range(missing and warm + missing):
        if len(found) >= 3 and time.perf_counter() - begun > seconds:
            break
        spent = {}
        for piece in (without, with_it) if pair % 2 else (with_it, without):
            start = clock()
            piece()
            spent[piece] = clock() - start
        if pair >= warm:
            found.append((spent[without], spent[with_it]))
            if keep:
                with keep.open("a", newline="") as file:
                    csv.writer(file).writerow((row, *found[-1]))
    return summary(found)


def kept(file: Path, row: str) -> list[tuple[float, float]]:
    """Seconds without and with, of the pairs of a row that an earlier run wrote into `file`."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [(float(without), float(with_it)) for name, without, with_it in csv.reader(lines) if name == row]


def summary(found: Sequence[tuple[float, float]]) -> Ratio:
    """What the pairs (seconds without, seconds with) come to."""
    ratios = [with_it / without for without, with_it in found]
    return Ratio(
        statistics.median(ratios),
        *median_interval(ratios),
        1000 * statistics.median(with_it - without for without, with_it in found),
        1000 * statistics.median(without for without, _ in found),
        len(found),
    )


def median_interval(values: Sequence[float], level: float = 0.9) -> tuple[float, float]:
    """Interval of the median by order statistics: no assumption about how the values are spread.

    Example:
        >>> median_interval(range(1, 31))
        (11, 20)
    """
    ordered = sorted(values)
    below = max(0, int(binom.ppf((1 - level) / 2, len(ordered), 0.5)) - 1)
    return ordered[below], ordered[len(ordered) - 1 - below]


def machine() -> str:
    """Hardware and versions in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return (
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} of {name}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
