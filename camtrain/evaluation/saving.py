"""An evaluation as files: one tidy CSV, JSON, thresholds to freeze, and a page to read."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from camtrain.evaluation.against import Against
from camtrain.evaluation.evaluation import Evaluation
from camtrain.evaluation.measures import MEASURES
from camtrain.evaluation.sanity_table import SanityTable
from camtrain.reporting._files import replacing
from camtrain.reporting.evaluation_page import EvaluationPage, write_evaluation
from camtrain.reporting.evaluation_rows import ComparisonRow, Curve, EvaluationMeta, Measure, ScoreRow, finite
from camtrain.reporting.evaluation_rows import SanityRow as StageRow

FILES = ("scores.csv", "scores.json", "thresholds.json", "comparison.csv", "sanity.csv", "report.html")
_PACKAGES = ("camtrain", "torch", "monai", "numpy")


def save_evaluation(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    against: Against | None = None,
    sanity: SanityTable | None = None,
    title: str = "Evaluation",
    checkpoints: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write scores.csv, scores.json, thresholds.json, report.html, and what there is of comparison.csv and sanity.csv.

    Args:
        evaluation: From `evaluate`.
        folder: Made where missing; files of these names are replaced, each whole or not at all.
        against: Comparison with a second evaluation.
        sanity: What `sanity_check` returned.
        title: Of the page.
        checkpoints: What was evaluated, for the page.
        command: How to do it again, for the page.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in (("comparison.csv", against), ("sanity.csv", sanity), ("thresholds.json", evaluation.thresholds)):
        if not made:  # of an earlier run
            (folder / name).unlink(missing_ok=True)
    write_csv(folder / "scores.csv", ScoreRow, evaluation.rows)
    if against is not None:
        write_csv(folder / "comparison.csv", ComparisonRow, against.rows)
    if sanity is not None:
        with replacing(folder / "sanity.csv") as temporary:
            Path(temporary).write_text(sanity.as_csv(), encoding="utf-8")
    if evaluation.thresholds:
        _write(folder / "thresholds.json", evaluation.thresholds)
    meta = _meta(evaluation, against, title, checkpoints, command)
    _write(
        folder / "scores.json",
        {
            "made_by": "camtrain evaluate",
            "checkpoints": list(checkpoints),
            "command": command,
            "settings": dict(evaluation.settings),
            "cases": dict(meta.cases),
            "notes": list(meta.notes),
            "thresholds": evaluation.thresholds,
            "rows": [dataclasses.asdict(row) for row in evaluation.rows],
            "comparison": [dataclasses.asdict(row) for row in against.rows] if against is not None else [],
        },
    )
    page = EvaluationPage(
        meta=meta,
        rows=evaluation.rows,
        measures={name: Measure(f"{m.says[:1].upper()}{m.says[1:]}.", m.higher) for name, m in MEASURES.items()},
        comparison=() if against is None else against.rows,
        curves=mean_curves(evaluation),
        sanity=[] if sanity is None else _stages(sanity),
    )
    return write_evaluation(page, folder / "report.html")


def _stages(table: SanityTable) -> list[StageRow]:
    """Means over labels, a line per method and layer; NaN where nothing is defined."""
    several = len({row.layer for row in table.rows if not row.control}) > 1
    return [
        StageRow(
            stage=str(row.stage),
            module=row.module,
            method=f"{row.method}{f' {row.layer}' if several else ''}{' (control)' if row.control else ''}",
            spearman=finite(row.strength),
            ssim=finite(row.ssim),
        )
        for row in table.means()
    ]


def write_csv(path: Path, kind: type[Any], rows: Sequence[Any]) -> Path:
    """Rows of one dataclass as CSV; an undefined number is an empty cell.

    Args:
        path: The file; it appears whole or not at all.
        kind: The dataclass.
        rows: Its rows.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    with replacing(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(getattr(row, name)) for name in names] for row in rows)
    return path


def _cell(value: Any) -> Any:
    return f"{value:.9g}" if isinstance(value, float) else "" if value is None else value


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _meta(
    evaluation: Evaluation, against: Against | None, title: str, checkpoints: Sequence[str], command: str
) -> EvaluationMeta:
    patients = {split: len({r.patient for r in of if r.patient}) for split, of in evaluation.records.items()}
    known = {split: count for split, count in patients.items() if count}
    several = len(evaluation.thresholds) > 1
    return EvaluationMeta(
        title=title,
        checkpoints=checkpoints,
        command=command,
        case_filter=str(evaluation.settings.get("cases", "positives")),
        cases={split: len(of) for split, of in evaluation.records.items()},
        patients=known,
        bootstrap_repeats=evaluation.repeats,
        bootstrap_unit="patients" if known else "cases",
        level=evaluation.level,
        seed=evaluation.seed,
        thresholds={
            f"{label} ({key})" if several else label: value
            for key, each in evaluation.thresholds.items()
            for label, value in each.items()
        },
        notes=[*evaluation.notes, *(against.notes if against is not None else [])],
        versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def mean_curves(evaluation: Evaluation) -> list[Curve]:
    """Mean insertion and deletion curves over all pairs, per split, method and layer."""
    curves = []
    for split, records in evaluation.records.items():
        found: dict[tuple[str, str, str], list[list[float]]] = {}
        for record in records:
            for method, layers in record.maps.items():
                for layer, measures in layers.items():
                    for kind in ("insertion", "deletion"):
                        each = [v for v in measures.get(f"{kind}_curve", {}).values() if v is not None]
                        found.setdefault((kind, method, layer), []).extend(each)
        for (kind, method, layer), values in found.items():
            if values:
                mean = np.mean(np.array(values), axis=0)
                share = np.linspace(0, 1, len(mean))
                curves.append(Curve(kind, split, method, layer, share.tolist(), mean.tolist()))
    return curves
