"""How the panel's pairs fare one by one: the scores of these very maps, and their rows for tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from camtrain.callbacks._panel import PanelEntry
from camtrain.metrics.energy_inside import energy_inside
from camtrain.metrics.organ_iou import organ_iou
from camtrain.reporting import CaseRow


def scored(entries: Sequence[PanelEntry], thresholds: Mapping[str, Tensor], names: Sequence[str]) -> list[PanelEntry]:
    """The entries with the scores of their own maps, whatever the truth; undefined ones are left out.

    Args:
        entries: Pairs of a panel.
        thresholds: Method -> (L,) thresholds of OrganIoU, as the scores of the epoch take them.
        names: Label names in the order of the thresholds.
    """
    ious: list[dict[str, float]] = [{} for _ in entries]
    inside: list[dict[str, float]] = [{} for _ in entries]
    limits: list[dict[str, float]] = [{} for _ in entries]
    # In the order of the maps: what speaks of one method alone speaks of the first.
    for method in dict.fromkeys(method for entry in entries for method in entry.maps):
        places = [i for i, entry in enumerate(entries) if method in entry.cells and method in entry.maps]
        for some in _of_one_grid(entries, places, method):
            # Pairs stand where labels do, so that each has its own threshold: one call for all of them.
            maps = torch.from_numpy(np.stack([entries[i].maps[method] for i in some]))[None]
            cells = torch.from_numpy(np.stack([entries[i].cells[method] for i in some]))[None]
            ones = torch.ones(1, len(some))
            _put(inside, some, method, energy_inside(maps, cells, ones)[0])
            if method in thresholds:
                chosen = thresholds[method][[names.index(entries[i].label) for i in some]]
                _put(ious, some, method, organ_iou(maps, cells, ones, thresholds=chosen)[0])
                _put(limits, some, method, chosen)
        for i in (i for i, entry in enumerate(entries) if method in entry.measured):
            _put(inside, [i], method, torch.tensor([entries[i].measured[method].energy_inside]))
            if method in thresholds:
                limit = thresholds[method][names.index(entries[i].label)]
                _put(ious, [i], method, torch.tensor([entries[i].measured[method].organ_iou(float(limit))]))
                _put(limits, [i], method, limit[None])
    return [
        replace(entry, organ_iou=iou, energy_inside=share, threshold=limit)
        for entry, iou, share, limit in zip(entries, ious, inside, limits, strict=True)
    ]


def _of_one_grid(entries: Sequence[PanelEntry], places: Iterable[int], method: str) -> Iterable[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        groups.setdefault(entries[place].maps[method].shape, []).append(place)
    return groups.values()


def _put(into: list[dict[str, float]], places: Sequence[int], method: str, values: Tensor) -> None:
    for place, value in zip(places, values.tolist(), strict=True):
        if value == value:
            into[place][method] = float(value)


def rows_of(entries: Iterable[PanelEntry], split: str, epoch: int, step: int) -> list[CaseRow]:
    """One row per pair and method, for `cases.csv`."""
    return [
        CaseRow(
            epoch=epoch,
            step=step,
            split=split,
            case=entry.case,
            label=entry.label,
            truth=int(entry.present),
            probability=entry.probability,
            method=method,
            organ_iou=entry.organ_iou.get(method),
            energy_inside=entry.energy_inside.get(method),
            threshold=entry.threshold.get(method),
            kind=entry.kind,
        )
        for entry in entries
        for method in entry.maps
    ]
