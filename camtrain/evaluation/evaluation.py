"""What `evaluate` returns: tidy rows with intervals, and the numbers of every case that they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from camtrain._errors import InputError, nearest
from camtrain.evaluation.case_store import CaseRecord
from camtrain.evaluation.intervals import Average, Interval, intervals
from camtrain.evaluation.raw_numbers import Key, Raw, raw_numbers
from camtrain.evaluation.resampling import Units
from camtrain.evaluation.statistics import SumStatistic
from camtrain.evaluation.thresholds import Thresholds
from camtrain.reporting.evaluation_rows import ScoreRow

# Areas of several labels cannot be pooled: a group of labels is their mean.
AREAS = ("auroc", "auprc", "auroc_per_patient", "auprc_per_patient")


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        rows: One per split, method, layer, measure and label; averages are rows with the label `macro` (mean over
            labels), `micro` (mean over all pairs) or `group:<name>`.
        records: Split -> the raw numbers of its cases.
        names: Label names in the order of the outputs.
        measures: What was asked for.
        thresholds: `method@layer` -> label -> OrganIoU threshold, as chosen on `val` or frozen before.
        groups: Name -> labels.
        settings: What the numbers depend on.
        notes: Sentences about what was dropped, empty or undefined.
        repeats: Bootstrap repeats.
        level: Of the intervals.
        seed: Of the bootstrap.
    """

    rows: Sequence[ScoreRow]
    records: Mapping[str, Sequence[CaseRecord]]
    names: Sequence[str]
    measures: Sequence[str]
    thresholds: Thresholds
    groups: Mapping[str, Sequence[str]]
    settings: Mapping[str, Any]
    notes: Sequence[str]
    repeats: int = 2000
    level: float = 0.95
    seed: int = 0
    progress: bool = field(default=False, repr=False)

    @staticmethod
    def of(
        records: Mapping[str, Sequence[CaseRecord]],
        names: Sequence[str],
        measures: Sequence[str],
        thresholds: Thresholds,
        groups: Mapping[str, Sequence[str]] | None,
        settings: Mapping[str, Any],
        notes: Sequence[str],
        repeats: int = 2000,
        level: float = 0.95,
        seed: int = 0,
        progress: bool = False,
    ) -> Evaluation:
        """Tables of finished cases.

        Raises:
            InputError: A group names an unknown label.
        """
        rows: list[ScoreRow] = []
        for split, of in records.items():
            if not of:
                continue
            raw = dict(raw_numbers(of, split, names, measures, thresholds))
            rows += _rows(raw, of, names, averages_of(groups or {}, names), repeats, level, seed, progress)
        said = [*notes, *(note for split, of in records.items() for note in _notes(split, of, names, settings))]
        return Evaluation(
            rows, records, names, measures, thresholds, groups or {}, settings, said, repeats, level, seed, progress
        )

    def row(
        self, measure: str, label: str = "macro", *, split: str | None = None, method: str = "", layer: str = ""
    ) -> ScoreRow:
        """The one row that fits.

        Args:
            measure: Its measure.
            label: Label, `macro`, `micro` or `group:<name>`.
            split: Split; None where there is one only.
            method: Method; empty where there is one only.
            layer: Layer; empty where there is one only.

        Raises:
            InputError: None fits, or several do.
        """
        found = [
            r
            for r in self.rows
            if r.measure == measure
            and r.label == label
            and split in (None, r.split)
            and method in ("", r.method)
            and layer in ("", r.layer)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            several = "; ".join(f"{r.split} {r.method} {r.layer}" for r in found[:4])
            raise InputError(f"{len(found)} rows fit {measure!r} of {label!r} ({several}): say split=, method=, layer=")
        known = sorted({r.measure for r in self.rows})
        raise InputError(f"no row of {measure!r} for {label!r}{nearest(measure, known)}; measured: {', '.join(known)}")


def averages_of(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, Average]:
    """Row name -> average: macro, micro, and every group.

    Raises:
        InputError: A group is empty or names an unknown label.
    """
    found = {"macro": Average("macro"), "micro": Average("micro")}
    for group, labels in groups.items():
        for label in labels:
            if label not in names:
                raise InputError(f"group {group!r} names {label!r}, which is no label{nearest(label, names)}")
        if len(set(labels)) < len(labels):
            raise InputError(f"group {group!r} names a label twice: {', '.join(labels)}")
        if not labels:
            raise InputError(f"group {group!r} has no label: name at least one")
        found[f"group:{group}"] = Average("micro", tuple(list(names).index(label) for label in labels))
    return found


def _rows(
    raw: Mapping[Key, Raw],
    records: Sequence[CaseRecord],
    names: Sequence[str],
    averages: Mapping[str, Average],
    repeats: int,
    level: float,
    seed: int,
    progress: bool,
) -> Iterator[ScoreRow]:
    units = Units.of([r.id for r in records], [r.patient for r in records])
    per_label = {key: each.statistic for key, each in raw.items() if not each.per_case}
    per_case = {key: each.statistic for key, each in raw.items() if each.per_case}
    with _bar(progress) as tick:
        pooled = {key: each for key, each in per_label.items() if isinstance(each, SumStatistic)}
        tables = intervals(pooled, units, repeats, level, seed, averages, tick)
        # Areas of several labels cannot be pooled: a group of them is a mean over labels.
        areas = {key: each for key, each in per_label.items() if not isinstance(each, SumStatistic)}
        means = {name: replace(each, kind="macro") for name, each in averages.items() if name != "micro"}
        tables |= intervals(areas, units, repeats, level, seed, means)
        whole = intervals(per_case, units, repeats, level, seed, {})
    for key, each in raw.items():
        if each.per_case:
            yield _row(key, "macro", whole[key].labels[0], int(each.counted[0]))
            continue
        labels = tables[key].labels
        for name, interval in tables[key].averages.items():
            columns = averages[name].columns
            of = range(len(names)) if columns is None else columns
            row = _row(key, name, interval, int(each.counted[list(of)].sum()))
            if _as_one(key) and (name == "macro" or key.measure in AREAS):
                # A mean over labels leaves out those without a value: how many of the counted ones are these?
                lost = [np.isnan(labels[c].mean) for c in of if each.counted[c]]
                row = replace(row, undefined=float(np.mean(lost)) if lost else 0.0)
            yield row
        for name, interval, counted in zip(names, labels, each.counted, strict=True):
            if counted:
                yield _row(key, name, interval, int(counted))


def _as_one(key: Key) -> bool:
    """Is it made of all pairs at once, so that a label has a value or has none?"""
    return key.measure.startswith(("auroc", "auprc", "calibration_error", "shortcut_reliance", "shortcut_risk"))


def _row(key: Key, label: str, interval: Interval, counted: int) -> ScoreRow:
    mean, low, high = (None if np.isnan(v) else float(v) for v in (interval.mean, interval.low, interval.high))
    undefined = 0.0 if counted == 0 else max(0.0, 1 - interval.n / counted)
    if _as_one(key) and mean is None:
        undefined = 1.0
    return ScoreRow(
        key.split, key.method, key.layer, label, key.measure, counted, mean, low, high, undefined, interval.units
    )


@contextmanager
def _bar(progress: bool) -> Iterator[Any]:
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("intervals", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _notes(
    split: str, records: Sequence[CaseRecord], names: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[str]:
    """What a reader of the tables must know, counted."""
    truth = [r.label for r in records]
    without = [name for c, name in enumerate(names) if not any(row[c] == 1 for row in truth)]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        yield f"{split}: no case has {', '.join(without[:5])}{more}: there is nothing to localise, and no AUROC"
    if any(r.maps for r in records) and settings.get("tolerance_mm") is not None:
        unknown = sum(not r.geometry for r in records)
        if unknown:
            yield f"{split}: {unknown} cases have no affine, so tolerance_mm has no meaning there: undefined"
    unsegmented = sum(not r.segmented for r in records)
    if unsegmented:
        yield f"{split}: {unsegmented} of {len(records)} cases have no organs; no score that needs them counts these"
    for what, says in (
        ("empty", "the organs of {} are missing in {} cases, which do not count for it"),
        ("full", "the organs of {} cover the whole image in {} cases: a share inside is 1 there by construction"),
    ):
        for column, count in Counter(c for r in records for c in getattr(r, what)).items():
            yield f"{split}: " + says.format(names[column], count)
    for key, count in Counter(key for r in records for key, columns in r.broken.items() for _ in columns).items():
        yield f"{split}: {count} maps of {key} hold NaN or Inf; their scores are undefined"
    alone = sum(bool(r.replaced.get("case", {}).get("no_donor")) for r in records)
    if alone:
        yield (
            f"{split}: {alone} cases found no other case of their shape whose voxels could replace theirs; they count "
            "as undefined for the replacement 'case'"
        )
