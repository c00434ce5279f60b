"""The rows of one evaluation, ready to be asked: by split, by method and layer, by label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from camtrain._errors import InputError
from camtrain.reporting.evaluation_rows import CHANCE, Measure, ScoreRow, is_average

Series = tuple[str, str]  # method, layer; two empty strings for measures that need no map
FREE: Final[Series] = ("", "")

# Used where the caller says nothing about a measure.
_LOWER: Final = frozenset(
    {
        "empty_map_rate",
        "average_drop",
        "deletion_auc",
        "sum_to_score_l1",
        "class_sensitivity",
        "outside_effect",
        "shortcut_reliance",
        "shortcut_risk",
        "calibration_error",
    }
)
_NEITHER: Final = frozenset({CHANCE, "bias_share", "channel_sparseness", "inside_effect"})
_TITLES: Final = {
    "auroc": "AUROC",
    "auroc_outside_replaced": "AUROC, outside replaced",
    "auprc": "AUPRC",
    "auroc_per_patient": "AUROC per patient",
    "auprc_per_patient": "AUPRC per patient",
    "organ_iou": "OrganIoU",
    "energy_inside": "Energy inside",
    CHANCE: "Chance level of energy inside",
    "mask_iou": "Mask IoU",
    "insertion_auc": "Insertion AUC",
    "deletion_auc": "Deletion AUC",
    "sum_to_score_l1": "Sum to score, L1",
    "kendall_tau": "Kendall tau",
}


def title_of(measure: str) -> str:
    """A measure's name for reading.

    Example:
        >>> title_of("organ_iou"), title_of("outside_effect/air"), title_of("bias_share")
        ('OrganIoU', 'Outside effect (air)', 'Bias share')
    """
    base, _, replacement = measure.partition("/")
    plain = base.replace("_", " ")
    title = _TITLES.get(base, plain[:1].upper() + plain[1:])
    return f"{title} ({replacement})" if replacement else title


def series_name(series: Series) -> str:
    """Method and layer for reading.

    Example:
        >>> series_name(("gradcam", "layer4")), series_name(("", ""))
        ('gradcam at layer4', 'no map needed')
    """
    return " at ".join(part for part in series if part) or "no map needed"


def average_name(label: str) -> str:
    """Averages in words, labels as they are.

    Example:
        >>> average_name("macro"), average_name("group:lung"), average_name("nodule")
        ('mean over labels', 'group lung', 'nodule')
    """
    known = {"macro": "mean over labels", "micro": "mean over cases and labels"}
    return known.get(label) or (f"group {label.removeprefix('group:')}" if is_average(label) else label)


def unique(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of appearance."""
    return list(dict.fromkeys(values))


@dataclass(frozen=True)
class Scores:
    """Rows and what the measures mean; answers keep the order in which things first appear.

    Attributes:
        rows: The tidy table.
        measures: Measure -> what it says; a measure with a replacement is also found without it.

    Raises:
        InputError: Two rows speak about the same thing.

    Example:
        >>> scores = Scores((ScoreRow("test", "", "", "nodule", "auroc", 40, 0.8),), {})
        >>> scores.splits, scores.labels("test"), scores.get("test", ("", ""), "nodule", "auroc").mean
        (['test'], ['nodule'], 0.8)
    """

    rows: Sequence[ScoreRow]
    measures: Mapping[str, Measure]

    def __post_init__(self) -> None:
        if len(self._table) != len(self.rows):
            (split, series, label, measure), _ = Counter(map(_key, self.rows)).most_common(1)[0]
            raise InputError(
                "expected one row per split, method, layer, label and measure, got more for "
                f"{split!r}, {series_name(series)}, {label!r}, {measure!r}: leave out the repeated ones"
            )

    @cached_property
    def _table(self) -> dict[tuple[str, Series, str, str], ScoreRow]:
        return {_key(row): row for row in self.rows}

    @cached_property
    def splits(self) -> list[str]:
        """Splits."""
        return unique(row.split for row in self.rows)

    @cached_property
    def _by_split(self) -> dict[str, list[ScoreRow]]:
        return {split: [row for row in self.rows if row.split == split] for split in self.splits}

    def of(self, split: str) -> list[ScoreRow]:
        """All rows of a split."""
        return self._by_split[split]

    def get(self, split: str, series: Series, label: str, measure: str) -> ScoreRow | None:
        """One row, or None."""
        return self._table.get((split, series, label, measure))

    def chance(self, split: str, series: Series, label: str) -> ScoreRow | None:
        """Chance level of energy inside; a layer's if the method has none of its own, else the split's."""
        keys: list[Series] = [series, ("", series[1]), FREE]
        return next((row for key in keys if (row := self.get(split, key, label, CHANCE))), None)

    def series(self, split: str, measure: str | None = None) -> list[Series]:
        """Methods and layers, of one measure or of all, without the measures that need no map."""
        found = ((series, names) for (where, series), names in self._measured.items() if where == split)
        return [series for series, names in found if any(series) and (measure is None or measure in names)]

    def labels(self, split: str) -> list[str]:
        """Labels, without averages."""
        return [label for label in self._names[split] if not is_average(label)]

    def averages(self, split: str) -> list[str]:
        """Averages over labels."""
        return [label for label in self._names[split] if is_average(label)]

    def measured(self, split: str, series: Series) -> list[str]:
        """Measures of a method and layer."""
        return list(self._measured.get((split, series), ()))

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {split: unique(row.label for row in self.of(split)) for split in self.splits}

    @cached_property
    def _measured(self) -> dict[tuple[str, Series], dict[str, None]]:
        found: dict[tuple[str, Series], dict[str, None]] = {}
        for row in self.rows:
            found.setdefault((row.split, (row.method, row.layer)), {})[row.measure] = None
        return found

    def better(self, measure: str) -> bool | None:
        """Is more better? None where neither is."""
        known = self.about(measure)
        if known is not None:
            return known.higher_is_better
        base = measure.partition("/")[0]
        return None if base in _NEITHER else base not in _LOWER

    def about(self, measure: str) -> Measure | None:
        """What the caller said about a measure."""
        return self.measures.get(measure) or self.measures.get(measure.partition("/")[0])

    def by_label(self, split: str, series: Series, measure: str) -> list[ScoreRow]:
        """A measure's rows per label, only where it is defined."""
        found = (self.get(split, series, label, measure) for label in self.labels(split))
        return [row for row in found if row is not None and row.mean is not None]

    def worst(self, split: str, series: Series, measure: str) -> list[ScoreRow]:
        """The rows per label, worst first; rows without a mean are left out."""
        sign = -1.0 if self.better(measure) is False else 1.0
        return sorted(self.by_label(split, series, measure), key=lambda row: sign * (row.mean or 0.0))

    def replacements(self, split: str, series: Series = FREE) -> list[str]:
        """What stood in for a region in the measures of shortcuts."""
        split_names = (m.partition("/") for m in self.measured(split, series))
        return unique(name for base, _, name in split_names if base == "shortcut_reliance" and name)


def _key(row: ScoreRow) -> tuple[str, Series, str, str]:
    return row.split, (row.method, row.layer), row.label, row.measure
