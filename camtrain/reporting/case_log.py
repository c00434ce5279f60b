"""`cases.csv`: how every panel case fared in every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from camtrain.reporting._logs import Log, read_rows, readable_rows
from camtrain.reporting.run_dir import RunDir


class CaseRow(NamedTuple):
    """One row of `cases.csv`.

    Attributes:
        epoch: Epoch of the Trainer.
        step: Global step of the Trainer.
        split: `val`, `test`, or a split's own name.
        case: Name of the case.
        label: Label name.
        truth: 1 or 0.
        probability: What the network says.
        method: Attention method.
        organ_iou: OrganIoU of this very map, or None where it is undefined.
        energy_inside: Energy inside of this very map, or None where it is undefined.
        threshold: The label's threshold of OrganIoU, or None.
        kind: Why the panel shows it: `positive`, `hard` or `negative`.
    """

    epoch: int
    step: int
    split: str
    case: str
    label: str
    truth: int
    probability: float
    method: str
    organ_iou: float | None
    energy_inside: float | None
    threshold: float | None
    kind: str

    @property
    def error(self) -> float:
        """|truth - probability|: sort by it to see the worst."""
        return abs(self.truth - self.probability)


_KEY = ("epoch", "step", "split", "case", "label", "method")


def write_cases(run_dir: RunDir, rows: Iterable[CaseRow]) -> None:
    """Add rows to `cases.csv`; a row of the same epoch, step, split, case, label and method is replaced.

    Args:
        run_dir: The run's folder.
        rows: Rows of any epoch and split.

    Example:
        >>> import tempfile
        >>> run = RunDir(tempfile.mkdtemp())
        >>> write_cases(run, [CaseRow(0, 9, "val", "a", "nodule", 1, 0.25, "hirescam", None, 0.5, None, "hard")])
        >>> read_cases(run)[0].error
        0.75
    """
    fresh: dict[tuple[object, ...], Sequence[object] | None] = {}
    for row in rows:
        fresh.pop(_key(row), None)
        fresh[_key(row)] = _cells(row)
    run_dir.add_csv(
        run_dir.cases_path,
        CaseRow._fields,
        fresh,
        lambda: {_key(row): _cells(row) for row in read_cases(run_dir)},
    )


def read_cases(run_dir: RunDir) -> list[CaseRow]:
    """All rows of `cases.csv`, in the order of writing; empty before the first pass with pictures.

    Raises:
        InputError: The file was changed into something else.
    """
    return read_rows(run_dir.cases_path, _LOG, _row)


def readable_cases(run_dir: RunDir) -> tuple[list[CaseRow], list[str]]:
    """The rows of `cases.csv` that can be read, and what is wrong with the others."""
    return readable_rows(run_dir.cases_path, _LOG, _row)


_LOG = Log(CaseRow._fields, "cases")


def _key(row: CaseRow) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in _KEY)


def _cells(row: CaseRow) -> list[object]:
    return ["" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value for value in row]


def _row(c: list[str]) -> CaseRow:
    iou, inside, threshold = (float(text) if text else None for text in c[8:11])
    probability = float(c[6]) if c[6] else math.nan
    return CaseRow(int(c[0]), int(c[1]), c[2], c[3], c[4], int(c[5]), probability, c[7], iou, inside, threshold, c[11])
