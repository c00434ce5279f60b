"""Two evaluations of the same cases, set against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from camtrain._errors import InputError
from camtrain.evaluation.comparing import Comparison, Difference, compare
from camtrain.evaluation.evaluation import AREAS, Evaluation, averages_of
from camtrain.evaluation.pairing import Scored
from camtrain.evaluation.raw_numbers import Key, Raw, raw_numbers
from camtrain.reporting.evaluation_rows import ComparisonRow


@dataclass(frozen=True)
class Against:
    """Evaluation b against evaluation a; differences are b - a.

    Attributes:
        rows: One per split, method, layer, measure and label.
        notes: Sentences about what could not be compared.
    """

    rows: Sequence[ComparisonRow]
    notes: Sequence[str]


def set_against(a: Evaluation, b: Evaluation) -> Against:
    """Paired comparison on the cases that both have, with bootstrap intervals and permutation p-values.

    Methods and layers are paired by name; where each evaluation has a single layer, it is paired whatever its name, so
    that two kinds of networks can be compared. Map scores belong to the pairs that both evaluations looked at: under
    the filters `correct`, `fn` and `fp` these differ between models, and the note says how many were lost.

    Args:
        a: The first model, for example the baseline.
        b: The second.

    Raises:
        InputError: They have no split or case in common, or different labels.
    """
    if sorted(a.names) != sorted(b.names):
        only = [f"only the first has {', '.join(x)}" for x in [_missing(a.names, b.names)] if x]
        only += [f"only the second has {', '.join(x)}" for x in [_missing(b.names, a.names)] if x]
        raise InputError(
            f"the two evaluations have different labels: {'; '.join(only)}; compare models of the same labels"
        )
    splits = [split for split in a.records if a.records[split] and b.records.get(split)]
    if not splits:
        raise InputError(f"the evaluations share no split: {', '.join(a.records)} against {', '.join(b.records)}")
    rows: list[ComparisonRow] = []
    notes = _unlike(a, b)
    for split in splits:
        for per_case in (False, True):
            first, second = _renamed(_scored(a, split, per_case), _scored(b, split, per_case))
            if not set(first.statistics) & set(second.statistics):
                continue
            averages = {} if per_case else averages_of(a.groups, a.names)
            found = compare(first, second, a.repeats, a.level, a.seed, averages)
            rows += _rows(found)
            notes += _notes(split, found, per_case)
            if not per_case and a.groups and any(key.measure in AREAS for key in found.tables):
                # Areas of several labels cannot be pooled: a group of them is a mean over labels.
                means = {n: replace(each, kind="macro") for n, each in averages.items() if n.startswith("group:")}
                areas = [
                    replace(side, statistics={k: s for k, s in side.statistics.items() if k.measure in AREAS})
                    for side in (first, second)
                ]
                grouped = compare(areas[0], areas[1], a.repeats, a.level, a.seed, means)
                rows += [row for row in _rows(grouped) if row.label.startswith("group:")]
    return Against(rows, notes)


def _missing(names: Sequence[str], among: Sequence[str]) -> list[str]:
    return [name for name in names if name not in among]


def _unlike(a: Evaluation, b: Evaluation) -> list[str]:
    """Settings that make numbers of another kind."""
    watched = (
        "cases",
        "cut",
        "at",
        "contrast_labels",
        "baseline",
        "steps",
        "tolerance_mm",
        "authors_edge_case",
        "table",
    )
    unlike = [key for key in watched if a.settings.get(key) != b.settings.get(key)]
    return (
        [f"the two evaluations differ in {', '.join(unlike)}: what depends on it is not comparable"] if unlike else []
    )


def _scored(evaluation: Evaluation, split: str, per_case: bool) -> Scored[Key]:
    records = evaluation.records[split]
    raw: Mapping[Key, Raw] = dict(
        raw_numbers(records, split, evaluation.names, evaluation.measures, evaluation.thresholds)
    )
    chosen = {key: each.statistic for key, each in raw.items() if each.per_case == per_case}
    labels = ["macro"] if per_case else list(evaluation.names)
    return Scored([r.id for r in records], labels, chosen, [r.patient for r in records])


def _renamed(a: Scored[Key], b: Scored[Key]) -> tuple[Scored[Key], Scored[Key]]:
    """A single layer of each, under one name."""
    layers = [sorted({key.layer for key in side.statistics if key.layer}) for side in (a, b)]
    if layers[0] == layers[1] or any(len(each) != 1 for each in layers):
        return a, b
    name = " | ".join(each[0] for each in layers)
    return tuple(  # type: ignore[return-value]
        Scored(
            side.ids,
            side.labels,
            {key._replace(layer=name if key.layer else ""): s for key, s in side.statistics.items()},
            side.patients,
        )
        for side in (a, b)
    )


def _rows(found: Comparison[Key]) -> list[ComparisonRow]:
    rows = []
    for key, table in found.tables.items():
        if key.measure == "energy_inside_chance":
            continue  # belongs to the organs, not to a model
        rows += [_row(key, name, each) for name, each in table.averages.items()]
        rows += [_row(key, name, each) for name, each in zip(found.labels, table.labels, strict=True) if each.n]
    return rows


def _row(key: Key, label: str, each: Difference) -> ComparisonRow:
    numbers = (each.a, each.b, each.difference, each.low, each.high, each.p, each.p_holm)
    a, b, difference, low, high, p, p_holm = (None if np.isnan(v) else float(v) for v in numbers)
    return ComparisonRow(
        key.split, key.method, key.layer, label, key.measure, each.n, a, b, difference, low, high, p, p_holm
    )


def _notes(split: str, found: Comparison[Key], per_case: bool) -> list[str]:
    notes = []
    if not per_case and (found.only_a or found.only_b):
        notes.append(
            f"{split}: {found.only_a} cases that only the first evaluation has, and {found.only_b} that only the "
            "second has, were left out of the comparison"
        )
    lost = {key.measure: sum(each.lost for each in table.labels) for key, table in found.tables.items()}
    telling = {measure: count for measure, count in lost.items() if count}
    if telling:
        text = ", ".join(f"{count} of {measure}" for measure, count in telling.items())
        notes.append(f"{split}: pairs with a score in one evaluation only do not enter the comparison: {text}")
    if found.left_out:
        several = ", ".join(sorted({f"{key.method}@{key.layer} {key.measure}".lstrip("@ ") for key in found.left_out}))
        notes.append(f"{split}: measured in one evaluation only: {several}")
    return notes
