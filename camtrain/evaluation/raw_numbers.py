"""From finished cases to statistics: which number of which case enters which mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from camtrain.evaluation.case_store import CASE, CaseRecord
from camtrain.evaluation.measures import MEASURES
from camtrain.evaluation.score_statistics import AveragePrecision, CalibrationError, ShortcutRisk, one_row_per_patient
from camtrain.evaluation.statistics import AUROC, Effect, EffectShare, Mean, Statistic
from camtrain.evaluation.thresholds import Thresholds
from camtrain.metrics import DEFAULT_THRESHOLD, THRESHOLDS

Floats = npt.NDArray[np.float64]


class Key(NamedTuple):
    """What a row measures, but for its label."""

    split: str
    method: str
    layer: str
    measure: str


class Raw(NamedTuple):
    """One measure of all cases of a split.

    Attributes:
        statistic: Of (n, L) numbers; of (n, 1) where `per_case`.
        counted: (L,) pairs that count, with or without a number; (1,) where `per_case`.
        per_case: A number of the case and not of a label.
    """

    statistic: Statistic
    counted: npt.NDArray[np.int64]
    per_case: bool = False


def raw_numbers(
    records: Sequence[CaseRecord], split: str, names: Sequence[str], measures: Sequence[str], thresholds: Thresholds
) -> Iterator[tuple[Key, Raw]]:
    """Every measure of one split.

    Args:
        records: Its cases.
        split: Its name.
        names: Label names in the order of the outputs.
        measures: Which to make, of `MEASURES`.
        thresholds: For OrganIoU curves.
    """
    truth = np.array([[np.nan if v is None else v for v in r.label] for r in records], dtype=np.float64)
    logits = np.array([r.logits for r in records], dtype=np.float64)
    yield from _of_logits(records, split, measures, truth, logits)
    yield from _of_maps(records, split, names, measures, thresholds)
    if any(MEASURES[name].family == "reliance" for name in measures):
        yield from _of_replacements(records, split, measures, truth, logits)


def _of_logits(
    records: Sequence[CaseRecord], split: str, measures: Sequence[str], truth: Floats, logits: Floats
) -> Iterator[tuple[Key, Raw]]:
    """What needs no map; `<measure>_per_patient` only where a patient has several scans."""
    known = (~np.isnan(truth)).sum(axis=0)
    probabilities = 0.5 * (1 + np.tanh(0.5 * logits))
    made: dict[str, tuple[Callable[[], Statistic], npt.NDArray[np.int64]]] = {
        "auroc": (lambda: AUROC(logits, truth), known),
        "auprc": (lambda: AveragePrecision(logits, truth), known),
        "calibration_error": (lambda: CalibrationError(probabilities, truth), known),
    }
    by_patient = one_row_per_patient(probabilities, truth, [r.patient for r in records])
    if by_patient is not None:
        patients = (~np.isnan(by_patient[1])).sum(axis=0)
        made["auroc_per_patient"] = (lambda: AUROC(*by_patient), patients)
        made["auprc_per_patient"] = (lambda: AveragePrecision(*by_patient), patients)
    for name, (make, counted) in made.items():
        if name in measures:
            yield Key(split, "", "", name), Raw(make(), counted)


def _of_maps(
    records: Sequence[CaseRecord], split: str, names: Sequence[str], measures: Sequence[str], thresholds: Thresholds
) -> Iterator[tuple[Key, Raw]]:
    found = {(method, layer): None for r in records for method, layers in r.maps.items() for layer in layers}
    for method, layer in found:
        frozen = thresholds.get(f"{method}@{layer}")
        columns = [_place(DEFAULT_THRESHOLD if frozen is None else frozen[name]) for name in names]

        def at_threshold(column: int, value: float | list[float], columns: list[int] = columns) -> float:
            return value[columns[column]] if isinstance(value, list) else value

        for measure in measures:
            cells = [r.maps.get(method, {}).get(layer, {}).get(measure, {}) for r in records]
            per_case = any(CASE in of for of in cells)
            width = 1 if per_case else len(names)
            values, counted = _matrix(cells, width, at_threshold)
            if counted.any():
                yield Key(split, method, layer, measure), Raw(Mean(values), counted.sum(axis=0), per_case)


def _matrix(
    cells: Sequence[Mapping[int, float | list[float] | None]],
    width: int,
    read: Callable[[int, float | list[float]], float],
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(n, L) numbers, NaN where undefined or not counted; (n, L) which count."""
    values, counted = np.full((len(cells), width), np.nan), np.zeros((len(cells), width), dtype=bool)
    for row, of in enumerate(cells):
        for column, value in of.items():
            place = max(column, 0)
            counted[row, place] = True
            if value is not None:
                values[row, place] = read(column, value)
    return values, counted


def _of_replacements(
    records: Sequence[CaseRecord], split: str, measures: Sequence[str], truth: Floats, logits: Floats
) -> Iterator[tuple[Key, Raw]]:
    before = 0.5 * (1 + np.tanh(0.5 * logits))
    for kind in dict.fromkeys(kind for r in records for kind in r.replaced):
        after = [
            _matrix([r.replaced.get(kind, {}).get(side, {}) for r in records], truth.shape[1], _plain)[0]
            for side in ("outside", "inside")
        ]
        outside, inside = (np.abs(each - before) for each in after)
        measured = ~np.isnan(outside) & ~np.isnan(inside)
        _, lost = _matrix([r.replaced.get(kind, {}).get("no_donor", {}) for r in records], truth.shape[1], _plain)
        counted = ((measured | lost) & ~np.isnan(truth)).sum(axis=0)
        made: dict[str, Statistic] = {
            "outside_effect": Effect(outside, truth),
            "inside_effect": Effect(inside, truth),
            "shortcut_reliance": EffectShare(outside, inside, truth),
            "auroc_outside_replaced": AUROC(np.where(measured, after[0], np.nan), truth),
            "shortcut_risk": ShortcutRisk(after[0], outside, inside, truth),
        }
        for name, statistic in made.items():
            if name in measures and counted.any():
                yield Key(split, "", "", f"{name}/{kind}"), Raw(statistic, counted)


def _plain(_: int, value: float | list[float]) -> float:
    return float(value) if not isinstance(value, list) else float("nan")


def _place(threshold: float) -> int:
    """Column of the curve; only the 53 values have one."""
    return int(np.argmin(np.abs(np.array(THRESHOLDS) - threshold)))
