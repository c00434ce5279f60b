"""What to look at first: the rows of an evaluation as a few plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from camtrain.reporting.evaluation_numbers import in_words, interval, number
from camtrain.reporting.evaluation_rows import ScoreRow
from camtrain.reporting.evaluation_scores import FREE, Scores, Series, series_name, title_of

_SHOWN: Final = 3
_LISTED: Final = 5  # names in a sentence
_SAME_MAP: Final = 0.9  # correlation between two labels' maps from which on the map hardly depends on the label
_OFTEN: Final = 0.2  # share of empty maps from which on the other scores speak about a selection


@dataclass(frozen=True, slots=True)
class Finding:
    """A label, and a sentence about it.

    Attributes:
        label: Label; empty when the sentence is about all of them.
        text: The sentence.
    """

    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Findings:
    """One thing to look at.

    Attributes:
        title: What these have in common.
        items: Worst first.
        note: What was left out, or how to read it.
    """

    title: str
    items: tuple[Finding, ...]
    note: str = ""


def first_look(scores: Scores, split: str) -> list[Findings]:
    """What a reader should look at first in one split; things that are as they should be give no entry.

    Example:
        >>> rows = (ScoreRow("test", "cam", "l4", "nodule", "organ_iou", 34, 0.21, 0.15, 0.28),)
        >>> first_look(Scores(rows, {}), "test")[0].items[0].text
        'OrganIoU 0.21 [0.15, 0.28], n = 34'
    """
    found = [*_of_maps(scores, split), *_of_shortcuts(scores, split)]
    return [entry for entry in found if entry.items]


def _of_maps(scores: Scores, split: str) -> Iterator[Findings]:
    for make in (_off_the_organ, _not_above_chance, _empty, _same_for_all):
        yield from make(scores, split)


def _leading(scores: Scores, split: str, measure: str) -> Series | None:
    """The first method and layer that has the measure."""
    return next(iter(scores.series(split, measure)), None)


def _only(series: Series) -> str:
    return f"Read from {series_name(series)}; the tables hold the others."


def _off_the_organ(scores: Scores, split: str) -> Iterator[Findings]:
    for measure in ("organ_iou", "energy_inside"):
        series = _leading(scores, split, measure)
        if series is None:
            continue
        rows = scores.worst(split, series, measure)[:_SHOWN]
        items = tuple(Finding(r.label, f"{title_of(measure)} {in_words(r)}{_energy(scores, r)}") for r in rows)
        yield Findings(f"Lowest {title_of(measure)}", items, _only(series))
        return


def _energy(scores: Scores, row: ScoreRow) -> str:
    """Energy inside of the same label, behind its OrganIoU."""
    series = (row.method, row.layer)
    energy = scores.get(row.split, series, row.label, "energy_inside")
    if row.measure == "energy_inside":
        return _against_chance(scores, row)
    if energy is None or energy.mean is None:
        return ""
    text = f"{number(energy.mean)} {interval(energy.low, energy.high, energy.mean)}".strip()
    return f"; energy inside {text}{_against_chance(scores, energy)}"


def _against_chance(scores: Scores, row: ScoreRow) -> str:
    chance = scores.chance(row.split, (row.method, row.layer), row.label)
    return "" if chance is None or chance.mean is None else f", chance {number(chance.mean)}"


def _not_above_chance(scores: Scores, split: str) -> Iterator[Findings]:
    series = _leading(scores, split, "energy_inside")
    if series is None:
        return
    rows = [row for row in scores.worst(split, series, "energy_inside") if _at_chance(scores, row)]
    items = tuple(Finding(r.label, f"energy inside {in_words(r)}{_against_chance(scores, r)}") for r in rows[:_SHOWN])
    note = "An evenly spread map scores the chance level; here the interval reaches down to it."
    yield Findings("Energy inside not shown to be above chance", items, f"{_rest(len(rows))}{note} {_only(series)}")


def _at_chance(scores: Scores, row: ScoreRow) -> bool:
    chance = scores.chance(row.split, (row.method, row.layer), row.label)
    # A region that covers everything has chance 1: nothing can be above it.
    return chance is not None and chance.mean is not None and row.low is not None and row.low <= chance.mean < 1


def _rest(count: int) -> str:
    return f"{count} labels in all. " if count > _SHOWN else ""


def _empty(scores: Scores, split: str) -> Iterator[Findings]:
    series = _leading(scores, split, "empty_map_rate")
    if series is None:
        return
    rows = [row for row in scores.worst(split, series, "empty_map_rate") if (row.mean or 0.0) >= _OFTEN]
    items = tuple(Finding(r.label, f"empty maps {in_words(r)}") for r in rows[:_SHOWN])
    note = "Where the map has no positive cell, other scores are undefined: they speak about the remaining cases only."
    yield Findings("Often nothing to show", items, f"{_rest(len(rows))}{note} {_only(series)}")


def _same_for_all(scores: Scores, split: str) -> Iterator[Findings]:
    found = []
    for series in scores.series(split, "class_sensitivity"):
        row = scores.get(split, series, "macro", "class_sensitivity")
        if row is not None and row.mean is not None and row.mean >= _SAME_MAP:
            found.append(Finding(series_name(series), f"correlation between labels' maps {in_words(row)}"))
    note = "Such maps hardly depend on the label; their localisation scores say nothing about it."
    yield Findings("Nearly the same map for every label", tuple(found), note)


def _of_shortcuts(scores: Scores, split: str) -> Iterator[Findings]:
    names = scores.replacements(split)
    if not names:
        return
    best: dict[str, ScoreRow] = {}
    for row in (r for name in names for r in scores.by_label(split, FREE, f"shortcut_reliance/{name}")):
        if row.label not in best or (row.mean or 0.0) > (best[row.label].mean or 0.0):
            best[row.label] = row
    rows = sorted(best.values(), key=lambda r: -(r.mean or 0.0))
    items = tuple(Finding(r.label, _shortcut(scores, r)) for r in rows[:_SHOWN])
    note = f"The highest of {len(names)} replacements ({', '.join(names)}). " if len(names) > 1 else ""
    yield Findings("Highest shortcut reliance", items, f"{note}Above 0.5, what lies outside the organs moves more.")
    open_ = [label for label in undecided(scores, split) if label not in best]
    if open_:
        more = f" and {len(open_) - _LISTED} more" if len(open_) > _LISTED else ""
        text = f"{len(open_)} of {len(scores.labels(split))} labels: {', '.join(open_[:_LISTED])}{more}"
        note = "Neither what lies inside nor what lies outside moves the probability enough to tell."
        yield Findings("Shortcut reliance undefined under every replacement", (Finding("", text),), note)


def _shortcut(scores: Scores, row: ScoreRow) -> str:
    name = row.measure.partition("/")[2]
    parts = [f"share {in_words(row)} ({name})"]
    for side in ("outside", "inside"):
        effect = scores.get(row.split, FREE, row.label, f"{side}_effect/{name}")
        if effect is not None and effect.mean is not None:
            parts.append(f"{side} effect {number(effect.mean)}")
    if row.low is not None and row.low > 0.5:
        parts.append("the whole interval lies above 0.5")
    return "; ".join(parts)


def undecided(scores: Scores, split: str) -> dict[str, list[str]]:
    """Labels whose shortcut reliance is undefined, and under which replacements.

    Example:
        >>> rows = (ScoreRow("test", "", "", "nodule", "shortcut_reliance/air", 9, None, undefined=1.0),)
        >>> undecided(Scores(rows, {}), "test")
        {'nodule': ['air']}
    """
    found: dict[str, list[str]] = {}
    for label in scores.labels(split):
        for name in scores.replacements(split):
            row = scores.get(split, FREE, label, f"shortcut_reliance/{name}")
            if row is not None and row.mean is None:
                found.setdefault(label, []).append(name)
    return found
