"""The pictures of one pass: drawn once on one colour scale, then handed to every sink."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from camtrain._errors import InputError
from camtrain.callbacks._case_scores import rows_of
from camtrain.callbacks._outlets import Outlets
from camtrain.callbacks._panel import PanelEntry
from camtrain.callbacks._past_maps import PastMaps
from camtrain.reporting import CasePicture, CaseRow, RunDir, compose_overview, shared_scale
from camtrain.reporting._logs import put_aside
from camtrain.reporting.sinks import picture_ending

_COLUMNS = (
    *("epoch", "case", "label", "kind", "truth", "probability", "error"),
    *("method", "organ_iou", "energy_inside", "threshold"),
)


def publish_pictures(
    outlets: Outlets,
    entries: Mapping[str, Sequence[PanelEntry]],
    scale: MutableMapping[str, float],
    past: PastMaps,
    name: str | None,
    epoch: int,
    step: int,
    fitting: bool,
) -> None:
    """Draw the panel and hand on its pictures, an overview, and a row for each pair.

    Args:
        outlets: Where they go.
        entries: Split -> its pairs, with scores.
        scale: Method -> end of the colour scale; grows here where it is too small.
        past: The maps of earlier epochs, to which those of a fit are added.
        name: Name of the monitor, part of the keys.
        epoch: Epoch of the Trainer.
        step: Global step of the Trainer.
        fitting: Is this a pass of a fit?
    """
    grow(scale, [entry for listed in entries.values() for entry in listed])
    pictures = sum(len(listed) for listed in entries.values())
    masked = outlets.masked
    outlets.send("begin", pictures)
    for split, listed in entries.items():
        rows = rows_of(listed, split, epoch, step)
        outlets.cases.add(rows)
        outlets.send("rows", _key(split, name, "cases"), _COLUMNS, _worst_first(rows), step)
        before = past.add(split, listed, epoch) if fitting else past.beside(split, listed)
        drawn = [entry.draw(_ends(scale, entry), masked, own) for entry, own in zip(listed, before, strict=True)]
        for label in dict.fromkeys(entry.label for entry in listed):
            chosen = [place for place, entry in enumerate(listed) if entry.label == label]
            captions, names = zip(*((listed[i].caption, f"{listed[i].case}_{label}") for i in chosen), strict=True)
            shown = [drawn[i] for i in chosen]
            outlets.send("images", _key(split, name, "attention", label), shown, captions, step, epoch, names)
        outlets.files(_save_overview, outlets.run_dir, listed, drawn, epoch, split, picture_ending(pictures))
    outlets.files(_save_panel, outlets.run_dir, entries, dict(scale))


def grow(scale: MutableMapping[str, float], entries: Sequence[PanelEntry]) -> None:
    """One colour scale per method (Grad-CAM behind a flatten head is a hundredth of HiResCAM), in powers of two.

    It only grows: a scale fixed on the maps of an untrained net would show nothing but saturated colours later. What
    was drawn before on a smaller one stands in the strip of every later picture on this one. Of maps that are all zero
    or not computed nothing can be learnt about it.
    """
    for method in dict.fromkeys(method for entry in entries for method in entry.maps):
        maps = [entry.maps[method] for entry in entries if method in entry.maps]
        if any(bool((np.isfinite(each) & (each != 0)).any()) for each in maps):
            scale[method] = max(scale.get(method, 0.0), 2.0 ** math.ceil(math.log2(shared_scale(maps))))


def _ends(scale: Mapping[str, float], entry: PanelEntry) -> dict[str, float]:
    return {method: scale.get(method, 1.0) for method in entry.maps}


def _key(*parts: str | None) -> str:
    return "/".join(part for part in parts if part)


def _worst_first(rows: Sequence[CaseRow]) -> list[list[Any]]:
    worst = sorted(rows, key=lambda row: (-row.error if row.error == row.error else 0.0, row.case, row.label))
    return [[getattr(row, column) for column in _COLUMNS] for row in worst]


def _save_overview(
    run_dir: RunDir, entries: Sequence[PanelEntry], drawn: Sequence[CasePicture], epoch: int, split: str, ending: str
) -> None:
    sheet = compose_overview([picture.tile for picture in drawn], [entry.brief for entry in entries])
    run_dir.save_named(sheet, "overview", epoch=epoch, split=split, ending=ending)


def _save_panel(run_dir: RunDir, entries: Mapping[str, Sequence[PanelEntry]], scale: dict[str, float]) -> None:
    cases = [
        {"split": split, "case": e.case, "label": e.label, "present": e.present, "kind": e.kind}
        for split, listed in entries.items()
        for e in listed
    ]
    known = _known_panel(run_dir)
    kept = [case for case in known["cases"] if case["split"] not in entries]
    run_dir.write_panel({**known, "scale": scale, "cases": kept + cases})


def _known_panel(run_dir: RunDir) -> dict[str, Any]:
    """What `panel.json` says, with a list of cases; a changed one is put aside, and the run goes on."""
    try:
        known = run_dir.read_panel() or {}
        cases = known.get("cases", [])
        if all("split" in case for case in cases):
            return {**known, "cases": list(cases)}
        reason = "not a panel"
    except (InputError, AttributeError, TypeError) as error:
        reason = "not readable" if isinstance(error, InputError) else "not a panel"
    aside = put_aside(run_dir.panel_path)
    warnings.warn(
        f"camtrain: {run_dir.panel_path}: {reason}. It was changed by somebody else and is now {aside.name}; the run "
        "goes on",
        stacklevel=2,
    )
    return {"cases": []}
