"""From a manifest or a data module to the facts that need no volume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._faults import Faults
from camtrain.data.manifest import Case, gather_manifest
from camtrain.data.manifest_splits import splits_from_files
from camtrain.data.manifest_transforms import check_triple
from camtrain.doctor.facts import Facts, Row
from camtrain.doctor.form_checks import rows_of
from camtrain.doctor.network import free_memory
from camtrain.doctor.sheet import Sheet, read_sheet

# Arguments by which labels, splits or files come from elsewhere than the manifest's own columns.
_ELSEWHERE = ("labels_csv", "root", "splits", "folds")
_PICTURES = (".png", ".jpg", ".jpeg")
_BYTES = 8  # per voxel of a cached case: image float32, organs int32


def facts_of_manifest(data: Any) -> Facts:
    """What a `ManifestDataModule` that could be made says of itself."""
    arguments: Mapping[str, Any] = data.hparams
    facts = Facts(
        source=str(data.manifest.path),
        labels=list(data.labels),
        table=data.table,
        rows=[_row(case) for case in data.manifest.cases],
    )
    return _with_arguments(facts, arguments)


def facts_of_refused(arguments: Mapping[str, Any], refused: str) -> Facts:
    """What can be known of a manifest that `ManifestDataModule` refuses: rows as far as they can be read.

    Args:
        arguments: Those of the data module.
        refused: What it said.
    """
    path = arguments.get("manifest")
    sheet = None if path is None else read_sheet(path)
    elsewhere = any(arguments.get(name) for name in _ELSEWHERE) or arguments.get("split_column", "split") != "split"
    table, trouble = _table(arguments.get("table"))
    if sheet is None or elsewhere:
        # What the CSV need not hold then, only the data module knows: its words stand for the form.
        return _gathered(arguments, refused, table, trouble)
    chosen = arguments.get("labels")
    facts = Facts(
        source=str(sheet.path),
        labels=list(sheet.labels) if chosen is None else [name for name in _listed(chosen) if name in sheet.labels],
        table=table,
        rules=() if table is None else table.labels,
        rows=rows_of(sheet),
        sheet=sheet,
        refused=refused,
        table_fault=trouble,
    )
    if chosen is not None:
        facts.sheet, facts.rows = _only(sheet, facts)
    if table is not None and (known := [name for name in facts.labels if name in table.labels]):
        facts.table = table.select(known)
    return _with_arguments(facts, arguments)


def _gathered(arguments: Mapping[str, Any], refused: str, table: OrganTable | None, trouble: str) -> Facts:
    """The cases as the data module reads them, as far as it can, so that their files are looked at too."""
    path = arguments.get("manifest")
    facts = Facts(str(path or "ManifestDataModule"), refused=refused, files=True, table_fault=trouble)
    if path is None:
        return facts
    chosen, splits = arguments.get("labels"), arguments.get("splits")
    try:
        manifest, lost = gather_manifest(
            path,
            None if chosen is None else _listed(chosen),
            Faults(str(path)),
            labels_csv=arguments.get("labels_csv"),
            root=arguments.get("root"),
            split_column=None if splits else arguments.get("split_column", "split"),
            check_files=True,
        )
    except InputError:
        return facts  # as `refused` says
    with Faults("").noting():  # likewise; the files are looked at all the same
        manifest = splits_from_files(manifest, splits) if splits else manifest
    # What is not there, or lies outside of the root, is told already and not looked at.
    rows = [_row(case) for case in manifest.cases]
    facts.rows = [
        replace(row, image=None, organs=None) if case.where in lost else row
        for row, case in zip(rows, manifest.cases, strict=True)
    ]
    facts.labels = list(manifest.labels)
    if table is not None and (known := [name for name in facts.labels if name in table.labels]):
        facts.table, facts.rules = table.select(known), table.labels
    return _with_arguments(facts, arguments)


def _only(sheet: Sheet, facts: Facts) -> tuple[Sheet, list[Row]]:
    """The sheet without the columns that labels= leaves out, which may hold anything."""
    kept = tuple(name for name in sheet.columns if name not in sheet.labels or name in facts.labels)
    narrowed = replace(sheet, columns=kept)
    order = [narrowed.labels.index(name) for name in facts.labels]
    rows = [replace(row, label=tuple(row.label[n] for n in order)) for row in rows_of(narrowed)]
    return narrowed, rows


def _table(source: Any) -> tuple[OrganTable | None, str]:
    if source is None:
        return None, ""
    try:
        return OrganTable.load(source), ""
    except InputError as error:
        return None, str(error)


def _row(case: Case) -> Row:
    return Row(
        where=case.where.split(" (id ")[0],
        id=case.id,
        split=case.split,
        patient=case.patient,
        label=case.label,
        image=case.image,
        organs=case.organs,
    )


def _with_arguments(facts: Facts, arguments: Mapping[str, Any]) -> Facts:
    """Splits, spacing, crop, window and cache."""
    facts.files = True
    facts.skips = arguments.get("on_error") == "skip"
    facts.train = str(arguments.get("train_split") or "train")
    val = arguments.get("val_split", "val")
    facts.val = None if val is None else str(val)
    facts.tests = _listed(arguments.get("test_splits", ("test",)))
    facts.spacing = _triple(arguments.get("spacing"))
    size = _triple(arguments.get("size"))
    facts.size = None if size is None else tuple(int(n) for n in size)
    window = arguments.get("window", (-1000.0, 800.0))
    pictures = any(row.image is not None and row.image.suffix.lower() in _PICTURES for row in facts.rows)
    if isinstance(window, Sequence) and not isinstance(window, str) and len(window) == 2 and not pictures:
        facts.window = (float(window[0]), float(window[1]))
        # A window that begins at 0 or above is not for HU, where air is -1000.
        facts.hounsfield = facts.window[0] < 0
    try:
        facts.cache = float(arguments.get("cache", True))
    except (TypeError, ValueError):
        facts.cache = 0.0
    facts.free_memory = free_memory()
    if facts.size is not None:
        kept = len(facts.of_split(facts.train)) + (len(facts.of_split(facts.val)) if facts.val else 0)
        facts.cached_bytes = int(facts.cache * kept * math.prod(facts.size) * _BYTES)
    return facts


def _triple(value: Any) -> tuple[float, ...] | None:
    """One number or three as three; None where it is left out, or wrong (which the data module says)."""
    if value is None:
        return None
    try:
        return check_triple("spacing", value, float)
    except (InputError, TypeError, ValueError):
        return None


def _listed(value: Any) -> list[str]:
    return [str(value)] if isinstance(value, str | Path) else [str(one) for one in value or ()]
