"""OrganIoU thresholds: chosen on validation cases, frozen for all others, kept by label name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from camtrain._errors import InputError
from camtrain.evaluation.case_store import CaseRecord
from camtrain.metrics import OrganIoU

Thresholds = dict[str, dict[str, float]]
"""`method@layer` -> label -> threshold."""


def choose_thresholds(
    records: Iterable[CaseRecord], names: Sequence[str]
) -> tuple[Thresholds, dict[str, frozenset[int]]]:
    """The best of the 53 thresholds per method, layer and label, on the cases that carry OrganIoU curves.

    Args:
        records: Validation cases.
        names: Label names in the order of the outputs.

    Returns:
        The thresholds; and per `method@layer` the columns that had a scored pair, all others having the default.
    """
    metrics: dict[str, OrganIoU] = {}
    for record in records:
        for method, layers in record.maps.items():
            for layer, measures in layers.items():
                metric = metrics.setdefault(f"{method}@{layer}", OrganIoU(len(names)))
                for column, curve in measures.get("organ_iou", {}).items():
                    if curve is not None:
                        metric.organ_iou[column] += torch.tensor(curve, dtype=metric.organ_iou.dtype)
                        metric.counted[column] += 1
    chosen = {
        key: dict(zip(names, (round(t, 6) for t in metric.best_thresholds().tolist()), strict=True))
        for key, metric in metrics.items()
    }
    scored = {key: frozenset(metric.counted.nonzero()[:, 0].tolist()) for key, metric in metrics.items()}
    return chosen, scored


def read_thresholds(given: Thresholds | str | Path, names: Sequence[str]) -> Thresholds:
    """Frozen thresholds, checked against the labels.

    Args:
        given: The mapping, or a JSON file with it (`thresholds.json` of an earlier evaluation).
        names: Label names in the order of the outputs.

    Raises:
        InputError: No such file, another content, or thresholds frozen for other labels.
    """
    content = _content(given)
    for key, each in content.items():
        if not isinstance(each, dict) or not all(isinstance(v, int | float) and 0 <= v < 1 for v in each.values()):
            raise InputError(f"thresholds for {key!r} expect a number in [0, 1) per label, got {each!r}")
        missing, foreign = [n for n in names if n not in each], [n for n in each if n not in names]
        if missing or foreign:
            parts = [f"none for {', '.join(missing)}"] if missing else []
            parts += [f"some for {', '.join(foreign)}"] if foreign else []
            raise InputError(
                f"thresholds for {key!r} were frozen for other labels: there are {' and '.join(parts)}; choose them on "
                "validation cases of this model, by leaving thresholds= out"
            )
    return content


def _content(given: Thresholds | str | Path) -> dict[str, Any]:
    if not isinstance(given, str | Path):
        return dict(given)
    path = Path(given)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"thresholds {path} cannot be read ({error}): name a thresholds.json of camtrain evaluate"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping from method@layer to thresholds per label")
    return content
