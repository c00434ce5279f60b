"""What an evaluation hands to its page: rows of the tidy table, and what is known about the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final, TypeVar

from camtrain._errors import InputError

CHANCE: Final = "energy_inside_chance"
REPLACED: Final = ("outside_effect", "inside_effect", "shortcut_reliance", "auroc_outside_replaced", "shortcut_risk")
_AVERAGES: Final = ("macro", "micro")
_TEXTS: Final = frozenset({"split", "method", "layer", "label", "measure", "stage", "module"})


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One line of the tidy table.

    Attributes:
        split: `test`, `external`, ...
        method: Attention method; empty for measures that need no map.
        layer: Tapped layer; empty likewise.
        label: Name of a label, or `macro`, `micro`, `group:<name>`.
        measure: `organ_iou`, `outside_effect/air`, ...
        n: Counted (case, label) pairs, or cases.
        mean: Mean over the pairs that have a score; None where none has.
        low: Lower end of the interval; None where there is none.
        high: Upper end.
        undefined: Share of the counted pairs (of an average of AUROCs or shares: labels) that have no score, 0 to 1.
        units: What the interval was drawn from: patients, or cases where patients are unknown.

    Example:
        >>> ScoreRow("test", "hirescam", "layer4", "nodule", "organ_iou", 34, 0.71, 0.65, 0.77).defined
        True
    """

    split: str
    method: str
    layer: str
    label: str
    measure: str
    n: int
    mean: float | None
    low: float | None = None
    high: float | None = None
    undefined: float = 0.0
    units: int = 0

    @property
    def defined(self) -> bool:
        """Is there a mean?"""
        return self.mean is not None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, or None where either is missing."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """Checkpoint B against checkpoint A on the same cases; `difference` is B - A.

    Attributes:
        split: As in `ScoreRow`, like the four that follow.
        method: Attention method or empty.
        layer: Layer or empty.
        label: Label, `macro`, `micro` or `group:<name>`.
        measure: Measure.
        n: Pairs that both checkpoints could score.
        mean_a: Mean of A over those.
        mean_b: Mean of B over those.
        difference: Mean of the paired differences.
        low: Lower end of its interval.
        high: Upper end.
        p: Two-sided permutation p-value.
        p_holm: The same after Holm's correction.

    Example:
        >>> ComparisonRow("test", "", "", "nodule", "auroc", 40, 0.80, 0.85, 0.05, 0.01, 0.09, 0.01, 0.04).p_holm
        0.04
    """

    split: str
    method: str
    layer: str
    label: str
    measure: str
    n: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True, slots=True)
class SanityRow:
    """How much of the map is left when weights are random.

    Attributes:
        stage: What was done: `cascading`, `label_randomised`, or a running number; rows keep their order.
        module: Module up to which weights were randomised.
        method: Attention method.
        spearman: Mean |rank correlation| with the map of the trained model, 0 to 1; a turned sign is no change.
        ssim: Structural similarity with it.

    Example:
        >>> SanityRow("1", "fc", "gradcam", 0.2, 0.3).module
        'fc'
    """

    stage: str
    module: str
    method: str
    spearman: float | None
    ssim: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A mean insertion or deletion curve.

    Attributes:
        kind: `insertion` or `deletion`.
        split: Split.
        method: Attention method.
        layer: Layer.
        share: (N,) share of the image put in or taken out, 0 to 1, rising.
        mean: (N,) mean probability at that share.

    Raises:
        InputError: The two have different lengths.

    Example:
        >>> Curve("insertion", "test", "gradcam", "layer4", (0.0, 1.0), (0.1, 0.9)).kind
        'insertion'
    """

    kind: str
    split: str
    method: str
    layer: str
    share: Sequence[float]
    mean: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.share) != len(self.mean):
            raise InputError(
                f"a {self.kind} curve needs one mean per share, got {len(self.share)} shares and "
                f"{len(self.mean)} means: pass both from the same run"
            )


@dataclass(frozen=True, slots=True)
class Measure:
    """What a measure says.

    Attributes:
        description: One sentence.
        higher_is_better: True, False, or None where neither is good in itself.

    Example:
        >>> Measure("Share of the positive attention inside the organ.", True).higher_is_better
        True
    """

    description: str
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMeta:
    """What was evaluated, and how to do it again.

    Attributes:
        title: Heading of the page.
        checkpoints: One; or A and B, in this order, where B, which the page is about, is compared with A.
        command: Command line that made the page.
        case_filter: `all`, `positives`, `correct`, `fn` or `fp`.
        cases: Split -> number of cases.
        patients: Split -> number of patients; empty where patients are unknown.
        bootstrap_repeats: Repeats behind the intervals; 0 = no intervals.
        bootstrap_unit: What was drawn: `cases` or `patients`.
        level: Confidence of the intervals.
        seed: Seed of the resampling.
        thresholds: Label -> threshold of OrganIoU.
        notes: Sentences: what was dropped, undefined, or is to be kept in mind.
        versions: Package -> version.
        date: As it shall be printed.

    Example:
        >>> EvaluationMeta(title="AxialNet", cases={"test": 120}).case_filter
        'all'
    """

    title: str
    checkpoints: Sequence[str] = ()
    command: str = ""
    case_filter: str = "all"
    cases: Mapping[str, int] = field(default_factory=dict)
    patients: Mapping[str, int] = field(default_factory=dict)
    bootstrap_repeats: int = 0
    bootstrap_unit: str = "cases"
    level: float = 0.95
    seed: int | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


RowT = TypeVar("RowT", ScoreRow, ComparisonRow, SanityRow)


def read_rows(kind: type[RowT], rows: Iterable[RowT | Mapping[str, Any]]) -> tuple[RowT, ...]:
    """Rows as the page wants them; mappings, also those of `csv.DictReader`, become rows.

    Args:
        kind: `ScoreRow`, `ComparisonRow` or `SanityRow`.
        rows: Rows of that kind, or mappings with its columns. NaN, infinite and empty numbers become None; other
            columns are ignored.

    Raises:
        InputError: A column is missing or holds no number.

    Example:
        >>> read_rows(SanityRow, [{"stage": 1, "module": "fc", "method": "cam", "spearman": "0.5", "ssim": ""}])
        (SanityRow(stage='1', module='fc', method='cam', spearman=0.5, ssim=None),)
    """
    return tuple(_row(kind, row if isinstance(row, Mapping) else _columns(row)) for row in rows)


def _columns(row: Any) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in fields(row)}


def _row(kind: type[RowT], row: Mapping[str, Any]) -> RowT:
    values: dict[str, Any] = {}
    for column in fields(kind):
        name = column.name
        if name in row:
            values[name] = _value(name, row[name])
        elif column.default is MISSING:
            raise InputError(
                f"a row of the evaluation needs the column {name!r}, got {', '.join(map(str, row)) or 'none'}: add it"
            )
    return kind(**values)


def _value(name: str, value: Any) -> Any:
    if name in _TEXTS:
        return "" if value is None else str(value)
    if name in ("n", "units"):
        return int(finite(value, name) or 0)
    number = finite(value, name)
    return (number or 0.0) if name == "undefined" else number


def finite(value: Any, name: str = "value") -> float | None:
    """The number, or None where there is none or where it is not finite.

    Raises:
        InputError: Not a number at all.

    Example:
        >>> finite("0.5"), finite(float("nan")), finite("")
        (0.5, None, None)
    """
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} of an evaluation row must be a number or empty, got {value!r}: correct that row"
        ) from error
    return number if math.isfinite(number) else None


def is_average(label: str) -> bool:
    """Is this a mean over labels, and not a label?

    Example:
        >>> is_average("macro"), is_average("group:lung"), is_average("nodule")
        (True, True, False)
    """
    return label in _AVERAGES or label.startswith("group:")
