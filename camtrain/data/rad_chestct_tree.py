"""A small folder in the layout of RAD-ChestCT, for machines without it: phantom scans and the original's tables."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.anatomy.partition import box_of
from camtrain.data.phantom import Case, Phantom, unpack
from camtrain.data.rad_chestct_files import BOX, SHAPE
from camtrain.data.rad_chestct_labels import FINDINGS, PLACES

_PREFIX = {"train": "trn", "val": "val", "test": "tst"}
_TABLE = {"train": "imgtrain", "val": "imgvalid", "test": "imgtest"}
_FIXED = {
    "cardiomegaly": ("cardiomegaly", "heart"),
    "coronary_calcification": ("coronary_artery_disease", "heart"),
    "aneurysm": ("aneurysm", "aorta"),
    "pericardial_effusion": ("pericardial_effusion", "heart"),
}
_SIDED = {
    "nodule": "nodule",
    "ground_glass": "groundglass",
    "consolidation": "consolidation",
    "effusion": "pleural_effusion",
}
LABELS = (
    *("h_great_vessel_aneurysm", "heart_cardiomegaly", "heart_coronary_artery_disease", "heart_pericardial_effusion"),
    *("lung_consolidation", "lung_groundglass", "lung_nodule", "lung_pleural_effusion"),
)
"""Labels of the study that occur in such a folder."""


def make_rad_chestct_tree(
    path: str | os.PathLike[str],
    train: int = 12,
    val: int = 6,
    test: int = 6,
    size: tuple[int, int, int] = (45, 48, 48),
    seed: int = 0,
) -> Path:
    """Write chest phantoms as RAD-ChestCT is written.

    The folder then holds volumes `trn00001.npz` (int16 HU, key `ct`, axes downwards, back, left; numbers of slices
    differ), the three tables of findings with all 84 x 52 columns and one row more than there are volumes, the
    extrema of the lungs with a NaN and an infinite border, and the metadata with patients. Findings have the sides and
    places at which they were drawn. Voxels are far larger than 0.8 mm, and a result on such data says nothing about
    RAD-ChestCT.

    Args:
        path: Folder to write, made if missing. It must be empty.
        train: Number of training scans.
        val: Number of validation scans.
        test: Number of test scans.
        size: Voxels (down, back, left); back and left are equal in the original.
        seed: Another seed, other scans.

    Returns:
        `path`, the `root=` of the data module.

    Raises:
        InputError: An argument is out of range, or the folder holds files.

    Example:
        >>> import tempfile
        >>> root = make_rad_chestct_tree(tempfile.mkdtemp(), train=1, val=1, test=0, size=(20, 24, 24))
        >>> [file.name for file in sorted(root.glob("*1.npz"))]
        ['trn00001.npz', 'val00001.npz']
    """
    root, counts = Path(path), {"train": train, "val": val, "test": test}
    if min(counts.values()) < 0:
        raise InputError(f"train, val and test expect numbers of scans from 0 on, got {counts}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"expected an empty or new folder to write scans to, got {root}: name another one")
    root.mkdir(parents=True, exist_ok=True)
    extrema: list[list[object]] = []
    people: list[list[object]] = []
    for split, count in counts.items():
        rows: dict[str, set[tuple[str, str]]] = {}
        for index in range(count):
            name = f"{_PREFIX[split]}{index + 1:05d}"
            # Scans differ in their number of slices.
            phantom = Phantom(size=(size[2], size[1], size[0] + index % 3 - 1), shortcut=None, seed=seed)
            case = phantom.case(split, index)
            hu = np.rint(np.clip(to_rad_axes(case.hu), -1000, 1000)).astype(np.int16)
            np.savez_compressed(root / f"{name}.npz", ct=hu)
            rows[name] = _findings(case, phantom.labels)
            extrema.append([name, *_borders(np.isin(to_rad_axes(case.organs), (1, 2)), len(extrema)), *hu.shape])
            people.append([f"{_PREFIX[split]}mrn{index // 2:04d}", name, _TABLE[split], f"{_TABLE[split]}_a"])
        rows[f"{_PREFIX[split]}99999"] = set()  # the tables know more scans than were published
        _write_table(root / f"{_TABLE[split]}_Abnormality_and_Location_Labels.csv", rows)
    _write(root / "Extrema_35747.csv", ["NoteAcc_DEID", *BOX, *SHAPE], extrema)
    header = ["MRN_DEID", "NoteAcc_DEID", "Set_Assigned", "Subset_Assigned"]
    _write(root / "CT_Scan_Metadata_Complete_35747.csv", header, people)
    return root


def to_rad_axes(volume: NDArray[np.generic]) -> NDArray[np.generic]:
    """(X, Y, Z) in RAS as (Z, Y, X) in the order of the files: downwards, to the back, to the left.

    Example:
        >>> to_rad_axes(np.arange(4).reshape(2, 1, 2))[:, 0].tolist()
        [[3, 1], [2, 0]]
    """
    return np.ascontiguousarray(volume.transpose(2, 1, 0)[::-1, ::-1, ::-1])


def _findings(case: Case, labels: tuple[str, ...]) -> set[tuple[str, str]]:
    """(finding, place) of what a phantom shows."""
    found = {_FIXED[name] for name, there in zip(labels, case.label, strict=True) if there and name in _FIXED}
    middle = case.hu.shape[0] / 2
    for name, there, lesion in zip(labels, case.label, unpack(case.lesion_bits, labels), strict=True):
        if not there or name not in _SIDED:
            continue
        across, _, up = np.nonzero(lesion)
        part = "lower" if not len(up) or up.mean() < case.hu.shape[2] / 2 else "upper"
        sides = {"right": across >= middle, "left": across < middle}
        found |= {(_SIDED[name], f"{side}_{part}") for side, here in sides.items() if bool(here.any())}
    return found


def _borders(lungs: NDArray[np.bool_], number: int) -> list[float]:
    """Borders of the lungs; of the first scan one is missing, of the second one infinite."""
    box = box_of(lungs) or ((0, 0), (0, 0), (0, 0))
    borders: list[float] = [border for axis in box for border in axis]
    if number < 2:
        borders[4 + number] = (math.nan, -math.inf)[number]
    return borders


def _write_table(file: Path, rows: Mapping[str, set[tuple[str, str]]]) -> None:
    pairs = [(finding, place) for finding in FINDINGS for place in sorted(PLACES)]
    lines = [[name, *(int(pair in found) for pair in pairs)] for name, found in rows.items()]
    _write(file, ["NoteAcc_DEID", *("*".join(pair) for pair in pairs)], lines)


def _write(file: Path, header: list[str], rows: list[list[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
