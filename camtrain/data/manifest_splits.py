"""Splits that do not stand in the manifest: from a file, or k-fold over patients with alike shares of every label."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from camtrain._errors import InputError
from camtrain.data._faults import Faults
from camtrain.data.manifest import Case, Manifest
from camtrain.data.manifest_csv import read_csv

Splits = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


def splits_from_files(manifest: Manifest, source: Splits) -> Manifest:
    """Splits of a file of its own.

    Args:
        manifest: The cases.
        source: A CSV file with `id` (or `patient`) and `split`; or split -> text file with one id per line.

    Returns:
        The same cases; those that no file names are in the split "".

    Raises:
        InputError: A name is unknown or in two splits, or a patient or scan comes to lie in two splits.
    """
    faults = Faults(str(manifest.path))
    if isinstance(source, Mapping):
        pairs = [row for split, file in source.items() for row in _list(Path(file), str(split))]
        by = "id"
    else:
        table = read_csv(Path(source), ("split",), "splits", "splits", faults)
        by = next((name for name in ("id", "patient") if name in table.columns), "")
        if not by:
            raise InputError(
                f"{source}: expected a column 'id' or 'patient' beside 'split', got {table.columns}: add it"
            )
        pairs = [(f"{source}, row {number}", row[by], row["split"]) for number, row in table.rows([by, "split"])]
    known = {getattr(case, by) for case in manifest.cases}
    found: dict[str, str] = {}
    for where, name, split in pairs:
        if name not in known:
            faults.add(f"{where}: expected the {by} of a case of {manifest.path.name}, got {name!r}: correct it")
        elif found.setdefault(name, split) != split:
            faults.add(f"{where}: expected every {by} in one split, got {name!r} in {found[name]!r} and {split!r}")
    faults.stop()
    return manifest.with_splits({case.id: found.get(getattr(case, by), "") for case in manifest.cases})


def _list(file: Path, split: str) -> list[tuple[str, str, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"splits= expects a text file with one id per line for {split!r}, got {file}: {error}"
        ) from None
    return [(f"{file}, line {number}", line.strip(), split) for number, line in enumerate(lines, 1) if line.strip()]


def kfold(
    manifest: Manifest, folds: int, fold: int, seed: int = 0, pool: Sequence[str] | None = None, val: str = "val"
) -> Manifest:
    """One fold of a k-fold cross-validation: its cases become the validation split, the other pooled ones training.

    All scans of a patient are in one fold. Folds are balanced greedily, as in stratified group k-fold: patients with
    the rarest findings are dealt first, each to the fold that has least of what the patient has. The same seed gives
    the same folds whatever the order of the rows.

    Args:
        manifest: The cases.
        folds: Number of folds.
        fold: Which one validates, from 0.
        seed: Of the order in which equal patients are dealt.
        pool: Splits that are divided, the first of them named like the training split; others stay (a test split).
        val: Name of the validation split.

    Raises:
        InputError: Fewer patients than folds, a fold that there is not, or no case in the pool.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"folds= expects at least 2 and fold= a number from 0 to folds - 1, got {folds} and {fold}")
    names = list(pool) if pool is not None else ["train", val]
    cases = [case for case in manifest.cases if case.split in names or not case.split]
    if not cases:
        raise InputError(
            f"{manifest.path}: folds= divides the cases of {', '.join(names)}, got none of these: set them"
        )
    place = assign_folds(cases, folds, seed)
    return manifest.with_splits({case.id: val if place[case.id] == fold else names[0] for case in cases})


def assign_folds(cases: Sequence[Case], folds: int, seed: int = 0) -> dict[str, int]:
    """Id -> fold; see `kfold`.

    Raises:
        InputError: Fewer patients than folds.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(f"patient {case.patient}" if case.patient else f"case {case.id}", []).append(case)
    if len(groups) < folds:
        raise InputError(f"folds={folds} expects as many patients, got {len(groups)}: take fewer folds")
    names = sorted(groups)
    labels = np.array([np.nansum([[1.0, *c.label] for c in groups[name]], axis=0) for name in names])
    # Each figure (scans, positives of each label) counts relative to its total: a rare label as much as a common one.
    labels /= np.maximum(labels.sum(axis=0), 1.0)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-labels[order].sum(axis=1), kind="stable")]
    held = np.zeros((folds, labels.shape[1]))
    place: dict[str, int] = {}
    for row in order:
        # The least growth of the sum of squares, which is smallest when all folds hold the same.
        chosen = int(np.argmin(held @ labels[row]))
        held[chosen] += labels[row]
        place |= {case.id: chosen for case in groups[names[row]]}
    return place


def label_counts(cases: Sequence[Case]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Present, absent and unknown cases of each label, (L, 3).

    Example:
        >>> case = Case("a", Path("a.nii"), None, "train", (1.0, float("nan")), "", "")
        >>> label_counts([case]).tolist()
        [[1, 0, 0], [0, 0, 1]]
    """
    label = np.array([case.label for case in cases], dtype=np.float64)
    return np.stack([(label == 1).sum(axis=0), (label == 0).sum(axis=0), np.isnan(label).sum(axis=0)], axis=1)
