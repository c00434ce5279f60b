"""Phantom cases as the files a hospital would give: NIfTI scans, NIfTI organs, and the CSV that names them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from camtrain._errors import InputError
from camtrain.data.phantom import DEFAULT_SIZE, LABELS, Phantom


def export_phantom(
    folder: str | Path,
    cases: int | Mapping[str, int] = 20,
    size: tuple[int, int, int] = DEFAULT_SIZE,
    labels: Sequence[str] | None = None,
    shortcut: float | None = 0.95,
    shortcut_at: str = "skin",
    cooccurrence: float = 0.0,
    organs: str = "exact",
    seed: int = 0,
) -> Path:
    """Write phantom cases for `ManifestDataModule` or any other reader.

    Scans hold Hounsfield units (int16), organs the ids of the shipped table `phantom` (uint8), both with the affine
    of the scan in mm, RAS.

    Args:
        folder: Where to write; made if missing.
        cases: Number of cases per split, for example `{"train": 40, "val": 10, "shift_reversed": 10}`; one number is
            shared out as 3/5 train, 1/5 val, 1/5 test.
        size: Voxels per axis.
        labels: Findings; None = all.
        shortcut: As in `PhantomDataModule`.
        shortcut_at: As in `PhantomDataModule`.
        cooccurrence: As in `PhantomDataModule`.
        organs: As in `PhantomDataModule`.
        seed: As in `PhantomDataModule`.

    Returns:
        The CSV, with the columns id, image, organs, split and one per label; paths relative to it.

    Raises:
        InputError: An argument is out of range, or the folder already holds a manifest.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_phantom(folder, {"train": 2}, size=(16, 16, 16)).read_text().splitlines()[1][:56]
        'train-00000,train-00000_ct.nii.gz,train-00000_organs.nii'
    """
    phantom = Phantom(
        labels=tuple(LABELS if labels is None else labels),
        size=size,
        shortcut=shortcut,
        shortcut_at=shortcut_at,
        cooccurrence=cooccurrence,
        organs=organs,
        seed=seed,
    )
    counts = _share_out(cases) if isinstance(cases, int) else dict(cases)
    target = Path(folder) / "manifest.csv"
    if target.exists():
        raise InputError(f"{target} exists already: choose another folder or delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [_write(phantom, split, i, target.parent) for split, count in counts.items() for i in range(count)]
    # The CSV comes last: a folder with a manifest is a folder that is complete.
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "organs", "split", *phantom.labels])
        writer.writerows(rows)
    return target


def _share_out(cases: int) -> dict[str, int]:
    if cases < 3:
        raise InputError(f"cases expects at least 3, one per split, got {cases}: or name the splits, {{'train': 1}}")
    fifth = max(1, cases // 5)
    return {"train": cases - 2 * fifth, "val": fifth, "test": fifth}


def _write(phantom: Phantom, split: str, index: int, folder: Path) -> list[str | int]:
    case = phantom.case(split, index)
    names = f"{case.id}_ct.nii.gz", f"{case.id}_organs.nii.gz"
    for name, volume in zip(names, (np.round(case.hu).astype(np.int16), case.organs), strict=True):
        image = nib.Nifti1Image(volume, case.affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / name)
    return [case.id, *names, split, *(int(v) for v in case.label)]
