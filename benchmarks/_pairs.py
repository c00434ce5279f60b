"""Two pieces of work against each other, in turns, on a machine that is never quiet. Not a benchmark."""

from __future__ import annotations

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
) -> Ratio:
    """Time both in every pair, who goes first alternating.

    Args:
        without: The plain piece.
        with_it: The same with what is measured.
        pairs: How many count.
        clock: Processor time, which others on the machine disturb least; `time.perf_counter` is wall time.
        warm: Pairs before that do not count.
        seconds: Of wall time, after which no other pair begins, once there are three.
    """
    begun = time.perf_counter()
    ratios, extras, plains = [], [], []
    for pair in range(warm + pairs):
        if len(ratios) >= 3 and time.perf_counter() - begun > seconds:
            break
        spent = {}
        for piece in (without, with_it) if pair % 2 else (with_it, without):
            start = clock()
            piece()
            spent[piece] = clock() - start
        if pair >= warm:
            ratios.append(spent[with_it] / spent[without])
            extras.append(1000 * (spent[with_it] - spent[without]))
            plains.append(1000 * spent[without])
    low, high = median_interval(ratios)
    return Ratio(
        statistics.median(ratios), low, high, statistics.median(extras), statistics.median(plains), len(ratios)
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
