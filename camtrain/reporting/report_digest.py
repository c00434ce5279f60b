"""What a run's scores say: which labels are read from the wrong place, since when, and a table with the worst first."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from camtrain.reporting.run_dir import MEAN, Score

OUTSIDE, INSIDE = 0.5, 0.8
_MOST_POINTS, _MOST_VALUES = 200, 400_000  # epochs of a curve; values of all curves of a split
_MOST_IN_SPARK = 100


class ReportMeasure(NamedTuple):
    """A score as the report names it.

    Attributes:
        title: Heading.
        better: Is more better? None: neither.
        meaning: One sentence.
        shaded: Are its values shares, so that they can be shaded from good to bad?
    """

    title: str
    better: bool | None
    meaning: str
    shaded: bool = True


# In the order of the table's columns.
MEASURES = {
    "energy_inside": ReportMeasure(
        "energy inside", True, "share of the positive evidence that lies inside the allowed organs"
    ),
    "organ_iou": ReportMeasure(
        "OrganIoU", True, "share of the attended cells that lie inside the organs, at a threshold chosen per label"
    ),
    "pointing_game": ReportMeasure("pointing game", True, "share of cases whose strongest cell lies inside the organs"),
    "mask_iou": ReportMeasure("mask IoU", True, "overlap of the strongest cells with the organs"),
    "relevance_rank": ReportMeasure(
        "relevance rank", True, "of the k strongest cells the share inside, k = cells of the organs"
    ),
    "auroc": ReportMeasure("AUROC", True, "chance that a present case has a higher logit than an absent one"),
    "auprc": ReportMeasure(
        "AUPRC", True, "average precision; falls with the share of present cases: compare models with it, not labels"
    ),
    "calibration_error": ReportMeasure(
        "calibration error", False, "mean gap of probability and share present, over 15 bins", False
    ),
    "empty_map_rate": ReportMeasure("empty maps", False, "share of maps without a positive cell"),
    "class_sensitivity": ReportMeasure(
        "class sensitivity", False, "correlation with the maps of the case's other labels; 1 = blind to the label"
    ),
    "sum_to_score_l1": ReportMeasure("sum to score", False, "distance between the sum of the map and the logit", False),
    "bias_share": ReportMeasure("bias share", None, "part of the logit that no cell accounts for", False),
    "outside_share": ReportMeasure(
        "pull from outside",
        False,
        "of what moves the logit when replaced, the share that lies far from the organs",
    ),
    "outside_pull": ReportMeasure(
        "outside pull", False, "how far the logit follows what comes in outside the organs; 1 = all the way", False
    ),
    "inside_pull": ReportMeasure(
        "inside pull", True, "how far the logit follows what comes in inside the organs; 1 = all the way", False
    ),
    "scored_share": ReportMeasure(
        "scored", None, "share of the present labels that were scored within map_budget", False
    ),
}
_STATES = {"outside": "mostly outside", "partly": "partly outside", "inside": "inside", "free": "may be read anywhere"}
_UNSCORED = "not scored"


class _Series:
    """Values over epochs, 16 bytes for each: a dictionary would need ten times as much, for as long as a run lasts."""

    __slots__ = ("epochs", "values")

    def __init__(self) -> None:
        self.epochs, self.values = array("q"), array("d")

    def put(self, epoch: int, value: float) -> None:
        place = bisect_left(self.epochs, epoch)
        if place < len(self.epochs) and self.epochs[place] == epoch:
            self.values[place] = value
        else:
            self.epochs.insert(place, epoch)
            self.values.insert(place, value)

    def points(self) -> dict[int, float]:
        return dict(zip(self.epochs, self.values, strict=True))


class Curves:
    """The scores of a run as curves over epochs; of several values of one epoch the last counts.

    Args:
        rows: Rows of `scores.csv`.

    Example:
        >>> curves = Curves([Score(0, 9, "val", "hirescam", "nodule", "energy_inside", 0.25)])
        >>> curves.last("val", "hirescam", "energy_inside", "nodule")
        0.25
    """

    def __init__(self, rows: Iterable[Score]) -> None:
        self._of: dict[tuple[str, str, str], dict[str, _Series]] = {}
        self._labels: dict[str, None] = {}
        self.epochs: dict[str, list[int]] = {}
        self.add(rows)

    def add(self, rows: Iterable[Score]) -> None:
        """Further rows; they count more than those before them."""
        for row in rows:
            labels = self._of.setdefault((row.split, row.method, row.measure), {})
            if row.label not in labels:
                labels[row.label] = _Series()
                self._labels[row.label] = None
            labels[row.label].put(row.epoch, row.value)
            epochs = self.epochs.setdefault(row.split, [])
            if (place := bisect_left(epochs, row.epoch)) == len(epochs) or epochs[place] != row.epoch:
                epochs.insert(place, row.epoch)

    @property
    def labels(self) -> list[str]:
        """Labels with scores, in the order in which they were written."""
        return [label for label in self._labels if label != MEAN]

    def __len__(self) -> int:
        """How many curves there are."""
        return sum(map(len, self._of.values()))

    @property
    def splits(self) -> list[str]:
        """Splits with scores, `val` first."""
        return sorted(self.epochs, key=lambda split: (split != "val", split))

    @property
    def methods(self) -> list[str]:
        """Methods with scores, in the order in which they were written."""
        return list(dict.fromkeys(method for _, method, _ in self._of if method))

    def measures(self, split: str, method: str) -> list[str]:
        """Scores per label of a split that are made of this method's maps or of none."""
        found = {
            measure
            for (s, m, measure), labels in self._of.items()
            if s == split and m in ("", method) and set(labels) != {MEAN}
        }
        known = list(MEASURES)
        return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))

    def points(self, split: str, method: str, measure: str, label: str) -> dict[int, float]:
        """Epoch -> value, in the order of the epochs."""
        found = self._series(split, method, measure, label)
        return found.points() if found else {}

    def last(self, split: str, method: str, measure: str, label: str) -> float | None:
        """The newest value; None where there is none."""
        found = self._series(split, method, measure, label)
        return found.values[-1] if found else None

    def _series(self, split: str, method: str, measure: str, label: str) -> _Series | None:
        found = self._of.get((split, method, measure)) or self._of.get((split, "", measure)) or {}
        return found.get(label)

    def for_script(self) -> dict[str, Any]:
        """All curves as plain lists: split -> epochs, and method -> measure -> label -> values."""
        result: dict[str, Any] = {}
        for split, epochs in self.epochs.items():
            curves = sum(len(labels) for (of, _, _), labels in self._of.items() if of == split)
            step = math.ceil(len(epochs) / min(_MOST_POINTS, max(20, _MOST_VALUES // max(1, curves))))
            shown = epochs[::-1][::step][::-1]
            data: dict[str, dict[str, dict[str, list[float | None]]]] = {}
            for (of, method, measure), labels in self._of.items():
                if of == split:
                    data.setdefault(method, {})[measure] = {
                        label: [_rounded(points.get(epoch)) for epoch in shown]
                        for label, points in ((label, series.points()) for label, series in labels.items())
                    }
            result[split] = {"epochs": shown, "data": data}
        return result


@dataclass(frozen=True)
class Verdict:
    """Where one label is read from.

    Attributes:
        label: Name of the label.
        state: `outside` (less than half of the positive evidence lies inside the organs), `partly` (less than 0.8),
            `inside`, `free` (no organ was named), or `unscored`.
        value: Energy inside, newest.
        since: First epoch of the unbroken run of epochs in this state that ends with the newest one.
        note: Since when, in words.
        points: Epoch -> energy inside.
        auroc: Newest AUROC.
    """

    label: str
    state: str
    value: float | None = None
    since: int | None = None
    note: str = ""
    points: Mapping[int, float] | None = None
    auroc: float | None = None

    @property
    def words(self) -> str:
        """The state in words."""
        return _STATES.get(self.state, _UNSCORED)


def verdicts(curves: Curves, labels: Sequence[str], split: str, method: str, free: Iterable[str] = ()) -> list[Verdict]:
    """Every label's verdict, those that are read from the wrong place first.

    Args:
        curves: Scores of the run.
        labels: Label names.
        split: Split to judge by.
        method: Method whose maps are judged.
        free: Labels that may be read from anywhere.

    Example:
        >>> rows = [Score(e, e, "val", "cam", "nodule", "energy_inside", v) for e, v in enumerate([0.9, 0.3, 0.2])]
        >>> found = verdicts(Curves(rows), ["nodule"], "val", "cam")[0]
        >>> found.state, found.note
        ('outside', 'since epoch 1; 0.90 inside in epoch 0')
    """
    anywhere = set(free)
    found = [_verdict(curves, label, split, method, label in anywhere) for label in labels]
    order = ["outside", "partly", "inside", "free", "unscored"]
    return sorted(found, key=lambda each: (order.index(each.state), each.value if each.value is not None else 2.0))


def state_of(value: float) -> str:
    """The state that a value of energy inside stands for."""
    return "outside" if value < OUTSIDE else "partly" if value < INSIDE else "inside"


def _verdict(curves: Curves, label: str, split: str, method: str, free: bool) -> Verdict:
    points = curves.points(split, method, "energy_inside", label)
    auroc = curves.last(split, method, "auroc", label)
    if free or not points:
        note = "" if free else "no present case with its organs, or no organ table"
        return Verdict(label, "free" if free else "unscored", note=note, auroc=auroc)
    epochs = list(points)
    states = [state_of(value) for value in points.values()]
    start = len(states) - 1
    while start and states[start - 1] == states[-1]:
        start -= 1
    note = "since the first epoch" if start == 0 else f"since epoch {epochs[start]}"
    if len(epochs) == 1:
        note = f"in epoch {epochs[0]}"
    elif start and states[-1] == "outside":
        note += f"; {points[epochs[start - 1]]:.2f} inside in epoch {epochs[start - 1]}"
    if (newest := curves.epochs[split][-1]) != epochs[-1]:
        note += f"; last scored in epoch {epochs[-1]} of {newest}"
    return Verdict(label, states[-1], points[epochs[-1]], epochs[start], note, points, auroc)


def headline(found: Sequence[Verdict], most: int = 3) -> str:
    """One sentence: how many labels are read from the wrong place, which, and since when.

    Example:
        >>> headline([Verdict("nodule", "inside", 0.9), Verdict("stent", "inside", 0.95)])
        'Both labels look inside their organs.'
    """
    judged = [each for each in found if each.state in ("outside", "partly", "inside")]
    wrong = [each for each in judged if each.state == "outside"]
    if not judged:
        return "No label could be compared with an organ yet."
    if wrong:
        some = f"{len(wrong)} of {len(judged)} labels look{'s' if len(wrong) == 1 else ''}"
        count = some if len(wrong) < len(judged) else _every(len(wrong))
        if len(wrong) <= most:
            named = ", ".join(f"{each.label} {each.note.split(';')[0]}" for each in wrong).replace(
                "epoch ", "epoch\u00a0"
            )
            return f"{count} mostly outside the organs: {named}."
        return f"{count} mostly outside the organs, worst {' and '.join(each.label for each in wrong[:2])}."
    partly = sum(each.state == "partly" for each in judged)
    if partly:
        return f"No label looks mostly outside its organs; {partly} of {len(judged)} partly."
    return f"{_every(len(judged))} inside {'its' if len(judged) == 1 else 'their'} organs."


def _every(count: int) -> str:
    return {1: "The label looks", 2: "Both labels look"}.get(count, f"All {count} labels look")


class Cell(NamedTuple):
    """A number of the heat table: as text, how bad from 0 to 4 (None: not judged), and where it comes in sorting."""

    text: str
    shade: int | None
    value: float | None


def heat_rows(curves: Curves, labels: Iterable[str], split: str, method: str) -> list[tuple[str, list[Cell]]]:
    """Label and newest scores, one per measure of `Curves.measures`."""
    measures = curves.measures(split, method)
    return [(label, [_cell(m, curves.last(split, method, m, label)) for m in measures]) for label in labels]


def _cell(measure: str, value: float | None) -> Cell:
    if value is None:
        return Cell("–", None, None)
    known = MEASURES.get(measure)
    text = (f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}").replace("-", "−")
    if known is None or known.better is None or not known.shaded:
        return Cell(text, None, value)
    bad = 1 - value if known.better else value
    if measure == "auroc":
        bad = 2 * bad  # a half is chance
    return Cell(text, int(min(4.0, max(0.0, 5 * bad))), value)  # a changed file may hold any number


def differences(
    first: Curves, second: Curves, labels: Iterable[str], split: str, methods: tuple[str, str]
) -> tuple[list[str], list[tuple[str, list[tuple[Cell, Cell, Cell]]]]]:
    """Scores of two runs label by label, with the second minus the first; the largest difference first.

    Returns:
        Measures that both have, and per label (first, second, difference) for each of them.
    """
    theirs = second.measures(split, methods[1])
    measures = [m for m in first.measures(split, methods[0]) if m in theirs]
    rows = []
    for label in [*labels, MEAN]:
        cells = []
        for measure in measures:
            a = first.last(split, methods[0], measure, label)
            b = second.last(split, methods[1], measure, label)
            cells.append((_cell(measure, a), _cell(measure, b), _difference(measure, a, b)))
        rows.append((label, cells))
    rows[:-1] = sorted(rows[:-1], key=lambda row: _sorting(row[1]))
    return measures, rows


def _sorting(cells: Sequence[tuple[Cell, Cell, Cell]]) -> float:
    value = cells[0][2].value if cells else None
    return math.inf if value is None else -abs(value)


def _difference(measure: str, a: float | None, b: float | None) -> Cell:
    """Shade 0: better, 4: worse, None: about the same, or nobody can say."""
    if a is None or b is None:
        return Cell("–", None, None)
    known = MEASURES.get(measure)
    gain = 0.0 if known is None or known.better is None else (b - a if known.better else a - b)
    shade = 0 if gain > 0.02 else 4 if gain < -0.02 else None
    return Cell(f"{b - a:+.2f}".replace("-", "−"), shade, b - a)


def sparkline(points: Mapping[int, float] | None, width: int = 120, height: int = 26) -> str:
    """A small curve of values from 0 to 1 as SVG, with a line at `OUTSIDE`; empty for fewer than two points."""
    if not points or len(points) < 2:
        return ""
    step = math.ceil(len(points) / _MOST_IN_SPARK)
    points = dict(list(points.items())[::-1][::step][::-1])
    first, last = min(points), max(points)
    xs = [2 + (epoch - first) / (last - first) * (width - 6) for epoch in points]
    ys = [height - 3 - min(1.0, max(0.0, value)) * (height - 6) for value in points.values()]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    middle = height - 3 - OUTSIDE * (height - 6)
    return (
        f'<svg class="spark" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line x1="0" x2="{width}" y1="{middle:.1f}" y2="{middle:.1f}"/><polyline points="{path}"/>'
        f'<circle cx="{xs[-1]:.1f}" cy="{ys[-1]:.1f}" r="2.5"/></svg>'
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
